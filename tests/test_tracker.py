"""TensorBoard and Weights & Biases: what they get, and that they can't stop or change a training."""

import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY
from kill_resume import read_run, same
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import history
from training import parse

import checkpoint
import train
from extras import trackers
from utils import load

SHORT = ("--epochs", 2, "--width", 8, "--crop", 32, "--lr", 1e-3, "--lpips-weight", 0, "--quiet")


@pytest.fixture(scope="module")
def tracked(photos, tmp_path_factory):
    """The folder of a run of two epochs with TensorBoard, the default; not to be changed."""
    out = tmp_path_factory.mktemp("tracked")
    train.train(parse("--data", photos, "--out", out, *SHORT))
    return out


def events(folder):
    """What TensorBoard would show of a folder."""
    return EventAccumulator(str(folder), {"scalars": 0, "images": 0}).Reload()


def steps(folder, tag):
    return [event.step for event in events(folder).Scalars(tag)]


def test_scalars_and_pictures_are_the_history(tracked):
    shown, rows = events(tracked), history(tracked)
    columns = {"lr": "lr", "images_per_second": "images_per_second"}
    for name in ("loss", "mse", "psnr"):
        columns |= {f"{name}/train": f"train_{name}", f"{name}/validation": f"val_{name}"}
    assert "lpips/train" not in shown.Tags()["scalars"]  # it took no part in the loss: nothing to show
    for tag, column in columns.items():
        found = {event.step: event.value for event in shown.Scalars(tag)}
        assert found == pytest.approx({int(row["epoch"]): float(row[column]) for row in rows})
    best = load(tracked / "best.pt")
    assert steps(tracked, "best/psnr")[-1] == best["epoch"]
    assert shown.Scalars("best/loss")[-1].value == pytest.approx(best["val_loss"])
    (tag,) = shown.Tags()["images"]
    assert [image.step for image in shown.Images(tag)] == [1, 2]


def test_grid_is_targets_above_outputs_at_half_size():
    targets, outputs = torch.rand(2, 6, 3, 224, 224)
    grid = trackers.validation_grid(targets, outputs)
    assert grid.shape == (3, 2 * 114 + 2, 6 * 114 + 2)
    for top, pictures in ((2, targets), (116, outputs)):
        half = torch.nn.functional.interpolate(pictures[5:], scale_factor=0.5, mode="bilinear")[0]
        assert torch.allclose(grid[:, top : top + 112, 572:684], half, atol=1e-5)


def test_hyper_parameters_and_final_metrics(tracked, tmp_path, run_evaluate):
    """What the HPARAMS tab reads; the metrics of the test images join the same run, once."""
    from tensorboard.plugins.hparams import metadata

    out = shutil.copytree(tracked, tmp_path / "run")
    for _ in range(2):
        assert run_evaluate("--ckpt", out / "best.pt", "--quiet") == 0
    shown = events(out)
    content = shown.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    values = metadata.parse_session_start_info_plugin_data(content).hparams
    assert values["layer"].string_value == "block1" and values["lr"].number_value == 1e-3
    content = shown.SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
    metrics = {info.name.tag for info in metadata.parse_experiment_plugin_data(content).metric_infos}
    assert {"best/psnr", "test/psnr", "test/ssim", "test/lpips"} <= metrics & set(shown.Tags()["scalars"])
    assert steps(out, "test/psnr") == [load(out / "best.pt")["epoch"]]
    assert steps(out, "loss/train") == [1, 2]


def test_resuming_repeats_no_step(tracked, photos, tmp_path, monkeypatch, run_train):
    """Stopped after the second epoch was tracked, before it was saved: it comes again, and is shown once."""
    real = train.save_last

    def stop(state, *rest):
        if state.epoch == 2:
            raise KeyboardInterrupt
        real(state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_last", stop)
        assert run_train("--data", photos, "--out", tmp_path, *SHORT) == 130
    assert steps(tmp_path, "loss/train") == [1, 2]
    assert run_train("--data", photos, "--out", tmp_path, *SHORT, "--resume") == 0
    assert len(list(tmp_path.glob(checkpoint.EVENTS))) == 2
    for tag in ("loss/train", "psnr/validation", "best/loss"):
        assert steps(tmp_path, tag) == [1, 2]
    assert same(read_run(tmp_path), read_run(tracked))


def test_no_tracker_changes_the_run(tracked, photos, tmp_path, run_train, run_evaluate):
    """Nor does evaluating begin a TensorBoard run where there was none."""
    assert run_train("--data", photos, "--out", tmp_path, *SHORT, "--tracker", "none") == 0
    assert same(read_run(tmp_path), read_run(tracked))
    assert run_evaluate("--ckpt", tmp_path / "best.pt", "--quiet") == 0
    assert not list(tmp_path.glob(checkpoint.EVENTS))


def test_overwrite_removes_the_old_events(tracked, photos, tmp_path, run_train):
    out = shutil.copytree(tracked, tmp_path / "run")
    trackers.add_test_metrics(out, 1, {"psnr": 20.0})
    assert run_train("--data", photos, "--out", out, *SHORT[2:], "--epochs", 1, "--overwrite") == 0
    assert steps(out, "loss/train") == [1] and "test/psnr" not in events(out).Tags()["scalars"]


# --- failures --------------------------------------------------------------------------------------------


def one_warning(text):
    (line,) = [line for line in text.splitlines() if line]
    assert line.startswith("warning: --tracker ") and "is off" in line
    return line


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_missing_package_is_one_warning(tracked, photos, tmp_path, monkeypatch, capsys, run_train, package):
    for name in list(sys.modules):
        if name.split(".")[0] == package or "utils.tensorboard" in name:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # what Python does where there is no such package
    assert run_train("--data", photos, "--out", tmp_path, *SHORT, "--tracker", package) == 0
    assert package in one_warning(capsys.readouterr().err)
    assert same(read_run(tmp_path), read_run(tracked))


def test_full_disk_is_one_warning(tracked, photos, tmp_path, monkeypatch, capfd, run_train):
    """Only the event file outgrows the limit, in the writer's own thread."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    random = torch.rand(3, 1024, 1024, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(trackers, "validation_grid", lambda *args: random)  # 3 MB as a PNG
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        assert run_train("--data", photos, "--out", tmp_path, *SHORT) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "File too large" in one_warning(capfd.readouterr().err)
    assert same(read_run(tmp_path), read_run(tracked))


def test_test_metrics_that_cannot_be_written_are_one_warning(tracked, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(tracked, tmp_path / "run")
    monkeypatch.setattr(trackers, "summary_writer", None)
    trackers.add_test_metrics(out, 1, {"psnr": 20.0})
    one_warning(capsys.readouterr().err)


# --- Weights & Biases ------------------------------------------------------------------------------------


def test_wandb_offline(tracked, photos, tmp_path):
    """In a process of its own, as wandb starts a service that lives until the end."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    flags = ["--data", photos, "--out", tmp_path, *SHORT, "--tracker", "wandb"]
    options = {"env": os.environ | {"WANDB_MODE": "offline"}, "capture_output": True, "text": True}
    command = [sys.executable, "train.py", *map(str, flags)]
    done = subprocess.run(command, cwd=REPOSITORY, timeout=120, **options)
    assert done.returncode == 0 and "warning: --tracker" not in done.stderr, done.stderr
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert file.stat().st_size > 1000 and b"psnr/validation" in file.read_bytes()
    pictures = list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))
    assert len(pictures) == 2
    assert steps(tmp_path, "psnr/validation") == [1, 2]
    assert same(read_run(tmp_path), read_run(tracked))
