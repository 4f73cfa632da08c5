"""The tables and pictures that compare the experiments, and the data that the page carries."""

import base64
import csv
import hashlib
import io
import json
import math
import shutil

import numpy as np
import pytest
from made_up import CONTROL, EVIL, FAILED, NAMES, UNRUN, copied, page_content, thirty_tiles, write_baselines
from PIL import Image

import data
import report
import results
from study import METRICS

# A baseline that made-up runs are below.
BELOW = {"psnr": {"mean": 30, "std": 1}, "ssim": {"mean": 1, "std": 0}, "lpips": {"mean": 0, "std": 0}}


def test_page_has_every_experiment(content):
    rows = {row["experiment"]: row for row in content["rows"]}
    assert list(rows) == NAMES
    assert rows[UNRUN]["note"] == "not run" and rows[FAILED]["note"] == "failed: error: out of <b>memory</b>"
    assert rows[CONTROL]["note"] == "random weights (control)"
    first = rows[NAMES[0]]
    assert (first["published_psnr"], first["resolution"], first["protocol"]) == (17.35, 112, "documented")
    assert first["minutes"] == 1.0 and 20 < first["psnr"] < 21 and first["data"] == "photos"
    assert content["histories"][NAMES[0]]["val_loss"][1] == 0.5 and content["histories"][UNRUN] == {}


def test_page_has_the_test_images_and_every_reconstruction(content, runs):
    assert len(content["images"]) == 24
    assert content["images"][0]["name"] == EVIL and content["images"][-1]["name"] == "0029.png"
    assert all(len(image["runs"]) == 13 for image in content["images"])
    assert content["images"][-1]["runs"][NAMES[0]]["psnr"] == 11
    expected = data.center_crops(thirty_tiles()[29:])[0].permute(1, 2, 0).numpy()
    for factor, text in (
        (1, content["images"][-1]["original"]),
        (0.75, content["images"][-1]["runs"][NAMES[0]]["picture"]),
    ):
        with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
            error = np.abs(np.asarray(picture) / 255 - factor * expected)
        assert picture.size == (224, 224) and error.mean() < 0.02
    assert (runs / "report.html").stat().st_size < 30e6


def test_grid_shows_the_originals_above_every_experiment(content, runs, monkeypatch, tmp_path):
    with Image.open(runs / "grid.png") as picture:
        assert picture.height > 14 * 200 and picture.width > 6 * 200
    grids = []
    monkeypatch.setattr(report, "draw_grid", lambda grid, path: grids.append(grid))
    report.draw_images(content["images"], tmp_path / "grid.png")
    assert list(grids[0]) == ["original", *(name for name in NAMES if name not in (UNRUN, FAILED))]
    expected = data.center_crops(thirty_tiles()[29:])[0].permute(1, 2, 0).numpy()
    for label, factor in (("original", 1), (NAMES[0], 0.75)):
        picture, caption = grids[0][label][-1]  # the last of six test images
        assert np.abs(np.asarray(picture) / 255 - factor * expected).mean() < 0.02
    assert caption == "11.00 dB"


def test_other_runs_join_the_fifteen(runs, tmp_path):
    copied(runs, tmp_path / "mine")
    shutil.copy(runs / NAMES[0] / "metrics.json", tmp_path)
    rows = results.result_rows(tmp_path)
    assert [row["experiment"] for row in rows] == [*NAMES, ".", "mine"]
    assert rows[-1]["psnr"] == rows[-2]["psnr"] > 20


def test_seeds_are_one_row_with_their_deviation(runs, tmp_path):
    for seed, psnr in ((2, 21.0), (10, 24.0)):
        config = json.loads((runs / NAMES[0] / "metrics.json").read_text())["config"] | {"seed": seed}
        values = {"psnr": {"mean": psnr, "std": 1.0}, "config": config}
        copied(runs, tmp_path / NAMES[0] / f"seed{seed}", **values)
    (tmp_path / NAMES[1] / "seed1").mkdir(parents=True)
    (tmp_path / NAMES[1] / "seed1" / "error.txt").write_text("error: no")
    rows = results.result_rows(tmp_path)
    assert (rows[0]["psnr"], rows[0]["seed"]) == (22.5, "2, 10")
    assert rows[0]["psnr_seeds"] == pytest.approx(3 / math.sqrt(2))  # two values 3 apart
    assert rows[0]["note"] == "2 seeds: ± 2.12 PSNR, ± 0.0000 SSIM, ± 0.0000 LPIPS"
    assert rows[1]["note"] == "failed: error: no" and len(rows) == 15
    report.write_report(tmp_path)
    assert "| 2, 10 | photos | 2 seeds: ± 2.12" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "grid.png").exists()  # of the first seed


