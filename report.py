"""The experiments of a folder side by side, published and measured: a table, a chart and one page for a browser."""

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

from evaluate import draw_grid
from utils import METRICS, UserError, atomic, write_text

PAGE = Path(__file__).with_name("report.html")
# What the study published: PSNR, SSIM, LPIPS, parameters, training minutes; 05 and 15 are from its public
# repository, the rest from its text.
PUBLISHED = {
    "01_vgg16_block1_tconv": (17.35, 0.560, 0.398, "34K", 70),
    "02_vgg16_block2_tconv": (16.89, 0.512, 0.452, None, None),
    "03_vgg16_block3_tconv": (15.12, 0.421, 0.587, "75K", None),
    "04_vgg16_block4_tconv": (13.76, 0.334, 0.724, None, None),
    "05_vgg16_block5_tconv": (12.26, 0.269, None, None, None),
    "06_vgg16_block1_attention": (16.92, 0.531, None, "12M", 180),
    "07_vgg16_block1_wavelet": (16.78, 0.524, None, "8M", 140),
    "08_vgg16_block1_frequency": (16.54, 0.518, None, "35M", 220),
    "09_vgg16_block1_tconv_mse": (17.12, 0.541, 0.445, "34K", None),
    "10_vgg16_block1_tconv_lpips": (16.43, 0.538, 0.372, "34K", None),
    "11_resnet34_layer1_tconv": (16.82, 0.506, 0.461, "50K", None),
    "12_resnet34_layer2_tconv": (15.43, 0.428, 0.573, None, None),
    "13_vit_small_block0_tconv": (14.67, 0.412, 0.621, None, None),
    "14_vit_small_block1_tconv": (14.29, 0.389, 0.658, None, None),
    "15_resnet34_layer1_attention": (13.53, 0.376, 0.282, None, None),
}


def result_rows(runs):
    """A dictionary for each of the fifteen experiments, and for every other evaluated run in the folder `runs`.

    `note` says what is special about it, or why there are no measurements.
    """
    rows = []
    found = [*runs.glob("metrics.json"), *runs.glob("*/metrics.json")]
    others = {str(path.parent.relative_to(runs)) for path in found} - PUBLISHED.keys()  # `.` is `runs` itself
    for name in [*PUBLISHED, *sorted(others)]:
        folder, published = runs / name, PUBLISHED.get(name, (None,) * 5)
        keys = ("published_psnr", "published_ssim", "published_lpips", "published_parameters", "published_minutes")
        row = {"experiment": name} | dict(zip(keys, published, strict=True)) | {"note": "not run"}
        if (folder / "metrics.json").exists():
            try:
                row |= measured(folder)
            except (ValueError, KeyError, TypeError) as error:
                row["note"] = f"metrics.json is not that of evaluate.py ({error!r}); evaluate again"
        elif (folder / "error.txt").exists():
            lines = (folder / "error.txt").read_text(errors="replace").strip().splitlines()
            row["note"] = f"failed: {lines[-1] if lines else 'no message'}"
        elif (folder / "last.pt").exists():
            row["note"] = "not finished"
        rows.append(row)
    return rows


def measured(folder):
    """What metrics.json and history.csv in `folder` say, as a part of a row of the results."""
    metrics = json.loads((folder / "metrics.json").read_text())
    row = {name + end: metrics[name][key] for name in METRICS for key, end in (("mean", ""), ("std", "_std"))}
    row |= {key: metrics[key] for key in ("parameters", "ms_per_image", "epoch", "data", "protocol", "weights")}
    row |= {key: metrics["config"][key] for key in ("encoder", "decoder")}
    row["resolution"] = metrics["features"][1]
    seconds = read_history(folder).get("seconds")
    row["minutes"] = sum(seconds) / 60 if seconds else None
    weights = {"imagenet": "", "random": "random weights (control)"}.get(row["weights"], f"weights {row['weights']}")
    protocol = "" if row["protocol"] == "documented" else f"protocol {row['protocol']}"
    row["note"] = "; ".join(filter(None, (weights, protocol, inversion(folder, metrics))))
    return row


def inversion(folder, metrics):
    """What inversion.json in `folder` (invert.py) says of the networks and data that `metrics` are of, or ""."""
    if not (folder / "inversion.json").exists():
        return ""
    try:
        found = json.loads((folder / "inversion.json").read_text())
        config = metrics["config"]
        same = {name: config[name] for name in ("encoder", "layer", "weights")}
        same |= {"start": config["decoder"], "data": metrics["data"]}
        if any(found.get(name) != value for name, value in same.items()):
            return ""
        psnr = {kind: found["metrics"][kind]["psnr"]["mean"] for kind in ("start", "inversion")}
        return f"inverted: {psnr['inversion']:.2f} dB from {psnr['start']:.2f} ({found['images']} images)"
    except (ValueError, KeyError, TypeError) as error:
        return f"inversion.json is not that of evaluate.py ({error!r}); invert again"


def read_history(folder):
    """{column: values, an epoch each} of history.csv in `folder`; an empty field is None. {} if it is not there."""
    path = folder / "history.csv"
    if not path.exists():
        return {}
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        return {key: [float(row[key]) if row[key] else None for row in rows] for key in rows[0]}
    except (ValueError, TypeError, IndexError) as error:
        raise UserError(f"{path}: not a history.csv of train.py ({error})") from None


