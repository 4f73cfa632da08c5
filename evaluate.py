"""Measure a trained decoder on the test images: PSNR, SSIM and LPIPS, as numbers and as pictures.

  python evaluate.py --ckpt runs/best.pt
  python evaluate.py --ckpt runs/best.pt --data FOLDER --out results
  python evaluate.py --ckpt pretrained/vgg16_block1.pt --images holiday.jpg  your own pictures, or folders
  python evaluate.py --baselines --data FOLDER                               what needs no features
  python evaluate.py --report runs                                           the experiments, side by side
  python evaluate.py --compare runs/a runs/b                                 whether b is better

The checkpoint knows its encoder, layer, decoder and data. Writes metrics.json, per_image.csv,
reconstructions.png, reconstructions.zip and histograms.png beside it (of other --data: to a folder of its
name there), or to --out; --images writes to images/ there, --baselines writes baselines.json, and a folder of
each one's results, to runs, or to --out, and --report writes report.html, a page to open in a browser,
results.md, .csv and .png and grid.png to the folder of the experiments. What optimisation finds in the
features: python invert.py --help
"""

from flags import parse_evaluate
from utils import run

if __name__ == "__main__":
    ARGS = run(lambda: parse_evaluate(doc=__doc__))  # before torch is imported: --help answers at once

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from baselines import write_baselines
from compare import compare
from metrics import LPIPS, feature_error, feature_scale, measure, summary, summary_table, target
from models import count_parameters, load_inverter
from pictures import draw_histograms, draw_iterations, draw_reconstructions, to_pixels, write_samples
from reconstruct import reconstruct_pictures
from report import write_report
from study import DOCUMENTED, FIGURES, METRICS, PROTOCOLS
from tracker import add_test_metrics
from utils import (
    RESULTS,
    UserError,
    digest,
    disable_bars,
    evenly_spaced,
    keep_freed_memory,
    make_folder,
    processes,
    refuse_other_results,
    select_device,
    timed,
    write_csv,
    write_result,
)

SSIM_WAITS = 16  # batches at most whose SSIM a GPU does not wait for
PICTURES = 1000  # at most, of all images, are kept to be drawn: 300 MB


class Evaluation(NamedTuple):
    """What evaluate_model measured, image by image."""

    values: dict  # {"psnr" (dB), "ssim", "lpips": (N,)}
    iterates: list  # the same and "feature_error", of what was there after each iteration; empty without any
    pictures: dict  # {number of an image: [what the metrics saw, its reconstruction], uint8 (H, W, 3)}


def evaluate(args):
    """Do what `args` (a Namespace of the flags) ask for."""
    if args.report:
        write_report(args.report)
        return
    if args.compare:
        compare(args.compare, args.out or "runs")
        return
    keep_freed_memory()
    with processes(select_device(args.device)) as started:
        evaluate_checkpoint(args, *started)


def evaluate_checkpoint(args, rank, world, device):
    """Measure a checkpoint, take one's own pictures or measure baselines, in one of `world` processes."""
    bars = disable_bars(args, rank)
    if args.baselines:
        if rank == 0:
            source, out = data.resolve(args.data), Path(args.out or "runs")
            options = {"batch_size": args.batch_size, "cache": args.cache, "bars": bars}
            write_baselines(source, out, PROTOCOLS[args.protocol], device, **options)
        return
    sha256 = digest(args.ckpt)  # first: a training may replace it meanwhile
    inverter, checkpoint = load_inverter(args.ckpt, args.encoder, args.weights, args.trust_code)
    inverter.to(device)
    config = checkpoint["config"]
    iterations = getattr(inverter.core, "iterations", 0)  # how often the decoder looks at the encoder
    if args.iterations and not iterations:
        raise UserError(f"--iterations: the {config['decoder']} decoder of {args.ckpt} does not iterate")
    if args.iterations:
        inverter.core.iterations = iterations = args.iterations
    protocol = PROTOCOLS[config["protocol"]]
    if args.images:
        if rank == 0:
            reconstruct_pictures(args, inverter, config, bars)
        return
    source, out = data.of_checkpoint(args.data, config["data"], args.ckpt)
    images = data.load_split(source, "test", args.cache, protocol, bars, inverter.size)
    if args.iterations:
        out = out / f"iterations-{args.iterations}"
    out = Path(args.out or out)
    about = {"data": source, "config": config, "ckpt_sha256": sha256}
    about |= {"iterations": iterations} if iterations else {}
    refuse_other_results(out, RESULTS, about)
    scale = None
    if iterations:
        divisor, scale = feature_scale(inverter.encoder, images)
        about[divisor] = scale
    if len(images) < world:
        raise UserError(f"{source}: {len(images)} test images for {world} processes; start no more than that")
    if rank == 0:
        make_folder(out)  # or an error, before anything is computed
    part = data.subset(images, np.array_split(np.arange(len(images)), world)[rank])
    found = evaluate_model(inverter, part, args.batch_size, bars, protocol, scale, PICTURES // world)
    if world > 1:
        found = gather(found)
    if rank == 0:
        about["ckpt"] = args.ckpt
        milliseconds = time_inference(inverter, images)
        write_evaluation(found, images.names, inverter, checkpoint, about, milliseconds, out)


# --- Measuring -------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_model(
    inverter, images, batch_size=4, bars=None, protocol=DOCUMENTED, scale=None, pictures=PICTURES
):
    """Reconstruct and measure the centre of `images`, of the inverter's own size: an Evaluation.

    images: data.Images, read a batch at a time, or uint8 (N, 256, 256, 3). protocol: that of the training.
    scale: what feature errors are divided by; with it each iteration is measured. pictures: of how many
    images, evenly spaced, pixels are kept.
    """
    lpips = LPIPS().to(inverter.device)
    parts = []  # of each batch, the values after each iteration
    waiting = []  # of those, the ones whose SSIM the CPU may still compute
    most = 1 if inverter.device.type == "cpu" else SSIM_WAITS
    drawn = set(evenly_spaced(len(images), pictures))
    kept = {}
    inverter.eval()
    with tqdm(None, "Evaluating", len(images), unit="image", disable=bars) as bar:
        for first in range(0, len(images), batch_size):
            pixels = images[first : first + batch_size]
            batch = data.center_crops(pixels, inverter.size).to(inverter.device)
            features = inverter.encode(batch)
            wanted = target(batch, protocol).clamp(0, 1)
            parts.append([])
            made = inverter.iterates(features)
            for image in made if scale else made[-1:]:
                output = image.clamp(0, 1)
                values = measure(output, wanted, lpips, protocol)
                if scale:
                    values["feature_error"] = feature_error(inverter.look, image, features, scale).tolist()
                parts[-1].append(values)
                waiting.append(values)
                if len(waiting) >= most:
                    await_ssim(waiting)
            pairs = zip(to_pixels(wanted), to_pixels(output), strict=True)
            for number, pair in enumerate(pairs, first):
                if number in drawn:
                    kept[number] = [pixels.clone() for pixels in pair]  # without the rest of the batch
            bar.update(len(batch))
    await_ssim(waiting)
    iterates = [joined(same) for same in zip(*parts, strict=True)]  # batches after as many iterations
    values = {name: iterates[-1][name] for name in METRICS}
    iterates = iterates if scale else []
    return Evaluation(values, iterates, kept)


