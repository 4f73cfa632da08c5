"""Measure a trained decoder on the test images: PSNR, SSIM and LPIPS, as numbers and as pictures.

  python evaluate.py --ckpt runs/best.pt
  python evaluate.py --ckpt runs/best.pt --data FOLDER --out results
  python evaluate.py --ckpt runs/best.pt --images holiday.jpg pictures/      your own pictures
  python evaluate.py --report runs                                           the experiments, side by side
  python evaluate.py --ckpt runs/best.pt --invert                            what optimisation finds in the features
  python evaluate.py --encoder vgg16 --layer block1 --invert                 the same, from noise and without a decoder

The checkpoint knows its encoder, layer, decoder and data. Writes metrics.json, per_image.csv, reconstructions.png,
reconstructions.zip and histograms.png beside it, or to --out; --images writes to images/ there, --invert writes
inversion.json, .csv and .png, and --report writes report.html, a page to open in a browser, results.md, .csv and
.png and grid.png to the folder of the experiments.
"""

import csv
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from utils import LAYERS, METRICS, RESULTS, Parser, UserError, check_layer, non_negative_float, positive_int, run

INVERT = {  # flags of --invert alone: type, default, help
    "count": (positive_int, 10, "test images, evenly spaced among all"),
    "steps": (positive_int, 300, "of Adam"),
    "tv-weight": (non_negative_float, 0.3, "of the total variation"),
}


def make_parser():
    """The flags."""
    parser = Parser(__doc__)
    what = parser.add_argument_group("what to do")
    what.add_argument("--ckpt", help="measure this checkpoint, which train.py wrote (default: runs/best.pt)")
    what = what.add_mutually_exclusive_group()
    what.add_argument("--images", nargs="+", metavar="PATH", help="instead: reconstruct these pictures and folders")
    what.add_argument("--report", metavar="RUNS", help="instead: the page and tables of the experiments in this folder")
    what.add_argument("--invert", action="store_true", help="instead: optimise pixels until their features match")
    invert = parser.add_argument_group("--invert")
    invert.add_argument("--encoder", choices=list(LAYERS), help="from noise, not from --ckpt's reconstruction")
    invert.add_argument("--layer", help="of --encoder")
    invert.add_argument("--weights", help="of --encoder: `imagenet`, `random` or a file (default: imagenet)")
    for flag, (kind, value, text) in INVERT.items():
        invert.add_argument(f"--{flag}", type=kind, help=f"{text} (default: {value})")
    how = parser.add_argument_group("how")
    how.add_argument("--data", help="folder whose test images to use, or `sample` (default: the checkpoint's)")
    how.add_argument("--out", help="folder for the results (default: the checkpoint's; from noise: runs/noise_…)")
    how.add_argument("--batch-size", type=positive_int, default=4, help="images at a time; results don't depend on it")
    how.add_argument("--cache", help="folder of decoded images (default: the checkpoint's)")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    how.add_argument("--quiet", action="store_true", help="no progress bars")
    how.add_argument("--bars", action="store_true", help="progress bars even where there is no terminal")
    return parser


def parse_args(argv=None):
    """The command line → argparse.Namespace. Raises UserError."""
    args = make_parser().parse_args(argv)
    given = [flag for flag in ("encoder", *INVERT) if getattr(args, flag.replace("-", "_")) is not None]
    if given and not args.invert:
        raise UserError(f"--{given[0]}: only with --invert")
    for flag, (_, value, _) in INVERT.items():
        if flag not in given:
            setattr(args, flag.replace("-", "_"), value)
    if args.encoder and args.ckpt:
        raise UserError("--encoder with --ckpt: the checkpoint knows its own; give one of them")
    for action, ignored in {"report": ("ckpt", "data", "cache", "out"), "images": ("data", "cache")}.items():
        for flag in ignored:
            if getattr(args, action) and getattr(args, flag):
                raise UserError(f"--{flag}: not with --{action}")
    if (args.layer or args.weights) and not args.encoder:
        raise UserError(f"--{'layer' if args.layer else 'weights'}: only with --encoder")
    if args.encoder:
        args.layer = args.layer or LAYERS[args.encoder][0]
        check_layer(args.encoder, args.layer)
    args.ckpt = args.ckpt or "runs/best.pt"
    return args


if __name__ == "__main__":
    ARGS = run(parse_args)  # before torch is imported, so that --help answers at once

import time

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from skimage.metrics import structural_similarity
from tqdm import tqdm

