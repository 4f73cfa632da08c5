"""The plain loop that ours is timed against does the same training."""

import os
import signal
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from training import CPU, parse

import bench
import data
import plain
import train
from evaluate import evaluate_model
from utils import UserError


@pytest.fixture
def loader_of_one_process(monkeypatch):
    """DataLoader, which here starts no others."""
    loader = torch.utils.data.DataLoader

    def single(images, batch_size, shuffle=False, **_):
        return loader(images, batch_size, shuffle)

    monkeypatch.setattr(torch.utils.data, "DataLoader", single)


def test_plain_loop_trains_as_ours_does(own_photos):
    ours = bench.Ours(str(own_photos), CPU, "--batch-size", "2")
    theirs = plain.Plain(CPU)
    batch, _ = next(ours.batches())
    for _ in range(3):
        assert theirs.step(batch.contiguous()) == pytest.approx(float(ours.step(batch)), rel=1e-4)


def test_too_few_photographs():
    with pytest.raises(UserError, match="at least 6"):
        bench.bench(bench.make_parser().parse_args(["--images", "5"]))


def test_step_of_any_batch(own_photos):
    figures = {}
    arguments = (plain.Plain(CPU), str(own_photos), CPU)
    bench.bench_step(*arguments, 1, 1, lambda **values: figures.update(values))
    assert set(figures) == {"step_ms plain", "step_ms ours", "step_speedup"}
    assert figures["step_speedup"] == pytest.approx(figures["step_ms plain"] / figures["step_ms ours"])
    with pytest.raises(UserError, match="--batch-size 64 × 1 processes: more than the 8 training images"):
        bench.bench_step(*arguments, 64, 1, None)


@pytest.mark.slow
def test_every_part_is_timed(own_photos, loader_of_one_process):
    """The functions that a benchmark calls, each with the parts that it promises."""
    for path in sorted((own_photos / "train").iterdir())[5:]:
        path.unlink()
    figures = {}
    arguments = (plain.Plain(CPU), str(own_photos), CPU)
    bench.bench_epoch(*arguments, 1, lambda **values: figures.update(values))
    ratio = figures["plain_epoch_step_ms"] / figures["epoch_step_ms"]
    assert figures["epoch_speedup"] == pytest.approx(ratio)
    assert figures["epoch_step_ms"] == pytest.approx(4 * figures["image_ms"]["block1"])
    assert set(figures["image_ms"]) == {"block1", "block1, crop 64", "block5", "block5, kept"}
    assert figures["kept_crops_speedup"] > 1
    bench.bench_step(*arguments, None, 1, lambda **values: figures.update(values))
    assert min(figures[f"step_ms {name}"] for name in ("ours", "best.yaml, muon", "best.yaml, adam")) > 0


def test_evaluation_measures_what_plain_does(own_photos):
    """The metrics of scikit-image and of the lpips package are ours."""
    for path in sorted((own_photos / "train").iterdir())[5:]:
        path.unlink()
    images = data.load_split(str(own_photos), "train")
    files = [own_photos / "train" / name for name in images.names]
    inverter, theirs = bench.Ours(str(own_photos), CPU).inverter, plain.Plain(CPU)
    inverter.decoder.load_state_dict(theirs.decoder.state_dict())
    values = evaluate_model(inverter, images[:], bars=True).values
    expected = theirs.evaluate(files)
    found = [values[name].mean() for name in ("psnr", "ssim", "lpips")]
    assert np.allclose(found, np.mean(expected, 0), rtol=1e-3)
    figures = {}
    bench.bench_evaluation(theirs, str(own_photos), CPU, lambda **values: figures.update(values))
    ratio = figures["eval_images_per_second"] / figures["plain_eval_images_per_second"]
    assert figures["eval_speedup"] == pytest.approx(ratio)


@pytest.mark.slow
def test_time_to_quality_of_a_decoder_that_is_good_at_once(own_photos, monkeypatch, loader_of_one_process):
    """Plain and ours in this process."""
    monkeypatch.setattr(bench, "elsewhere", lambda device: nullcontext(plain.Plain(device)))
    monkeypatch.setattr(bench, "child_gib", lambda script, *flags: train.train(parse(*flags)))
    monkeypatch.setattr(bench, "STUDY", {"psnr": 0, "ssim": -1, "lpips": 9})
    monkeypatch.setattr(bench, "FAST", ["--config", "configs/fast.yaml", "--batch-size", 4, "--passes", 1])
    figures = {}
    bench.bench_quality(str(own_photos), CPU, lambda **values: figures.update(values))
    wanted = 30 * figures["plain_epoch_seconds"] / figures["fast_seconds"]
    assert figures["time_to_quality"] == pytest.approx(wanted) and figures["test"]["psnr"] > 0
    monkeypatch.setattr(bench, "TRIALS", 0)
    with pytest.raises(UserError, match="did not get as good"):
        bench.bench_quality(str(own_photos), CPU, lambda **values: None)


def test_the_training_of_a_process_of_its_own_is_on_the_device(monkeypatch):
    commands = []

    def child_gib(*command):
        commands.append(command)
        raise UserError("enough")

    monkeypatch.setattr(bench, "child_gib", child_gib)
    with pytest.raises(UserError, match="enough"):
        bench.bench(bench.make_parser().parse_args(["--images", "6", "--device", "cpu"]))
    assert commands[0][commands[0].index("--device") + 1] == CPU


def test_a_process_that_fails_is_one_line():
    with pytest.raises(UserError, match="-c ended with status 3, as it says above"):
        bench.child_gib("-c", "raise SystemExit(3)")
    with pytest.raises(UserError, match="--json nowhere/bench.json: no such folder"):
        bench.bench(bench.make_parser().parse_args(["--json", "nowhere/bench.json"]))
    with pytest.raises(UserError, match="the plain loop's process ended"):
        with plain.elsewhere(CPU) as loop:
            os.kill(loop._manager._process.pid, signal.SIGKILL)
            loop.step()
