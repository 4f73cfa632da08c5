"""What a user of train.py sees: the loop's decisions, whole runs, repeatability, and errors."""

import copy
import math
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, read_csv
from kill_resume import read_run, same
from skimage.metrics import peak_signal_noise_ratio
from training import parse, train_epoch, training_on, validate

import data
import evaluate
import metrics
import train
from encoders import Encoder
from extras import trackers
from metrics import LPIPS, Loss
from models import build_inverter, load_inverter
from utils import PUBLISHED, load

SMALL = ("--crop", 32, "--width", 8, "--lpips-weight", 0, "--tracker", "none", "--quiet")
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
NO_MPS = pytest.mark.skipif(torch.backends.mps.is_available(), reason="MPS is here")


def history(out):
    return read_csv(out / "history.csv")


# --- the loop's decisions --------------------------------------------------------------------------------


def make_up_losses(monkeypatch, losses):
    """Give validation these losses, one an epoch."""
    losses, picture = iter(losses), torch.zeros(1, 3, 224, 224)
    means = dict.fromkeys([*metrics.TERMS, "seconds"], 1.0)
    monkeypatch.setattr(train, "validate", lambda _: (means | {"loss": next(losses)}, picture, picture))


def test_early_stop_plateau_and_best_epoch_on_made_up_losses(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "draw_curves", lambda *_: None)  # eighteen times
    for epochs in (3, 40):
        make_up_losses(monkeypatch, [0.5, 0.4, 0.3] + [0.35] * 40)
        train.train(parse("--data", photos, "--out", tmp_path / f"{epochs}", "--epochs", epochs, *SMALL))
    best = load(tmp_path / "40" / "best.pt")
    assert (best["epoch"], best["val_loss"]) == (3, 0.3)
    assert same(best["decoder"], load(tmp_path / "3" / "last.pt")["decoder"])
    # epochs 4–9 are bad: the sixth exceeds a patience of five, so 10–15 run at half, 16–18 at a quarter
    assert [float(row["lr"]) for row in history(tmp_path / "40")] == [1e-4] * 9 + [5e-5] * 6 + [2.5e-5] * 3


def test_the_rate_of_an_epoch_is_that_of_its_last_step(photos, tmp_path, run_train):
    """Of one cycle of six steps, two an epoch: by hand, from the highest at step 0.8 down by a cosine."""
    flags = ("--data", photos, "--out", tmp_path, "--epochs", 3, "--lr", 1e-2, "--schedule", "onecycle")
    assert run_train(*flags, *SMALL) == 0
    lowest = 1e-2 / 25 / 1e4
    shares = [(step - 0.8) / 4.2 for step in (1, 3, 5)]
    expected = [lowest + (1e-2 - lowest) / 2 * (1 + math.cos(math.pi * share)) for share in shares]
    assert [float(row["lr"]) for row in history(tmp_path)] == pytest.approx(expected)


def test_loss_by_hand():
    a, b = torch.rand(2, 2, 3, 64, 64)
    lpips = LPIPS()(a, b)
    terms = Loss(0.5, 0.25)(a, b)
    mse = ((a - b) ** 2).flatten(1).sum(1) / (3 * 64 * 64)
    assert terms["mse"].tolist() == pytest.approx(mse.tolist(), rel=1e-5)
    assert terms["lpips"].tolist() == pytest.approx(lpips.tolist())
    assert terms["loss"].tolist() == pytest.approx((0.5 * mse + 0.25 * lpips).tolist())
    assert terms["psnr"][0] == pytest.approx(10 * math.log10(1 / float(mse[0])), rel=1e-5)
    terms = Loss(1.0, 0)(a, b)
    assert torch.equal(terms["loss"], terms["mse"]) and terms["lpips"].isnan().all()


def test_published_loss_by_hand():
    output, images = torch.rand(2, 2, 3, 64, 64)
    terms = Loss(0.5, 0, PUBLISHED)(output, images)
    target = ((images.permute(0, 2, 3, 1) - MEAN) / STD).permute(0, 3, 1, 2)
    assert terms["mse"].tolist() == pytest.approx(((output - target) ** 2).mean((1, 2, 3)).tolist())
    assert terms["mse"].min() > 0.5 and torch.equal(terms["loss"], 0.5 * terms["mse"])


