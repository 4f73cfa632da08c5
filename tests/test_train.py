"""What a user of train.py sees: defaults, configuration, the loop's decisions, repeatability, and errors."""

import csv
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY
from kill_resume import read_run, same
from skimage.metrics import peak_signal_noise_ratio

import data
import evaluate
import train
from models import LPIPS, Encoder, build_model
from utils import UserError, load


def parse(*flags):
    return train.parse_args([str(flag) for flag in flags])


def history(out):
    with open(Path(out) / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- configuration ---------------------------------------------------------------------------------------


def test_defaults_are_the_papers():
    args = vars(parse())
    paper = {"encoder": "vgg16", "layer": "block1", "decoder": "tconv", "weights": "imagenet", "epochs": 30}
    paper |= {"batch_size": 4, "lr": 1e-4, "schedule": "plateau", "patience": 15, "seed": 42, "out": "runs"}
    paper |= {"mse_weight": 0.5, "lpips_weight": 0.5, "data": None}
    assert {key: args[key] for key in paper} == paper


def test_optimiser_and_schedule_are_the_papers(photos):
    job = job_for(photos)
    (group,) = job.optimizer.param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-4, (0.9, 0.999), 1e-8, 0)
    assert (job.scheduler.factor, job.scheduler.patience, job.scheduler.min_lrs) == (0.5, 5, [1e-7])
    assert sum(p.numel() for p in group["params"]) == 33_731  # the decoder alone


