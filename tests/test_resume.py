"""Nothing is lost: interruption, resumption, locks, full disks."""

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

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


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """(flags, folder) of a run of 2 epochs, 3 steps a pass, by its name; trained when first wanted."""
    both = ["--data", photos, "--epochs", 2, "--batch-size", 3, "--lr", 1e-3, "--width", 8, "--quiet"]
    more = {
        "plateau": [],
        "onecycle": ["--schedule", "onecycle", "--freeze-bn", 2],
        "crops": ["--crop", 64, "--passes", 2, "--kept-crops", 3, "--val-images", 1],
        "feedback": ["--crop", 64, "--decoder", "feedback", "--iterations", 2, "--optimizer", "muon"],
    }

    @cache
    def run(name):
        flags = [*both, *more[name]]
        out = tmp_path_factory.mktemp(name)
        train.train(parse(*flags, "--out", out))
        return flags, out

    return run


@pytest.mark.parametrize(
    ("run", "moment"),  # the signal, and at which call of which function it arrives
    [
        ("plateau", (signal.SIGTERM, data, "crops", 5)),  # in the second step of epoch 2
        ("onecycle", (signal.SIGINT, data, "crops", 2)),
        ("crops", (signal.SIGTERM, data, "crops", 11)),  # in the second pass of epoch 2
        ("feedback", (signal.SIGTERM, data, "crops", 7)),  # of which two are for the deviation
        ("plateau", (signal.SIGINT, data, "center_crops", 1)),  # in the validation of epoch 1
        ("plateau", (signal.SIGUSR1, train, "draw_curves", 1)),  # between the epochs
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


def test_signal_saves_and_says_how_to_go_on(photos, tmp_path, run_train, error_line):
    """Before it no other may write there."""
    flags = ("--data", photos, "--out", tmp_path, "--epochs", 500, "--width", 8)
    command = [sys.executable, "train.py", *map(str, flags)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert any(line.startswith("epoch") for line in process.stdout)
    assert run_train(*flags, "--resume") == 2
    assert "another training is writing there" in error_line()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "--epochs 500 --width 8 --resume" in output
    state = utils.load(tmp_path / "last.pt")
    assert state["epoch"] >= 1 and state["about"]["width"] == 8


def test_second_signal_ends_at_once():
    code = (
        "import os, signal, time, torch\n"
        "from signals import Signals\n"
        "with Signals(torch.device('cpu')):\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)  # as a launcher may\n"
        "    print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (128 + signal.SIGINT, "still here\n")
    assert time.monotonic() - start < 50


def test_resuming_a_finished_run_changes_nothing(whole, capsys):
    flags, out = whole("plateau")
    before = {name: (out / name).read_bytes() for name in ("best.pt", "last.pt", "history.csv")}
    train.train(parse(*flags, "--out", out, "--resume"))
    assert "finished after epoch 2" in capsys.readouterr().out
    assert before == {name: (out / name).read_bytes() for name in before}


def test_resume_with_another_configuration_names_the_key(whole, run_train, error_line):
    flags, out = whole("plateau")
    assert run_train(*flags, "--out", out, "--resume", "--lr", 2e-3) == 2
    assert "lr is 0.002" in (line := error_line()) and "0.001" in line


def test_too_little_memory_is_not_blamed_on_the_run(whole, run_train, error_line, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 bytes")

    flags, out = whole("plateau")
    monkeypatch.setattr(torch.optim.Adam, "load_state_dict", full)
    assert run_train(*flags, "--out", out, "--resume") == 2
    assert error_line().startswith("out of memory")


def test_resume_with_other_images_is_refused(own_photos, tmp_path, run_train, error_line):
    """Of other names or pixels, of training or validation; a folder may be written in another way."""
    flags = ("--out", tmp_path / "run", "--epochs", 1, "--width", 8, "--quiet", "--resume")
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


def test_more_epochs_under_a_plateau(whole, tmp_path, run_train):
    """End at what they would have been from the start; config.yaml and best.pt say them."""
    flags, out = whole("plateau")
    shutil.copytree(out, tmp_path / "more")
    more = (*flags, "--epochs", 4, "--patience", 3)
    train.train(parse(*more, "--out", tmp_path / "more", "--resume"))
    train.train(parse(*more, "--out", tmp_path / "whole"))
    assert same(read_run(tmp_path / "more"), read_run(tmp_path / "whole"))
    config = yaml.safe_load((tmp_path / "more" / "config.yaml").read_text())
    assert (config["epochs"], config["patience"]) == (4, 3)
    assert len((tmp_path / "more" / "history.csv").read_text().splitlines()) == 5


def test_best_says_how_long_the_run_may_take_before_there_is_a_better(whole, tmp_path):
    flags, out = whole("plateau")
    shutil.copytree(out, tmp_path / "run")
    content = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    torch.save(content | {"best_loss": 0.0}, tmp_path / "run" / "last.pt")  # no epoch will be better
    train.train(parse(*flags, "--epochs", 3, "--out", tmp_path / "run", "--resume"))
    before, best = (utils.load(folder / "best.pt") for folder in (out, tmp_path / "run"))
    assert best["epoch"] == before["epoch"] <= 2 and same(best["decoder"], before["decoder"])
    assert (before["config"]["epochs"], best["config"]["epochs"]) == (2, 3)


def test_fewer_epochs_than_are_done_change_nothing(whole, tmp_path, capsys):
    flags, out = whole("plateau")
    shutil.copytree(out, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    train.train(parse(*flags, "--epochs", 1, "--out", tmp_path / "run", "--resume"))
    assert "finished after epoch 2" in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_more_epochs_of_onecycle_are_refused(whole, run_train, error_line):
    flags, out = whole("onecycle")
    assert run_train(*flags, "--out", out, "--epochs", 4, "--resume") == 2
    assert "epochs is 4, the run in" in (line := error_line()) and "onecycle's rates are those of" in line


def test_runs_of_earlier_versions_go_on(whole, photos, tmp_path, run_train, error_line):
    """Whose last.pt has less, and flags that are no more."""
    flags, out = whole("plateau")
    shutil.copytree(out, tmp_path / "run")
    content = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    newer = (
        "init",
        "init_sha256",
        "encoder_sha256",
        "hash of the training images",
        "hash of the validation images",
    )
    about = {key: value for key, value in content["about"].items() if key not in newer}
    about |= {"feedback": None, "own_weights": False, "training images": "8 (names 01234567)"}
    old = {key: value for key, value in content.items() if key != "format"}
    torch.save(old | {"about": about}, tmp_path / "run" / "last.pt")
    assert run_train(*flags, "--out", tmp_path / "run", "--resume", "--data", f"{photos}/") == 0
    assert run_train(*flags, "--out", tmp_path / "run", "--resume", "--data", "sample") == 2
    assert "--resume: data is 'sample', the run in" in error_line()


# --- the decoder of another run -------------------------------------------------------------------------


def test_training_starts_from_another_decoder(photos, own_photos, tmp_path, run_train, capsys):
    """At a rate of nearly 0 the first validation is that of the run that it starts from."""
    both = ("--decoder", "residual", "--width", 8, "--batch-size", 2, "--quiet", "--epochs", 1)
    assert run_train(*both, "--data", photos, "--lr", 1e-3, "--seed", 1, "--out", tmp_path / "a") == 0
    first = utils.load(tmp_path / "a" / "best.pt")
    (own_photos / "train" / data.load_split(str(photos), "train").names[0]).unlink()  # other features
    init = ("--init", tmp_path / "a" / "best.pt", "--lr", 1e-30)
    assert run_train(*both, *init, "--data", photos, "--out", tmp_path / "b") == 0
    second = utils.load(tmp_path / "b" / "best.pt")
    assert second["val_loss"] == pytest.approx(first["val_loss"], rel=1e-6)
    assert run_train(*both, *init, "--data", own_photos, "--out", tmp_path / "c") == 0
    third = utils.load(tmp_path / "c" / "best.pt")
    for name, tensor in first["decoder"].items():
        torch.testing.assert_close(third["decoder"][name], tensor, rtol=0, atol=1e-20)
    digest = hashlib.sha256((tmp_path / "a" / "best.pt").read_bytes()).hexdigest()
    assert second["init_sha256"] == digest and second["config"]["init"] == f"{tmp_path}/a/best.pt"
    assert "***" not in capsys.readouterr().out


def test_what_training_cannot_start_from(trained, own, photos, tmp_path, run_train, error_line, capsys):
    (tmp_path / "net.py").write_text(own.read_text() + "\nopen('ran', 'w')\n")
    content = utils.load(trained / "best.pt")
    of_program = content["config"] | {"encoder": f"{tmp_path}/net.py:build"}
    torch.save(content | {"config": of_program, "encoder_sha256": "0"}, tmp_path / "own.pt")
    flags = ("--data", photos, "--out", tmp_path / "run", "--epochs", 1, "--quiet")
    for init, more, message in (
        (
            trained / "best.pt",
            ("--decoder", "residual"),
            "a tconv decoder of (64, 112, 112), for a residual decoder",
        ),
        (trained / "best.pt", ("--width", 8), "upsample.0.weight is (64, 32, 4, 4), should be (64, 8, 4, 4)"),
        (trained / "best.pt", ("--layer", "block2"), "for a tconv decoder of (128, 56, 56) here"),
        (trained / "last.pt", (), "not a best.pt"),
        (tmp_path / "none.pt", (), "no such checkpoint"),
    ):
        assert run_train(*flags, "--init", init, *more) == 2
        assert message in (line := error_line()) and str(init) in line
    assert not (tmp_path / "run" / "last.pt").exists()
    assert run_train(*flags, "--init", tmp_path / "own.pt") == 0
    assert "own.pt: was trained on other features" in capsys.readouterr().out and not Path("ran").exists()
    (tmp_path / "moved").mkdir()
    (tmp_path / "own.pt").rename(tmp_path / "moved" / "own.pt")
    assert run_train(*flags, "--init", tmp_path / "moved" / "own.pt", "--resume") == 0
    assert run_train(*flags, "--init", trained / "best.pt", "--resume") == 2
    assert "--resume: init is" in (line := error_line()) and "not the same content" in line


def test_resume_keeps_a_best_without_last(trained, photos, tmp_path, run_train, error_line):
    (tmp_path / "best.pt").write_bytes(content := (trained / "best.pt").read_bytes())
    assert run_train("--data", photos, "--out", tmp_path, "--resume") == 2
    assert "holds best.pt but no last.pt" in error_line() and (tmp_path / "best.pt").read_bytes() == content


def test_overwrite_replaces_a_run(trained, photos, tmp_path, run_train):
    (tmp_path / "best.pt").write_bytes((trained / "best.pt").read_bytes())
    (tmp_path / "metrics.json").write_text("{}")
    assert run_train("--data", photos, "--out", tmp_path, "--epochs", 1, "--width", 8, "--overwrite") == 0
    assert not (tmp_path / "metrics.json").exists()  # it was the old run's
    assert torch.load(tmp_path / "best.pt", weights_only=True)["config"]["width"] == 8


@pytest.mark.parametrize("damage", ["truncated", "other"])
def test_damaged_last_is_an_error(whole, tmp_path, run_train, error_line, damage):
    flags, out = whole("plateau")
    content = (out / "last.pt").read_bytes()
    if damage == "truncated":
        (tmp_path / "last.pt").write_bytes(content[: len(content) // 2])
    else:
        torch.save({"config": {}}, tmp_path / "last.pt")
    assert run_train(*flags, "--out", tmp_path, "--resume") == 2
    assert "last.pt: not " in error_line()


def test_killed_and_resumed_is_bit_identical():
    assert kill_resume.check(runs=1) == 1


def test_mutated_inputs():
    assert fuzz_inputs.check(count=50) == 0


# --- what a training must not replace ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["metrics.json", "history.csv", "curves.png", "config.yaml", "inversion.csv"]
)
def test_files_of_no_run_are_not_replaced(photos, tmp_path, run_train, error_line, name):
    """The folder of an evaluation, say."""
    (tmp_path / name).write_text("precious")
    (tmp_path / ".draft.tmp").write_text("precious")
    flags = ("--data", photos, "--out", tmp_path, "--epochs", 1, "--width", 8, "--quiet")
    for again in ((), ("--resume",)):
        assert run_train(*flags, *again) == 2
        assert f"holds {name} of no run" in (line := error_line()) and "--overwrite" in line
    assert (tmp_path / name).read_text() == (tmp_path / ".draft.tmp").read_text() == "precious"
    assert not (tmp_path / "last.pt").exists()


def test_only_its_own_temporary_files_are_removed(tmp_path):
    for name in (".best.pt.123.tmp.pt", ".notes.tmp", ".best.pt.old.tmp.pt"):
        (tmp_path / name).write_text("")
    train.claim(tmp_path, resume=False, overwrite=False)
    assert sorted(path.name for path in tmp_path.glob(".*.tmp*")) == [".best.pt.old.tmp.pt", ".notes.tmp"]


# --- full disks ------------------------------------------------------------------------------------------


def test_two_processes_build_one_cache(own_photos, tmp_path):
    code = (
        "import data; real, names = data.decode, []\n"
        "data.decode = lambda path, *rest: names.append(path.name) or real(path, *rest)\n"
        f"total = data.load_split({str(own_photos)!r}, 'test', {str(tmp_path / 'cache')!r})[:].sum()\n"
        "print(*names, total)"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0].split() for process in both]
    assert outputs[0][-1] == outputs[1][-1]
    assert sum(output.count("00.jpg") for output in outputs) == 1  # decoded by one of them


@pytest.fixture
def small_files():
    """No file may grow beyond 20 kB: what a full disk is like."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_is_an_error_that_leaves_the_run_good(whole, tmp_path, request, run_train, error_line):
    flags, out = whole("plateau")
    request.getfixturevalue("small_files")  # now that there is such a run
    assert run_train(*flags, "--out", tmp_path) == 2
    assert "last.pt" in (line := error_line()) and "File too large" in line
    assert [path.name for path in tmp_path.iterdir() if path.suffix not in (".lock", ".yaml")] == [".lock"]


def test_full_disk_keeps_the_previous_file(tmp_path, small_files):
    utils.save({"a": torch.zeros(10)}, tmp_path / "a.pt")
    with pytest.raises(OSError, match="too large"):
        utils.save({"a": torch.zeros(10_000)}, tmp_path / "a.pt")
    assert len(utils.load(tmp_path / "a.pt")["a"]) == 10
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
