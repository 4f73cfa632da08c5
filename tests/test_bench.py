"""The plain loop that ours is timed against does the same training."""

import pytest
import torch

import bench
import plain
from utils import UserError


def test_plain_loop_trains_as_ours_does(own_photos):
    cpu = torch.device("cpu")
    ours = bench.Ours(str(own_photos), cpu, "--batch-size", "2")
    theirs = plain.Plain(cpu)
    batch = ours.batch()
    for _ in range(3):
        assert theirs.step(batch.contiguous()) == pytest.approx(float(ours.step(batch)), rel=1e-4)


def test_own_photographs(photos, tmp_path):
    bench.link_photographs(photos, tmp_path, 3)
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == [
        "00000.png",
        "00001.png",
        "00002.png",
    ]
    with pytest.raises(UserError, match="10 training images; --images 60"):
        bench.link_photographs(photos, tmp_path, 60)
    with pytest.raises(UserError, match="at least 6"):
        bench.bench(bench.make_parser().parse_args(["--images", "5"]))


def test_every_part_is_timed(own_photos):
    """The functions that a benchmark calls, each with the parts that it promises."""
    cpu = torch.device("cpu")
    figures = {}
    bench.bench_cheap_epochs(str(own_photos), cpu, 1, lambda title, **values: figures.update(values))
    assert set(figures["image_ms"]) == {"block1", "block1, crop 64", "block5", "block5, kept"}
    assert figures["kept_crops_speedup"] > 1
    ours = bench.Ours(str(own_photos), cpu)
    parts = bench.step_parts(ours, ours.batch())
    assert set(parts) == {"data", "encoder", "decoder", "lpips", "optimiser"} and min(parts.values()) > 0
    assert bench.child_gib("-c", bench.ATTENTION.replace("112", "28")) > 0.1


def test_time_to_quality_of_a_decoder_that_is_good_at_once(own_photos, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "STUDY", {"psnr": 0, "ssim": -1, "lpips": 9})
    config = "--config configs/fast.yaml --batch-size 4 --passes 1"
    monkeypatch.setattr(bench, "FAST", config.split())
    figures = {}
    bench.bench_quality(str(own_photos), torch.device("cpu"), lambda title, **values: figures.update(values))
    wanted = 30 * figures["plain_epoch_seconds"] / figures["fast_seconds"]
    assert figures["time_to_quality"] == pytest.approx(wanted) and figures["test"]["psnr"] > 0
