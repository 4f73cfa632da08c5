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
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == ["00.png", "01.png", "02.png"]
    with pytest.raises(UserError, match="10 training images; --images 60"):
        bench.link_photographs(photos, tmp_path, 60)
    with pytest.raises(UserError, match="at least 6"):
        bench.bench(bench.make_parser().parse_args(["--images", "5"]))
