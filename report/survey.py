"""The results of survey.py: a strip of reconstructions, a chart over the depth and tables."""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from data import to_pixels
from metrics import psnr, thumbnail
from report.pictures import drawable, save_figure
from utils import FREE_BASELINES, METRICS, METRICS_AND_FEATURE_ERROR, write_csv, write_text


class Row(NamedTuple):
    """What was measured of a layer."""

    layer: str
    metrics: dict | None = None  # its metrics.json
    note: str = ""  # why there are none

    @property
    def shape(self):
        return tuple(self.metrics["shape"])

    def psnr_by_image(self, out):
        """PSNR of each test image, (N,)."""
        with open(Path(out, self.layer, "per_image.csv"), encoding="utf-8", newline="") as file:
            return np.array([float(row["psnr"]) for row in csv.DictReader(file)])

    def cells(self):
        """{heading: text}."""
        names = [*METRICS_AND_FEATURE_ERROR, *FREE_BASELINES]
        found = dict.fromkeys(["layer", "features", *names, "note"], "–") | {
            "layer": self.layer,
            "note": self.note,
        }
        if not self.metrics:
            return found
        found["features"] = "×".join(map(str, self.shape))
        found |= {name: f"{self.metrics[name]['mean']:.3f}" for name in METRICS_AND_FEATURE_ERROR}
        baselines = self.metrics["baselines"]
        found |= {kind: f"{baselines[kind]['psnr']['mean']:.3f}" for kind in FREE_BASELINES}
        psnr, colour = self.metrics["psnr"]["mean"], baselines["mean_colour"]["psnr"]["mean"]
        return found | ({"note": "below the mean colour"} if psnr < colour else {})


def write_survey(rows, out):
    """Write survey.csv and survey.md to the folder `out`."""
    table = [row.cells() for row in rows]
    write_csv(out / "survey.csv", list(table[0]), [cells.values() for cells in table])
    write_text(out / "survey.md", survey_table(rows))


def survey_table(rows):
    """The rows as Markdown, with PSNR of the baselines."""
    labels = METRICS_AND_FEATURE_ERROR | {kind: f"{label}, PSNR" for kind, label in FREE_BASELINES.items()}
    table = [row.cells() for row in rows]
    heads = [labels.get(name, name) for name in table[0]]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    lines += ["| " + " | ".join(text.replace("|", "/") for text in cells.values()) + " |" for cells in table]
    return "\n".join(lines) + "\n"


def draw_survey(rows, image, found, path):
    """Draw the strip and the chart.

    image: (3, size, size) in [0, 1]; found: {layer: its reconstruction}.
    """
    rows = [row for row in rows if row.layer in found]
    columns = len(rows) + 1
    figure = Figure(figsize=(2.1 * columns, 7.4), layout="constrained")
    strip, chart = figure.subfigures(2, 1, height_ratios=[4.6, 2.8])
    axes = strip.subplots(2, columns, squeeze=False)
    show(axes[0][0], image, "the image", "")
    axes[1][0].axis("off")
    axes[1][0].text(0.5, 0.5, "thumbnails\nof the features'\nsize", ha="center", va="center")
    for column, row in enumerate(rows, 1):
        small = thumbnail(image[None], row.shape[1:])[0]
        show(axes[0][column], found[row.layer], drawable(row.layer, 24), decibels(found[row.layer], image))
        show(axes[1][column], small, f"{row.shape[1]}×{row.shape[2]} pixels", decibels(small, image))
    names = [drawable(row.layer, 24) for row in rows]
    for axis, name in zip(chart.subplots(1, 2), ("psnr", "lpips"), strict=True):
        axis.plot(names, [row.metrics[name]["mean"] for row in rows], "o-", color="black", label="decoder")
        for (kind, label), style in zip(FREE_BASELINES.items(), ("s:", "^--"), strict=True):
            values = [row.metrics["baselines"][kind][name]["mean"] for row in rows]
            axis.plot(names, values, style, color="grey", label=label)
        axis.set(ylabel=METRICS[name], xlabel="layer, from the image on")
        axis.tick_params("x", rotation=20)
        axis.grid(alpha=0.3)
    axis.legend()
    count = rows[0].metrics["images"]
    chart.suptitle(f"means over {count} test images", fontsize=10)
    save_figure(figure, path)


def decibels(image, original):
    return f"{psnr(image[None], original[None]).item():.1f} dB"


def show(axis, image, title, below):
    axis.imshow(to_pixels(image[None])[0].numpy())
    axis.set_title(title, fontsize=9)
    axis.set(xticks=[], yticks=[], xlabel=below)
