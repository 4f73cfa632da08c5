"""Nothing is lost: interruption, resumption, locks, full disks."""

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from unittest.mock import Mock

import fuzz_inputs
import kill_resume
import pytest
import torch
import yaml
from conftest import REPOSITORY
from kill_resume import read_run, same
from PIL import Image
from training import parse

import data
import train
import utils
from extras import trackers

SMALL = ("--crop", 32, "--width", 8, "--lpips-weight", 0, "--tracker", "none", "--quiet")


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """(flags, folder) of a run of 2 epochs, 3 steps a pass, by its name; trained when first wanted."""
    both = ["--data", photos, "--epochs", 2, "--batch-size", 3, "--lr", 1e-3, "--width", 8, "--quiet"]
    both += ["--val-images", 1, "--crop", 32, "--lpips-weight", 0]
    more = {
        "plateau": ["--crop", 64, "--lpips-weight", 0.5],
        "onecycle": ["--schedule", "onecycle", "--freeze-bn", 2],
        "crops": ["--passes", 2, "--kept-crops", 3],
        "feedback": ["--decoder", "feedback", "--iterations", 2, "--optimizer", "muon"],
    }

    @cache
    def run(name):
        flags = [*both, *more[name]]
        out = tmp_path_factory.mktemp(name)
        train.train(parse(*flags, "--out", out))
        return flags, out

    return run


@pytest.fixture
def copied(whole, tmp_path):
    """(flags, folder) of a copy of the run `plateau`, which a test may change."""
    flags, out = whole("plateau")
    return flags, shutil.copytree(out, tmp_path / "copied")


@pytest.mark.parametrize(
    ("run", "moment"),  # the signal, and at which call of which function it arrives
    [
        ("plateau", (signal.SIGTERM, data, "crops", 5)),  # in the second step of epoch 2
        ("onecycle", (signal.SIGINT, data, "crops", 2)),
        ("crops", (signal.SIGTERM, data, "crops", 11)),  # in the second pass of epoch 2
        ("feedback", (signal.SIGTERM, data, "crops", 7)),  # of which two are for the deviation
        ("plateau", (signal.SIGINT, data, "center_crops", 1)),  # in the validation of epoch 1
        ("plateau", (signal.SIGUSR1, trackers, "draw_curves", 1)),  # between the epochs
        ("plateau", (signal.SIGTERM, utils.os, "replace", 3)),  # while a file is written
    ],
)
def test_interrupted_and_resumed_is_bit_identical(whole, tmp_path, monkeypatch, capsys, run, moment):
    number, owner, name, call = moment
    flags, expected = whole(run)
    real, calls = getattr(owner, name), []

    def interrupting(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupting)
        patch.setattr(sys, "argv", ["train.py", *map(str, flags), "--out", str(tmp_path), "--overwrite"])
        with pytest.raises(SystemExit) as stopped:
            train.train(parse(*flags, "--out", tmp_path))
    assert stopped.value.code == 128 + number
    again = capsys.readouterr().out.split("go on with: python ")[1].split()
    assert again[0] == "train.py" and again[-1] == "--resume" and "--overwrite" not in again
    train.train(parse(*flags, "--out", tmp_path, "--resume"))
    assert same(read_run(tmp_path), read_run(expected))


