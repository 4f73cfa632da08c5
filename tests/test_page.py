"""How the page that compares the experiments behaves in a browser."""

import base64
import io
import re
import shutil

import numpy as np
import pytest
from made_up import EVIL, NAMES, copied, write_baselines
from PIL import Image

import report


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
            np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).resize(shot.size)) / 255
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
