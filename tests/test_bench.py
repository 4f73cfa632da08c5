"""The plain loop that ours is timed against does the same training."""

import pytest
import torch
from test_train import job_for

import bench
import data
from utils import UserError


def test_plain_loop_trains_as_ours_does(photos):
    job, plain = job_for(photos), bench.Plain(torch.device("cpu"))
    plan = data.epoch_plan(job.images["train"].sizes, 42, 0)
    batch = data.crops(job.images["train"], *(part[:2] for part in plan))
    for _ in range(3):
        assert plain.step(batch.contiguous()) == pytest.approx(float(job.train_step(batch)[0].mean()), rel=1e-4)


def test_own_photographs(photos, tmp_path):
    bench.link_photographs(photos, tmp_path, 3)
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == ["00.png", "01.png", "02.png"]
    with pytest.raises(UserError, match="10 training images; --images 60"):
        bench.link_photographs(photos, tmp_path, 60)
    with pytest.raises(UserError, match="at least 6"):
        bench.bench(bench.make_parser().parse_args(["--images", "5"]))
