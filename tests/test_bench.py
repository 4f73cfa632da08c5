"""The plain loop that ours is timed against does the same training."""

import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import read_json
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


def test_plain_loop_trains_as_ours_does(own_photos):
    training, batch = bench.training_on(str(own_photos), CPU, "--batch-size", "2")
    theirs = plain.Plain(CPU)
    for _ in range(3):
        ours = train.train_step(training, batch)["loss"].mean()
        assert theirs.step(batch.contiguous()) == pytest.approx(float(ours), rel=1e-4)


def test_evaluation_measures_what_plain_does(five):
    """The metrics of scikit-image and of the lpips package are ours."""
    images = data.load_split(str(five), "train")
    inverter, theirs = bench.training_on(str(five), CPU)[0].inverter, plain.Plain(CPU)
    inverter.decoder.load_state_dict(theirs.decoder.state_dict())
    values = evaluate_model(inverter, images[:], bars=True).values
    expected = theirs.evaluate([five / "train" / name for name in images.names])
    found = [values[name].mean() for name in ("psnr", "ssim", "lpips")]
    assert np.allclose(found, np.mean(expected, 0), rtol=1e-3)


@pytest.fixture
def here(five, monkeypatch):
    """What a benchmark does elsewhere is done in this process, with five photographs, and timed once."""
    by_turns, training_on = bench.by_turns, bench.training_on

    def child_gib(script, *flags):
        assert "--device" in flags
        train.train(parse(*flags))
        return 1.0

    def make_photographs(folder, count):
        shutil.copytree(five, folder, dirs_exist_ok=True)

    def on_crops(*arguments):
        large = {"configs/best.yaml", "block5"} & set(arguments)
        return training_on(*arguments, *(["--crop", "64"] if large else []))

    monkeypatch.setattr(bench, "elsewhere", lambda device: nullcontext(plain.Plain(device)))
    monkeypatch.setattr(bench, "child_gib", child_gib)
    monkeypatch.setattr(bench, "make_photographs", make_photographs)
    monkeypatch.setattr(bench, "training_on", on_crops)
    monkeypatch.setattr(bench, "by_turns", lambda *arguments, **_: by_turns(*arguments, times=2))


def run_bench(*flags):
    bench.bench(bench.make_parser().parse_args([str(flag) for flag in flags]))


@pytest.mark.slow
def test_every_part_is_timed(here, tmp_path, capsys):
    run_bench("--rounds", 1, "--device", "cpu", "--json", tmp_path / "bench.json")
    found, screen = read_json(tmp_path / "bench.json"), capsys.readouterr().out
    speedups = ("step", "epoch", "crop", "kept_crops", "eval")
    assert all(found[f"{name}_speedup"] > 0 and f"{name}_speedup: " in screen for name in speedups)
    assert {"step_ms best.yaml, muon", "step_ms best.yaml, adam", "training_peak_gib"} <= found.keys()


def test_step_of_any_batch(here, tmp_path):
    run_bench("--rounds", 1, "--device", "cpu", "--batch-size", 1, "--json", tmp_path / "bench.json")
    assert read_json(tmp_path / "bench.json").keys() > {"step_ms plain", "step_ms ours", "step_speedup"}
    with pytest.raises(UserError, match="--batch-size 64 × 1 processes: only 4 training images"):
        run_bench("--device", "cpu", "--batch-size", 64)


def test_time_to_quality_of_a_decoder_that_is_good_at_once(here, five, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "STUDY", {"psnr": 0, "ssim": -1, "lpips": 9})
    monkeypatch.setattr(bench, "FAST", ["--config", "configs/fast.yaml", "--batch-size", 4, "--passes", 1])
    run_bench("--quality", five, "--device", "cpu", "--json", tmp_path / "bench.json")
    found = read_json(tmp_path / "bench.json")
    assert found["time_to_quality"] > 0 and found["test"]["psnr"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--images", "5"], "--images 5: at least 6"),
        (["--json", "nowhere/bench.json"], "--json nowhere/bench.json: no such folder"),
    ],
)
def test_mistakes(flags, message):
    with pytest.raises(UserError, match=message):
        run_bench(*flags)


def test_a_process_that_fails_is_one_line():
    with pytest.raises(UserError, match="-c ended with status 3, as it says above"):
        bench.child_gib("-c", "raise SystemExit(3)")
