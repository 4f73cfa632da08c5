"""A folder of experiments with made-up numbers, for tests of the tables and of the page."""

import csv
import json
import re
import shutil

import numpy as np

import data
import report
import results
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


def write_runs(folder):
    """Thirteen evaluated experiments with 24 of 30 test images each, one that failed and one not run."""
    images = data.center_crops(thirty_tiles())
    pairs = zip(to_pixels(images), to_pixels(0.75 * images), strict=True)  # three quarters come back
    write_samples(dict(enumerate(pairs)), folder / "samples.zip")
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
        config = config_of(parse_train(["--config", str(results.CONFIGS / f"{name}.yaml"), "--crop", "224"]))
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
        metrics |= {"shape": [64, 224 >> (number % 5 + 1), 112], "size": 224, "config": config}
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


def page_content(folder, **options):
    """The data that the page in `folder` carries; options: of json.loads."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    text = re.search(r'<script id="content" type="application/json">(.*?)</script>', page, re.S)[1]
    return json.loads(text, **options)


def copied(runs, folder, name=NAMES[0], **changes):
    """A copy in `folder` of an experiment of `runs`, with `changes` in its metrics.json."""
    shutil.copytree(runs / name, folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(metrics | changes))


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
