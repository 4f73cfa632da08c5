"""The tables, pictures and page that compare runs, made of results that evaluate.py wrote."""

import base64
import hashlib
import io
import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import read_csv, read_json
from PIL import Image

import evaluate
from flags import parse_evaluate
from report import page, results
from report.results import PUBLISHED_RESULTS
from utils import METRICS

NAMES = list(PUBLISHED_RESULTS)
EVIL = "<img src=x onerror=alert(1)> {{CONTENT}}"  # a name that a folder may have


@pytest.fixture(scope="module")
def evaluated(trained, photos, tmp_path_factory):
    """The folder of an evaluated run of experiment 1, and baselines.json in the folder above it."""
    run = tmp_path_factory.mktemp("runs") / "run"
    shutil.copytree(trained, run)
    for flags in (("--ckpt", run / "best.pt"), ("--baselines", "--data", photos, "--out", run.parent)):
        evaluate.evaluate(parse_evaluate([*map(str, flags), "--quiet"]))
    return run


@pytest.fixture
def copied(evaluated):
    """Copy the evaluated run to a folder, with changes in its metrics.json, and in `config` there."""

    def copy(folder, config=None, psnr=None, **changes):
        shutil.copytree(evaluated, folder)
        content = measured(folder) | changes
        content["config"] |= config or {}
        if psnr:
            content["psnr"] = {"mean": psnr, "std": 1.0}
        (folder / "metrics.json").write_text(json.dumps(content))

    return copy


def measured(folder):
    return read_json(folder / "metrics.json")


def rows_of(folder):
    return {row["experiment"]: row for row in results.result_rows(folder)}


def notes_of(folder):
    return {name: row["note"] for name, row in rows_of(folder).items()}


class Page(HTMLParser):
    """The elements of report.html, {tag: attributes of each}, their text and the data that it carries."""

    def __init__(self, folder):
        super().__init__()
        self.elements, self.text, self.inside = {}, [], None
        self.feed((folder / "report.html").read_text(encoding="utf-8"))
        self.rows = {row["experiment"]: row for row in self.data["rows"]}

    def handle_starttag(self, tag, attributes):
        self.inside = dict(attributes)
        self.elements.setdefault(tag, []).append(self.inside)

    def handle_data(self, text):
        self.text.append(text)
        if self.inside and self.inside.get("id") == "content":
            self.data = json.loads(text)
            self.inside = None


def decoded(text):
    with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
        return np.asarray(picture) / 255


@pytest.fixture(scope="module")
def reported(evaluated):
    """A folder of experiment 1, one that failed, one still training, a run of another name, baselines."""
    folder = evaluated.parent / "reported"
    for name in (NAMES[0], NAMES[2], EVIL):
        shutil.copytree(evaluated, folder / name)
    (folder / NAMES[2] / "metrics.json").unlink()
    (folder / NAMES[1]).mkdir()
    (folder / NAMES[1] / "error.txt").write_text("something\nerror: out of <b>memory</b>\n")
    images = (folder / EVIL / "per_image.csv").read_text().replace("00.jpg", f'"</script>{EVIL}"')
    (folder / EVIL / "per_image.csv").write_text(images)
    shutil.copy(evaluated.parent / "baselines.json", folder)
    evaluate.evaluate(parse_evaluate(["--report", str(folder)]))
    return folder


