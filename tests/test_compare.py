"""Comparing runs: differences and intervals against hand calculations and a t-test, and what is refused."""

import json

import numpy as np
import pytest
from conftest import read_csv
from scipy.stats import t, ttest_ind

from report import compare


def write_run(folder, psnr, images=None, **about):
    """A run's results, with these values of PSNR and the others made of them."""
    folder.mkdir(parents=True)
    images = images or [f"{i}.png" for i in range(len(psnr))]
    content = {"data": "natural", "protocol": "documented", "images": len(psnr), "size": 224} | about
    (folder / "metrics.json").write_text(json.dumps(content))
    rows = [
        f"{name},{value},{value / 40},{1 / value},{2 / value}"
        for name, value in zip(images, psnr, strict=True)
    ]
    (folder / "per_image.csv").write_text("\n".join(["image,psnr,ssim,lpips,feature_error", *rows]))
    return folder


@pytest.fixture
def draws():
    return np.random.default_rng(1)


def table(folder):
    """compare.csv in the folder: {metric: its row}, of one run."""
    return {row["metric"]: row for row in read_csv(folder / "compare.csv")}


def test_interval_is_that_of_a_paired_t_test(draws, tmp_path, figures_of, capsys):
    figures = figures_of(compare)
    base = draws.normal(25, 5, 100)
    gain = draws.normal(0.3, 1, 100)
    runs = [write_run(tmp_path / "a", base), write_run(tmp_path / "b", base + gain)]
    compare.compare(runs, tmp_path / "out")
    rows = table(tmp_path / "out")
    mean, error = gain.mean(), gain.std(ddof=1) / 10
    low, high = t.interval(0.95, 99, mean, error)
    found = rows["psnr"]
    assert float(found["difference"]) == pytest.approx(mean)
    assert float(found["low"]) == pytest.approx(low) and low > 0
    assert float(found["high"]) == pytest.approx(high)
    assert float(found["won"]) == (gain > 0).mean() == float(rows["lpips"]["won"])  # where lower is better
    assert float(rows["lpips"]["difference"]) == pytest.approx((1 / (base + gain) - 1 / base).mean())
    assert float(rows["feature_error"]["difference"]) == pytest.approx((2 / (base + gain) - 2 / base).mean())
    point, _, (bar,) = figures[0].axes[0].containers[0]
    assert point.get_xdata() == pytest.approx([mean])
    assert bar.get_segments()[0][:, 0] == pytest.approx([float(found["low"]), float(found["high"])])
    screen = capsys.readouterr().out
    assert screen.count("over images alone") == 4 and "*" not in screen.split("\n", 1)[1]


def test_baselines_have_no_feature_error(tmp_path):
    a, b = (write_run(tmp_path / name, [20.0, 30.0, 25.0]) for name in "ab")
    table_of_b = (b / "per_image.csv").read_text().splitlines()
    (b / "per_image.csv").write_text("\n".join(line.rpartition(",")[0] for line in table_of_b))
    compare.compare([a, b], tmp_path)
    assert list(table(tmp_path)) == ["psnr", "ssim", "lpips"]


def test_interval_of_seeds_is_that_of_welchs_t_test(draws, tmp_path, capsys):
    """Images that say the same, seeds that differ."""
    images = draws.normal(25, 5, 50)
    means = [0.0, 0.3, 0.1], [1.0, 1.1, 1.7, 1.2, 1.3]
    a, b = (images + np.array(side)[:, None] for side in means)
    found = compare.difference(a, b, lower=False)
    low, high = ttest_ind(means[1], means[0], equal_var=False).confidence_interval()
    assert found["difference"] == pytest.approx(1.26 - 0.4 / 3)
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    for name, side in (("a", a), ("b", b)):
        for seed, psnr in enumerate(side):
            write_run(tmp_path / name / f"seed{seed}", psnr)
    compare.compare([tmp_path / "a", tmp_path / "b"], tmp_path)
    row = table(tmp_path)["psnr"]
    assert (row["interval"], row["seeds"]) == ("over images and seeds", "5, 3")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "PSNR" in line]
    assert f"{1.26 - 0.4 / 3:+.4f}*" in line and line.endswith("over images and seeds")