@pytest.mark.parametrize("flag", ["--tf32", "--no-tf32"])
def test_tf32_is_for_training_alone(photos, tmp_path, monkeypatch, run_train, flag):
    allowed = []

    def watch(name, real):
        def watched(*args):
            allowed.append((name, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            return real(*args)

        monkeypatch.setattr(train, name, watched)

    watch("train_step", train.train_step)
    watch("validate", train.validate)
    assert run_train("--data", photos, "--out", tmp_path, "--epochs", 1, flag, *SMALL) == 0
    assert set(allowed) == {("train_step", *2 * (flag == "--tf32",)), ("validate", False, False)}


@pytest.mark.parametrize("decoder", ["tconv", "feedback"])
def test_amp_computes_in_bfloat16_and_returns_float32(decoder):
    image = torch.rand(1, 3, 32, 32)
    inverter = build_inverter(decoder=decoder).eval()
    inverter.decoder.size = (32, 32)  # small, because bfloat16 is slow on a CPU
    exact = inverter(image).detach()
    inverter.amp = True
    rounded = inverter(image).detach()
    assert inverter.encode(image).dtype == torch.bfloat16
    assert rounded.dtype == torch.float32 and rounded.shape == exact.shape
    assert 1e-5 < (exact - rounded).abs().max() < 0.02 * max(1, exact.abs().max())  # tconv's are at most 1


@pytest.mark.parametrize("decoder", ["tconv", "feedback"])
def test_compiled_training_is_the_same(photos, tmp_path, monkeypatch, run_train, decoder):
    """Through torch.compile's tracer, with a backend that needs no C++ compiler."""
    compiled, real = [], torch.nn.Module.compile

    def compile_eagerly(net):
        compiled.append(net)
        real(net, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    flags = ("--data", photos, "--epochs", 1, "--val-images", 1, "--decoder", decoder, *SMALL)
    assert run_train(*flags, "--out", tmp_path / "a") == 0 and not compiled
    assert run_train(*flags, "--out", tmp_path / "b", "--compile") == 0 and len(compiled) == 2
    a, b = (load(tmp_path / name / "best.pt") for name in "ab")
    assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-4)
    assert a["decoder"].keys() == b["decoder"].keys()


def test_frozen_batch_norm(photos):
    """After --freeze-bn steps training normalises by what it has, and a step sees what validation would."""
    training = training_on(photos, "--epochs", 2, "--freeze-bn", 1, "--lpips-weight", 0)
    batch = data.center_crops(training.val_images[:])
    for _ in range(2):
        train_epoch(training)  # ends in training mode
        assert int(training.inverter.decoder.upsample[1].num_batches_tracked) == 1  # of four steps
        trained_on = training.inverter(batch).detach()
        assert torch.equal(trained_on, validate(training)[2])
        training.epoch, training.step = 1, 0


def test_averages_are_over_images_not_batches():
    meter = metrics.Meter(["psnr", "ssim"])
    meter.add({"psnr": torch.tensor([10.0, 20.0, 30.0]), "ssim": torch.tensor([0.5, 0.5, 0.5])})
    meter.add({"psnr": torch.tensor([60.0]), "ssim": torch.tensor([0.9])})
    assert meter.averages() == pytest.approx({"psnr": 30, "ssim": 0.6})


def test_validation_shows_what_the_metrics_see(photos):
    """Targets and outputs for the tracker are those that were measured, the protocol's too."""
    training = training_on(photos, "--protocol", "published", "--width", 8)
    assert training.scheduler.min_lrs == [1e-6]
    averages, targets, outputs = validate(training)
    pairs = zip(targets.numpy(), outputs.numpy(), strict=True)
    expected = [peak_signal_noise_ratio(*pair, data_range=1) for pair in pairs]
    assert len(targets) == 2 and averages["psnr"] == pytest.approx(np.mean(expected), abs=1e-3)
    crop = data.center_crops(training.val_images[:])[1]
    seen = ((crop.permute(1, 2, 0) - MEAN) / STD).clamp(0, 1).permute(2, 0, 1)
    torch.testing.assert_close(targets[1], seen)


def test_six_of_many_validation_images_are_shown(photos):
    """As pictures, whatever the decoder gives; whole, whatever the crops it is trained on."""
    training = training_on(photos, "--decoder", "residual", *SMALL)
    training.inverter.decoder.head.last.bias.data.fill_(50)
    training.val_indices = 5 * [0, 1]
    _, targets, outputs = validate(training)
    crops = data.center_crops(training.val_images[:])
    assert torch.equal(targets, crops[[0, 0, 0, 1, 1, 1]])  # numbers 0, 2, 4, 5, 7 and 9 of ten
    assert len(outputs) == 6 and 0 <= outputs.min() and outputs.max() <= 1


def test_encoder_is_bit_identical_after_training(photos):
    training = training_on(photos, "--epochs", 1, "--crop", 64)
    encoder, decoder = training.inverter.encoder, training.inverter.decoder
    before, untrained = copy.deepcopy((dict(encoder.state_dict()), dict(decoder.state_dict())))
    train_epoch(training)
    assert same(before, dict(encoder.state_dict())) and not same(untrained, dict(decoder.state_dict()))
    assert all(p.grad is None for p in [*encoder.parameters(), *training.loss.parameters()])


# --- whole runs ------------------------------------------------------------------------------------------


def test_files_of_a_run(trained, checkpoint, photos):
    names = {path.name for path in trained.iterdir() if path.name[0] != "."}
    assert names >= {"best.pt", "last.pt", "config.yaml", "history.csv", "curves.png"}
    assert (trained / "best.pt").stat().st_size < 200_000
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config == checkpoint["config"] and "cache" not in config
    assert config["data"] == str(photos) and config["lr"] == 2e-3
    assert checkpoint["decoder"].keys() == training_on(photos).inverter.decoder.state_dict().keys()
    assert torch.__version__.startswith(checkpoint["versions"]["torch"])
    assert checkpoint["shape"] == [64, 112, 112] and checkpoint["weights_sha256"] is None
    rows = history(trained)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    losses = [float(row["val_loss"]) for row in rows]
    assert checkpoint["val_loss"] == min(losses) == losses[checkpoint["epoch"] - 1]
    for row in rows:
        loss, mse, lpips = (float(row[f"train_{name}"]) for name in ("loss", "mse", "lpips"))
        assert loss == pytest.approx(0.5 * mse + 0.5 * lpips)


def test_two_runs_are_bit_identical(trained, tmp_path, run_train):
    assert run_train("--config", trained / "config.yaml", "--out", tmp_path) == 0
    assert same(read_run(tmp_path), read_run(trained))


def test_epoch_line_has_everything(photos, tmp_path, run_train, capsys):
    assert run_train("--data", photos, "--out", tmp_path, "--epochs", 1, "--lpips-weight", 0) == 0
    out, err = capsys.readouterr()
    (line,) = [line for line in out.splitlines() if line.startswith("epoch")]
    row = history(tmp_path)[0]
    for split in ("train", "val"):
        loss, mse, psnr = (float(row[f"{split}_{name}"]) for name in ("loss", "mse", "psnr"))
        assert f"{split} loss {loss:.4f} mse {mse:.4f} lpips – psnr {psnr:.2f}" in line
    assert "lr 1.0e-04" in line and "images/s" in line and row["train_lpips"] == ""
    for part in ("33,731 trainable parameters", "64 × 112 × 112", "8 training and 2 validation"):
        assert part in out
    assert err == ""  # no bar where there is no terminal


def test_short_training_on_the_sample_gains_6_db(tmp_path, run_train):
    def psnr_of_unseen(inverter):
        return evaluate.evaluate_model(inverter, test, bars=True).values["psnr"].mean()

    test = data.load_split("sample", "test")[::8]
    flags = ("--epochs", 1, "--passes", 14, "--mse-weight", 1, "--lpips-weight", 0)  # quick to gain them
    flags += ("--crop", 32, "--val-images", 2, "--tracker", "none", "--out", tmp_path)
    assert run_train("--config", REPOSITORY / "configs" / "sample.yaml", *flags) == 0
    trained, _ = load_inverter(tmp_path / "best.pt")
    assert psnr_of_unseen(trained) >= psnr_of_unseen(build_inverter()) + 6


def test_without_data_the_sample_is_used_loudly(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert data.resolve(None) == "sample"
    assert "SAMPLE" in capsys.readouterr().out
    Path("data/DIV2K").mkdir(parents=True)
    assert data.resolve(None) == "data/DIV2K"


def test_quiet_prints_no_progress(photos, tmp_path, run_train, capsys):
    flags = ("--data", photos, "--out", tmp_path, "--epochs", 1, *SMALL)
    assert run_train(*flags) == 0
    out, err = capsys.readouterr()
    assert "best: epoch 1" in out and "epoch 1/1" not in out and err == ""
    assert run_train(*flags, "--overwrite", "--no-quiet", "--bars") == 0
    out, err = capsys.readouterr()
    assert "epoch 1/1" in out and "Epoch 1/1: " in err and "Validation: " in err


# --- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data", "nowhere"), "nowhere: no such folder"),
        (("--batch-size", 9), "--batch-size 9 × 1 processes: only 8 training images"),
        (("--out", "file/run"), "--out file/run: cannot write there"),
        (("--width", 2**31 - 1), "out of memory"),
        pytest.param(("--device", "cuda"), "0 CUDA devices", marks=NO_CUDA),
        pytest.param(("--device", "mps"), "--device mps: PyTorch finds no Apple GPU", marks=NO_MPS),
        (("--device", "mps:1"), "--device mps:1: use auto, cpu, cuda, cuda:N or mps"),
    ],
)
def test_what_cannot_be_is_one_line(photos, tmp_path, run_train, error_line, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert run_train("--data", photos, "--out", "run", *flags) == 2
    assert message in error_line() and not Path("run/last.pt").exists()


@pytest.mark.parametrize(
    ("train_count", "message"), [(0, "0 images"), (1, "1 images"), (None, "has no folder for the train")]
)
def test_too_few_images(tmp_path, photos, run_train, error_line, train_count, message):
    if train_count is not None:
        (tmp_path / "train").mkdir()
        for file in sorted((photos / "train").iterdir())[:train_count]:
            (tmp_path / "train" / file.name).symlink_to(file)
    assert run_train("--data", tmp_path, "--out", tmp_path / "out") == 2
    assert message in error_line()


def test_compiler_that_fails_is_one_line(photos, tmp_path, run_train, error_line, monkeypatch):
    from_compiler = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    fails = Mock(side_effect=from_compiler("no C++ compiler"))
    monkeypatch.setattr(train, "train_step", fails)
    assert run_train("--data", photos, "--out", tmp_path, *SMALL) == 2
    assert error_line().startswith("--compile: ")


def test_non_finite_loss_stops_and_keeps_the_best(photos, tmp_path, run_train, error_line, monkeypatch):
    real, steps = Encoder.forward, []

    def poisoned(self, images):
        steps.append(1)
        z = real(self, images)
        return z * math.nan if len(steps) == 5 else z  # 1: a crop's shape; 2–4: epoch 1; 5: epoch 2

    monkeypatch.setattr(Encoder, "forward", poisoned)
    assert run_train("--data", photos, "--out", tmp_path, "--epochs", 3, *SMALL) == 2
    assert "not finite in epoch 2, step 1;" in error_line()
    assert [load(tmp_path / name)["epoch"] for name in ("best.pt", "last.pt")] == [1, 1]


def test_existing_run_is_not_overwritten(trained, run_train, error_line):
    before = (trained / "best.pt").read_bytes()
    assert run_train("--config", trained / "config.yaml") == 2
    assert "--resume" in (line := error_line()) and "--overwrite" in line
    assert (trained / "best.pt").read_bytes() == before


def test_results_of_a_best_that_is_no_more_are_removed(photos, tmp_path, monkeypatch, run_train):
    """Who evaluates while it trains has results that the next best epoch makes untrue."""
    make_up_losses(monkeypatch, [3.0, 1.0, 2.0])
    there = []

    def evaluated(history, path):
        there.append((tmp_path / "metrics.json").exists())
        (tmp_path / "metrics.json").write_text("{}")

    monkeypatch.setattr(train, "write_history", evaluated)
    assert run_train("--data", photos, "--out", tmp_path, "--epochs", 3, *SMALL) == 0
    assert there == [False, False, True]  # after the third epoch best.pt is still the second's
