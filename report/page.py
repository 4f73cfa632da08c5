"""The experiments of a folder side by side, published and measured: a table, a chart and a page."""

import base64
import csv
import io
import json
import math
import zipfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from checkpoint import reading, seed_folders
from report.pictures import draw_grid, drawable, save_figure
from report.results import is_experiment, joined, read_history, result_rows
from utils import IMAGE_SIZE, METRICS, UserError, evenly_spaced, write_csv, write_text

DIGITS = {"psnr": 2, "ssim": 3, "lpips": 3}
PAGE = Path(__file__).with_name("page.html")


def write_report(runs):
    """Write report.html, results.md, .csv and .png, and grid.png, to the folder `runs`. Raises UserError."""
    runs = Path(runs)
    if not runs.is_dir():
        raise UserError(f"--report {runs}: no such folder; run_all.sh fills it")
    rows = result_rows(runs)
    images = test_images(runs, rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns.sort(key=lambda key: key == "note")  # last
    write_csv(runs / "results.csv", columns, [[row.get(key) for key in columns] for row in rows])
    table = results_table(rows)
    write_text(runs / "results.md", table)
    draw_results(rows, runs / "results.png")
    (runs / "grid.png").unlink(missing_ok=True)
    if images:
        draw_images(images, runs / "grid.png")
    write_text(runs / "report.html", page(runs, rows, images))
    print(f"{table}\n{runs / 'report.html'} shows them in a browser")


# --- The table and the pictures --------------------------------------------------------------------------


def results_table(rows):
    """The results as Markdown."""
    headings = [*METRICS.values(), "parameters", "training", "inference", "seed", "data", "note"]
    lines = [
        "Each cell: published → measured; protocol documented unless a note says another. training: minutes, "
        "with validation, without what --kept-crops encodes; inference: milliseconds for an image by itself. "
        "Published times: an RTX 3090.",
        "",
        f"| experiment | {' | '.join(headings)} |",
        f"| --- |{' --- |' * len(headings)}",
    ]
    for row in rows:
        cells = [row["experiment"]]
        for metric in METRICS:
            digits = DIGITS[metric]
            cells.append(f"{cell(row.get(f'published_{metric}'), digits)} → {cell(row.get(metric), digits)}")
        cells.append(f"{row.get('published_parameters') or '–'} → {cell(row.get('parameters'), 0)}")
        cells.append(f"{cell(row.get('published_minutes'), 0)} → {cell(row.get('minutes'), 1)}")
        cells.append(f"{row.get('published_inference') or '–'} → {cell(row.get('inference_ms'), 1)}")
        cells += [str(row.get("seed", "–")), row.get("data", "–"), row["note"]]
        lines.append("| " + " | ".join(text.replace("|", "/") for text in cells) + " |")
    return "\n".join(lines) + "\n"


def cell(value, digits):
    """A number of a table, `–` where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}"


def other_weights(row):
    """A mark for a row whose encoder has not ImageNet's weights."""
    return "" if row.get("weights", "imagenet") == "imagenet" else " *"


def draw_results(rows, path):
    """Published and measured metrics of the experiments as bars, the baselines as dashed lines."""
    baselines = [row for row in rows if not is_experiment(row) and row["experiment"].endswith(" colour")]
    rows = [row for row in rows if is_experiment(row)]
    figure = Figure(figsize=(14, 0.3 * len(rows) + 0.5), layout="constrained")
    places = np.arange(len(rows))
    panels = figure.subplots(1, len(METRICS), sharey=True)
    for axis, (metric, label) in zip(panels, METRICS.items(), strict=True):
        for shift, legend, key in ((-0.2, "published", f"published_{metric}"), (0.2, "measured", metric)):
            values = [math.nan if row.get(key) is None else row[key] for row in rows]
            axis.barh(places + shift, values, 0.4, label=legend)
        for number, row in enumerate(baselines, 4):  # the bars are C0 and C1
            axis.axvline(row[metric], color=f"C{number}", linestyle="--", label=row["experiment"])
        axis.set_xlabel(label)
        axis.set_yticks(places, [drawable(row["experiment"]) + other_weights(row) for row in rows])
        axis.invert_yaxis()
    title = "* not ImageNet's weights" if any(map(other_weights, rows)) else None
    handles = axis.get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=2 + len(baselines), title=title)
    save_figure(figure, path)


def draw_images(images, path, count=6):
    """The originals of `count` of test_images' `images`, above what each experiment made of them."""
    chosen = [images[i] for i in evenly_spaced(len(images), count)]
    grid = {"original": [(decoded(image["original"]), image["name"]) for image in chosen]}
    for name in dict.fromkeys(name for image in chosen for name in image["runs"]):
        runs = [image["runs"].get(name) for image in chosen]
        grid[name] = [run and (decoded(run["picture"]), f"{run['psnr']:.2f} dB") for run in runs]
    draw_grid(grid, path)


def decoded(text):
    """The PIL image of a JPEG in base64."""
    return Image.open(io.BytesIO(base64.b64decode(text)))


# --- The page --------------------------------------------------------------------------------------------


def page(runs, rows, images):
    """report.html with the rows, curves and test images of the folder `runs` in it: it needs nothing else."""
    names = [row["experiment"] for row in rows if is_experiment(row)]
    histories = {name: read_history(seed_folders(runs / name)[0])[0] for name in names}
    content = json.dumps({"rows": rows, "histories": histories, "images": images}, allow_nan=False)
    # Every < is escaped, so that no name of a file can end the script element that the JSON stands in.
    return PAGE.read_text(encoding="utf-8").replace("{{CONTENT}}", content.replace("<", "\\u003c"))


def test_images(runs, rows):
    """The test images that evaluations left, each once, with every experiment's reconstruction and metrics.

    [{"name", "data", "original": JPEG in base64, "runs": {experiment: {"picture": the same, metric: value}}}]
    A file that cannot be read is named in the `note` of its row.
    """
    images = {}
    for row in rows:
        path = seed_folders(runs / row["experiment"])[0] / "reconstructions.zip"
        if not is_experiment(row) or "data" not in row or not path.exists():
            continue
        source = row["data"]
        if row["protocol"] != "documented":
            source += f", protocol {row['protocol']}"
        if row["size"] != IMAGE_SIZE:
            source += f", {row['size']}×{row['size']}"
        try:
            with reading(f"{path.name}: damaged, or not per_image.csv's", "evaluate again"):
                for name, original, run in reconstructions(path):
                    image = {"name": name, "data": source, "original": original, "runs": {}}
                    images.setdefault((source, name), image)["runs"][row["experiment"]] = run
        except UserError as error:
            row["note"] = joined(row["note"], str(error))
    return list(images.values())


def reconstructions(path):
    """(name, original, {"picture", metric: value}) of each image in the zip at `path`, in base64."""
    with open(path.with_name("per_image.csv"), newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("evaluate.py compresses nothing")
        pictures = {name: base64.b64encode(archive.read(name)).decode() for name in archive.namelist()}
    found = []
    for number in sorted({name.split("-")[0] for name in pictures}):
        row = rows[int(number)]
        run = {metric: float(row[metric]) for metric in METRICS}
        if not all(math.isfinite(value) for value in run.values()):
            raise ValueError(f"a metric of {row['image']} is not finite")
        run["picture"] = pictures[f"{number}-reconstruction.jpg"]
        found.append((row["image"], pictures[f"{number}-original.jpg"], run))
    return found