import data
from models import IMAGE_SIZE, LPIPS, build_model, count_parameters, feature_shape
from tracker import add_test_metrics
from utils import atomic, disable_bars, keep_freed_memory, load, make_folder, select_device, start_processes, write_text


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
def measure(images, target, lpips, protocol="documented"):
    """{metric: one float an image} of `images` against `target`, (B, 3, H, W) in [0, 1]; lpips: a models.LPIPS."""
    with ThreadPoolExecutor() as pool:
        similarity = list(pool.map(ssim, images, target, [protocol] * len(images)))  # each on one core
    return {"psnr": psnr(images, target).tolist(), "ssim": similarity, "lpips": lpips(images, target).tolist()}


@torch.no_grad()
def evaluate_model(encoder, decoder, pixels, batch_size=4, bars=None, protocol="documented"):
    """Reconstruct the central 224×224 of `pixels`, uint8 (N, 256, 256, 3), and measure each image.

    Returns {"psnr" (dB), "ssim", "lpips": float64 arrays (N,)} and the milliseconds an image that
    encoder and decoder took together, the median over the batches, without the first, slow one where there are more.
    The networks' device is used; bars: tqdm's `disable`; protocol: that of the training.
    """
    device = next(decoder.parameters()).device
    lpips = LPIPS().to(device)
    values, seconds = {name: [] for name in METRICS}, []
    decoder.eval()
    with tqdm(None, "Evaluating", len(pixels), unit="image", disable=bars) as bar:
        for part in pixels.split(batch_size):
            batch = data.center_crops(part).to(device)
            start = wait(device)
            output = decoder(encoder(batch)).clamp(0, 1)
            seconds.append((wait(device) - start) / max(len(batch), 1))
            for name, value in measure(output, data.target(batch, protocol).clamp(0, 1), lpips, protocol).items():
                values[name] += value
            bar.update(len(batch))
    return {name: np.array(value) for name, value in values.items()}, 1000 * float(np.median(seconds[1:] or seconds))