def test_seeds_that_are_missing_are_said(runs, tmp_path):
    found = json.loads((runs / NAMES[0] / "metrics.json").read_text())
    for seed in (1, 4):
        copied(runs, tmp_path / NAMES[0] / f"seed{seed}", config=found["config"] | {"seed": seed})
    for seed, file in ((2, "error.txt"), (3, "last.pt")):
        (tmp_path / NAMES[0] / f"seed{seed}").mkdir()
        (tmp_path / NAMES[0] / f"seed{seed}" / file).write_text("error: no memory")
    note = results.result_rows(tmp_path)[0]["note"]
    assert note.startswith("2 seeds: ")
    assert note.endswith("; seed2 failed: error: no memory; seed3 not finished")


def test_seeds_are_of_any_device_and_of_the_same_test_images(runs, tmp_path):
    found = json.loads((runs / NAMES[0] / "metrics.json").read_text())
    for seed, more in ((1, {}), (2, {"device": "cuda:1"})):
        copied(runs, tmp_path / "a" / f"seed{seed}", config=found["config"] | {"seed": seed} | more)
    for seed, source in ((1, found["data"]), (2, "/other")):
        copied(runs, tmp_path / "b" / f"seed{seed}", config=found["config"] | {"seed": seed}, data=source)
    notes = {row["experiment"]: row["note"] for row in results.result_rows(tmp_path)}
    assert notes["a"].startswith("2 seeds")
    assert notes["b"] == f"seed2: data is /other, of another seed {found['data']}"


def test_published_numbers_go_by_configuration_not_by_name(runs, tmp_path):
    config = json.loads((runs / NAMES[0] / "metrics.json").read_text())["config"]
    copied(runs, tmp_path / "mine")  # experiment 1 under another name
    copied(runs, tmp_path / NAMES[0], config=config | {"layer": "block2"})  # experiment 2 under that of 1
    copied(runs, tmp_path / "other", config=config | {"width": 8})
    rows = {row["experiment"]: row for row in results.result_rows(tmp_path)}
    assert rows["mine"]["published_psnr"] == 17.35 and rows["mine"]["note"] == ""
    assert (
        rows[NAMES[0]]["published_psnr"] == 16.89
        and rows[NAMES[0]]["note"] == "not this experiment: layer block2"
    )
    assert rows["other"]["published_psnr"] is None and rows["other"]["published_inference"] is None
    (line,) = [line for line in report.results_table(list(rows.values())).splitlines() if "| other |" in line]
    assert "12–15" not in line and "– → 12.5" in line


def test_data_are_named_as_shortly_as_tells_them_apart(runs, tmp_path):
    sources = {"a": "/one/photos", "b": "/two/photos", "c": "/one/natural", "d": "sample", "e": "."}
    for name, source in sources.items():
        copied(runs, tmp_path / name, data=source)
    labels = {row["experiment"]: row.get("data") for row in results.result_rows(tmp_path)}
    assert [labels[name] for name in "abcde"] == ["one/photos", "two/photos", "natural", "sample", "."]


def test_folder_that_is_not_there(tmp_path, run_evaluate, error_line):
    assert run_evaluate("--report", tmp_path / "runs") == 2
    assert "no such folder" in error_line()


@pytest.mark.parametrize("name", ["history.csv", "reconstructions.zip", "metrics.json"])
def test_what_cannot_be_read_is_named_in_its_row(runs, tmp_path, run_evaluate, name):
    """Of the fifteen and of other runs; those beside them keep theirs."""
    folder = tmp_path / "runs"
    shapeless = json.loads((runs / NAMES[0] / "metrics.json").read_text()) | {"shape": []}
    damages = ["[]", "epoch,seconds\n1,soon\n", "", '{"psnr": {"mean": NaN}}', "[" * 100_000]
    damages.append(json.dumps(shapeless))
    bad = [NAMES[0], *(f"bad{number}" for number in range(1, len(damages)))]
    copied(runs, folder / NAMES[1], NAMES[1])
    for run, content in zip(bad, damages, strict=True):
        copied(runs, folder / run)
        (folder / run / name).write_text(content)
    assert run_evaluate("--report", folder) == 0
    found = {row["experiment"]: row for row in results.result_rows(folder)}
    shown = {row["experiment"]: row["note"] for row in page_content(folder)["rows"]}
    for run in bad:
        assert name in shown[run] and "again" in shown[run]
        assert ("psnr" in found[run]) == (name != "metrics.json")
    assert found[NAMES[1]]["note"] == shown[NAMES[1]] == "" and found[NAMES[1]]["psnr"] > 20


