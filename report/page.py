"""The experiments side by side, published and measured: a table, charts and a page."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from report.pictures import draw_grid, drawable, save_figure, svg
from report.results import DIGITS, result_rows
from utils import METRICS, METRICS_AND_FEATURE_ERROR, UserError, evenly_spaced, write_csv, write_text

PAGE = Path(__file__).with_name("page.html")
COLUMNS = METRICS_AND_FEATURE_ERROR | {
    "top1_agreement": "top-1 agreement",
    "mean_colour": "mean colour (dB)",
    "thumbnail": "thumbnail (dB)",
    "parameters": "parameters",
    "minutes": "training",
    "inference_ms": "inference",
}
CURVES = {"train_loss": "training loss", "val_loss": "validation loss", "val_psnr": "validation PSNR (dB)"}
ABOUT = (
    "Cells: published → measured; protocol documented unless a note says another. Mean colour and thumbnail "
    "(as many pixels as the features have positions) need no features. training: minutes, with validation, "
    "without what --kept-crops encodes; inference: milliseconds for an image by itself. Published times: an "
    "RTX 3090."
)


def write_report(runs):
    """Write report.html, results.md, .csv and .png, and grid.png, to the folder `runs`; returns the table.

    Raises UserError.
    """
    runs = Path(runs)
    if not runs.is_dir():
        raise UserError(f"--report {runs}: no such folder; run_all.sh fills it")
    rows = result_rows(runs)
    images = test_images(rows)
    curves = draw_curves({row["experiment"]: row.pop("history", {}) for row in rows})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns.sort(key=lambda key: key == "note")  # last
    write_csv(runs / "results.csv", columns, [[row.get(key) for key in columns] for row in rows])
    table = results_table(rows)
    write_text(runs / "results.md", table)
    bars = draw_results(rows, runs / "results.png")
    (runs / "grid.png").unlink(missing_ok=True)
    if images:
        draw_images(images, runs / "grid.png")
    write_text(runs / "report.html", page(rows, images, svg(bars), svg(curves)))
    return f"{table}\n{runs / 'report.html'} shows them in a browser"


def test_images(rows):
    """Each test image of result_rows once, with its reconstruction by each experiment."""
    found = {}
    for row in rows:
        for name, original, run in row.pop("images", []):
            data = f"{row['data']}, {row['size']}×{row['size']}, protocol {row['protocol']}"
            image = {"name": name, "data": data, "original": original, "runs": {}}
            found.setdefault((name, data), image)["runs"][row["experiment"]] = run
    return list(found.values())


def cells(row):
    """{heading: text} of a row."""
    found = {"experiment": row["experiment"]}
    for key, label in COLUMNS.items():
        published = f"published_{key.removesuffix('_ms')}"
        names = (published, key) if published in row and row["published_psnr"] else (key,)
        found[label] = " → ".join(cell(row.get(name), DIGITS.get(key, 1)) for name in names)
    return found | {"seed": row.get("seed", "–"), "data": row.get("data", "–"), "note": row["note"]}


def cell(value, digits):
    if isinstance(value, float):
        return f"{value:,.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else value or "–"


def results_table(rows):
    """The results as Markdown."""
    table = [cells(row) for row in rows]
    lines = [ABOUT, "", f"| {' | '.join(table[0])} |", f"|{' --- |' * len(table[0])}"]
    for texts in table:
        lines.append("| " + " | ".join(text.replace("|", "/") for text in texts.values()) + " |")
    return "\n".join(lines) + "\n"


def draw_results(rows, path):
    """Draw the metrics of the runs, published and measured, as bars, and the baselines as dashed lines.

    Runs of --protocol published have another target: they are drawn only where there are no others.
    """
    baselines = [row for row in rows if row["experiment"] in ("constant colour", "mean colour")]
    rows = [row for row in rows if "psnr" in row and "encoder" in row]
    rows = [row for row in rows if row["protocol"] == "documented"] or rows
    marks = [" *" if row.get("weights", "imagenet") != "imagenet" else "" for row in rows]
    names = [drawable(row["experiment"]) + mark for row, mark in zip(rows, marks, strict=True)]
    places = np.arange(len(rows))
    figure = Figure(figsize=(14, 0.3 * len(rows) + 1.5), layout="constrained")
    panels = figure.subplots(1, len(METRICS), sharey=True)
    for axis, (metric, label) in zip(panels, METRICS.items(), strict=True):
        for shift, legend, key in ((-0.2, "published", f"published_{metric}"), (0.2, "measured", metric)):
            values = np.array([row.get(key) for row in rows], float)  # None: NaN
            if np.isfinite(values).any():
                axis.barh(places + shift, values, 0.4, label=legend)
        for number, row in enumerate(baselines, 4):  # the bars are C0 and C1
            axis.axvline(row[metric], color=f"C{number}", linestyle="--", label=row["experiment"])
        axis.set_xlabel(label)
        axis.set_yticks(places, names)
    axis.invert_yaxis()  # shared
    title = "* not ImageNet's weights" if any(marks) else None
    legend = axis.get_legend_handles_labels()
    figure.legend(*legend, loc="outside upper center", ncols=2 + len(baselines), title=title)
    save_figure(figure, path)
    return figure


def draw_curves(histories):
    """A figure of the CURVES; histories: {experiment: {column: [a number for each epoch]}}."""
    histories = {name: history for name, history in histories.items() if CURVES.keys() <= history.keys()}
    figure = Figure(figsize=(14, 4 + 0.1 * len(histories)), layout="constrained")
    for axis, (column, label) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        for number, (name, history) in enumerate(histories.items()):
            style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":", "-.")[number // 10 % 4]}
            axis.plot(history["epoch"], history[column], marker=".", label=drawable(name, 40), **style)
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def draw_images(images, path, count=6):
    """Draw `count` of the test_images above their reconstructions."""
    chosen = [images[i] for i in evenly_spaced(len(images), count)]
    grid = {"original": [(decoded(image["original"]), image["name"]) for image in chosen]}
    for name in dict.fromkeys(name for image in chosen for name in image["runs"]):
        grid[name] = []
        for run in (image["runs"].get(name) for image in chosen):
            grid[name].append(run and (decoded(run["picture"]), f"{run['metrics'][METRICS['psnr']]} dB"))
    draw_grid(grid, path)


def decoded(jpeg):
    return Image.open(io.BytesIO(jpeg))


def page(rows, images, bars, curves):
    """The text of report.html, which needs no other file; bars, curves: SVG."""
    rows = sorted(rows, key=lambda row: ("psnr" not in row) + (row["note"] == "not run"))  # these last
    content = {"rows": [cells(row) for row in rows], "images": images}
    content = json.dumps(content, default=lambda jpeg: base64.b64encode(jpeg).decode())
    # With < escaped, no file name can end the script element around the JSON.
    parts = {"ABOUT": ABOUT, "BARS": bars, "CURVES": curves, "CONTENT": content.replace("<", "\\u003c")}
    return re.sub(r"{{(\w+)}}", lambda found: parts[found[1]], PAGE.read_text(encoding="utf-8"))