def wait(device):
    """The time in seconds, when a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def summary(values):
    """Mean, standard deviation (population), minimum and maximum of an array, as a dictionary of floats."""
    return {name: float(getattr(values, name)()) for name in ("mean", "std", "min", "max")}


@torch.no_grad()
def reconstruct(encoder, decoder, pixels, protocol="documented"):
    """The central 224×224 of one image, uint8 (256, 256, 3), as the metrics see it, and what comes back.

    Two (1, 3, 224, 224) in [0, 1].
    """
    image = data.center_crops(pixels[None]).to(next(decoder.parameters()).device)
    return data.target(image, protocol).clamp(0, 1), decoder(encoder(image)).clamp(0, 1)


def to_image(picture):
    """A picture (3, H, W) in [0, 1] as an 8-bit PIL image."""
    return Image.fromarray((255 * picture).round().byte().permute(1, 2, 0).cpu().numpy())


def from_worst_to_best(psnr, count=6):
    """Indices of `count` images, evenly spaced from the lowest to the highest PSNR."""
    return np.argsort(psnr)[np.linspace(0, len(psnr) - 1, min(count, len(psnr))).round().astype(int)]


def draw_grid(rows, path):
    """A figure of `rows`: {label: [(PIL image, what stands above it) or None, …]}, all equally long."""
    columns = len(next(iter(rows.values())))
    figure = Figure(figsize=(2.2 * columns + 0.4, 2.4 * len(rows)), layout="constrained")
    for line, (label, cells) in zip(figure.subplots(len(rows), columns, squeeze=False), rows.items(), strict=True):
        line[0].set_ylabel(label, parse_math=False)  # names of files and folders may have a $
        for axis, cell in zip(line, cells, strict=True):
            axis.set(xticks=[], yticks=[])
            if cell:
                axis.imshow(cell[0])
                axis.set_title(cell[1], fontsize=8, parse_math=False)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=100)


def draw_reconstructions(encoder, decoder, images, values, path, protocol):
    """Target, reconstruction and 5× difference of six test images."""
    first = "original" if protocol == "documented" else "target, as measured"
    rows = {first: [], "reconstruction": [], "5 × difference": []}
    for i in from_worst_to_best(values["psnr"]):
        (target,), (output,) = reconstruct(encoder, decoder, images.pixels[i], protocol)
        pictures = map(to_image, (target, output, (5 * (target - output).abs()).clamp(0, 1)))
        captions = (images.names[i][:24], f"{values['psnr'][i]:.2f} dB", "")
        for row, cell in zip(rows.values(), zip(pictures, captions, strict=True), strict=True):
            row.append(cell)
    draw_grid(rows, path)


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


def write_samples(encoder, decoder, pixels, path, protocol="documented", count=24):
    """A zip of `count` evenly spaced test images, as the metrics see them, and their reconstructions, for the page.

    The members are N-original.jpg and N-reconstruction.jpg, N being the image's row in per_image.csv, from 0
    (report.py reads them).
    """
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for i in np.linspace(0, len(pixels) - 1, min(count, len(pixels))).round().astype(int):
            pair = reconstruct(encoder, decoder, pixels[i], protocol)
            for kind, picture in zip(("original", "reconstruction"), pair, strict=True):
                with archive.open(f"{i:05}-{kind}.jpg", "w") as file:  # with full colour, for 5× differences
                    to_image(picture[0]).save(file, "JPEG", quality=90, subsampling=0)


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
def reconstruct_pictures(encoder, decoder, files, out, bars=None, protocol="documented"):
    """Write original | reconstruction | 5× difference of each file, its central square at 224×224, to `out`.

    protocol: that of the training; of `published`, the original is what its metrics see.
    """
    device = next(decoder.parameters()).device
    size = (IMAGE_SIZE, IMAGE_SIZE)
    squares = [ImageOps.fit(data.read_image(file), size, Image.Resampling.BILINEAR) for file in files]  # or an error
    stems = [file.stem for file in files]
    names = [f"{stem}-{i + 1}" if stems.count(stem) > 1 else stem for i, stem in enumerate(stems)]
    paths = [out / f"{name}.png" for name in names]
    for path in paths:
        if paths.count(path) > 1 or path.resolve() in {file.resolve() for file in files}:
            raise UserError(f"{path}: would be overwritten; give another --out or rename the picture")
    jobs = zip(files, squares, paths, strict=True)
    for file, square, path in tqdm(jobs, "Reconstructing", len(files), unit="image", disable=bars):
        image = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].to(device).float() / 255
        output, target = decoder(encoder(image)).clamp(0, 1), data.target(image, protocol).clamp(0, 1)
        strip = torch.cat([target, output, (5 * (target - output).abs()).clamp(0, 1)], dim=3)[0]
        with atomic(path) as temporary:
            to_image(strip).save(temporary)
        print(f"{file}: {psnr(output, target).item():.2f} dB, {path}")


def evaluate(args):
    """Do what `args` (a Namespace of the flags) ask for."""
    if args.report:
        from report import write_report

        return write_report(args.report)
    keep_freed_memory()
    rank, world, device = start_processes(select_device(args.device))
    bars = disable_bars(args, rank)
    if args.invert:
        if world > 1:
            raise UserError("--invert: works in one process; start it without torchrun")
        from invert import invert_test_images

        return invert_test_images(args, device, bars)
    encoder, decoder, checkpoint = load_model(args.ckpt)
    encoder, decoder = encoder.to(device), decoder.to(device)
    out = args.out or Path(args.ckpt).parent
    config = checkpoint["config"]
    if args.images:
        files = picture_files(args.images)
        if rank == 0:
            reconstruct_pictures(encoder, decoder, files, make_folder(Path(out, "images")), bars, config["protocol"])
        return
    source = data.resolve(args.data or config["data"])
    images = data.load_split(source, "test", args.cache or config["cache"], config["protocol"], bars)
    out = make_folder(out)
    pixels = images.pixels[rank::world]
    values, milliseconds = evaluate_model(encoder, decoder, pixels, args.batch_size, bars, config["protocol"])
    if world > 1:
        values, milliseconds = gather(values, milliseconds, len(images.names))
    if rank == 0:
        write_evaluation(encoder, decoder, checkpoint, source, images, values, milliseconds, out)


def gather(values, milliseconds, count):
    """Put together what each process measured; process r has images r, r + world, …"""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (values, milliseconds))
    whole = {name: np.empty(count) for name in METRICS}
    for rank, (part, _) in enumerate(parts):
        for name in METRICS:
            whole[name][rank :: len(parts)] = part[name]
    return whole, sum(part[1] for part in parts) / len(parts)


def write_evaluation(encoder, decoder, checkpoint, source, images, values, milliseconds, out):
    """Print the table of a measured checkpoint and write its files to the folder `out`."""
    config = checkpoint["config"]
    metrics = {name: summary(values[name]) for name in METRICS}
    about = {"images": len(images.names), "ms_per_image": milliseconds, "data": source}
    about |= {name: config[name] for name in ("protocol", "weights")}
    about |= {"parameters": count_parameters(decoder), "epoch": checkpoint["epoch"]}
    about |= {"features": feature_shape(encoder), "config": config}
    numbers, per_image, pictures, histograms, samples = (out / name for name in RESULTS)
    numbers.unlink(missing_ok=True)
    write_per_image(images.names, values, per_image)
    draw_reconstructions(encoder, decoder, images, values, pictures, config["protocol"])
    draw_histograms(values, histograms)
    write_samples(encoder, decoder, images.pixels, samples, config["protocol"])
    write_text(numbers, json.dumps(metrics | about, indent=2))  # last: where it is, the others are
    add_test_metrics(out, checkpoint["epoch"], {name: metrics[name]["mean"] for name in METRICS})

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
