"""Measure a trained decoder on the test images: PSNR, SSIM and LPIPS, as numbers and as pictures.

  python evaluate.py --ckpt runs/best.pt
  python evaluate.py --ckpt runs/best.pt --data FOLDER --out results
  python evaluate.py --ckpt runs/best.pt --images holiday.jpg pictures/      your own pictures
  python evaluate.py --baselines --data FOLDER                               what needs no features
  python evaluate.py --report runs                                           the experiments, side by side

The checkpoint knows its encoder, layer, decoder and data. Writes metrics.json, per_image.csv,
reconstructions.png, reconstructions.zip and histograms.png beside it (of other --data: to a folder of its
name there), or to --out; --images writes to images/ there, --baselines writes baselines.json to runs, or to
--out, and --report writes report.html, a page to open in a browser, results.md, .csv and .png and grid.png to
the folder of the experiments. What optimisation finds in the features: python invert.py --help
"""

from flags import parse_evaluate
from utils import run

if __name__ == "__main__":
    ARGS = run(lambda: parse_evaluate(doc=__doc__))  # before torch is imported: --help answers at once

import json
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps, PngImagePlugin
from tqdm import tqdm

import data
from baselines import write_baselines
from metrics import LPIPS, measure, psnr, summary, summary_table, target
from models import IMAGE_SIZE, count_parameters, load_inverter
from pictures import draw_histograms, draw_reconstructions, strip, to_pixels, write_samples
from report import write_report
from study import DOCUMENTED, METRICS, PROTOCOLS
from tracker import add_test_metrics
from utils import (
    RESULTS,
    UserError,
    atomic,
    digest,
    disable_bars,
    keep_freed_memory,
    make_folder,
    refuse_other_results,
    same_data,
    select_device,
    start_processes,
    write_csv,
    write_text,
)


class Evaluation(NamedTuple):
    """What evaluate_model measured, image by image."""

    values: dict  # {"psnr" (dB), "ssim", "lpips": float64 (N,)}
    targets: torch.Tensor  # the images as the metrics saw them, as uint8 pixels (N, 224, 224, 3)
    outputs: torch.Tensor  # the reconstructions that were measured, likewise


def evaluate(args):
    """Do what `args` (a Namespace of the flags) ask for."""
    if args.report:
        write_report(args.report)
        return
    keep_freed_memory()
    rank, world, device = start_processes(select_device(args.device))
    bars = disable_bars(args, rank)
    if args.baselines:
        if rank == 0:
            source, out = data.resolve(args.data), Path(args.out or "runs")
            write_baselines(source, out, PROTOCOLS[args.protocol], device, args.batch_size, args.cache, bars)
        return
    inverter, checkpoint = load_inverter(args.ckpt)
    inverter.to(device)
    config = checkpoint["config"]
    protocol = PROTOCOLS[config["protocol"]]
    if args.images:
        if rank == 0:
            files = picture_files(args.images)
            out = make_folder(Path(args.out or Path(args.ckpt).parent, "images"))
            reconstruct_pictures(inverter, files, out, digest(args.ckpt), bars, protocol)
        return
    source = data.resolve(args.data or config["data"])
    images = data.load_split(source, "test", args.cache, protocol, bars)
    if same_data(source, config["data"]):
        source = config["data"]
        out = Path(args.out or Path(args.ckpt).parent)
    else:
        out = Path(args.out or Path(args.ckpt).parent / Path(source).resolve().name)
    refuse_other_results(out, RESULTS, {"data": source, "config": config})
    found = evaluate_model(inverter, images[rank::world], args.batch_size, bars, protocol)
    if world > 1:
        found = gather(found, len(images.names))
    if rank == 0:
        milliseconds = time_inference(inverter, images[:1])
        write_evaluation(found, images.names, inverter, checkpoint, source, milliseconds, make_folder(out))


# --- Measuring -------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_model(inverter, pixels, batch_size=4, bars=None, protocol=DOCUMENTED):
    """Reconstruct and measure the central 224×224 of `pixels`, uint8 (N, 256, 256, 3): an Evaluation.

    Where the inverter is, it computes; bars: tqdm's `disable`; protocol: that of the training.
    """
    lpips = LPIPS().to(inverter.device)
    values = {name: [] for name in METRICS}
    targets, outputs = [], []
    inverter.eval()
    with tqdm(None, "Evaluating", len(pixels), unit="image", disable=bars) as bar:
        for part in pixels.split(batch_size):
            batch = data.center_crops(part).to(inverter.device)
            output = inverter(batch).clamp(0, 1)
            wanted = target(batch, protocol).clamp(0, 1)
            for name, value in measure(output, wanted, lpips, protocol).items():
                values[name] += value
            targets.append(to_pixels(wanted))
            outputs.append(to_pixels(output))
            bar.update(len(batch))
    values = {name: np.array(value) for name, value in values.items()}
    return Evaluation(values, torch.cat(targets), torch.cat(outputs))


@torch.no_grad()
def time_inference(inverter, pixels, repeats=5):
    """Milliseconds for one image by itself: the median of `repeats`, after one that does not count."""
    image = data.center_crops(pixels[:1]).to(inverter.device)
    inverter.eval()
    seconds = []
    for _ in range(repeats + 1):
        start = wait(inverter.device)
        inverter(image)
        seconds.append(wait(inverter.device) - start)
    return 1000 * median(seconds[1:])