def write_report(runs):
    """Write report.html, results.md, .csv and .png, and grid.png, to the folder `runs`. Raises UserError."""
    runs = Path(runs)
    if not runs.is_dir():
        raise UserError(f"--report {runs}: no such folder; run_all.sh fills it")
    rows = result_rows(runs)
    columns = dict.fromkeys(key for row in rows for key in row if key != "note") | {"note": None}
    with atomic(runs / "results.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    table = results_table(rows)
    write_text(runs / "results.md", table)
    draw_results(rows, runs / "results.png")
    images = test_images(runs, rows)
    (runs / "grid.png").unlink(missing_ok=True)
    if images:
        draw_images(images, runs / "grid.png")
    write_text(runs / "report.html", page(runs, rows, images))
    print(f"{table}\n{runs / 'report.html'} shows them in a browser")


def results_table(rows):
    """The results as Markdown."""
    sources = sorted({row["data"] for row in rows if "data" in row})
    lines = [f"Measured on {', '.join(sources) or '–'}, protocol documented unless a note says another; each cell: "
             "published → measured. Times: minutes of training, milliseconds an image of inference.", ""]  # fmt: skip
    lines.append("| experiment | PSNR (dB) ↑ | SSIM ↑ | LPIPS ↓ | parameters | training | inference | note |")
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        cells = [
            f"{cell(row[f'published_{m}'], d)} → {cell(row.get(m), d)}" for m, d in zip(METRICS, (2, 3, 3), strict=True)
        ]
        cells.append(f"{row['published_parameters'] or '–'} → {cell(row.get('parameters'), 0)}")
        cells.append(f"{cell(row['published_minutes'], 0)} → {cell(row.get('minutes'), 1)}")
        cells += [f"12–15 → {cell(row.get('ms_per_image'), 1)}", row["note"]]
        lines.append("| " + " | ".join(text.replace("|", "/") for text in (row["experiment"], *cells)) + " |")
    return "\n".join(lines) + "\n"


def cell(value, digits):
    """A number of a table, `–` where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}"


def draw_results(rows, path):
    """Published and measured metrics of the experiments as bars."""
    figure = Figure(figsize=(14, 0.3 * len(rows) + 0.5), layout="constrained")
    places = np.arange(len(rows))
    for axis, (metric, label) in zip(figure.subplots(1, 3, sharey=True), METRICS.items(), strict=True):
        for shift, prefix in ((-0.2, "published"), (0.2, "measured")):
            key = metric if prefix == "measured" else f"published_{metric}"
            values = [math.nan if row.get(key) is None else row[key] for row in rows]
            axis.barh(places + shift, values, 0.4, label=prefix)
        axis.set_xlabel(label)
        axis.set_yticks(places, [row["experiment"] for row in rows], parse_math=False)  # a folder's name may have a $
        axis.invert_yaxis()
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=100)


def draw_images(images, path, count=6):
    """The originals of `count` evenly spaced `images`, which test_images returned, above what each experiment made."""

    def decoded(text):
        return Image.open(io.BytesIO(base64.b64decode(text)))

    chosen = [images[i] for i in np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int)]
    grid = {"original": [(decoded(image["original"]), image["name"][:24]) for image in chosen]}
    for name in dict.fromkeys(name for image in chosen for name in image["runs"]):
        runs = (image["runs"].get(name) for image in chosen)
        grid[name] = [run and (decoded(run["picture"]), f"{run['psnr']:.2f} dB") for run in runs]
    draw_grid(grid, path)


# --- The page --------------------------------------------------------------------------------------------


def page(runs, rows, images):
    """report.html with the rows, training curves and test images of the folder `runs` in it: it needs nothing else."""
    content = {
        "rows": rows,
        "histories": {row["experiment"]: read_history(runs / row["experiment"]) for row in rows},
        "images": images,
    }
    # Every < is escaped, so that no name of a file can end the script element that the JSON stands in.
    return PAGE.read_text(encoding="utf-8").replace("{{CONTENT}}", json.dumps(content).replace("<", "\\u003c"))


def test_images(runs, rows):
    """The test images that evaluations left, each once, with every experiment's reconstruction and metrics.

    [{"name", "data", "original": JPEG in base64, "runs": {experiment: {"picture": the same, metric: value}}}]
    """
    images = {}
    for row in rows:
        path = runs / row["experiment"] / "reconstructions.zip"
        if "data" not in row or not path.exists():
            continue
        try:
            with open(path.with_name("per_image.csv"), newline="", encoding="utf-8") as file:
                values = list(csv.DictReader(file))
            with zipfile.ZipFile(path) as archive:
                pictures = {name: base64.b64encode(archive.read(name)).decode() for name in archive.namelist()}
            for number in sorted({name.split("-")[0] for name in pictures}):
                name = values[int(number)]["image"]
                source = (
                    row["data"] if row["protocol"] == "documented" else f"{row['data']}, protocol {row['protocol']}"
                )
                image = {"name": name, "data": source, "original": pictures[f"{number}-original.jpg"], "runs": {}}
                image = images.setdefault((source, name), image)
                run = {metric: float(values[int(number)][metric]) for metric in METRICS}
                image["runs"][row["experiment"]] = run | {"picture": pictures[f"{number}-reconstruction.jpg"]}
        except (zipfile.BadZipFile, KeyError, ValueError, IndexError) as error:
            raise UserError(f"{path}: damaged, or not per_image.csv's ({error}); evaluate again") from None
    return list(images.values())