def test_experiments_side_by_side(evaluated, reported, photos):
    found, page = measured(evaluated), Page(reported)
    baselines = read_json(reported / "baselines.json")["baselines"]

    rows = {row["experiment"]: row for row in read_csv(reported / "results.csv")}
    assert list(rows) == [EVIL, *NAMES, *baselines]
    first = rows[NAMES[0]]
    assert float(first["psnr"]) == found["psnr"]["mean"]
    assert float(first["lpips_std"]) == found["lpips"]["std"]
    assert (first["published_psnr"], first["data"], first["seed"]) == ("17.35", photos.name, "42")
    epochs = read_csv(evaluated / "history.csv")
    seconds = sum(float(epoch["seconds"]) + float(epoch["val_seconds"]) for epoch in epochs)
    assert float(first["minutes"]) == pytest.approx(seconds / 60)
    assert list(first)[-1] == "note" and "; epochs 2, lr 0.002" in first["note"]
    assert float(rows["mean colour"]["ssim"]) == baselines["mean colour"]["ssim"]["mean"]
    assert rows["mean colour"]["published_psnr"] == rows["mean colour"]["minutes"] == ""

    table = (reported / "results.md").read_text()
    assert f"| {NAMES[0]} | 17.35 → {found['psnr']['mean']:.2f} | 0.560 → " in table
    assert "| 34K → 33,731 | 70 → " in table
    assert "error: out of <b>memory</b>" in rows[NAMES[1]]["note"] == page.rows[NAMES[1]]["note"]

    assert list(page.rows)[:3] == [EVIL, NAMES[0], "constant colour"]
    assert list(page.rows)[-15:] == ["thumbnail 112 × 112", NAMES[1], NAMES[2], *NAMES[3:]]
    assert page.rows[NAMES[2]]["note"] == "not finished" and page.rows[NAMES[3]]["note"] == "not run"
    assert page.rows[NAMES[0]]["PSNR (dB) ↑"] == f"17.35 → {found['psnr']['mean']:.2f}"


def test_bars_and_dashed_lines(evaluated, reported, tmp_path):
    figure = page.draw_results(results.result_rows(reported), tmp_path / "results.png")
    values = read_json(reported / "baselines.json")["baselines"]
    for axis, metric in zip(figure.axes, METRICS, strict=True):
        lines = [values[name][metric]["mean"] for name in ("constant colour", "mean colour")]
        assert [line.get_xdata()[0] for line in axis.lines] == lines
        found = measured(evaluated)[metric]["mean"]
        assert axis.containers[-1].datavalues[1] == found and len(axis.get_yticks()) == 2  # what was measured


def test_page_needs_no_other_file_and_takes_names_for_text(reported):
    page = Page(reported)
    assert "img" not in page.elements and "b" not in page.elements
    assert len(page.elements["script"]) == 2 and len(page.elements["svg"]) == 2
    sources = {"src", "href", "xlink:href", "action", "data"}
    attributes = [pair for every in page.elements.values() for element in every for pair in element.items()]
    assert all(value[0] == "#" or value == "data:," for name, value in attributes if name in sources)
    assert EVIL in page.rows and page.data["images"][0]["name"] == f"</script>{EVIL}"
    assert page.text.count(EVIL) == 2  # in the bars, and in the legend of the curves
    assert {NAMES[0], "validation loss", "LPIPS ↓"} <= set(page.text) and NAMES[14] in page.rows


def test_test_images_beside_every_reconstruction(photos, reported):
    _, *images = Page(reported).data["images"]  # the first is that of the other name
    images.sort(key=lambda image: image["name"])
    assert [image["name"] for image in images] == ["00.jpg", "01.jpg", "02.jpg"]
    assert [list(image["runs"]) for image in images] == [[NAMES[0]], [EVIL, NAMES[0]], [EVIL, NAMES[0]]]
    for image, row in zip(images, read_csv(reported / NAMES[0] / "per_image.csv"), strict=True):
        with Image.open(photos / "test" / image["name"]) as photo:
            expected = np.asarray(photo)[16:240, 16:240] / 255
        original = decoded(image["original"])
        assert original.shape == (224, 224, 3) and np.abs(original - expected).mean() < 0.02
        made = decoded(image["runs"][NAMES[0]]["picture"])
        mse = ((made - expected) ** 2).mean()
        assert 10 * np.log10(1 / mse) == pytest.approx(float(row["psnr"]), abs=0.5)
        assert image["runs"][NAMES[0]]["metrics"]["PSNR (dB) ↑"] == f"{float(row['psnr']):.2f}"
    with Image.open(reported / "grid.png") as picture:
        assert picture.height > 3 * 200 and picture.width > 3 * 200


def test_a_folder_without_runs(tmp_path, run_evaluate, refused):
    assert "no such folder" in refused(run_evaluate, "--report", tmp_path / "runs")
    (tmp_path / "grid.png").touch()  # of an earlier report
    assert run_evaluate("--report", tmp_path) == 0
    assert {row["note"] for row in Page(tmp_path).rows.values()} == {"not run"}
    assert not (tmp_path / "grid.png").exists()