def await_ssim(waiting):
    """Wait for the SSIM of each of these `measure` results, and forget them."""
    for values in waiting:
        values["ssim"] = list(values["ssim"])
    waiting.clear()


@torch.no_grad()
def time_inference(inverter, pixels, repeats=5):
    """Milliseconds for one image by itself: the median of `repeats`, after one that does not count."""
    image = data.center_crops(pixels[:1], inverter.size).to(inverter.device)
    inverter.eval()
    return 1000 * timed(inverter.device, lambda: inverter(image), repeats)


def gather(found):
    """Put together what each process measured of its part of the images."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, found)
    pictures, first = {}, 0
    for part in parts:
        pictures |= {first + number: pair for number, pair in part.pictures.items()}
        first += len(part.values["psnr"])
    iterates = [joined(same) for same in zip(*(part.iterates for part in parts), strict=True)]
    return Evaluation(joined([part.values for part in parts]), iterates, pictures)


def joined(parts):
    """{name: (N,)} of such parts, one after the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


# --- What it writes --------------------------------------------------------------------------------------


def write_evaluation(found, names, inverter, checkpoint, about, milliseconds, out):
    """Print the table of a measured checkpoint and write its files to the folder `out`.

    found: the Evaluation of the test images, whose names are given; about: what metrics.json also says.
    """
    config = checkpoint["config"]
    protocol = PROTOCOLS[config["protocol"]]
    values = found.values
    metrics = {name: summary(values[name]) for name in METRICS}
    about = about | {"images": len(names), "inference_ms": milliseconds}
    about |= {name: config[name] for name in ("protocol", "weights")}
    about |= {"parameters": count_parameters(inverter.decoder), "epoch": checkpoint["epoch"]}
    about |= {"shape": list(inverter.shape), "size": inverter.size}
    label = "target, as measured" if protocol.normalized_target else "original"
    (out / "metrics.json").unlink(missing_ok=True)
    rows = zip(names, *(values[name].tolist() for name in METRICS), strict=True)
    write_csv(out / "per_image.csv", ("image", *METRICS), rows)
    draw_reconstructions(found.pictures, names, values["psnr"], out / "reconstructions.png", label)
    draw_histograms(values, out / "histograms.png")
    write_samples(found.pictures, out / "reconstructions.zip")
    if found.iterates:
        draw_iterations(found.iterates, out / "iterations.png", inverter.core.in_a_round)
        about["iterates"] = [{name: summary(after[name]) for name in FIGURES} for after in found.iterates]
    # last: where it is, the others are
    write_result(out / "metrics.json", metrics | about)
    add_test_metrics(out, checkpoint["epoch"], {name: metrics[name]["mean"] for name in METRICS})

    print(
        f"{config['encoder']} {config['layer']} ({config['weights']} weights) + {config['decoder']}, "
        f"epoch {checkpoint['epoch']}, protocol {protocol.name}; {len(names)} test images of {about['data']}"
    )
    print(summary_table(metrics))
    for number, after in enumerate(found.iterates):
        means = ", ".join(f"{label} {after[name].mean():.4f}" for name, label in FIGURES.items())
        print(f"after {number} iterations: {means}")
    print(f"{milliseconds:.1f} ms for an image by itself on {inverter.device}; results in {out}")


if __name__ == "__main__":
    run(lambda: evaluate(ARGS))