def test_command_line_wins_over_yaml_over_defaults(tmp_path):
    text = "lr: 1e-3\nepochs: 5\nlayer: block2\ndeterministic: false\nwidth: null\namp: true\nfreeze_bn: 20\n"
    (tmp_path / "c.yaml").write_text(text)
    args = parse("--config", tmp_path / "c.yaml", "--epochs", 7, "--no-amp", "--freeze-bn", 0)
    assert (args.lr, args.epochs, args.layer, args.batch_size, args.deterministic) == (1e-3, 7, "block2", 4, False)
    assert (args.amp, args.freeze_bn) == (False, 0) and parse("--config", tmp_path / "c.yaml").amp


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1", "unknown key 'learning_rate'; the keys are encoder, layer"),
        ("epochs: many", "epochs: 'many' is not a whole number"),
        ("epochs: 2.5", "epochs: '2.5' is not a whole number"),
        ("epochs: true", "epochs: True should be a number or a word"),
        ("epochs: [1]", "epochs: [1] should be"),
        ("epochs: null", "epochs: None should be"),
        ("lr: -1", "lr: -1 is not positive"),
        ("lr: .nan", "lr: nan is not positive"),
        ("deterministic: 3", "deterministic: 3 should be true or false"),
        ("encoder: vgg19", "--encoder: invalid choice: 'vgg19' (choose from"),
        ("layer: block9", "choose from block1, block2"),
        ("- 1\n- 2", "is list, should be"),
        ("just words", "is str, should be"),
        ("", "is NoneType, should be"),
        ("a: b: c", "mapping values are not allowed"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        parse("--config", tmp_path / "c.yaml")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--encoder", "vgg19"], "vgg16"),
        (["--layer", "block6"], "choose from block1, block2, block3, block4, block5"),
        (["--layer", "layer1"], "not a layer of vgg16"),
        (["--decoder", "unet"], "tconv"),
        (["--epochs", "0"], "--epochs: 0 is not positive"),
        (["--lr", "-0.1"], "--lr: -0.1 is not positive"),
        (["--batch-size", "-1"], "--batch-size: -1 is not positive"),
        (["--mse-weight", "-0.5"], "--mse-weight: -0.5 is not zero or positive"),
        (["--mse-weight", "0", "--lpips-weight", "0"], "nothing to minimise"),
        (["--speed", "9"], "unrecognized arguments: --speed 9"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistake_on_the_command_line_is_one_line_at_once(flags, message):
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "train.py", *flags], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert time.perf_counter() - start < 5  # torch was not imported


def test_help_names_every_layer_and_default():
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=REPOSITORY, capture_output=True, text=True)
    text = " ".join(done.stdout.split())
    assert done.returncode == 0
    for part in (
        "vgg16: block1…block5; resnet34: layer1…layer4; vit_small: block0…block11; alexnet: conv1…conv5",
        "--lr LR",
        "(default: 0.0001)",
        "python train.py --config configs/sample.yaml",
    ):
        assert part in text


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_help_is_instant(script):
    """Nothing heavy is imported before the flags are read, which takes far less than a second."""
    command = [sys.executable, "-X", "importtime", script, "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 0 and "argparse" in imported
    assert not imported & {"torch", "torchvision", "numpy", "matplotlib", "skimage", "tensorboard", "wandb"}
    commands = [line for line in done.stdout.splitlines() if line.startswith("  python ")]
    assert len(commands) >= 3 and "(default: None)" not in done.stdout


def test_quiet_prints_no_progress(photos, tmp_path, run_train, capsys):
    assert run_train("--data", photos, "--out", tmp_path, "--epochs", 1, "--width", 8, "--quiet") == 0
    out, err = capsys.readouterr()
    assert "best: epoch 1" in out and "epoch 1/1" not in out and err == ""
    flags = ("--data", photos, "--out", tmp_path, "--epochs", 1, "--width", 8, "--overwrite", "--bars")
    assert run_train(*flags) == 0
    out, err = capsys.readouterr()
    assert "epoch 1/1" in out and "Epoch 1/1: " in err and "Validation: " in err


def test_every_config_file_is_valid():
    files = sorted((REPOSITORY / "configs").glob("*.yaml"))
    assert files
    for file in files:
        parse("--config", file)


# --- the loop's decisions --------------------------------------------------------------------------------


def job_for(photos, out="unused", **flags):
    args = parse("--data", photos, "--out", out, *(part for k, v in flags.items() for part in (f"--{k}", v)))
    config = {key: value for key, value in vars(args).items() if key not in train.NOT_CONFIG}
    return train.Run(config, torch.device("cpu"), bars=True)


def test_early_stop_plateau_and_best_epoch_on_made_up_losses(photos, tmp_path, monkeypatch):
    """Losses fall for three epochs, then never again: best is 3; lr halves after six bad epochs; 15 bad ones end it."""
    losses = [0.5, 0.4, 0.3] + [0.35] * 40
    job = job_for(photos, tmp_path, epochs=40)
    weights = []

    def made_up_epoch(signals):
        with torch.no_grad():
            job.decoder.to_rgb.bias.add_(1)
        weights.append(job.decoder.to_rgb.bias.clone())
        return dict.fromkeys(train.COLUMNS, 0.1)

    def made_up_validation(signals):
        return dict.fromkeys(train.COLUMNS, 0.1) | {"loss": losses[job.epoch]}

    monkeypatch.setattr(job, "train_epoch", made_up_epoch)
    monkeypatch.setattr(job, "validate", made_up_validation)
    job.fit(None)
    rows = history(tmp_path)
    assert len(rows) == 3 + 15
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert (best["epoch"], best["val_loss"]) == (3, 0.3)
    assert torch.equal(best["decoder"]["to_rgb.bias"], weights[2])
    # epochs 4–9 are bad: the sixth exceeds a patience of five, so 10–15 run at half, 16–18 at a quarter
    assert [float(row["lr"]) for row in rows] == [1e-4] * 9 + [5e-5] * 6 + [2.5e-5] * 3


def test_terms_by_hand(photos):
    a, b = torch.rand(2, 2, 3, 224, 224)
    lpips = LPIPS()
    config = {"mse_weight": 0.5, "lpips_weight": 0.5, "protocol": "documented"}
    loss, mse, distance, psnr = train.terms(a, b, config, lpips)
    assert mse[1] == pytest.approx(float(((a[1] - b[1]) ** 2).sum() / 150_528), rel=1e-5)
    assert loss.tolist() == pytest.approx((0.5 * mse + 0.5 * distance).tolist())
    assert psnr[0] == pytest.approx(10 * math.log10(1 / float(mse[0])), rel=1e-5)
    a.requires_grad_()
    loss, mse, distance, _ = train.terms(a, b, config | {"mse_weight": 1.0, "lpips_weight": 0}, None)
    assert torch.equal(loss, mse) and distance.isnan().all()
    loss, mse, distance, _ = train.terms(a, b, config | {"mse_weight": 0, "lpips_weight": 1.0}, lpips)
    assert torch.equal(loss, distance) and not mse.isnan().any()
    grad = torch.autograd.grad(loss.sum(), a)[0]
    assert torch.allclose(grad, torch.autograd.grad(lpips(a, b).sum(), a)[0])


def test_published_terms_by_hand():
    output, images = torch.rand(2, 2, 3, 64, 64)
    config = {"mse_weight": 0.5, "lpips_weight": 0, "protocol": "published"}
    loss, mse, _, psnr = train.terms(output, images, config, None)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    target = ((images.permute(0, 2, 3, 1) - mean) / std).permute(0, 3, 1, 2)
    assert mse.tolist() == pytest.approx(((output - target) ** 2).mean((1, 2, 3)).tolist()) and mse.min() > 0.5
    assert torch.equal(loss, 0.5 * mse)
    pairs = zip(output.numpy(), target.clip(0, 1).numpy(), strict=True)
    expected = [peak_signal_noise_ratio(*pair, data_range=1) for pair in pairs]
    assert psnr.tolist() == pytest.approx(expected, abs=1e-3)


def test_pixel_target_is_in_0_1(photos, tmp_path, monkeypatch):
    targets = []
    real = data.target
    monkeypatch.setattr(data, "target", lambda *args: targets.append(real(*args)) or targets[-1])
    job = job_for(photos, tmp_path, epochs=1)
    job.fit(train.Signals(job.device))
    assert len(targets) == 2 + 1  # two training steps and one of validation
    assert all(t.min() >= 0 and t.max() <= 1 and t.std() > 0.1 for t in targets)
    pixels = job.images["val"].pixels[:, 16:240, 16:240].permute(0, 3, 1, 2)
    assert torch.equal(targets[-1], pixels.float() / 255)


def test_amp_computes_in_bfloat16_and_returns_float32(photos):
    image, outputs = torch.rand(1, 3, 32, 32), []
    for amp in (False, True):
        job = job_for(photos)
        job.config["amp"] = amp
        job.decoder.size = (32, 32)  # small, because bfloat16 is slow on a CPU
        outputs.append(job.decode(job.decoder.eval(), job.encode(image)).detach())
    exact, rounded = outputs
    assert rounded.dtype == torch.float32 and rounded.shape == exact.shape
    assert 1e-5 < (exact - rounded).abs().max() < 0.02


def test_compiled_training_is_the_same(photos, tmp_path, monkeypatch, run_train):
    """Through torch.compile's tracer, with a backend that needs no C++ compiler."""
    compiled = []
    real = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: compiled.append(self) or real(self, backend="aot_eager")
    )
    flags = ("--data", photos, "--epochs", 1, "--width", 8, "--tracker", "none")
    assert run_train(*flags, "--out", tmp_path / "a") == 0 and not compiled
    assert run_train(*flags, "--out", tmp_path / "b", "--compile") == 0 and len(compiled) == 2
    a, b = (load(tmp_path / name / "best.pt") for name in "ab")
    assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-4) and a["decoder"].keys() == b["decoder"].keys()


