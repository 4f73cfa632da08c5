"""The page that compares the experiments: what is in it, and how it behaves in a browser."""

import csv
import io
import json
import math
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import data
import report
from flags import config_of, parse_train
from metrics import summary
from pictures import to_pixels, write_samples
from study import METRICS, PUBLISHED
from utils import write_csv

NAMES = list(PUBLISHED)
UNRUN, FAILED, CONTROL = NAMES[3], NAMES[7], NAMES[12]
EVIL = "</script><img src=x onerror=console.error(1)>.png"  # a name that a file may have


def thirty_tiles():
    pixels = data.sample_tiles("train")[:]
    return pixels[:: len(pixels) // 30][:30]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of thirteen evaluated experiments with 24 of 30 test images each, one failed, one not run."""
    folder = tmp_path_factory.mktemp("runs")
    images = data.center_crops(thirty_tiles())
    write_samples(
        to_pixels(images), to_pixels(0.75 * images), folder / "samples.zip"
    )  # three quarters come back
    draw = np.random.RandomState(0)
    for number, name in enumerate(NAMES):
        (folder / name).mkdir()
        if name == FAILED:
            (folder / name / "error.txt").write_text("something\nerror: out of <b>memory</b>\n")
        if name in (UNRUN, FAILED):
            continue
        shutil.copy(folder / "samples.zip", folder / name / "reconstructions.zip")
        psnr = 20 + number / 2 + draw.rand(30)
        psnr[29] = 11  # the last image is the worst
        values = {"psnr": psnr, "ssim": 0.5 + 0.01 * psnr, "lpips": 1 - 0.03 * psnr}
        images = [EVIL, *(f"{i:04}.png" for i in range(1, 30))]
        columns = [values[metric].tolist() for metric in METRICS]
        write_csv(folder / name / "per_image.csv", ("image", *METRICS), zip(images, *columns, strict=True))
        config = config_of(parse_train(["--config", str(report.CONFIGS / f"{name}.yaml"), "--crop", "224"]))
        metrics = {metric: summary(values[metric]) for metric in values}
        metrics |= {
            "images": 30,
            "inference_ms": 12.5,
            "data": "/a/photos",
            "protocol": "documented",
            "epoch": 3,
        }
        metrics |= {
            "weights": "random" if name == CONTROL else "imagenet",
            "parameters": 10 ** (4 + number % 4),
        }
        metrics |= {"shape": [64, 224 >> (number % 5 + 1), 112], "config": config}
        (folder / name / "metrics.json").write_text(json.dumps(metrics))
        with open(folder / name / "history.csv", "w", newline="") as file:
            writer = csv.writer(file)
            columns = [
                f"{split}_{term}" for split in ("train", "val") for term in ("loss", "mse", "lpips", "psnr")
            ]
            writer.writerow(["epoch", *columns, "lr", "seconds", "val_seconds"])
            for epoch in range(1, 11):
                writer.writerow([epoch, *(1 / epoch for _ in columns), 1e-4, 5.0, 1.0])
    report.write_report(folder)
    return folder


@pytest.fixture(scope="module")
def content(runs):
    """The data that the page carries."""
    page = (runs / "report.html").read_text(encoding="utf-8")
    return json.loads(
        re.search(r'<script id="content" type="application/json">(.*?)</script>', page, re.S)[1]
    )


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
        with Image.open(io.BytesIO(report.base64.b64decode(text))) as picture:
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


def copied(runs, folder, name=NAMES[0], **changes):
    """A copy in `folder` of an experiment of `runs`, with `changes` in its metrics.json."""
    shutil.copytree(runs / name, folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(metrics | changes))


def test_other_runs_join_the_fifteen(runs, tmp_path):
    copied(runs, tmp_path / "mine")
    shutil.copy(runs / NAMES[0] / "metrics.json", tmp_path)
    rows = report.result_rows(tmp_path)
    assert [row["experiment"] for row in rows] == [*NAMES, ".", "mine"]
    assert rows[-1]["psnr"] == rows[-2]["psnr"] > 20


def test_seeds_are_one_row_with_their_deviation(runs, tmp_path):
    for seed, psnr in ((2, 21.0), (10, 24.0)):
        config = json.loads((runs / NAMES[0] / "metrics.json").read_text())["config"] | {"seed": seed}
        values = {"psnr": {"mean": psnr, "std": 1.0}, "config": config}
        copied(runs, tmp_path / NAMES[0] / f"seed{seed}", **values)
    (tmp_path / NAMES[1] / "seed1").mkdir(parents=True)
    (tmp_path / NAMES[1] / "seed1" / "error.txt").write_text("error: no")
    rows = report.result_rows(tmp_path)
    assert (rows[0]["psnr"], rows[0]["seed"]) == (22.5, "2, 10")
    assert rows[0]["psnr_seeds"] == pytest.approx(3 / math.sqrt(2))  # two values 3 apart
    assert rows[0]["note"] == "2 seeds: ± 2.12 PSNR, ± 0.0000 SSIM, ± 0.0000 LPIPS"
    assert rows[1]["note"] == "failed: error: no" and len(rows) == 15
    report.write_report(tmp_path)
    assert "| 2, 10 | photos | 2 seeds: ± 2.12" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "grid.png").exists()  # of the first seed


