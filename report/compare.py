"""Paired differences between runs over the same test images, with confidence intervals."""

import csv
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.special import stdtrit

from checkpoint import read_result, reading, seed_folders
from report.pictures import drawable, save_figure
from utils import METRICS, METRICS_AND_FEATURE_ERROR, UserError, make_folder, same_data, write_csv

ALL = "over images and seeds"  # only this interval can tell two runs apart
SAME = ("data", "protocol", "images", "size")  # must be equal in metrics.json


class Measured(NamedTuple):
    """The metrics of a run's seeds on the same images."""

    name: str
    about: dict  # the SAME entries of metrics.json
    images: list  # names
    values: dict  # {metric: float64 (seeds, images)}


def compare(folders, out):
    """Print how each run differs from the first; write compare.csv and .png to `out`. Raises UserError."""
    first, *others = [read_runs(Path(folder)) for folder in folders]
    rows = []
    for run in others:
        refuse_other_images(first, run)
        for metric in (name for name in first.values if name in run.values):
            a, b = first.values[metric], run.values[metric]
            row = {"run": run.name, "against": first.name, "metric": metric, "seeds": f"{len(b)}, {len(a)}"}
            rows.append(row | difference(a, b, lower=METRICS_AND_FEATURE_ERROR[metric].endswith("↓")))
    table = make_folder(out) / "compare.csv"
    write_csv(table, list(rows[0]), [row.values() for row in rows])
    draw(rows, table.with_suffix(".png"))
    print_table(rows)
    print(f"{table} and compare.png")


def read_runs(folder):
    """The Measured of a run, or of all its seeds in FOLDER/seed1 and so on. Raises UserError."""
    parts = [read_run(seed) for seed in seed_folders(folder)]
    for part in parts[1:]:
        refuse_other_images(parts[0], part)
    known = [name for name in parts[0].values if all(name in part.values for part in parts)]
    values = {name: np.concatenate([part.values[name] for part in parts]) for name in known}
    return parts[0]._replace(name=str(folder), values=values)


def read_run(folder):
    """The Measured of one evaluation. Raises UserError."""
    with reading(f"--compare {folder}: not results of this program", "evaluate again"):
        found = read_result(folder / "metrics.json")
        with open(folder / "per_image.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        known = [name for name in METRICS_AND_FEATURE_ERROR if name in METRICS or name in rows[0]]
        values = {name: np.array([[float(row[name]) for row in rows]]) for name in known}
        about, images = {key: found[key] for key in SAME}, [row["image"] for row in rows]
        return Measured(str(folder), about, images, values)


def refuse_other_images(a, b):
    """Raise UserError unless two runs were measured on the same images in the same way."""
    for key in SAME:
        x, y = a.about[key], b.about[key]
        if x != y and (key != "data" or not same_data(x, y)):
            raise UserError(f"--compare: {key} is {x} in {a.name}, {y} in {b.name}")
    if a.images != b.images:
        raise UserError(f"--compare: the images in {a.name} are not those in {b.name}")


def difference(a, b, lower):
    """b − a, (seeds, images) each: mean, 95 % interval, and the share of images that b won.

    The variance of the mean adds the paired images' to each side's seeds'; the interval is Student's t with
    Welch and Satterthwaite's degrees of freedom. lower: whether lower is better.
    """
    by_image = b.mean(0) - a.mean(0)
    mean, images = by_image.mean(), len(by_image)
    several = [side for side in (a, b) if len(side) > 1]
    interval = ("over images alone", "over images and one side's seeds", ALL)[len(several)]
    parts = [(by_image.var(ddof=1) / images, images - 1) if images > 1 else (math.nan, 1)]  # (variance, df)
    for side in several:  # the only side with several seeds stands for both
        share = 1 / len(side) if len(several) == 2 else 1 / len(a) + 1 / len(b)
        parts.append((side.mean(1).var(ddof=1) * share, len(side) - 1))
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / (sum(part**2 / count for part, count in parts) or 1)
    half = stdtrit(max(freedom, 1), 0.975) * math.sqrt(variance)
    won = (by_image < 0 if lower else by_image > 0).mean()
    return {"difference": mean, "low": mean - half, "high": mean + half, "won": won, "interval": interval}


def print_table(rows):
    """Print the differences; * marks an interval over images and seeds without 0."""
    print(f"against {rows[0]['against']}; 95 % intervals, * where 0 lies outside; share of images won")
    longest = max(len(row["run"]) for row in rows)
    for row in rows:
        sure = "*" if row["interval"] == ALL and (row["low"] > 0 or row["high"] < 0) else " "
        between = f"[{row['low']:+.4f}, {row['high']:+.4f}]".replace("+nan", "–")
        values = f"{METRICS_AND_FEATURE_ERROR[row['metric']]:<16}{row['difference']:>+10.4f}{sure} {between}"
        print(f"{row['run']:<{longest}}  {values}  {row['won']:>4.0%}  {row['interval']}")


def label_of(row):
    return f"{drawable(row['run'])}\n{row['interval']}"


def draw(rows, path):
    """Draw the differences and their intervals, a panel for each metric."""
    names = list(dict.fromkeys(map(label_of, rows)))
    figure = Figure(figsize=(12, 1.2 + 0.5 * len(names)), layout="constrained")
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    panels = figure.subplots(1, len(metrics), sharey=True)
    for axis, metric in zip(panels, metrics, strict=True):
        for row in (row for row in rows if row["metric"] == metric):
            place = names.index(label_of(row))
            half = row["high"] - row["difference"]
            axis.errorbar(row["difference"], place, xerr=half, fmt="o", color="black", capsize=3)
        axis.axvline(0, color="grey", linewidth=1)
        axis.set_xlabel(f"difference of {METRICS_AND_FEATURE_ERROR[metric]}")
        axis.set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()  # shared
    figure.suptitle(drawable(f"against {rows[0]['against']}"))
    save_figure(figure, path)
