"""Draw docs/reading.jpg: one photograph as each block of VGG16 gives it back, with what every metric says.

python docs/reading.py PHOTOGRAPH      writes docs/reading.jpg and docs/tables/reading.csv
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
import skimage.data
import torch
from matplotlib.figure import Figure
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from evaluate import evaluate_model
from extras.own_pictures import read_square
from metrics import scale_of, thumbnail
from models import load_inverter
from utils import METRICS_AND_FEATURE_ERROR, cli_main, write_csv

BLOCKS = range(1, 6)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="of a function of skimage.data")
    name = parser.parse_args().name
    photograph = io.BytesIO()
    Image.fromarray(getattr(skimage.data, name)()).save(photograph, "PNG")
    pixels = torch.tensor(np.asarray(read_square(photograph, 224)))
    image = pixels.permute(2, 0, 1)[None] / 255
    rows = []
    figure = Figure(figsize=(13, 5.4), layout="constrained")
    axes = figure.subplots(2, len(BLOCKS) + 1)
    show(axes[0][0], image, "the photograph", "")
    axes[1][0].axis("off")
    axes[1][0].text(
        0.5, 0.5, "thumbnails of the\nfeatures' size,\nin pixels", ha="center", va="center", fontsize=12
    )
    for column, block in enumerate(BLOCKS, 1):
        inverter, _ = load_inverter(REPOSITORY / f"pretrained/vgg16_block{block}.pt")
        found = evaluate_model(inverter, pixels[None], bars=True)
        values = {metric: float(found.values[metric][0]) for metric in METRICS_AND_FEATURE_ERROR}
        values["feature_error"] /= scale_of(inverter.encode(image))[1]
        small = found.baselines["thumbnail"]["psnr"][0]
        rows.append([f"block{block}", *(f"{value:.4f}" for value in values.values()), f"{small:.2f}"])
        below = f"SSIM {values['ssim']:.3f}, LPIPS {values['lpips']:.3f}\n"
        below += f"feature error {values['feature_error']:.2f}"
        show(axes[0][column], inverter(image).clamp(0, 1), f"block{block}: {values['psnr']:.1f} dB", below)
        side = inverter.shape[1]
        show(axes[1][column], thumbnail(image, (side, side)), f"{side} × {side}: {small:.1f} dB", "")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=90)
    Image.open(picture).convert("RGB").save(REPOSITORY / f"docs/{name}.jpg", quality=88)
    head = ["layer", *METRICS_AND_FEATURE_ERROR, "thumbnail_psnr"]
    write_csv(REPOSITORY / f"docs/tables/{name}.csv", head, rows)


def show(axis, image, title, below):
    axis.imshow(image[0].permute(1, 2, 0).numpy())
    axis.set_title(title, fontsize=12)
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel(below, fontsize=10)


if __name__ == "__main__":
    cli_main(main)