def test_published_numbers_go_by_configuration_not_by_name(runs, tmp_path):
    config = json.loads((runs / NAMES[0] / "metrics.json").read_text())["config"]
    copied(runs, tmp_path / "mine")  # experiment 1 under another name
    copied(runs, tmp_path / NAMES[0], config=config | {"layer": "block2"})  # experiment 2 under that of 1
    copied(runs, tmp_path / "other", config=config | {"width": 8})
    rows = {row["experiment"]: row for row in report.result_rows(tmp_path)}
    assert rows["mine"]["published_psnr"] == 17.35 and rows["mine"]["note"] == ""
    assert (
        rows[NAMES[0]]["published_psnr"] == 16.89
        and rows[NAMES[0]]["note"] == "not this experiment: layer block2"
    )
    assert rows["other"]["published_psnr"] is None and rows["other"]["published_inference"] is None
    (line,) = [line for line in report.results_table(list(rows.values())).splitlines() if "| other |" in line]
    assert "12–15" not in line and "– → 12.5" in line


def test_data_are_named_as_shortly_as_tells_them_apart(runs, tmp_path):
    for name, source in (("a", "/one/photos"), ("b", "/two/photos"), ("c", "/one/natural"), ("d", "sample")):
        copied(runs, tmp_path / name, data=source)
    labels = {row["experiment"]: row.get("data") for row in report.result_rows(tmp_path)}
    assert [labels[name] for name in "abcd"] == ["one/photos", "two/photos", "natural", "sample"]


def test_folder_that_is_not_there(tmp_path, run_evaluate, error_line):
    assert run_evaluate("--report", tmp_path / "runs") == 2
    assert "no such folder" in error_line()


@pytest.mark.parametrize(
    "content", ["epoch,seconds\n1,soon\n", "[]", "", '{"psnr": {"mean": NaN}}', "[" * 100_000, "shape"]
)
@pytest.mark.parametrize("name", ["history.csv", "reconstructions.zip", "metrics.json"])
def test_what_cannot_be_read_is_named_in_its_row(runs, tmp_path, run_evaluate, name, content):
    """The other experiments keep theirs."""
    folder = tmp_path / "runs"
    copied(runs, folder / NAMES[0])
    copied(runs, folder / NAMES[1], NAMES[1])
    if content == "shape":
        content = json.dumps(json.loads((runs / NAMES[0] / "metrics.json").read_text()) | {"shape": []})
    (folder / NAMES[0] / name).write_text(content)
    assert run_evaluate("--report", folder) == 0
    bad, good = report.result_rows(folder)[:2]
    page = (folder / "report.html").read_text()
    rows = json.loads(
        re.search(r'<script id="content" type="application/json">(.*?)</script>', page, re.S)[1]
    )["rows"]
    assert name in rows[0]["note"] and "again" in rows[0]["note"]
    assert ("psnr" in bad) == (name != "metrics.json") and good["note"] == "" and good["psnr"] > 20


def test_page_has_no_nan(runs, tmp_path):
    copied(runs, tmp_path / NAMES[0])
    (tmp_path / NAMES[0] / "history.csv").write_text("epoch,val_psnr,seconds\n1,nan,2.0\n2,inf,2.0\n")
    report.write_report(tmp_path)
    text = re.search(r'application/json">(.*?)</script>', (tmp_path / "report.html").read_text(), re.S)[1]

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(text, parse_constant=refuse)["histories"][NAMES[0]]["val_psnr"] == [None, None]


# --- Baselines -------------------------------------------------------------------------------------------


def write_baselines(folder, **changes):
    """A baselines.json in `folder` of made-up numbers, with `changes`."""
    values = {"constant colour": {"psnr": 13.0, "ssim": 0.3, "lpips": 0.9}}
    values["mean colour"] = {"psnr": 21.0, "ssim": 0.4, "lpips": 0.8}
    baselines = {
        name: {metric: {"mean": value, "std": 0.1} for metric, value in metrics.items()}
        for name, metrics in values.items()
    }
    content = {"data": "/a/photos", "protocol": "documented", "images": 30, "baselines": baselines} | changes
    (folder / "baselines.json").write_text(json.dumps(content))


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
    text = re.search(r'application/json">(.*?)</script>', (tmp_path / "report.html").read_text(), re.S)[1]
    content = json.loads(text)
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
    notes = {row["experiment"]: row["note"] for row in report.result_rows(tmp_path)}
    assert notes[NAMES[0]] == "below mean colour"
    assert notes["control"] == "random weights (control); below mean colour"
    assert (notes[NAMES[4]], notes["data"], notes["protocol"]) == ("", "", "protocol published")
    assert notes["mean colour"] == notes["constant colour"] == "baseline, no features"
    write_baselines(tmp_path, protocol="published")
    notes = {row["experiment"]: row["note"] for row in report.result_rows(tmp_path)}
    assert (notes[NAMES[0]], notes["protocol"]) == ("", "protocol published; below mean colour")
    assert notes["mean colour"] == "baseline, no features; protocol published"


