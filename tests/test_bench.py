"""The plain loop that ours is timed against does the same training."""

import multiprocessing
import os
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from training import CPU, parse

import bench.__main__ as bench
import data
import train
from bench import plain
from evaluate import evaluate_model
from utils import UserError


@pytest.fixture
def five(own_photos, monkeypatch):
    """A folder of five training photographs, and a DataLoader that starts no other process."""
    loader = torch.utils.data.DataLoader

    def single(images, batch_size, shuffle=False, **_):
        return loader(images, batch_size, shuffle)

    monkeypatch.setattr(torch.utils.data, "DataLoader", single)
    for path in sorted((own_photos / "train").iterdir())[5:]:
        path.unlink()
    return own_photos


@pytest.fixture
def figures():
    """The figures that a benchmark shows, which gets figures.update."""
    return {}


def parse_bench(*flags):
    return bench.make_parser().parse_args(flags)


def test_plain_loop_trains_as_ours_does(own_photos):
    training, batch = bench.training_on(str(own_photos), CPU, "--batch-size", "2")
    theirs = plain.Plain(CPU)
    for _ in range(3):
        ours = train.train_step(training, batch)["loss"].mean()
        assert theirs.step(batch.contiguous()) == pytest.approx(float(ours), rel=1e-4)


def test_step_of_any_batch(five, figures):
    arguments = (plain.Plain(CPU), str(five), CPU)
    args = ["--rounds", "1", "--batch-size"]
    bench.bench_step(*arguments, parse_bench(*args, "1"), lambda **values: figures.update(values))
    assert set(figures) == {"step_ms plain", "step_ms ours", "step_speedup"}
    assert figures["step_speedup"] == pytest.approx(figures["step_ms plain"] / figures["step_ms ours"])
    with pytest.raises(UserError, match="--batch-size 64 × 1 processes: only 4 training images"):
        bench.bench_step(*arguments, parse_bench(*args, "64"), None)


@pytest.mark.slow
def test_every_part_is_timed(five, figures):
    arguments = (plain.Plain(CPU), str(five), CPU)
    bench.bench_epoch(*arguments, 1, lambda **values: figures.update(values))
    ratio = figures["plain_epoch_step_ms"] / figures["epoch_step_ms"]
    assert figures["epoch_speedup"] == pytest.approx(ratio)
    assert figures["epoch_step_ms"] == pytest.approx(4 * figures["image_ms"]["block1"])
    assert set(figures["image_ms"]) == {"block1", "block1, crop 64", "block5", "block5, kept"}
    assert figures["kept_crops_speedup"] > 1
    bench.bench_step(*arguments, parse_bench("--rounds", "1"), lambda **values: figures.update(values))
    assert min(figures[f"step_ms {name}"] for name in ("ours", "best.yaml, muon", "best.yaml, adam")) > 0


def test_evaluation_measures_what_plain_does(five, figures):
    """The metrics of scikit-image and of the lpips package are ours."""
    images = data.load_split(str(five), "train")
    inverter, theirs = bench.training_on(str(five), CPU)[0].inverter, plain.Plain(CPU)
    inverter.decoder.load_state_dict(theirs.decoder.state_dict())
    values = evaluate_model(inverter, images[:], bars=True).values
    expected = theirs.evaluate([five / "train" / name for name in images.names])
    found = [values[name].mean() for name in ("psnr", "ssim", "lpips")]
    assert np.allclose(found, np.mean(expected, 0), rtol=1e-3)
    bench.bench_evaluation(theirs, str(five), CPU, lambda **values: figures.update(values))
    ratio = figures["eval_images_per_second"] / figures["plain_eval_images_per_second"]
    assert figures["eval_speedup"] == pytest.approx(ratio)


@pytest.mark.slow
def test_time_to_quality_of_a_decoder_that_is_good_at_once(five, figures, monkeypatch):
    """Plain and ours in this process."""
    monkeypatch.setattr(bench, "elsewhere", lambda device: nullcontext(plain.Plain(device)))
    monkeypatch.setattr(bench, "child_gib", lambda script, *flags: train.train(parse(*flags)))
    monkeypatch.setattr(bench, "STUDY", {"psnr": 0, "ssim": -1, "lpips": 9})
    monkeypatch.setattr(bench, "FAST", ["--config", "configs/fast.yaml", "--batch-size", 4, "--passes", 1])
    bench.bench_quality(str(five), CPU, lambda **values: figures.update(values))
    wanted = 30 * figures["plain_epoch_seconds"] / figures["fast_seconds"]
    assert figures["time_to_quality"] == pytest.approx(wanted) and figures["test"]["psnr"] > 0
    monkeypatch.setattr(bench, "TRIALS", 0)
    with pytest.raises(UserError, match="did not get as good"):
        bench.bench_quality(str(five), CPU, lambda **values: None)


def test_the_training_of_a_process_of_its_own_is_on_the_device(monkeypatch):
    def child_gib(*command):
        raise UserError(f"--device {command[command.index('--device') + 1]}")

    monkeypatch.setattr(bench, "child_gib", child_gib)
    monkeypatch.setattr(bench, "make_photographs", lambda folder, count: None)
    with pytest.raises(UserError, match="--device cpu"):
        bench.bench(bench.make_parser().parse_args(["--images", "6", "--device", "cpu"]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--images", "5"], "--images 5: at least 6"),
        (["--json", "nowhere/bench.json"], "--json nowhere/bench.json: no such folder"),
    ],
)
def test_mistakes(flags, message):
    with pytest.raises(UserError, match=message):
        bench.bench(bench.make_parser().parse_args(flags))


class Failing:
    def __init__(self, device):
        pass

    def step(self):
        os._exit(1)


def test_a_process_that_fails_is_one_line(monkeypatch):
    with pytest.raises(UserError, match="-c ended with status 3, as it says above"):
        bench.child_gib("-c", "raise SystemExit(3)")
    monkeypatch.setattr(plain, "Plain", Failing)
    monkeypatch.setattr(plain, "get_context", lambda method: multiprocessing.get_context("fork"))  # quicker
    with pytest.raises(UserError, match="the plain loop's process ended"), plain.elsewhere(CPU) as loop:
        loop.step()
