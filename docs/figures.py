"""Draw the figures of docs/erratum.md and docs/findings.md from what `bash docs/evidence.sh` measured."""

import argparse
import csv
import math
import sys
from pathlib import Path

from matplotlib.figure import Figure

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from checkpoint import read_result
from report.compare import read_runs
from report.pictures import save_figure
from utils import UserError, cli_main

# The last two epochs of the study's public log, of its best model (docs/erratum.md).
LOG = {
    "epoch": (29, 30),
    "val_loss": (0.5027, 0.5034),
    "val_mse": (0.8354, 0.8433),
    "val_lpips": (0.1699, 0.1635),
}
FLOOR = 0.776  # the least MSE of any output in [0, 1], on natural's validation images (docs/erratum.md)
RESOLUTION = {55: "conv1_55", 27: "conv1_27", 13: "conv1_13", 6: "conv1_6"}  # positions a side: run
DEPTH = {1: "conv1_13", 2: "conv2_13", 3: "conv3_13", 4: "conv4_13", 5: "conv5_13"}  # convolutions: run
PHOTOGRAPHS = (100, 400, 800, 3853)
INVERTED = [*(f"vgg16_block{n}" for n in range(1, 6)), *(f"alexnet_conv{n}" for n in (1, 3, 5))]


def there(path):
    if not path.exists():
        raise UserError(f"{path}: is not there; bash docs/evidence.sh makes it")
    return path


def draw_published(history, path):
    """Validation of each epoch of the study's own recipe and code, beside what is known of its log."""
    labels = {"val_loss": "validation loss", "val_mse": "validation MSE", "val_lpips": "validation LPIPS"}
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for axis, (name, label) in zip(figure.subplots(1, 3), labels.items(), strict=True):
        axis.plot([int(row["epoch"]) for row in history], [float(row[name]) for row in history], label="here")
        axis.plot(LOG["epoch"], LOG[name], "x", color="black", label="the study's log")
        if name == "val_mse":
            axis.axhline(FLOOR, color="grey", linestyle="--", label="least possible on these images")
        axis.set(xlabel="epoch", ylabel=label)
        axis.legend()
    save_figure(figure, path)


def draw_points(axis, folder, runs, label):
    """PSNR, with its deviation over seeds, of {place on the axis: run}."""
    values = [read_runs(there(folder / name)).values["psnr"].mean(1) for name in runs.values()]  # (seeds,)
    deviation = [value.std(ddof=1) if len(value) > 1 else math.nan for value in values]
    axis.errorbar(
        list(runs), [value.mean() for value in values], yerr=deviation, marker="o", capsize=3, label=label
    )


def draw_inversions(axis, folder):
    """PSNR by layer: of a decoder, and of pixels optimised from its output and from noise."""
    ends = {"decoder": ("", "start"), "optimised from there": ("", "inversion")}
    ends["optimised from noise"] = ("noise_", "inversion")
    for number, (label, (prefix, end)) in enumerate(ends.items()):
        found = [read_result(there(folder / f"{prefix}{layer}" / "inversion.json")) for layer in INVERTED]
        values = [content["metrics"][end]["psnr"]["mean"] for content in found]
        places = [place + 0.27 * (number - 1) for place in range(len(INVERTED))]
        axis.bar(places, values, 0.27, label=label)
    axis.set(xticks=range(len(INVERTED)), ylabel="PSNR (dB) ↑")
    axis.set_xticklabels([layer.replace("_", "\n") for layer in INVERTED])


def draw_answers(root, path):
    """PSNR against resolution, depth, the number of photographs, and by decoder or optimisation."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    (resolution, depth), (data, inversion) = figure.subplots(2, 2)
    depth.sharey(resolution)
    draw_points(resolution, root / "layers", RESOLUTION, "AlexNet's first convolution, averaged")
    resolution.set(xscale="log", xlabel="positions a side", ylabel="PSNR (dB) ↑", xticks=list(RESOLUTION))
    resolution.set_xticklabels(list(RESOLUTION))
    resolution.minorticks_off()
    draw_points(depth, root / "layers", DEPTH, "AlexNet at 13 × 13 positions")
    depth.set(xlabel="convolutions", ylabel="PSNR (dB) ↑", xticks=list(DEPTH))
    counts = {count: str(count) for count in PHOTOGRAPHS}
    draw_points(data, root / "data", counts, "AlexNet's fifth convolution, features.10")
    data.set(xscale="log", xlabel="photographs (80 % train)", ylabel="PSNR (dB) ↑", xticks=PHOTOGRAPHS)
    data.set_xticklabels(PHOTOGRAPHS)
    data.minorticks_off()
    draw_inversions(inversion, root / "inversion")
    for axis in (resolution, depth, data, inversion):
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="?", type=Path, default=REPOSITORY / "runs" / "evidence", help="of docs/evidence.sh")
    add("out", nargs="?", type=Path, default=REPOSITORY / "docs", help="folder for the figures")
    args = parser.parse_args()
    history = there(args.runs / "published" / "seed42" / "history.csv")
    with open(history, encoding="utf-8", newline="") as file:
        draw_published(list(csv.DictReader(file)), args.out / "published.png")
    draw_answers(args.runs, args.out / "answers.png")
    print(f"published.png and answers.png in {args.out}")


if __name__ == "__main__":
    cli_main(main)
