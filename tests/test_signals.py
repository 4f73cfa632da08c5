"""What stops a training, where Python has no signals, locks fail, or something goes wrong on the way."""

import errno
import signal
import subprocess
import sys
import threading
from unittest.mock import Mock

import filelock
import pytest
import torch
import torch.distributed as dist
from conftest import REPOSITORY
from training import parse

import data
import train
import utils

SHORT = ("--epochs", 1, "--width", 8, "--crop", 32, "--mse-weight", 1, "--lpips-weight", 0, "--quiet")


def test_a_second_signal_ends_at_once_but_not_the_copy_of_the_first():
    """Without SIGUSR1, too, as on Windows."""
    code = (
        "import os, signal, time, torch\n"
        "del signal.SIGUSR1\n"
        "from checkpoint import Interrupted, Signals\n"
        "with Signals(torch.device('cpu')) as signals:\n"
        "    signals.received = signal.SIGTERM  # of another process\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "with Signals(torch.device('cpu')) as signals:\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)  # as a launcher may\n"
        "    try:\n"
        "        signals.check()\n"
        "    except Interrupted:\n"
        "        print(signals.received, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=50
    )
    assert (done.returncode, done.stdout) == (128 + signal.SIGINT, f"{int(signal.SIGTERM)}\n"), done.stderr


def test_training_outside_the_main_thread(photos, tmp_path, run_train):
    """Which alone may handle signals: they are not handled then."""
    found = []
    flags = ("--data", photos, "--out", tmp_path, *SHORT)
    thread = threading.Thread(target=lambda: found.append(run_train(*flags)))
    thread.start()
    thread.join()
    assert found == [0] and (tmp_path / "best.pt").exists()


def test_handlers_are_as_before(photos, tmp_path, run_train):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [*map(signal.getsignal, numbers), threading.excepthook]
    assert run_train("--data", photos, "--out", tmp_path, *SHORT) == 0  # with TensorBoard
    assert [*map(signal.getsignal, numbers), threading.excepthook] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("where", ["--out", "--cache"])
def test_file_systems_without_locks(photos, tmp_path, monkeypatch, run_train, error_line, where):
    real = filelock.FileLock.acquire

    def acquire(self, *args, **more):
        if str(tmp_path / where) in str(self.lock_file):
            raise OSError(errno.ENOLCK, "No locks")
        return real(self, *args, **more)

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    flags = ("--data", photos, "--out", tmp_path / "--out", "--cache", tmp_path / "--cache", *SHORT)
    assert run_train(*flags) == 2
    assert where in (line := error_line()) and "cannot be locked" in line and "No locks" in line


# --- what goes wrong on the way --------------------------------------------------------------------------


def test_another_training_after_one_that_failed(photos, tmp_path):
    """Its lock is free although the error, and with it what the training had, is still there."""
    flags = ("--data", photos, "--out", tmp_path, *SHORT, "--val-images", 1)
    with pytest.raises(utils.UserError, match="--crop 33") as failed:
        train.train(parse(*flags, "--crop", 33))
    train.train(parse(*flags))
    assert failed.value and (tmp_path / "best.pt").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_process_group_of_a_training_that_failed(tmp_path, monkeypatch, rank, capsys):
    """A group of one process, which says that it is this one of two."""
    for name, value in {"WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    real, group = dist.init_process_group, {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: real("gloo", **group))
    monkeypatch.setattr(dist, "rendezvous", lambda _: iter([(group["store"], rank, 2)]))
    monkeypatch.setattr(dist, "get_rank", lambda *_: rank)
    try:
        with pytest.raises(utils.UserError, match="nowhere"):
            train.train(parse("--data", tmp_path / "nowhere", "--out", tmp_path, "--device", "cpu"))
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    print("heard")
    assert capsys.readouterr().out == "heard\n"


def test_traceback_for_who_asks(tmp_path, run_train, monkeypatch, capsys):
    monkeypatch.setenv("FEATURE_INVERSION_DEBUG", "1")
    assert run_train("--data", tmp_path / "nowhere", "--out", tmp_path) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and "in resolve" in "".join(lines)
    assert lines[-1].startswith("error: --data ")


def test_an_error_of_the_system_without_a_name(tmp_path, run_train, monkeypatch, error_line):
    monkeypatch.setattr(data, "resolve", Mock(side_effect=OSError("odd")))
    assert run_train("--data", tmp_path, "--out", tmp_path) == 2
    assert error_line() == "odd (FEATURE_INVERSION_DEBUG=1 shows where)"


# --- Apple's GPUs ----------------------------------------------------------------------------------------


def test_mps_is_one_process(monkeypatch, tmp_path, run_train, error_line):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_train("--data", "sample", "--out", tmp_path, "--device", "mps") == 2
    assert "--device mps: one process only" in error_line()


def test_sums_of_mps_are_in_float64():
    """Which MPS has none of."""
    meter = train.Meter(["psnr"], torch.device("mps"))
    for value in (1e8, 1.0, 1.0):
        meter.add({"psnr": torch.tensor([value])})
    assert meter.averages()["psnr"] == (1e8 + 2) / 3
