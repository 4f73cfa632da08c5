"""Comparing runs: differences and intervals against hand calculations and a t-test, and what is refused."""

import csv
import json

import numpy as np
import pytest
from scipy.stats import t

import compare


def write_run(folder, psnr, images=None, **about):
    """A run's results, with these values of PSNR and the others made of them."""
    folder.mkdir(parents=True)
    images = images or [f"{i}.png" for i in range(len(psnr))]
    content = {"data": "natural", "protocol": "documented", "images": len(psnr), "size": 224} | about
    (folder / "metrics.json").write_text(json.dumps(content))
    rows = [f"{name},{value},{value / 40},{1 / value}" for name, value in zip(images, psnr, strict=True)]
    (folder / "per_image.csv").write_text("\n".join(["image,psnr,ssim,lpips", *rows]))
    return folder


@pytest.fixture
def draws():
    return np.random.default_rng(1)


def test_interval_is_that_of_a_paired_t_test(draws, tmp_path, figures_of):
    figures = figures_of(compare)
    base = draws.normal(25, 5, 100)
    gain = draws.normal(0.3, 1, 100)
    a = write_run(tmp_path / "a", base)
    b = write_run(tmp_path / "b", base + gain)
    compare.compare([a, b], tmp_path / "out")
    with open(tmp_path / "out" / "compare.csv", newline="") as file:
        rows = {row["metric"]: row for row in csv.DictReader(file)}
    mean, error = gain.mean(), gain.std(ddof=1) / 10
    low, high = t.interval(0.95, 99, mean, error)
    found = rows["psnr"]
    assert float(found["difference"]) == pytest.approx(mean)
    assert float(found["low"]) == pytest.approx(low, abs=0.03)
    assert float(found["high"]) == pytest.approx(high, abs=0.03)
    assert float(found["won"]) == (gain > 0).mean() == float(rows["lpips"]["won"])  # where lower is better
    assert float(rows["lpips"]["difference"]) == pytest.approx((1 / (base + gain) - 1 / base).mean())
    point, _, (bar,) = figures[0].axes[0].containers[0]
    assert point.get_xdata() == pytest.approx([mean])
    assert bar.get_segments()[0][:, 0] == pytest.approx([float(found["low"]), float(found["high"])])
    assert (tmp_path / "out" / "compare.png").exists()


def test_seeds_widen_the_interval(draws):
    """Images that say the same, seeds that differ: the interval is that of the seeds."""
    images = draws.normal(25, 5, 50)
    a = images + np.zeros((3, 1))
    b = images + np.array([[0.0], [1.0], [2.0]])
    found = compare.difference(a, b, lower=False)
    assert found["difference"] == pytest.approx(1)
    assert found["low"] < 0.4 and found["high"] > 1.6  # of means of three draws from 0, 1, 2
    alone = compare.difference(a[:1], b[1:2], lower=False)
    assert alone["low"] == pytest.approx(1) == alone["high"]


def test_seed_folders_are_one_run(tmp_path, capsys):
    for seed, gain in ((1, 1.0), (2, 3.0)):
        write_run(tmp_path / "b" / f"seed{seed}", [20 + gain, 30 + gain])
    a = write_run(tmp_path / "a", [20, 30])
    compare.compare([a, tmp_path / "b"], tmp_path)
    assert "+2.0000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "sample"}, "data is natural in"),
        ({"protocol": "published"}, "protocol is documented in"),
        ({"images": ["1.png", "0.png"]}, "the images in"),
    ],
)
def test_other_images_are_refused(tmp_path, run_evaluate, error_line, change, message):
    a = write_run(tmp_path / "a", [20, 30])
    b = write_run(tmp_path / "b", [20, 30], **change)
    assert run_evaluate("--compare", a, b, "--out", tmp_path / "out") == 2
    assert message in error_line() and not (tmp_path / "out").exists()


def test_mistakes(tmp_path, run_evaluate, error_line):
    assert run_evaluate("--compare", tmp_path) == 2
    assert "takes two runs or more" in error_line()
    assert run_evaluate("--compare", tmp_path, tmp_path) == 2
    assert "has no metrics.json; evaluate it first" in error_line()
    good = write_run(tmp_path / "good", [20, 30])
    bad = write_run(tmp_path / "bad", [20, 30])
    for name, text in (("metrics.json", "[" * 100_000), ("per_image.csv", "image\n" + "x" * 200_000)):
        before = (bad / name).read_text()
        (bad / name).write_text(text)
        assert run_evaluate("--compare", good, bad, "--out", tmp_path / "out") == 2
        assert "bad: not results of this program" in error_line()
        (bad / name).write_text(before)