def test_what_is_below_a_thumbnail_says_so(runs, tmp_path):
    """The picture in as many pixels as the layer has positions: 112 for experiment 1, 56 for 2."""
    copied(runs, tmp_path / NAMES[0])
    copied(runs, tmp_path / NAMES[1], NAMES[1])
    values = {"psnr": {"mean": 30, "std": 1}, "ssim": {"mean": 1, "std": 0}, "lpips": {"mean": 0, "std": 0}}
    write_baselines(tmp_path, baselines={"thumbnail 112 × 112": values})
    rows = {row["experiment"]: row["note"] for row in report.result_rows(tmp_path)}
    assert rows[NAMES[0]] == "below thumbnail 112 × 112" and rows[NAMES[1]] == ""


def test_one_folder_by_two_names_has_one_label(runs, tmp_path):
    copied(runs, tmp_path / NAMES[0], data="/x/../a/photos")
    write_baselines(tmp_path)
    assert {row["data"] for row in report.result_rows(tmp_path) if "data" in row} == {"photos"}


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
    *experiments, row = report.result_rows(tmp_path)
    assert [row["experiment"] for row in experiments] == NAMES
    assert row.keys() == {"experiment", "note"} and row["experiment"] == "baselines.json"
    assert "is not that of evaluate.py --baselines" in row["note"] and "measure again" in row["note"]


def test_damaged_baselines_leave_the_report(runs, tmp_path, run_evaluate):
    copied(runs, tmp_path / NAMES[0])
    (tmp_path / "baselines.json").write_text("{}")
    assert run_evaluate("--report", tmp_path) == 0
    assert "| baselines.json | – → – |" in (tmp_path / "results.md").read_text()
    assert "measure again" in (tmp_path / "report.html").read_text()


# --- In a browser ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip(
            "chromium and chromedriver are not installed (Debian: apt install chromium chromium-driver)"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    for flag in ("disable-background-networking", "disable-component-update", "disable-sync"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def page(browser, runs):
    """Open the page at a width in a colour scheme; nothing may be left in the console, nothing fetched."""

    def open_page(width=1280, scheme="light"):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get((runs / "report.html").as_uri())
        return browser

    yield open_page
    assert browser.get_log("browser") == []
    fetched = browser.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
    )
    assert [name for name in fetched if not name.startswith("data:")] == []


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def column(browser, number):
    """Texts of a column of the table, from 1."""
    return [cell.text.split("\n")[0] for cell in find(browser, f"#table tbody tr > :nth-child({number})")]


def test_sorting_the_table(page):
    browser = page()
    assert column(browser, 1) == NAMES
    (button,) = find(browser, "th[data-key=psnr] button")
    button.click()
    values = [float(text) for text in column(browser, 3) if text != "–"]
    assert values == sorted(values) and len(values) == 13 and column(browser, 3)[-2:] == ["–", "–"]
    assert find(browser, "th[aria-sort]")[0].get_attribute("aria-sort") == "ascending"
    button.send_keys("\ue007")  # Enter
    assert [float(text) for text in column(browser, 3)[:-2]] == values[::-1] and column(browser, 3)[-1] == "–"
    (heading,) = find(browser, "th[aria-sort]")
    assert heading.get_attribute("aria-sort") == "descending" and heading.get_attribute("data-key") == "psnr"
    find(browser, "th[data-key=published_parameters] button")[0].click()
    assert column(browser, 9)[:3] == ["34K"] * 3 and column(browser, 9)[4:8] == ["75K", "8M", "12M", "35M"]
    assert "<b>memory</b>" in find(browser, "#table")[0].text


def test_charts_are_drawn(page):
    browser = page()
    for chart in ("resolution", "parameters"):
        assert len(find(browser, f"#{chart} g > title")) == 13
    assert len(find(browser, "#curves polyline")) == 13
    find(browser, "#runs input")[0].click()
    assert len(find(browser, "#curves polyline")) == 12
    find(browser, "#column option[value=train_loss]")[0].click()
    assert "training loss" in find(browser, "#curves")[0].text


