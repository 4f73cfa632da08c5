"""Several processes, on the CPU, do what one does; and what is no such start is one line."""

import os
import signal
import subprocess
import sys
import zipfile
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import REPOSITORY, read_csv, read_json
from training import batches_of, training_on, validate

import train
import utils

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
PATHS = [str(REPOSITORY), str(REPOSITORY / "tests"), *os.environ.get("PYTHONPATH", "").split(":")]
PATHS = ":".join(filter(None, PATHS))
HERE = {"cwd": REPOSITORY, "env": os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}}
SMALL = ["--width", 8, "--lpips-weight", 0, "--crop", 32, "--device", "cpu", "--tracker", "none"]


def launched(*command):
    """What two processes of this script and flags print. Fails where they do."""
    command = [*LAUNCH, *map(str, command)]
    done = subprocess.run(command, **HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def one_step(photos, rank, world, parallel):
    """The decoder's state after a step on this process's part of a batch of four."""
    training = training_on(photos, "--width", 8, "--crop", 64, "--batch-size", 4 // world)
    batch = next(batches_of(training, rank, world))
    training.config["freeze_bn"] = training.step = 1  # since on the CPU each process has its own batch norm
    training.model, training.world = parallel(training.inverter), world
    training.optimizer = torch.optim.SGD(training.inverter.decoder.parameters(), lr=1)
    train.train_step(training, *batch)
    return training.inverter.decoder.state_dict()


def in_a_group(photos, folder, rank):
    """one_step in a group of two processes; what it gives, to a file in `folder`."""
    store = dist.FileStore(str(Path(folder, "store")), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(minutes=2))
    try:
        state = one_step(photos, rank, 2, torch.nn.parallel.DistributedDataParallel)
        torch.save(state, Path(folder, f"{rank}.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_gradients_of_two_processes_are_those_of_the_joint_batch(photos, tmp_path):
    """This process is the first of the two."""
    code = f"from test_processes import in_a_group; in_a_group({str(photos)!r}, {str(tmp_path)!r}, 1)"
    second = subprocess.Popen([sys.executable, "-c", code], **HERE)
    in_a_group(photos, tmp_path, 0)
    assert second.wait(timeout=60) == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    joint = one_step(photos, 0, 1, lambda model: model)
    before = training_on(photos, "--width", 8).inverter.decoder.state_dict()
    assert (joint["to_rgb.weight"] - before["to_rgb.weight"]).abs().max() > 1e-3
    for key in joint:
        assert torch.equal(first[key], second[key])
        torch.testing.assert_close(first[key], joint[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["best.pt", f"{'a' * 251}.png", "猫" * 85, f"a.{'b' * 253}"], ids=["short", "Latin", "CJK", "dot"]
)
def test_what_a_killed_process_leaves_is_found(tmp_path, name):
    """Whatever the name, and only what it leaves of this file."""
    path = tmp_path / name
    code = "import os, sys, pathlib, utils\nwith utils.atomic(sys.argv[1]) as path: path.touch(); os._exit(9)"
    for file in (path, tmp_path / "other.pt"):
        assert subprocess.run([sys.executable, "-c", code, file], **HERE).returncode == 9
    (left,) = utils.leftovers(path)
    assert left.exists() and left.name[0] == "." and len(list(tmp_path.iterdir())) == 2
    utils.write_text(path, "whole")
    assert path.read_text() == "whole"


@pytest.mark.parametrize(
    ("size", "rank", "message"),
    [("two", None, "WORLD_SIZE is 'two'"), ("2", None, "start with torchrun"), ("2", "5", "RANK is '5'")],
)
def test_processes_without_torchrun(
    photos, tmp_path, run_train, error_line, monkeypatch, size, rank, message
):
    monkeypatch.setenv("WORLD_SIZE", size)
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
        if rank:
            monkeypatch.setenv(name, rank)
    assert run_train("--data", photos, "--out", tmp_path) == 2
    assert message in error_line()


# Each process trains, one of them is interrupted in epoch 2, both go on, and measure what they have.
RANKS = """
import os, signal, sys, torch
import data, evaluate, train
from flags import parse_evaluate, parse_train
folder, *flags = sys.argv[1:]
real, calls = data.crops, []
def crops(*rest):
    calls.append(1)
    if len(calls) == 6 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return real(*rest)
data.crops = crops
try:
    train.train(parse_train(flags))
except SystemExit as stopped:
    status = stopped.code
state = train.train(parse_train([*flags, "--resume"]))
torch.save([state.inverter.decoder.state_dict(), state.history, status], f"{folder}/{os.environ['RANK']}.pt")
ckpt = ["--ckpt", f"{folder}/run/best.pt", "--device", "cpu"]
evaluate.evaluate(parse_evaluate([*ckpt, "--out", f"{folder}/two"]))
"""


@pytest.mark.slow
def test_two_gloo_processes(photos, tmp_path, run_evaluate):
    """Interrupted and resumed, both end with the same parameters; they measure what one process measures."""
    (tmp_path / "ranks.py").write_text(RANKS)
    flags = ["--data", photos, "--out", tmp_path / "run", "--epochs", 2, "--batch-size", 2, "--lr", 1e-3]
    flags += [*SMALL, "--passes", 2, "--kept-crops", 1, "--freeze-bn", 3]  # of four steps an epoch
    printed = launched(tmp_path / "ranks.py", tmp_path, *flags)
    assert printed.count("epoch 1/2") == 1  # the first process speaks
    assert "go on with: torchrun, as before, " in printed
    (a, rows, status), (b, other_rows, other_status) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert status == other_status == 128 + signal.SIGTERM
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert [row["val_loss"] for row in rows] == [row["val_loss"] for row in other_rows]

    training = training_on(photos, "--width", 8)
    training.inverter.decoder.load_state_dict(utils.load(tmp_path / "run" / "last.pt")["decoder"])
    val, _, _ = validate(training)
    for name in ("mse", "psnr"):
        assert rows[-1][f"val_{name}"] == pytest.approx(val[name], abs=1e-5)

    assert run_evaluate("--ckpt", tmp_path / "run" / "best.pt", "--out", tmp_path / "one") == 0
    two, one = (read_json(tmp_path / name / "metrics.json") for name in ("two", "one"))
    tables = [read_csv(tmp_path / name / "per_image.csv") for name in ("two", "one")]
    assert two["images"] == one["images"] == 3
    for name in ("psnr", "ssim", "lpips"):
        assert two[name] == pytest.approx(one[name], abs=1e-5)
        for a, b in zip(*tables, strict=True):
            assert (a["image"], float(a[name])) == (b["image"], pytest.approx(float(b[name]), abs=1e-5))
    originals = []
    for name in ("two", "one"):
        with zipfile.ZipFile(tmp_path / name / "reconstructions.zip") as archive:
            originals.append({name: archive.read(name) for name in archive.namelist() if "original" in name})
    assert originals[0] == originals[1] and len(originals[0]) == 3


@pytest.mark.slow
def test_two_processes_and_a_decoder_part_of_which_has_no_gradient(photos, tmp_path):
    """Without MSE a step that begins with what a round made leaves the head of `feedback` out."""
    flags = ["--data", photos, "--out", tmp_path, "--decoder", "feedback", *SMALL]
    flags += ["--mse-weight", 0, "--lpips-weight", 1, "--epochs", 1, "--passes", 4, "--val-images", 1]
    assert "best: epoch 1" in launched("train.py", *flags, "--batch-size", 2)