@pytest.mark.parametrize(
    ("seed", "image", "both"),  # standard deviations: of seeds, of images, of an image with a seed
    [(0.1, 0, 0), (0.1, 0.3, 0), (0, 0.3, 0), (0.1, 0.3, 0.3)],
    ids=["seeds", "seeds and images", "images", "all"],
)
def test_intervals_of_three_seeds_cover_what_they_say(draws, seed, image, both):
    """Simulated, 100 test images: the true difference, 0, lies within at least 93 of 100 intervals."""
    count, within = 4000, 0
    for _ in range(count):
        a, b = draws.normal(0, seed, (2, 3, 1)) + draws.normal(0, both, (2, 3, 100))
        found = compare.difference(a, b + draws.normal(0, image, 100), lower=False)
        within += found["low"] <= 1e-9 and found["high"] >= -1e-9
    assert within / count >= 0.93


def test_seeds_of_one_side_stand_for_both(draws, tmp_path, capsys):
    images = draws.normal(25, 5, 50)
    seeds = np.array([1.0, 1.1, 1.3])
    for seed, gain in enumerate(seeds):
        write_run(tmp_path / "b" / f"seed{seed}", images + gain)
    compare.compare([write_run(tmp_path / "a", images), tmp_path / "b"], tmp_path)
    row = table(tmp_path)["psnr"]
    half = t.ppf(0.975, 2) * seeds.std(ddof=1) * (1 + 1 / 3) ** 0.5
    assert float(row["high"]) - float(row["difference"]) == pytest.approx(half)
    assert row["interval"] == "over images and one side's seeds"
    assert float(row["low"]) > 0 and "*" not in capsys.readouterr().out.split("\n", 1)[1]


def test_one_image_has_no_interval(tmp_path, capsys):
    runs = [write_run(tmp_path / "a", [20.0]), write_run(tmp_path / "b", [21.0])]
    compare.compare(runs, tmp_path)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "PSNR" in line]
    assert "+1.0000" in line and "[–, –]" in line and "*" not in line
    assert (tmp_path / "compare.png").exists()


@pytest.mark.parametrize("seeds", [1, 3])
def test_runs_that_are_the_same(draws, seeds):
    a = np.tile(draws.normal(25, 5, 14), (seeds, 1))
    found = compare.difference(a, a, lower=False)
    assert found["difference"] == found["low"] == found["high"] == found["won"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "sample"}, "data is natural in"),
        ({"protocol": "published"}, "protocol is documented in"),
        ({"images": ["1.png", "0.png"]}, "the images in"),
    ],
)
def test_other_images_are_refused(tmp_path, run_evaluate, refused, change, message):
    a = write_run(tmp_path / "a", [20, 30])
    b = write_run(tmp_path / "b", [20, 30], **change)
    assert message in refused(run_evaluate, "--compare", a, b, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mistakes(tmp_path, run_evaluate, refused):
    assert "takes two runs or more" in refused(run_evaluate, "--compare", tmp_path)
    assert "has no metrics.json; evaluate it first" in refused(run_evaluate, "--compare", tmp_path, tmp_path)
    good = write_run(tmp_path / "good", [20, 30])
    old = write_run(tmp_path / "old", [20, 30], ckpt="best.pt", ckpt_sha256="0")
    (old / "best.pt").touch()
    line = refused(run_evaluate, "--compare", good, old)
    assert line == f"{old / 'metrics.json'} is of an earlier best.pt; evaluate again"
    for name, text in (("metrics.json", "["), ("per_image.csv", "image\na")):
        bad = write_run(tmp_path / f"bad {name}", [20, 30])
        (bad / name).write_text(text)
        line = refused(run_evaluate, "--compare", good, bad, "--out", tmp_path / "out")
        assert f"{bad}: not results of this program" in line