def test_frozen_batch_norm(photos, tmp_path):
    """After --freeze-bn steps training normalises by what it has, and a step sees what validation would."""
    job = job_for(photos, tmp_path, epochs=2, **{"freeze-bn": 1})
    signals, counts, batch = train.Signals(job.device), [], data.center_crops(job.images["val"].pixels)
    for _ in range(2):
        job.train_epoch(signals)
        counts.append(int(job.decoder.upsample[1].num_batches_tracked))
        job.set_training()
        trained_on = job.decode(job.model, job.encode(batch)).detach()
        job.validate(signals)
        assert torch.equal(trained_on, job.decode(job.decoder, job.encode(batch)).detach())
        job.epoch, job.step = 1, 0
    assert counts == [1, 1]  # of four steps


@pytest.mark.parametrize(("limit", "again"), [(train.KEPT_FEATURES, 0), (0, 1)])
def test_validation_features_are_computed_once_if_small(photos, tmp_path, monkeypatch, limit, again):
    monkeypatch.setattr(train, "KEPT_FEATURES", limit)
    job, calls = job_for(photos, tmp_path, encoder="alexnet", layer="conv3"), []
    job.encoder.register_forward_hook(lambda *args: calls.append(1))
    first = job.validate(train.Signals(job.device))
    assert len(calls) == 1  # one batch
    assert job.validate(train.Signals(job.device)) == first and len(calls) == 1 + again


