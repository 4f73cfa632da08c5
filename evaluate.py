"""Measure a trained decoder on the test images: PSNR, SSIM and LPIPS, as numbers and as pictures.

  python evaluate.py --ckpt runs/best.pt
  python evaluate.py --ckpt runs/best.pt --data FOLDER --out results

The checkpoint knows its encoder, layer, decoder and data. Writes metrics.json, per_image.csv,
reconstructions.png and histograms.png beside it, or to --out.
"""

import csv
import json
from pathlib import Path

from utils import PROTOCOL, Parser, UserError, positive_int, run


def make_parser():
    """The flags."""
    parser = Parser(__doc__)
    parser.add_argument("--ckpt", default="runs/best.pt", help="checkpoint that train.py wrote")
    parser.add_argument("--data", help="folder whose test images to use, or `sample` (None: the training's)")
    parser.add_argument("--out", help="folder for the results (None: the checkpoint's)")
    parser.add_argument(
        "--batch-size", type=positive_int, default=4, help="images at a time; results don't depend on it"
    )
    parser.add_argument("--cache", help="folder of decoded images (None: ~/.cache/feature-inversion)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


if __name__ == "__main__":
    ARGS = run(lambda: make_parser().parse_args())  # before torch is imported, so that --help answers at once

import time

import numpy as np
import torch
from matplotlib.figure import Figure
from skimage.metrics import structural_similarity
from tqdm import tqdm

import data
from models import LPIPS, build_model
from utils import atomic, load, make_folder, select_device, write_text

METRICS = {"psnr": "PSNR (dB) ↑", "ssim": "SSIM ↑", "lpips": "LPIPS ↓"}


def load_model(path):
    """(encoder, decoder, checkpoint) of the best.pt at `path`, on the CPU, in eval mode. Raises UserError."""
    checkpoint = load(path)
    missing = {"decoder", "config", "protocol", "epoch", "val_loss"} - set(
        checkpoint if type(checkpoint) is dict else ()
    )
    if missing:
        raise UserError(f"{path}: not a best.pt of train.py (it has no {', '.join(sorted(missing))})")
    try:
        names = ("encoder", "layer", "decoder", "weights", "width", "seed")
        encoder, decoder = build_model(**{name: checkpoint["config"][name] for name in names})
        decoder.load_state_dict(checkpoint["decoder"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: not a best.pt of this program ({error})") from None
    return encoder, decoder.eval(), checkpoint


def psnr(images, target):
    """Peak signal-to-noise ratio in dB of each image (B, 3, H, W) in [0, 1] (paper 3.4.1); 100 dB where equal."""
    return -10 * torch.log10((images - target).square().mean((1, 2, 3)).clamp_min(1e-10))


def ssim(image, target):
    """Structural similarity of two images (3, H, W) in [0, 1] as Wang et al. 2004 define it (paper 3.4.2)."""
    return structural_similarity(
        image.cpu().numpy(),
        target.cpu().numpy(),
        channel_axis=0,
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )


@torch.no_grad()
def evaluate_model(encoder, decoder, pixels, batch_size=4, bars=None):
    """Reconstruct the central 224×224 of `pixels`, uint8 (N, 256, 256, 3), and measure each image.

    Returns {"psnr" (dB), "ssim", "lpips": float64 arrays (N,)} and the milliseconds an image that
    encoder and decoder took together. The networks' device is used; bars: tqdm's `disable`.
    """
    device = next(decoder.parameters()).device
    lpips = LPIPS().to(device)
    values, seconds = {name: [] for name in METRICS}, 0.0
    decoder.eval()
    with tqdm(None, "Evaluating", len(pixels), unit="image", disable=bars) as bar:
        for part in pixels.split(batch_size):
            batch = data.center_crops(part).to(device)
            start = wait(device)
            output = decoder(encoder(batch)).clamp(0, 1)
            seconds += wait(device) - start
            values["psnr"] += psnr(output, batch).tolist()
            values["ssim"] += [ssim(*pair) for pair in zip(output, batch, strict=True)]
            values["lpips"] += lpips(output, batch).tolist()
            bar.update(len(batch))
    return {name: np.array(value) for name, value in values.items()}, 1000 * seconds / len(pixels)


def wait(device):
    """The time in seconds, when a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def summary(values):
    """Mean, standard deviation (population), minimum and maximum of an array, as a dictionary of floats."""
    return {name: float(getattr(values, name)()) for name in ("mean", "std", "min", "max")}


@torch.no_grad()
def draw_reconstructions(encoder, decoder, images, values, path, columns=6):
    """Original, reconstruction and 5× difference of `columns` test images, from the lowest to the highest PSNR."""
    order = np.argsort(values["psnr"])
    chosen = order[np.linspace(0, len(order) - 1, min(columns, len(order))).round().astype(int)]
    figure = Figure(figsize=(2.2 * len(chosen) + 0.4, 7.2), layout="constrained")
    axes = figure.subplots(3, len(chosen), squeeze=False)
    device = next(decoder.parameters()).device
    for column, i in enumerate(chosen):
        image = data.center_crops(images.pixels[i : i + 1]).to(device)
        output = decoder(encoder(image)).clamp(0, 1)
        rows = (image, output, (5 * (image - output).abs()).clamp(0, 1))
        for axis, picture in zip(axes[:, column], rows, strict=True):
            axis.imshow(picture[0].permute(1, 2, 0).cpu().numpy())
            axis.set(xticks=[], yticks=[])
        axes[0, column].set_title(images.names[i][:24], fontsize=8)
        axes[1, column].set_title(f"{values['psnr'][i]:.2f} dB", fontsize=8)
    for axis, label in zip(axes[:, 0], ("original", "reconstruction", "5 × difference"), strict=True):
        axis.set_ylabel(label)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=100)


def draw_histograms(values, path):
    """How the metrics are distributed over the test images."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    for axis, (name, label) in zip(figure.subplots(1, 3), METRICS.items(), strict=True):
        axis.hist(values[name], bins=20)
        axis.axvline(values[name].mean(), color="black", linestyle="--", label=f"mean {values[name].mean():.3f}")
        axis.set(xlabel=label, ylabel="images")
        axis.legend()
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=100)


def write_per_image(names, values, path):
    """One CSV row a test image."""
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("image", *METRICS))
        writer.writerows(zip(names, *(values[name].tolist() for name in METRICS), strict=True))


def evaluate(args):
    """Evaluate the checkpoint that `args` (a Namespace of the flags) name, print the table and write the files."""
    device, bars = select_device(args.device), True if args.quiet else None
    encoder, decoder, checkpoint = load_model(args.ckpt)
    config = checkpoint["config"]
    source = data.resolve(args.data or config["data"])
    images = data.load_split(source, "test", args.cache)
    out = make_folder(args.out or Path(args.ckpt).parent)
    encoder, decoder = encoder.to(device), decoder.to(device)
    values, milliseconds = evaluate_model(encoder, decoder, images.pixels, args.batch_size, bars)

    metrics = {name: summary(values[name]) for name in METRICS}
    about = {"images": len(images.names), "ms_per_image": milliseconds, "data": source, "protocol": PROTOCOL}
    about |= {"weights": config["weights"], "epoch": checkpoint["epoch"], "config": config}
    write_per_image(images.names, values, out / "per_image.csv")
    draw_reconstructions(encoder, decoder, images, values, out / "reconstructions.png")
    draw_histograms(values, out / "histograms.png")
    write_text(out / "metrics.json", json.dumps(metrics | about, indent=2))

    print(f"{config['encoder']} {config['layer']} ({config['weights']} weights) + {config['decoder']}, epoch "
          f"{checkpoint['epoch']}; {len(images.names)} test images of {source}, protocol {PROTOCOL}")  # fmt: skip
    print(f"{'':<12}{'mean ± std':>18}{'min':>10}{'max':>10}")
    for name, label in METRICS.items():
        s = metrics[name]
        print(f"{label:<12}{s['mean']:>9.4f} ±{s['std']:>7.4f}{s['min']:>10.4f}{s['max']:>10.4f}")
    print(f"{milliseconds:.1f} ms an image on {device}; results in {out}")


if __name__ == "__main__":
    run(lambda: evaluate(ARGS))
