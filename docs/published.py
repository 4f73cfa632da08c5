"""Put a run under --protocol published beside the study's own log, table and pictures (docs/erratum.md).

  python train.py --protocol published --data natural --out runs/published
  python evaluate.py --ckpt runs/published/best.pt --data DIV2K_TEST --out runs/published/div2k
  python docs/published.py runs/published runs/published/div2k PUBLISHED

DIV2K_TEST: DIV2K 0801 to 0900 in a folder test/. PUBLISHED: the study's history.csv and per_image.csv, and
panels.csv. Writes published_images.csv and published_epochs.csv to docs/tables/, erratum.png to docs/.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from report.pictures import save_figure
from utils import UserError, cli_main, write_csv

LOSSES = {"val_loss": "loss", "val_mse": "MSE", "val_lpips": "LPIPS"}


def columns(path):
    """{column: [text]} of a CSV file. Raises UserError."""
    if not path.exists():
        raise UserError(f"{path}: no such file; python docs/published.py --help says what is needed")
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {key: [row[key] for row in rows] for key in rows[0]}


def numbers(texts):
    return np.array(texts, float)


def compare(run, tested, published):
    """Write the tables and the figure, and print what they say."""
    ours, study = columns(tested / "per_image.csv"), columns(published / "per_image.csv")
    names = [Path(name).stem for name in ours["image"]]
    if names != [f"{801 + int(index):04}" for index in study["image_idx"]]:
        raise UserError(
            f"{tested}/per_image.csv: should be of DIV2K 0801 to 0900, is of {names[0]} and so on"
        )
    table, pairs = {"image": names}, {}
    for metric in ("psnr", "ssim"):
        here, there = pairs[metric] = numbers(ours[metric]), numbers(study[metric])
        table |= {f"{metric}_here": here, f"{metric}_study": there}
        for label, values in (("here", here), ("study", there), ("difference", here - there)):
            print(f"{metric} {label}: {values.mean():.3f} ± {values.std():.3f}")
        print(f"{metric}: correlation {np.corrcoef(here, there)[0, 1]:.3f} over {len(here)} images")
    write_csv(DOCS / "tables" / "published_images.csv", list(table), zip(*table.values(), strict=True))

    here, log = columns(run / "history.csv"), columns(published / "history.csv")
    count = min(len(here["epoch"]), len(log["epoch"]))
    epochs = {"epoch": np.arange(1, count + 1)}
    for name, label in LOSSES.items():
        pair = [numbers(source[name])[:count] for source in (here, log)]
        epochs |= dict(zip((f"{name}_here", f"{name}_study"), pair, strict=True))
        print(f"validation {label}, epoch {count}: here {pair[0][-1]:.4f}, study {pair[1][-1]:.4f}")
    write_csv(DOCS / "tables" / "published_epochs.csv", list(epochs), zip(*epochs.values(), strict=True))

    panels = columns(published / "panels.csv")
    normalised, photograph = (
        numbers(panels[f"psnr_to_{name}"]) for name in ("normalised_clipped", "photograph")
    )
    print(f"panels nearer to the normalised image: {(normalised > photograph).sum()} of {len(photograph)}")
    draw(pairs, epochs, normalised, photograph)


def draw(pairs, epochs, normalised, photograph):
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    for axis, (metric, label) in zip(axes, {"psnr": "PSNR (dB)", "ssim": "SSIM"}.items(), strict=False):
        here, study = pairs[metric]
        axis.plot(study, here, "o", color="#0072b2", markersize=4)
        ends = [min(here.min(), study.min()), max(here.max(), study.max())]
        axis.plot(ends, ends, color="grey", linewidth=1)
        correlation = np.corrcoef(here, study)[0, 1]
        axis.set(xlabel=f"{label}, the study's table", ylabel=f"{label}, here")
        axis.set_title(f"each test image, correlation {correlation:.3f}")
    order = np.argsort(photograph)
    for values, style, label in (
        (normalised, "^", "normalised and clipped image"),
        (photograph, "o", "photograph"),
    ):
        axes[2].plot(values[order], style, markersize=4, label=f"to the {label}")
    axes[2].set(xlabel="the study's 100 figures, in order", ylabel="PSNR (dB) of the panel “Original”")
    axes[2].set_title("what the panel “Original” shows")
    axes[2].legend()
    for axis, (name, label) in zip(axes[3:], LOSSES.items(), strict=True):
        axis.plot(epochs["epoch"], epochs[f"{name}_study"], "o-", markersize=3, label="the study's log")
        axis.plot(epochs["epoch"], epochs[f"{name}_here"], "^--", markersize=3, label="here")
        axis.set(xlabel="epoch", ylabel=f"validation {label}")
    axes[3].legend()
    save_figure(figure, DOCS / "erratum.png")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("run", "tested", "published"):
        parser.add_argument(name, type=Path)
    compare(**vars(parser.parse_args()))


if __name__ == "__main__":
    cli_main(main)