def test_choosing_an_image(page):
    browser = page()
    assert find(browser, "#chosen b")[0].text == "0029.png"  # the worst comes first
    assert len(find(browser, "#thumbs input")) == 24 and len(find(browser, "#cards figure")) == 13
    assert "PSNR 11.00 dB" in find(browser, "#cards figure")[0].text
    find(browser, "#thumbs input")[0].send_keys("\ue014")  # the right arrow
    second = find(browser, "#chosen b")[0].text
    assert second != "0029.png" and second in find(browser, "#thumbs input:checked + img")[0].get_attribute(
        "alt"
    )
    find(browser, "#order option[value=name]")[0].click()
    assert find(browser, "#chosen b")[0].text == second  # sorting keeps the choice
    assert "0029.png" in find(browser, "#thumbs img")[-2].get_attribute("alt")
    find(browser, "#thumbs label")[-1].click()
    assert find(browser, "#chosen b")[0].text == EVIL
    find(browser, "#order option[value=lpips]")[0].click()
    find(browser, f"#judge option[value='{NAMES[8]}']")[0].click()
    assert "0029.png" in find(browser, "#thumbs img")[0].get_attribute("alt")  # the highest LPIPS


def test_slider(page):
    from selenium.webdriver import ActionChains

    browser = page()
    (slider,) = find(browser, "#cut")

    def cut():
        return browser.execute_script(
            "return getComputedStyle(document.querySelector('.compare img + img')).clipPath"
        )

    assert "50%" in cut()
    slider.send_keys("\ue014" * 3)
    assert "53%" in cut()
    picture = find(browser, ".compare")[0]
    ActionChains(browser).scroll_to_element(picture).move_to_element(picture).click_and_hold().move_by_offset(
        picture.size["width"] // 4, 0
    ).release().perform()
    assert 70 < float(slider.get_attribute("value")) < 80 and f"{slider.get_attribute('value')}%" in cut()


def test_difference_is_five_times_the_difference(page, content):
    browser = page()
    box = find(browser, ".difference")[0]
    with Image.open(io.BytesIO(box.screenshot_as_png)) as shot:
        seen = np.asarray(shot.convert("RGB"))[4:-4, 4:-4] / 255
        images = content["images"][-1]
        pair = [
            np.asarray(Image.open(io.BytesIO(report.base64.b64decode(text))).resize(shot.size)) / 255
            for text in (images["original"], images["runs"][NAMES[0]]["picture"])
        ]
    expected = (5 * np.abs(pair[0] - pair[1])).clip(0, 1)[4:-4, 4:-4]
    assert expected.std() > 0.1 and np.abs(seen - expected).mean() < 0.06


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_and_colour_schemes(page, scheme):
    browser = page(375, scheme)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 375
    colours = [
        sum(
            map(
                int,
                re.findall(r"\d+", browser.execute_script(f"return getComputedStyle({element}).{what}"))[:3],
            )
        )
        for element, what in (
            ("document.body", "backgroundColor"),
            ("document.body", "color"),
            ("document.querySelector('#resolution .tick')", "fill"),
        )
    ]
    ground, text, tick = colours if scheme == "light" else [765 - colour for colour in colours]
    assert ground > 650 and text < 150 and tick < 400


def test_baselines_are_dashed_lines_in_the_charts(browser, runs, tmp_path):
    copied(runs, tmp_path / NAMES[0])
    copied(runs, tmp_path / NAMES[1], NAMES[1])
    write_baselines(tmp_path)
    report.write_report(tmp_path)
    browser.get((tmp_path / "report.html").as_uri())
    for chart in ("resolution", "parameters"):
        lines = find(browser, f"#{chart} .baseline line")
        heights = [float(line.get_attribute("y1")) for line in lines]
        assert heights == [float(line.get_attribute("y2")) for line in lines] and heights[0] > heights[1] > 0
        dashes = "return getComputedStyle(arguments[0]).strokeDasharray"
        assert "6" in browser.execute_script(dashes, lines[0])
        labels = [label.text for label in find(browser, f"#{chart} .baseline text")]
        assert labels == ["constant colour", "mean colour"]
        assert len(find(browser, f"#{chart} g:not(.baseline) > title")) == 2
    assert "2 of 15 experiments" in find(browser, "#about")[0].text
    assert column(browser, 1)[-2:] == ["constant colour", "mean colour"] and column(browser, 3)[-1] == "21.00"
    assert "below mean colour" in find(browser, "#table tbody tr")[0].text
    assert browser.get_log("browser") == []


def test_empty_folder_says_so(browser, tmp_path):
    report.write_report(tmp_path)
    browser.get((tmp_path / "report.html").as_uri())
    assert "No experiment has been measured yet" in find(browser, "#about")[0].text
    assert "No test images yet" in find(browser, "#viewer")[0].text
    assert browser.get_log("browser") == []