def test_a_running_training_is_alone_and_says_at_a_signal_how_to_go_on(
    photos, tmp_path, run_train, error_line
):
    flags = ("--data", photos, "--out", tmp_path, "--epochs", 500, *SMALL[:-1])
    command = [sys.executable, "train.py", *map(str, flags)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert any(line.startswith("epoch") for line in process.stdout)
    assert run_train(*flags, "--resume") == 2
    assert "another training is writing there" in error_line()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "--lpips-weight 0 --tracker none --resume" in output
    state = utils.load(tmp_path / "last.pt")
    assert state["epoch"] >= 1 and state["about"]["width"] == 8


@pytest.mark.parametrize("epochs", [2, 1])
def test_resuming_a_finished_run_changes_nothing(copied, capsys, epochs):
    flags, out = copied
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    train.train(parse(*flags, "--epochs", epochs, "--out", out, "--resume"))
    assert "finished after epoch 2" in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize(
    ("run", "more", "messages"),
    [
        ("plateau", ("--lr", 2e-3), ("lr is 0.002", "has 0.001")),
        ("onecycle", ("--epochs", 4), ("epochs is 4, the run in", "onecycle's learning rates are for")),
    ],
)
def test_resume_with_another_configuration_names_the_key(whole, run_train, error_line, run, more, messages):
    flags, out = whole(run)
    assert run_train(*flags, "--out", out, "--resume", *more) == 2
    line = error_line()
    assert all(message in line for message in messages)


def test_too_little_memory_is_not_blamed_on_the_run(whole, run_train, error_line, monkeypatch):
    flags, out = whole("plateau")
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 bytes")
    monkeypatch.setattr(torch.optim.Adam, "load_state_dict", Mock(side_effect=full))
    assert run_train(*flags, "--out", out, "--resume") == 2
    assert error_line().startswith("out of memory")


def test_resume_with_other_images_is_refused(own_photos, tmp_path, run_train, error_line):
    """Of other names or pixels, of training or validation; a folder may be written in another way."""
    flags = ("--out", tmp_path / "run", "--epochs", 1, "--resume", *SMALL)
    assert run_train("--data", own_photos, *flags) == 0
    assert run_train("--data", f"{own_photos}/../own_photos/", *flags) == 0
    names = {split: data.load_split(str(own_photos), split).names[0] for split in ("train", "val")}
    for name in names.values():
        file = own_photos / "train" / name
        before = file.read_bytes()
        Image.open(file).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(file)
        assert run_train("--data", own_photos, *flags) == 2
        assert "--resume: hash of the " in error_line()
        file.write_bytes(before)
    (own_photos / "train" / names["train"]).rename(own_photos / "train" / "first.png")
    assert run_train("--data", own_photos, *flags) == 2
    assert "--resume: hash of the training images is '" in error_line()


def test_more_epochs_under_a_plateau(copied, tmp_path):
    """End at what they would have been from the start; config.yaml and best.pt say them."""
    flags, out = copied
    more = (*flags, "--epochs", 3, "--patience", 4)
    train.train(parse(*more, "--out", out, "--resume"))
    train.train(parse(*more, "--out", tmp_path / "whole"))
    assert same(read_run(out), read_run(tmp_path / "whole"))
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["epochs"], config["patience"]) == (3, 4)


def test_runs_of_earlier_versions_go_on(copied, photos, run_train, error_line):
    """Whose last.pt has less, and flags that are no more."""
    flags, out = copied
    content = utils.load(out / "last.pt")
    hashes = [f"hash of the {split} images" for split in ("training", "validation")]
    for key in ("init", "init_sha256", "encoder_sha256", *hashes):
        del content["about"][key]
    del content["format"]
    content["about"] |= {"feedback": None, "own_weights": False, "training images": "8 (names 01234567)"}
    torch.save(content, out / "last.pt")
    assert run_train(*flags, "--out", out, "--resume", "--data", f"{photos}/") == 0
    assert run_train(*flags, "--out", out, "--resume", "--data", "sample") == 2
    assert "--resume: data is 'sample', the run in" in error_line()


# --- the decoder of another run -------------------------------------------------------------------------


def test_training_starts_from_another_decoder(photos, own_photos, tmp_path, run_train, capsys):
    """At a rate of nearly 0 the first validation is that of the run that it starts from."""
    both = ("--decoder", "residual", "--batch-size", 2, "--epochs", 1, *SMALL)
    assert run_train(*both, "--data", photos, "--lr", 1e-3, "--seed", 1, "--out", tmp_path / "a") == 0
    file = tmp_path / "a" / "best.pt"
    (own_photos / "train" / data.load_split(str(photos), "train").names[0]).unlink()  # other features
    init = (*both, "--init", file, "--lr", 1e-30)
    assert run_train(*init, "--data", photos, "--out", tmp_path / "b") == 0
    assert run_train(*init, "--data", own_photos, "--out", tmp_path / "c") == 0
    first, second, third = (utils.load(tmp_path / name / "best.pt") for name in "abc")
    assert second["val_loss"] == pytest.approx(first["val_loss"], rel=1e-6)
    for name, tensor in first["decoder"].items():
        torch.testing.assert_close(third["decoder"][name], tensor, rtol=0, atol=1e-20)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert second["init_sha256"] == digest and second["config"]["init"] == str(file)
    assert "***" not in capsys.readouterr().out