def test_fast_changes_the_optimisation_only():
    fast = yaml.safe_load((REPOSITORY / "configs" / "fast.yaml").read_text())
    assert set(fast) == {"epochs", "lr", "schedule", "freeze_bn"}


def test_encoder_is_bit_identical_after_training(photos, tmp_path):
    job = job_for(photos, tmp_path, encoder="vgg16", epochs=1)
    before = {key: value.clone() for key, value in job.encoder.state_dict().items()}
    decoder = {key: value.clone() for key, value in job.decoder.state_dict().items()}
    job.fit(train.Signals(job.device))
    assert all(torch.equal(before[key], value) for key, value in job.encoder.state_dict().items())
    assert all(p.grad is None for p in [*job.encoder.parameters(), *job.lpips.parameters()])
    assert not all(torch.equal(decoder[key], value) for key, value in job.decoder.state_dict().items())


# --- whole runs ------------------------------------------------------------------------------------------


def test_files_of_a_run(trained, checkpoint, photos):
    names = {path.name for path in trained.iterdir() if path.name[0] != "."}
    assert names >= {"best.pt", "last.pt", "config.yaml", "history.csv", "curves.png"}
    assert (trained / "best.pt").stat().st_size < 200_000
    assert checkpoint["config"]["data"] == str(photos) and checkpoint["config"]["lr"] == 2e-3
    assert set(checkpoint["decoder"]) == set(job_for(photos).decoder.state_dict())  # nothing of the encoder
    assert torch.__version__.startswith(checkpoint["versions"]["torch"])
    rows = history(trained)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["val_loss"]) == checkpoint["val_loss"] if checkpoint["epoch"] == 2 else True
    for row in rows:
        assert float(row["train_loss"]) == pytest.approx(
            0.5 * float(row["train_mse"]) + 0.5 * float(row["train_lpips"])
        )
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config == checkpoint["config"]


def test_two_runs_are_bit_identical(trained, tmp_path, run_train):
    assert run_train("--config", trained / "config.yaml", "--out", tmp_path) == 0
    assert same(read_run(tmp_path), read_run(trained))


def test_epoch_line_has_everything(photos, tmp_path, run_train, capsys):
    assert run_train("--data", photos, "--out", tmp_path, "--epochs", 1, "--lpips-weight", 0) == 0
    out, err = capsys.readouterr()
    (line,) = [line for line in out.splitlines() if line.startswith("epoch")]
    for part in ("train loss", "val loss", "mse", "lpips –", "psnr", "lr 1.0e-04", "images/s"):
        assert part in line
    assert "33,731 trainable parameters" in out and "64 × 112 × 112" in out and "8 training and 2 validation" in out
    assert err == ""  # no bar where there is no terminal
    assert history(tmp_path)[0]["train_lpips"] == ""