def test_results_of_an_earlier_best_are_named_and_not_shown(runs, tmp_path):
    """In their row, or of an inversion in its note; what belongs to the best.pt there, or to none, stays."""
    digest = hashlib.sha256(b"decoder").hexdigest()
    of = {"ckpt": "best.pt", "ckpt_sha256": digest}
    config = json.loads((runs / NAMES[0] / "metrics.json").read_text())["config"]
    inverted = {"encoder": config["encoder"], "layer": config["layer"], "weights": config["weights"]}
    inverted |= {"start": config["decoder"], "data": "/a/photos", "images": 4} | of
    inverted["metrics"] = {kind: {"psnr": {"mean": 30}} for kind in ("start", "inversion")}
    for name, content in (("old", "better"), ("same", "decoder"), ("gone", ""), ("seeds/seed1", "better")):
        copied(runs, tmp_path / name, **of)
        if content:
            (tmp_path / name / "best.pt").write_text(content)
    copied(runs, tmp_path / "inverted")
    (tmp_path / "inverted" / "inversion.json").write_text(json.dumps(inverted))
    (tmp_path / "inverted" / "best.pt").write_text("better")
    report.write_report(tmp_path)
    page = page_content(tmp_path)
    rows = {row["experiment"]: row for row in page["rows"]}
    again = "is of an earlier best.pt; evaluate again"
    assert rows["old"]["note"] == f"old/metrics.json {again}"
    assert rows["seeds"]["note"] == f"seeds/seed1/metrics.json {again}"
    assert rows["inverted"]["note"] == "inversion.json is of an earlier best.pt; invert again"
    assert {name for name in rows if rows[name].get("psnr")} == {"same", "gone", "inverted"}
    assert {name for image in page["images"] for name in image["runs"]} == {"same", "gone", "inverted"}


@pytest.mark.parametrize("compression", [8, 14, 99])  # deflate and LZMA, which these files have not; none
def test_zip_of_another_compression_is_named_in_its_row(compression, runs, tmp_path):
    copied(runs, tmp_path / NAMES[0])
    archive = tmp_path / NAMES[0] / "reconstructions.zip"
    content = bytearray(archive.read_bytes())
    entry = content.find(b"PK\x01\x02")  # of its directory; ten bytes on is the compression
    content[entry + 10] = compression
    archive.write_bytes(content)
    report.write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "reconstructions.zip: damaged" in page


def test_page_has_no_nan(runs, tmp_path):
    copied(runs, tmp_path / NAMES[0])
    (tmp_path / NAMES[0] / "history.csv").write_text("epoch,val_psnr,seconds\n1,nan,2.0\n2,inf,2.0\n")
    report.write_report(tmp_path)

    def refuse(constant):
        raise AssertionError(constant)

    content = page_content(tmp_path, parse_constant=refuse)
    assert content["histories"][NAMES[0]]["val_psnr"] == [None, None]


# --- Baselines -------------------------------------------------------------------------------------------


def test_baselines_are_the_last_rows_and_dashed_lines(runs, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: figures.append(figure))
    copied(runs, tmp_path / NAMES[0])
    write_baselines(tmp_path)
    report.write_report(tmp_path)
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["experiment"] for row in rows] == [*NAMES, "constant colour", "mean colour"]
    last = rows[-1]
    assert (last["psnr"], last["psnr_std"], last["data"], last["protocol"]) == (
        "21.0",
        "0.1",
        "photos",
        "documented",
    )
    assert last["parameters"] == last["minutes"] == last["inference_ms"] == last["published_psnr"] == ""
    table = (tmp_path / "results.md").read_text()
    assert (
        "| constant colour | – → 13.00 | – → 0.300 | – → 0.900 | – → – | – → – | – → – | – | photos |"
        in table
    )
    content = page_content(tmp_path)
    assert content["rows"][-1] == {
        "experiment": "mean colour",
        "psnr": 21.0,
        "psnr_std": 0.1,
        "ssim": 0.4,
        "ssim_std": 0.1,
        "lpips": 0.8,
        "lpips_std": 0.1,
        "data": "photos",
        "protocol": "documented",
        "note": "baseline, no features",
    }
    assert list(content["histories"]) == NAMES
    (figure,) = figures
    for axis, places in zip(figure.axes, ([13, 21], [0.3, 0.4], [0.9, 0.8]), strict=True):
        assert [line.get_xdata()[0] for line in axis.lines] == places
        assert {line.get_linestyle() for line in axis.lines} == {"--"}
        assert len(axis.get_yticks()) == 15
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    assert legend == {"published", "measured", "constant colour", "mean colour"}