def test_what_training_cannot_start_from(trained, own, photos, tmp_path, run_train, error_line, capsys):
    (tmp_path / "net.py").write_text(own.read_text() + "\nopen('ran', 'w')\n")
    content = utils.load(trained / "best.pt")
    of_program = content["config"] | {"encoder": f"{tmp_path}/net.py:build"}
    torch.save(content | {"config": of_program, "encoder_sha256": "0"}, tmp_path / "own.pt")
    flags = ("--data", photos, "--out", tmp_path / "run", "--epochs", 1, *SMALL, "--width", 32)
    best = trained / "best.pt"
    for init, more, message in (
        (best, ("--decoder", "residual"), "a tconv decoder of (64, 112, 112), for a residual decoder"),
        (best, ("--width", 8), "upsample.0.weight is (64, 32, 4, 4), should be (64, 8, 4, 4)"),
        (best, ("--layer", "block2"), "for a tconv decoder of (128, 56, 56) here"),
        (trained / "last.pt", (), "not a best.pt"),
        (tmp_path / "none.pt", (), "no such checkpoint"),
    ):
        assert run_train(*flags, "--init", init, *more) == 2
        assert message in (line := error_line()) and str(init) in line
    assert not (tmp_path / "run" / "last.pt").exists()
    assert run_train(*flags, "--init", tmp_path / "own.pt") == 0
    assert "own.pt: was trained on other features" in capsys.readouterr().out and not Path("ran").exists()
    moved = (tmp_path / "own.pt").rename(tmp_path / "moved.pt")
    assert run_train(*flags, "--init", moved, "--resume") == 0
    assert run_train(*flags, "--init", best, "--resume") == 2
    assert "--resume: init is" in (line := error_line()) and "not the same content" in line


# --- what a training must not replace ----------------------------------------------------------------------


def test_overwrite_replaces_a_run(trained, photos, tmp_path, run_train):
    (tmp_path / "best.pt").write_bytes((trained / "best.pt").read_bytes())
    (tmp_path / "metrics.json").write_text("{}")
    assert run_train("--data", photos, "--out", tmp_path, "--epochs", 1, "--overwrite", *SMALL) == 0
    assert not (tmp_path / "metrics.json").exists()  # it was the old run's
    assert utils.load(tmp_path / "best.pt")["config"]["width"] == 8


@pytest.mark.parametrize("damage", ["truncated", "other"])
def test_damaged_last_is_an_error(copied, run_train, error_line, damage):
    flags, out = copied
    if damage == "truncated":
        os.truncate(out / "last.pt", (out / "last.pt").stat().st_size // 2)
    else:
        torch.save({"config": {}}, out / "last.pt")
    assert run_train(*flags, "--out", out, "--resume") == 2
    assert "last.pt: not " in error_line()


@pytest.mark.parametrize("name", ["best.pt", "metrics.json", "curves.png", "config.yaml", "inversion.csv"])
def test_files_of_no_run_are_not_replaced(photos, tmp_path, run_train, error_line, name):
    """The folder of an evaluation, say."""
    (tmp_path / name).write_text("precious")
    (tmp_path / ".draft.tmp").write_text("precious")
    flags = ("--data", photos, "--out", tmp_path, "--epochs", 1, "--width", 8, "--quiet")
    for again in ((), ("--resume",)):
        assert run_train(*flags, *again) == 2
        assert f"holds {name} but no last.pt" in (line := error_line()) and "--overwrite" in line
    assert (tmp_path / name).read_text() == (tmp_path / ".draft.tmp").read_text() == "precious"
    assert not (tmp_path / "last.pt").exists()


# --- killed processes, mutated files, full disks -----------------------------------------------------------


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical():
    assert kill_resume.check(runs=1) == 1


def test_mutated_inputs():
    assert fuzz_inputs.check(count=50) == 0


def test_two_processes_build_one_cache(own_photos, tmp_path):
    code = (
        "import data; real, names = data.decode, []\n"
        "data.decode = lambda path, **how: names.append(path.name) or real(path, **how)\n"
        f"total = data.load_split({str(own_photos)!r}, 'test', {str(tmp_path / 'cache')!r})[:].sum()\n"
        "print(*names, total)"
    )
    options = {"cwd": REPOSITORY, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", code], **options) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].split() for process in both]
    assert outputs[0][-1] == outputs[1][-1]
    assert sum(output.count("00.jpg") for output in outputs) == 1  # decoded by one of them


@pytest.fixture
def small_files(whole):
    """No file may grow beyond 20 kB: what a full disk is like. There is such a run as `plateau` before."""
    whole("plateau")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_is_an_error_that_leaves_the_run_good(whole, tmp_path, small_files, run_train, error_line):
    flags, _ = whole("plateau")
    assert run_train(*flags, "--out", tmp_path) == 2
    assert "last.pt" in (line := error_line()) and "File too large" in line
    assert [path.name for path in tmp_path.iterdir() if path.suffix not in (".lock", ".yaml")] == [".lock"]


def test_full_disk_keeps_the_previous_file(tmp_path, small_files):
    utils.save({"a": torch.zeros(10)}, tmp_path / "a.pt")
    with pytest.raises(OSError, match="too large"):
        utils.save({"a": torch.zeros(10_000)}, tmp_path / "a.pt")
    assert len(utils.load(tmp_path / "a.pt")["a"]) == 10
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
