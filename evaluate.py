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
from utils import cli_main

if __name__ == "__main__":
    ARGS = cli_main(lambda: parse_evaluate(doc=__doc__))  # before torch is imported: --help answers at once

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from checkpoint import RESULTS, refuse_other_results, write_result
from metrics import LPIPS, feature_error, feature_scale, measure, summary, summary_table, target
from models import count_parameters, load_inverter
from utils import (
    DOCUMENTED,
    METRICS,
    METRICS_AND_FEATURE_ERROR,
    PROTOCOLS,
    UserError,
    digest,
    disable_bars,
    evenly_spaced,
    keep_freed_memory,
    make_folder,
    processes,
    select_device,
    timed,
    write_csv,
)

SSIM_WAITS = 16  # batches at most whose SSIM a GPU does not wait for
PICTURES = 1000  # at most, of all images, are kept to be drawn: 300 MB


class Evaluation(NamedTuple):
    """What evaluate_model measured, image by image."""

    values: dict  # {"psnr" (dB), "ssim", "lpips": (N,)}
    iterates: list  # the same and "feature_error", of what was there after each iteration; empty without any
    pictures: dict  # {number of an image: [what the metrics saw, its reconstruction], uint8 (H, W, 3)}
    names: list = ()  # of the images


def evaluate(args):
    """Do what `args` (a Namespace of the flags) ask for."""
    if args.report:
        from report.page import write_report

        write_report(args.report)
        return
    if args.compare:
        from report.compare import compare

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
            from report.baselines import write_baselines

            source, out = data.resolve(args.data), Path(args.out or "runs")
            options = {"batch_size": args.batch_size, "cache": args.cache, "bars": bars}
            write_baselines(source, out, PROTOCOLS[args.protocol], device, **options)
        return
    sha256 = digest(args.ckpt)  # first: a training may replace it meanwhile
    inverter, checkpoint = load_inverter(args.ckpt, args.encoder, args.weights, args.trust_code)
    inverter.to(device)
    config = checkpoint["config"]
    iterations = getattr(inverter.base_decoder, "iterations", 0)  # how often the decoder looks at the encoder
    if args.iterations and not iterations:
        raise UserError(f"--iterations: the {config['decoder']} decoder of {args.ckpt} does not iterate")
    if args.iterations:
        inverter.base_decoder.iterations = iterations = args.iterations
    protocol = PROTOCOLS[config["protocol"]]
    if args.images:
        if rank == 0:
            from extras.own_pictures import reconstruct_pictures

            reconstruct_pictures(args, inverter, config, bars)
        return
    source, out = data.of_checkpoint(args.data, config["data"], args.ckpt)
    images = data.load_split(source, "test", args.cache, protocol, bars=bars, size=inverter.size)
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
    options = {"bars": bars, "protocol": protocol, "scale": scale, "pictures": PICTURES // world}
    found = evaluate_model(inverter, part, args.batch_size, **options)
    if world > 1:
        found = gather(found)
    if rank == 0:
        about |= {"ckpt": args.ckpt, "inference_ms": time_inference(inverter, images)}
        write_evaluation(found._replace(names=images.names), inverter, checkpoint, about, out)


# --- Measuring -------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_model(
    inverter, images, batch_size=4, *, bars=None, protocol=DOCUMENTED, scale=None, pictures=PICTURES
):
    """Reconstruct and measure the centres of `images`, of the inverter's size: an Evaluation.

    images: data.Images, read a batch at a time, or uint8 (N, 256, 256, 3).
    protocol: that of the training. scale: divides feature errors; with it each iteration is measured.
    pictures: keep the pixels of so many images, evenly spaced.
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
            made = inverter.decode_all(features)
            for image in made if scale else made[-1:]:
                output = image.clamp(0, 1)
                values = measure(output, wanted, lpips, protocol)
                if scale:
                    values["feature_error"] = feature_error(
                        inverter.reencode, image, features, scale
                    ).tolist()
                parts[-1].append(values)
                waiting.append(values)
                if len(waiting) >= most:
                    finish_ssim(waiting)
            pairs = zip(data.to_pixels(wanted), data.to_pixels(output), strict=True)
            for number, pair in enumerate(pairs, first):
                if number in drawn:
                    kept[number] = [pixels.clone() for pixels in pair]  # without the rest of the batch
            bar.update(len(batch))
    finish_ssim(waiting)
    iterates = [concatenate(same) for same in zip(*parts, strict=True)]  # batches after as many iterations
    values = {name: iterates[-1][name] for name in METRICS}
    iterates = iterates if scale else []
    return Evaluation(values, iterates, kept)


def finish_ssim(waiting):
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
    iterates = [concatenate(same) for same in zip(*(part.iterates for part in parts), strict=True)]
    return Evaluation(concatenate([part.values for part in parts]), iterates, pictures)


def concatenate(parts):
    """{name: (N,)} of such parts, one after the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


# --- What it writes --------------------------------------------------------------------------------------


def write_evaluation(found, inverter, checkpoint, about, out):
    """Print the table of a measured checkpoint and write its files to the folder `out`.

    found: the Evaluation of the test images; about: more entries of metrics.json. Pictures need report/.
    """
    config = checkpoint["config"]
    protocol = PROTOCOLS[config["protocol"]]
    values = found.values
    metrics = {name: summary(values[name]) for name in METRICS}
    about = about | {"images": len(found.names)}
    about |= {name: config[name] for name in ("protocol", "weights")}
    about |= {"parameters": count_parameters(inverter.decoder), "epoch": checkpoint["epoch"]}
    about |= {"shape": list(inverter.shape), "size": inverter.size}
    label = "target, as measured" if protocol.normalized_target else "original"
    (out / "metrics.json").unlink(missing_ok=True)
    rows = zip(found.names, *(values[name].tolist() for name in METRICS), strict=True)
    write_csv(out / "per_image.csv", ("image", *METRICS), rows)
    if find_spec("report"):
        from report.pictures import draw_evaluation

        trained = getattr(inverter.base_decoder, "iterations_per_round", None)
        draw_evaluation(found, out, label, trained)
    if found.iterates:
        about["iterates"] = [
            {name: summary(after[name]) for name in METRICS_AND_FEATURE_ERROR} for after in found.iterates
        ]
    # last: where it is, the others are
    write_result(out / "metrics.json", metrics | about)
    if find_spec("extras") and find_spec("report"):
        from extras.trackers import add_test_metrics

        add_test_metrics(out, checkpoint["epoch"], {name: metrics[name]["mean"] for name in METRICS})

    print(
        f"{config['encoder']} {config['layer']} ({config['weights']} weights) + {config['decoder']}, epoch "
        f"{checkpoint['epoch']}, protocol {protocol.name}; {len(found.names)} test images of {about['data']}"
    )
    print(summary_table(metrics))
    for number, after in enumerate(found.iterates):
        means = ", ".join(
            f"{label} {after[name].mean():.4f}" for name, label in METRICS_AND_FEATURE_ERROR.items()
        )
        print(f"after {number} iterations: {means}")
    print(f"{about['inference_ms']:.1f} ms for an image by itself on {inverter.device}; results in {out}")


if __name__ == "__main__":
    cli_main(lambda: evaluate(ARGS))