def wait(device):
    """The time in seconds, when a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def gather(found, count):
    """Put together what each process measured; process r has images r, r + world, …"""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, found)
    values = {name: np.empty(count) for name in METRICS}
    targets, outputs = torch.empty((2, count, *found.outputs.shape[1:]), dtype=torch.uint8)
    for rank, part in enumerate(parts):
        targets[rank :: len(parts)] = part.targets
        outputs[rank :: len(parts)] = part.outputs
        for name in METRICS:
            values[name][rank :: len(parts)] = part.values[name]
    return Evaluation(values, targets, outputs)


# --- What it writes --------------------------------------------------------------------------------------


def write_evaluation(found, names, inverter, checkpoint, source, milliseconds, out):
    """Print the table of a measured checkpoint and write its files to the folder `out`.

    found: the Evaluation of the test images of `source`, whose names are given.
    """
    config = checkpoint["config"]
    protocol = PROTOCOLS[config["protocol"]]
    values = found.values
    metrics = {name: summary(values[name]) for name in METRICS}
    about = {"images": len(names), "inference_ms": milliseconds, "data": source}
    about |= {name: config[name] for name in ("protocol", "weights")}
    about |= {"parameters": count_parameters(inverter.decoder), "epoch": checkpoint["epoch"]}
    about |= {"shape": list(inverter.shape), "config": config}
    numbers, per_image, reconstructions, histograms, samples = (out / name for name in RESULTS)
    label = "target, as measured" if protocol.normalized_target else "original"
    numbers.unlink(missing_ok=True)
    rows = zip(names, *(values[name].tolist() for name in METRICS), strict=True)
    write_csv(per_image, ("image", *METRICS), rows)
    draw_reconstructions(found.targets, found.outputs, names, values["psnr"], reconstructions, label)
    draw_histograms(values, histograms)
    write_samples(found.targets, found.outputs, samples)
    write_text(numbers, json.dumps(metrics | about, indent=2))  # last: where it is, the others are
    add_test_metrics(out, checkpoint["epoch"], {name: metrics[name]["mean"] for name in METRICS})

    print(
        f"{config['encoder']} {config['layer']} ({config['weights']} weights) + {config['decoder']}, "
        f"epoch {checkpoint['epoch']}, protocol {protocol.name}; {len(names)} test images of {source}"
    )
    print(summary_table(metrics))
    print(f"{milliseconds:.1f} ms for an image by itself on {inverter.device}; results in {out}")


# --- One's own pictures ----------------------------------------------------------------------------------


def picture_files(paths):
    """The image files that `paths` name or that lie in the folders among them. Raises UserError."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            found = data.image_files(path)
            if not found:
                raise UserError(
                    f"--images {path}: no images in this folder ({' '.join(sorted(data.EXTENSIONS))})"
                )
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"--images {path}: no such file or folder")
    return files


@torch.no_grad()
def reconstruct_pictures(inverter, files, out, made_by, bars=None, protocol=DOCUMENTED):
    """Write original | reconstruction | 5× difference of each file, its central square at 224×224, to `out`.

    made_by: the checkpoint's digest, which a PNG that was written keeps, with its picture's: only such a one
    is ever replaced. protocol: that of the training; of `published`, the original is what its metrics see.
    """
    size = (IMAGE_SIZE, IMAGE_SIZE)
    squares = [
        ImageOps.fit(data.read_image(file), size, Image.Resampling.BILINEAR) for file in files
    ]  # or an error
    paths = strip_paths(files, out)
    marks = [f"feature-inversion {made_by[:16]} of {digest(file)[:16]}" for file in files]
    for path, mark in zip(paths, marks, strict=True):
        if paths.count(path) > 1 or path.exists() and mark_of(path) != mark:
            raise UserError(f"{path}: would be overwritten; give another --out, or rename the picture")
    jobs = zip(files, squares, paths, marks, strict=True)
    for file, square, path, mark in tqdm(jobs, "Reconstructing", len(files), unit="image", disable=bars):
        image = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].to(inverter.device).float() / 255
        output = inverter(image).clamp(0, 1)
        wanted = target(image, protocol).clamp(0, 1)
        about = PngImagePlugin.PngInfo()
        about.add_text("Software", mark)
        with atomic(path) as temporary:
            strip(to_pixels(wanted)[0], to_pixels(output)[0]).save(temporary, pnginfo=about)
        print(f"{file}: {psnr(output, wanted).item():.2f} dB, {path}")


def strip_paths(files, out):
    """The PNG in folder `out` for each of `files`; those of one name are numbered."""
    stems = [file.stem for file in files]
    paths = []
    for number, stem in enumerate(stems, 1):
        name = f"{stem}-{number}" if stems.count(stem) > 1 else stem
        paths.append(out / f"{name}.png")
    return paths


def mark_of(path):
    """What reconstruct_pictures wrote into the PNG at `path` about its origin, or None."""
    try:
        with Image.open(path) as picture:
            return picture.info.get("Software")
    except Exception:  # every Pillow plugin has its own kinds
        return None


if __name__ == "__main__":
    run(lambda: evaluate(ARGS))
