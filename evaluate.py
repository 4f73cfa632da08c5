"""Measure a trained decoder on the test images: PSNR, SSIM and LPIPS, as numbers and as pictures.

  python evaluate.py --ckpt runs/best.pt
  python evaluate.py --ckpt runs/best.pt --data FOLDER --out results
  python evaluate.py --ckpt runs/best.pt --images holiday.jpg pictures/      your own pictures
  python evaluate.py --results runs                                          the fifteen, side by side

The checkpoint knows its encoder, layer, decoder and data. Writes metrics.json, per_image.csv,
reconstructions.png and histograms.png beside it, or to --out; --images writes to images/ there.
"""

import csv
import json
import math
from pathlib import Path

from utils import RESULTS, Parser, UserError, positive_int, run


def make_parser():
    """The flags."""
    parser = Parser(__doc__)
    parser.add_argument("--ckpt", default="runs/best.pt", help="checkpoint that train.py wrote")
    parser.add_argument("--data", help="folder whose test images to use, or `sample` (None: the training's)")
    parser.add_argument("--images", nargs="+", metavar="PATH", help="instead: reconstruct these pictures and folders")
    parser.add_argument("--results", metavar="RUNS", help="instead: table and chart of the experiments in this folder")
    parser.add_argument("--out", help="folder for the results (None: the checkpoint's)")
    parser.add_argument(
        "--batch-size", type=positive_int, default=4, help="images at a time; results don't depend on it"
    )
    parser.add_argument("--cache", help="folder of decoded images (None: the training's)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


if __name__ == "__main__":
    ARGS = run(lambda: make_parser().parse_args())  # before torch is imported, so that --help answers at once

import time

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from skimage.metrics import structural_similarity
from tqdm import tqdm

import data
from models import IMAGE_SIZE, LPIPS, build_model, count_parameters
from utils import atomic, load, make_folder, select_device, start_processes, write_text

METRICS = {"psnr": "PSNR (dB) ↑", "ssim": "SSIM ↑", "lpips": "LPIPS ↓"}
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


def load_model(path):
    """(encoder, decoder, checkpoint) of the best.pt at `path`, on the CPU, in eval mode. Raises UserError."""
    checkpoint = load(path)
    missing = {"decoder", "config", "epoch", "val_loss"} - set(checkpoint if type(checkpoint) is dict else ())
    if missing:
        raise UserError(f"{path}: not a best.pt of train.py (it has no {', '.join(sorted(missing))})")
    try:
        names = ("encoder", "layer", "decoder", "weights", "width", "seed", "protocol")
        encoder, decoder = build_model(**{name: checkpoint["config"][name] for name in names})
        decoder.load_state_dict(checkpoint["decoder"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: not a best.pt of this program ({error})") from None
    return encoder, decoder.eval(), checkpoint


def psnr(images, target):
    """Peak signal-to-noise ratio in dB of each image (B, 3, H, W) in [0, 1] (paper 3.4.1); 100 dB where equal."""
    return -10 * torch.log10((images - target).square().mean((1, 2, 3)).clamp_min(1e-10))


def ssim(image, target, protocol="documented"):
    """Structural similarity of two images (3, H, W) in [0, 1] (paper 3.4.2).

    `documented`: as Wang et al. 2004 define it, 11×11 Gaussian window. `published`: scikit-image's 7×7 uniform one.
    """
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    window = window if protocol == "documented" else {"win_size": 7}
    return structural_similarity(image.cpu().numpy(), target.cpu().numpy(), channel_axis=0, data_range=1.0, **window)


@torch.no_grad()
def evaluate_model(encoder, decoder, pixels, batch_size=4, bars=None, protocol="documented"):
    """Reconstruct the central 224×224 of `pixels`, uint8 (N, 256, 256, 3), and measure each image.

    Returns {"psnr" (dB), "ssim", "lpips": float64 arrays (N,)} and the milliseconds an image that
    encoder and decoder took together. The networks' device is used; bars: tqdm's `disable`; protocol: that of
    the training.
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
            target = data.target(batch, protocol).clamp(0, 1)
            values["psnr"] += psnr(output, target).tolist()
            values["ssim"] += [ssim(*pair, protocol) for pair in zip(output, target, strict=True)]
            values["lpips"] += lpips(output, target).tolist()
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
def draw_reconstructions(encoder, decoder, images, values, path, protocol, columns=6):
    """Target, reconstruction and 5× difference of `columns` test images, from the lowest to the highest PSNR."""
    order = np.argsort(values["psnr"])
    chosen = order[np.linspace(0, len(order) - 1, min(columns, len(order))).round().astype(int)]
    figure = Figure(figsize=(2.2 * len(chosen) + 0.4, 7.2), layout="constrained")
    axes = figure.subplots(3, len(chosen), squeeze=False)
    device = next(decoder.parameters()).device
    for column, i in enumerate(chosen):
        image = data.center_crops(images.pixels[i : i + 1]).to(device)
        output, target = decoder(encoder(image)).clamp(0, 1), data.target(image, protocol).clamp(0, 1)
        rows = (target, output, (5 * (target - output).abs()).clamp(0, 1))
        for axis, picture in zip(axes[:, column], rows, strict=True):
            axis.imshow(picture[0].permute(1, 2, 0).cpu().numpy())
            axis.set(xticks=[], yticks=[])
        axes[0, column].set_title(images.names[i][:24], fontsize=8)
        axes[1, column].set_title(f"{values['psnr'][i]:.2f} dB", fontsize=8)
    first = "original" if protocol == "documented" else "target, as measured"
    for axis, label in zip(axes[:, 0], (first, "reconstruction", "5 × difference"), strict=True):
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


def picture_files(paths):
    """The image files that `paths` name or that lie in the folders among them. Raises UserError."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in data.EXTENSIONS and p.name[0] != ".")
            if not found:
                raise UserError(f"--images {path}: no images in this folder ({' '.join(sorted(data.EXTENSIONS))})")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"--images {path}: no such file or folder")
    return files


@torch.no_grad()
def reconstruct_pictures(encoder, decoder, files, out, bars=None):
    """Write original | reconstruction | 5× difference of each file, its central square at 224×224, to `out`."""
    device = next(decoder.parameters()).device
    pictures = [(file, data.read_image(file)) for file in files]  # a bad one is an error before anything is written
    for number, (file, picture) in enumerate(tqdm(pictures, "Reconstructing", unit="image", disable=bars)):
        square = ImageOps.fit(picture, (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
        image = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].to(device).float() / 255
        output = decoder(encoder(image)).clamp(0, 1)
        strip = torch.cat([image, output, (5 * (image - output).abs()).clamp(0, 1)], dim=3)[0]
        name = file.stem if [f.stem for f in files].count(file.stem) == 1 else f"{file.stem}-{number + 1}"
        strip = (255 * strip).round().byte().permute(1, 2, 0).cpu().numpy()
        with atomic(out / f"{name}.png") as temporary:
            Image.fromarray(strip).save(temporary)
        print(f"{file}: {psnr(output, image).item():.2f} dB, {out / f'{name}.png'}")


def result_rows(runs):
    """A dictionary for each of the fifteen experiments, from its folder in `runs`: what is there, or why not."""
    rows = []
    for name, published in PUBLISHED.items():
        folder, row = Path(runs, name), {"experiment": name}
        row |= dict(zip(("published_psnr", "published_ssim", "published_lpips"), published, strict=False))
        row |= {"published_parameters": published[3], "published_minutes": published[4], "note": "not run"}
        if (folder / "metrics.json").exists():
            metrics = json.loads((folder / "metrics.json").read_text())
            row |= {
                f"{metric}{end}": metrics[metric][key]
                for metric in METRICS
                for key, end in (("mean", ""), ("std", "_std"))
            }
            row |= {key: metrics[key] for key in ("parameters", "ms_per_image", "epoch", "data", "protocol", "weights")}
            with open(folder / "history.csv", newline="") as file:
                row["minutes"] = sum(float(epoch["seconds"]) for epoch in csv.DictReader(file)) / 60
            row["note"] = "random weights (control)" if metrics["weights"] == "random" else ""
        elif (folder / "error.txt").exists():
            lines = (folder / "error.txt").read_text().strip().splitlines()
            row["note"] = f"failed: {lines[-1] if lines else 'no message'}"
        elif (folder / "last.pt").exists():
            row["note"] = "not finished"
        rows.append(row)
    return rows


def write_results(runs):
    """Published and measured, side by side: results.md, results.csv and results.png in the folder `runs`."""
    runs = Path(runs)
    if not runs.is_dir():
        raise UserError(f"--results {runs}: no such folder; run_all.sh fills it")
    rows = result_rows(runs)
    columns = dict.fromkeys(key for row in rows for key in row if key != "note") | {"note": None}
    with atomic(runs / "results.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    protocols = sorted({row["protocol"] for row in rows if "protocol" in row})
    sources = sorted({row["data"] for row in rows if "data" in row})
    lines = [f"Measured under protocol {', '.join(protocols) or '–'} on {', '.join(sources) or '–'}; each cell: "
             "published → measured. Times: minutes of training, milliseconds an image of inference.", ""]  # fmt: skip
    lines.append("| experiment | PSNR (dB) ↑ | SSIM ↑ | LPIPS ↓ | parameters | training | inference | note |")
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        cells = [
            f"{cell(row[f'published_{m}'], d)} → {cell(row.get(m), d)}" for m, d in zip(METRICS, (2, 3, 3), strict=True)
        ]
        cells.append(f"{row['published_parameters'] or '–'} → {cell(row.get('parameters'), 0)}")
        cells.append(f"{cell(row['published_minutes'], 0)} → {cell(row.get('minutes'), 1)}")
        cells += [f"12–15 → {cell(row.get('ms_per_image'), 1)}", row["note"].replace("|", "/")]
        lines.append(f"| {row['experiment']} | {' | '.join(cells)} |")
    write_text(runs / "results.md", "\n".join(lines) + "\n")
    draw_results(rows, runs / "results.png")
    print("\n".join(lines))


def cell(value, digits):
    """A number of a table, `–` where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}"


def draw_results(rows, path):
    """Published and measured metrics of the experiments as bars."""
    figure = Figure(figsize=(14, 5), layout="constrained")
    places = np.arange(len(rows))
    for axis, (metric, label) in zip(figure.subplots(1, 3, sharey=True), METRICS.items(), strict=True):
        for shift, prefix in ((-0.2, "published"), (0.2, "measured")):
            key = metric if prefix == "measured" else f"published_{metric}"
            values = [math.nan if row.get(key) is None else row[key] for row in rows]
            axis.barh(places + shift, values, 0.4, label=prefix)
        axis.set(xlabel=label, yticks=places, yticklabels=[row["experiment"] for row in rows])
        axis.invert_yaxis()
        axis.legend()
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=100)


def evaluate(args):
    """Do what `args` (a Namespace of the flags) ask for."""
    if args.results:
        return write_results(args.results)
    rank, world, device = start_processes(select_device(args.device))
    bars = True if args.quiet or rank else None
    encoder, decoder, checkpoint = load_model(args.ckpt)
    encoder, decoder = encoder.to(device), decoder.to(device)
    out = args.out or Path(args.ckpt).parent
    if args.images:
        files = picture_files(args.images)
        return reconstruct_pictures(encoder, decoder, files, make_folder(Path(out, "images")), bars)
    config = checkpoint["config"]
    source = data.resolve(args.data or config["data"])
    images = data.load_split(source, "test", args.cache or config["cache"], config["protocol"])
    out = make_folder(out)
    pixels = images.pixels[rank::world]
    values, milliseconds = evaluate_model(encoder, decoder, pixels, args.batch_size, bars, config["protocol"])
    if world > 1:
        values, milliseconds = gather(values, milliseconds, len(images.names))
    if rank == 0:
        report(encoder, decoder, checkpoint, source, images, values, milliseconds, out)


def gather(values, milliseconds, count):
    """Put together what each process measured; process r has images r, r + world, …"""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (values, milliseconds))
    whole = {name: np.empty(count) for name in METRICS}
    for rank, (part, _) in enumerate(parts):
        for name in METRICS:
            whole[name][rank :: len(parts)] = part[name]
    return whole, sum(part[1] for part in parts) / len(parts)


def report(encoder, decoder, checkpoint, source, images, values, milliseconds, out):
    """Print the table of a measured checkpoint and write its files to the folder `out`."""
    config = checkpoint["config"]
    metrics = {name: summary(values[name]) for name in METRICS}
    about = {"images": len(images.names), "ms_per_image": milliseconds, "data": source}
    about |= {name: config[name] for name in ("protocol", "weights")}
    about |= {"parameters": count_parameters(decoder), "epoch": checkpoint["epoch"], "config": config}
    numbers, per_image, pictures, histograms = (out / name for name in RESULTS)
    write_per_image(images.names, values, per_image)
    draw_reconstructions(encoder, decoder, images, values, pictures, config["protocol"])
    draw_histograms(values, histograms)
    write_text(numbers, json.dumps(metrics | about, indent=2))  # last: where it is, the others are

    print(
        f"{config['encoder']} {config['layer']} ({config['weights']} weights) + {config['decoder']}, "
        f"epoch {checkpoint['epoch']}, protocol {config['protocol']}; {len(images.names)} test images of {source}"
    )
    print(f"{'':<12}{'mean ± std':>18}{'min':>10}{'max':>10}")
    for name, label in METRICS.items():
        s = metrics[name]
        print(f"{label:<12}{s['mean']:>9.4f} ±{s['std']:>7.4f}{s['min']:>10.4f}{s['max']:>10.4f}")
    print(f"{milliseconds:.1f} ms an image on {next(decoder.parameters()).device}; results in {out}")


if __name__ == "__main__":
    run(lambda: evaluate(ARGS))