def test_published_numbers_are_of_the_configuration(copied, tmp_path):
    """Whatever the folder is called; it may be the one that is reported."""
    copied(tmp_path / "mine")
    copied(tmp_path / NAMES[0], {"layer": "block2"})
    copied(tmp_path / "other", {"width": 8})
    shutil.copy(tmp_path / "mine" / "metrics.json", tmp_path)
    rows = rows_of(tmp_path)
    assert list(rows) == [".", "mine", "other", *NAMES]
    assert rows["mine"]["published_psnr"] == rows["."]["published_psnr"] == 17.35
    assert rows[NAMES[0]]["published_psnr"] == 16.89
    assert rows[NAMES[0]]["note"].startswith("not this experiment: layer block2; ")
    assert rows["other"]["published_psnr"] is rows["other"]["published_inference"] is None


def test_notes_say_how_a_run_differs_from_the_study(copied, tmp_path):
    study = {"epochs": 30, "lr": 1e-4}
    copied(tmp_path / "few", study | {"train_images": 80, "patience": 3}, psnr=30)
    copied(tmp_path / "control", study, psnr=30, weights="random")
    copied(tmp_path / "code", study, psnr=30, protocol="published")
    notes = notes_of(tmp_path)
    assert notes["few"] == "train_images 80, patience 3" and notes["code"] == "protocol published"
    assert notes["control"] == "random weights (control)"


def test_data_are_named_by_their_folder_if_that_tells_them_apart(copied, tmp_path):
    def labels():
        return [row["data"] for row in results.result_rows(tmp_path) if "data" in row]

    for name, source in {"a": "/one/photos", "b": "/x/../one/photos", "c": "sample"}.items():
        copied(tmp_path / name, data=source)
    assert labels() == ["photos", "photos", "sample"]
    copied(tmp_path / "d", data="/two/photos")
    assert labels() == ["/one/photos", "/x/../one/photos", "sample", "/two/photos"]


@pytest.mark.parametrize("name", ["history.csv", "reconstructions.zip", "per_image.csv", "metrics.json"])
@pytest.mark.parametrize("content", ["", "epoch,seconds\n1,soon\n"])
def test_a_damaged_file_is_named_in_its_row(copied, tmp_path, name, content):
    copied(tmp_path / NAMES[0])
    copied(tmp_path / "good")
    (tmp_path / NAMES[0] / name).write_text(content)
    rows = rows_of(tmp_path)
    bad, good = rows[NAMES[0]], rows["good"]
    assert name in bad["note"] and "again" in bad["note"] and "psnr" not in bad
    assert "psnr" in good and "again" not in good["note"]


def test_results_of_an_earlier_best_are_named_and_not_shown(copied, tmp_path):
    """In their row, or of an inversion in its note; what belongs to the best.pt there, or to none, stays."""
    of = {"ckpt": "best.pt", "ckpt_sha256": hashlib.sha256(b"decoder").hexdigest()}
    for name, content in (("old", "better"), ("same", "decoder"), ("seeds/seed1", "better")):
        copied(tmp_path / name, **of)
        (tmp_path / name / "best.pt").write_text(content)
    copied(tmp_path / "gone", **of)
    (tmp_path / "gone" / "best.pt").unlink()
    copied(tmp_path / "inverted")
    (tmp_path / "inverted" / "inversion.json").write_text(json.dumps(of))
    rows = rows_of(tmp_path)
    again = "is of an earlier best.pt; evaluate again"
    assert rows["old"]["note"] == f"old/metrics.json {again}"
    assert rows["seeds"]["note"] == f"seeds/seed1/metrics.json {again}"
    assert "inversion.json is of an earlier best.pt; invert again" in rows["inverted"]["note"]
    assert {name for name in rows if rows[name].get("images")} == {"same", "gone", "inverted"}


# --- Seeds -----------------------------------------------------------------------------------------------