def test_short_training_on_the_sample_gains_6_db(tmp_path, run_train):
    def psnr_of_unseen(decoder):
        return evaluate.evaluate_model(encoder, decoder, test.pixels, bars=True)[0]["psnr"].mean()

    test = data.load_split("sample", "test")
    encoder, untrained = build_model()
    flags = ("--epochs", 3, "--mse-weight", 1, "--lpips-weight", 0)  # the quickest to gain them
    assert run_train("--config", REPOSITORY / "configs" / "sample.yaml", *flags, "--out", tmp_path) == 0
    trained = evaluate.load_model(tmp_path / "best.pt")[1]
    assert psnr_of_unseen(trained) >= psnr_of_unseen(untrained) + 6


def test_without_data_the_sample_is_used_loudly(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert data.resolve(None) == "sample"
    assert "SAMPLE" in capsys.readouterr().out
    Path("data/DIV2K").mkdir(parents=True)
    assert data.resolve(None) == "data/DIV2K"


# --- bad input -------------------------------------------------------------------------------------------


def test_data_that_is_not_there_is_an_error(tmp_path, run_train, error_line):
    assert run_train("--data", tmp_path / "nowhere", "--out", tmp_path / "out") == 2
    assert "nowhere: no such folder" in error_line()
    assert not (tmp_path / "out" / "best.pt").exists()


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


def test_batch_larger_than_the_split(photos, tmp_path, run_train, error_line):
    assert run_train("--data", photos, "--out", tmp_path, "--batch-size", 9) == 2
    assert "--batch-size 9" in (line := error_line()) and "8 training images" in line


def test_out_that_is_not_writable(photos, tmp_path, run_train, error_line):
    (tmp_path / "file").write_text("")
    assert run_train("--data", photos, "--out", tmp_path / "file" / "run") == 2
    assert "file/run: cannot write there" in error_line()


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_without_cuda(photos, tmp_path, run_train, error_line):
    assert run_train("--data", photos, "--out", tmp_path, "--device", "cuda") == 2
    assert "0 CUDA devices" in error_line()


def test_processes_without_torchrun(photos, tmp_path, run_train, error_line, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert run_train("--data", photos, "--out", tmp_path) == 2
    assert "start with torchrun" in error_line()


def test_compiler_that_fails_is_one_line(photos, tmp_path, run_train, error_line, monkeypatch):
    from torch._inductor.exc import InductorError

    def fails(*_):
        raise InductorError(RuntimeError("no C++ compiler"), None)

    monkeypatch.setattr(train.Run, "train_step", fails)
    assert run_train("--data", photos, "--out", tmp_path, "--quiet") == 2
    assert error_line().startswith("--compile: ")


def test_non_finite_loss_stops_and_keeps_the_best(photos, tmp_path, run_train, error_line, monkeypatch):
    real, steps = Encoder.forward, []

    def poisoned(self, images):
        steps.append(1)
        z = real(self, images)
        return z * math.nan if len(steps) == 6 else z  # 1 and 2: the shape; 3–5: epoch 1; 6: epoch 2

    monkeypatch.setattr(Encoder, "forward", poisoned)
    assert run_train("--data", photos, "--out", tmp_path, "--epochs", 3, "--tracker", "none") == 2
    assert "not finite in epoch 2, step 1;" in error_line()
    assert torch.load(tmp_path / "best.pt", weights_only=True)["epoch"] == 1
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 1


def test_existing_run_is_not_overwritten(trained, run_train, error_line):
    before = (trained / "best.pt").read_bytes()
    assert run_train("--config", trained / "config.yaml") == 2
    assert "--resume" in (line := error_line()) and "--overwrite" in line
    assert (trained / "best.pt").read_bytes() == before