def test_what_is_below_mean_colour_says_so(runs, tmp_path):
    """On the same data, by whatever name, and by the same protocol."""
    copied(runs, tmp_path / NAMES[0])
    copied(runs, tmp_path / NAMES[4], NAMES[4])  # 22 dB
    copied(runs, tmp_path / "control", CONTROL, psnr={"mean": 14.0, "std": 1.0}, data="/a/b/../photos")
    copied(runs, tmp_path / "data", data="/b/photos")
    copied(runs, tmp_path / "protocol", protocol="published")
    write_baselines(tmp_path)
    notes = {row["experiment"]: row["note"] for row in results.result_rows(tmp_path)}
    assert notes[NAMES[0]] == "below mean colour"
    assert notes["control"] == "random weights (control); below mean colour"
    assert (notes[NAMES[4]], notes["data"], notes["protocol"]) == ("", "", "protocol published")
    assert notes["mean colour"] == notes["constant colour"] == "baseline, no features"
    write_baselines(tmp_path, protocol="published")
    notes = {row["experiment"]: row["note"] for row in results.result_rows(tmp_path)}
    assert (notes[NAMES[0]], notes["protocol"]) == ("", "protocol published; below mean colour")
    assert notes["mean colour"] == "baseline, no features; protocol published"


def test_what_is_no_part_of_the_studys_recipe_is_said(runs, tmp_path):
    config = json.loads((runs / NAMES[0] / "metrics.json").read_text())["config"]
    copied(runs, tmp_path / "few", config=config | {"train_images": 80, "patience": 3})
    copied(runs, tmp_path / "six", config=config | {"decoder": "feedback"}, iterations=6)
    copied(runs, tmp_path / "three", config=config | {"decoder": "feedback"}, iterations=3)
    notes = {row["experiment"]: row["note"] for row in results.result_rows(tmp_path)}
    assert notes["few"] == "train_images 80, patience 3"
    assert (notes["six"], notes["three"]) == ("asked for 6 iterations", "")


def test_images_of_another_size_are_others(runs, tmp_path):
    """Baselines are of 224 pixels, and so are the pictures that a run of 96 is not laid over."""
    copied(runs, tmp_path / "a")
    copied(runs, tmp_path / "b", size=96)
    write_baselines(tmp_path, baselines={"mean colour": BELOW})
    rows = results.result_rows(tmp_path)
    notes = {row["experiment"]: row["note"] for row in rows}
    assert (notes["a"], notes["b"]) == ("below mean colour", "")
    images = report.test_images(tmp_path, rows)
    assert {tuple(image["runs"]) for image in images} == {("a",), ("b",)}


def test_what_is_below_a_thumbnail_says_so(runs, tmp_path):
    """The picture in as many pixels as the layer has positions: 112 for experiment 1, 56 for 2."""
    copied(runs, tmp_path / NAMES[0])
    copied(runs, tmp_path / NAMES[1], NAMES[1])
    write_baselines(tmp_path, baselines={"thumbnail 112 × 112": BELOW})
    rows = {row["experiment"]: row["note"] for row in results.result_rows(tmp_path)}
    assert rows[NAMES[0]] == "below thumbnail 112 × 112" and rows[NAMES[1]] == ""


def test_one_folder_by_two_names_has_one_label(runs, tmp_path):
    copied(runs, tmp_path / NAMES[0], data="/x/../a/photos")
    write_baselines(tmp_path)
    assert {row["data"] for row in results.result_rows(tmp_path) if "data" in row} == {"photos"}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "[" * 100_000,
        {"data": "/a\0b"},
        {"protocol": "mine"},
        {"baselines": {"mean colour": {}}},
        {"baselines": {"my colour": {metric: {"mean": 1, "std": 1} for metric in METRICS}}},
        {"baselines": {"mean colour": {metric: {"mean": math.nan, "std": 1} for metric in METRICS}}},
        {"baselines": {"mean colour": {metric: {"mean": 10**400, "std": 1} for metric in METRICS}}},
    ],
)
def test_damaged_baselines_are_one_row_that_says_so(tmp_path, content):
    if isinstance(content, str):
        (tmp_path / "baselines.json").write_text(content)
    else:
        write_baselines(tmp_path, **content)
    *experiments, row = results.result_rows(tmp_path)
    assert [row["experiment"] for row in experiments] == NAMES
    assert row.keys() == {"experiment", "note"} and row["experiment"] == "baselines.json"
    assert "is not that of evaluate.py --baselines" in row["note"] and "measure again" in row["note"]


def test_damaged_baselines_leave_the_report(runs, tmp_path, run_evaluate):
    copied(runs, tmp_path / NAMES[0])
    (tmp_path / "baselines.json").write_text("{}")
    assert run_evaluate("--report", tmp_path) == 0
    assert "| baselines.json | – → – |" in (tmp_path / "results.md").read_text()
    assert "measure again" in (tmp_path / "report.html").read_text()