def test_seeds_are_one_row_with_their_std(copied, tmp_path):
    for seed, mean in ((2, 21.0), (10, 24.0)):
        copied(tmp_path / NAMES[0] / f"seed{seed}", {"seed": seed, "device": f"cuda:{seed}"}, psnr=mean)
    for seed, file in ((3, "error.txt"), (4, "last.pt")):
        (tmp_path / NAMES[0] / f"seed{seed}").mkdir()
        (tmp_path / NAMES[0] / f"seed{seed}" / file).write_text("error: no memory")
    (tmp_path / NAMES[1] / "seed1").mkdir(parents=True)
    (tmp_path / NAMES[1] / "seed1" / "error.txt").write_text("error: no")
    row, failed, *_ = results.result_rows(tmp_path)
    assert (row["psnr"], row["psnr_std"], row["seed"]) == (22.5, 1.0, "2, 10")
    assert row["psnr_seeds"] == pytest.approx(3 / 2**0.5)  # two values 3 apart
    assert "; 2 seeds: ± 2.12 PSNR, ± 0.0000 SSIM, ± 0.0000 LPIPS" in row["note"]
    assert row["note"].endswith("; seed3 failed: error: no memory; seed4 not finished")
    assert len(row["images"]) == 3 and failed["note"] == "failed: error: no"


def test_seeds_are_of_the_same_configuration_and_images(copied, evaluated, tmp_path):
    data = measured(evaluated)["data"]
    for run, config, changes in (
        ("data", {}, {"data": "/other"}),
        ("lr", {"lr": 0.5}, {}),
        ("same", {}, {"data": f"{data}/../{data.rpartition('/')[2]}"}),
    ):
        copied(tmp_path / run / "seed1", {"seed": 1})
        copied(tmp_path / run / "seed2", config | {"seed": 2}, **changes)
    notes = notes_of(tmp_path)
    assert notes["data"] == f"seed2: data is /other, of another seed {data}"
    assert notes["lr"] == "seed2: lr is 0.5, of another seed 0.002"
    assert "2 seeds" in notes["same"]


# --- Baselines -------------------------------------------------------------------------------------------


def test_what_needs_no_features_stands_in_the_row(copied, evaluated, tmp_path):
    """As measured on the same images, at the layer's size."""
    found = measured(evaluated)
    colour, thumbnail = (found["baselines"][kind]["psnr"]["mean"] for kind in ("mean_colour", "thumbnail"))
    copied(tmp_path / "high", psnr=colour + 1, top1_agreement=0.75)
    copied(tmp_path / "low", psnr=colour - 1)
    copied(tmp_path / "older", baselines={})
    shutil.copy(evaluated.parent / "baselines.json", tmp_path)
    evaluate.evaluate(parse_evaluate(["--report", str(tmp_path)]))
    rows = {row["experiment"]: row for row in read_csv(tmp_path / "results.csv")}
    assert float(rows["high"]["mean_colour"]) == colour and float(rows["low"]["thumbnail"]) == thumbnail
    assert "below the mean colour" in rows["low"]["note"] and "below" not in rows["high"]["note"]
    assert float(rows["high"]["feature_error"]) == found["feature_error"]["mean"]
    assert rows["mean colour"]["note"] == "baseline, no features" and rows["older"]["thumbnail"] == ""
    cells = Page(tmp_path).rows
    assert cells["high"]["thumbnail (dB)"] == f"{thumbnail:.2f}" and cells["older"]["thumbnail (dB)"] == "–"
    assert (cells["high"]["top-1 agreement"], cells["low"]["top-1 agreement"]) == ("0.75", "–")


@pytest.mark.parametrize("content", ["", '{"protocol": "mine", "data": "sample"}'])
def test_damaged_baselines_are_one_row_that_says_so(copied, tmp_path, content):
    copied(tmp_path / NAMES[0])
    (tmp_path / "baselines.json").write_text(content)
    first, *_, row = results.result_rows(tmp_path)
    assert "psnr" in first and row.keys() == {"experiment", "note"} and row["experiment"] == "baselines.json"
    assert "not that of evaluate.py --baselines" in row["note"] and "measure again" in row["note"]
