"""Measure a trained decoder on the test images: PSNR, SSIM and LPIPS, as numbers and as pictures.

  python evaluate.py --ckpt runs/best.pt
  python evaluate.py --ckpt runs/best.pt --data FOLDER --out results
  python evaluate.py --ckpt pretrained/vgg16_block1.pt --images holiday.jpg  your own pictures, or folders
  python evaluate.py --ckpt pretrained/vgg16_block?.pt --images holiday.jpg  by several decoders, side by side
  python evaluate.py --baselines --data FOLDER                               what needs no features
  python evaluate.py --report runs                                           the experiments, side by side
  python evaluate.py --compare runs/a runs/b                                 whether b is better

The checkpoint knows its encoder, layer, decoder and data. Its folder (for other --data a subfolder of that
name) or --out gets metrics.json, per_image.csv, reconstructions.png and .zip and histograms.png, or with
--images images/. --baselines writes baselines.json and baselines/ to runs or --out, --report writes
report.html, results.md, .csv and .png and grid.png to RUNS. For optimisation: python invert.py --help
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
from metrics import (
    LPIPS,
    SCALE_IMAGES,
    feature_error,
    feature_scale,
    measure,
    scale_of,
    summary,
    summary_table,
    target,
    thumbnail,
)
from models import count_parameters, load_inverter
from utils import (
    DOCUMENTED,
    FREE_BASELINES,
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

    iterates: list  # {"psnr" (dB), "ssim", "lpips", "feature_error": (N,)} after each iteration, or one;
    # the last has "same_label", (N,), where there is a classifier
    baselines: dict  # {kind of FREE_BASELINES: the same without "feature_error"}
    pictures: dict  # {number of an image: [target, reconstruction], uint8 (H, W, 3)}
    features: torch.Tensor | None = None  # of the first images, (SCALE_IMAGES, C, H, W)
    names: list = ()  # of the images

    @property
    def values(self):
        """After the last iteration."""
        return self.iterates[-1]


def evaluate(args):
    """Do what `args` (a Namespace of the flags) ask for. Raises UserError."""
    if args.report:
        from report.page import write_report

        print(write_report(args.report))
        return
    if args.compare:
        from report.compare import compare

        return compare(args.compare, args.out or "runs")
    keep_freed_memory()
    with processes(select_device(args.device)) as (rank, world, device):
        bars = disable_bars(args, rank)
        if not (args.baselines or args.images):
            evaluate_checkpoint(args, bars, rank, world, device)
        elif args.baselines and rank == 0:
            from report.baselines import write_baselines

            write_baselines(args, device, bars)
        elif rank == 0:
            from extras.own_pictures import picture_files, reconstruct_pictures

            picture_files(args.images)  # or an error, before any checkpoint is loaded
            opened = []
            for path in args.ckpts:
                inverter, checkpoint, _ = open_checkpoint(args, path, device)
                name = Path(path).parent.resolve().name if Path(path).stem == "best" else Path(path).stem
                opened.append((name, inverter, checkpoint["config"]))
            reconstruct_pictures(args, opened, bars)


def open_checkpoint(args, path, device):
    """The inverter of a best.pt, with --iterations, the checkpoint, and the SHA-256 of the file."""
    sha256 = digest(path)  # first: a training may replace it meanwhile
    inverter, checkpoint = load_inverter(path, args.encoder, args.weights, args.trust_code)
    if args.iterations:
        if not hasattr(inverter.base_decoder, "iterations"):
            name = checkpoint["config"]["decoder"]
            raise UserError(f"--iterations: the {name} decoder of {path} does not iterate")
        inverter.base_decoder.iterations = args.iterations
    return inverter.to(device), checkpoint, sha256


def evaluate_checkpoint(args, bars, rank, world, device):
    """Measure a checkpoint on the test images in `world` processes; the first writes the results."""
    inverter, checkpoint, sha256 = open_checkpoint(args, args.ckpt, device)
    config = checkpoint["config"]
    protocol = PROTOCOLS[config["protocol"]]
    source, out = data.of_checkpoint(args.data, config["data"], args.ckpt)
    out = Path(args.out or (out / f"iterations-{args.iterations}" if args.iterations else out))
    images = data.load_split(source, "test", args.cache, protocol, bars=bars, size=inverter.size)
    if len(images) < world:
        raise UserError(f"{source}: {len(images)} test images for {world} processes; start no more than that")
    about = {"data": source, "config": config, "ckpt_sha256": sha256}
    iterations = getattr(inverter.base_decoder, "iterations", None)
    if iterations:
        about["iterations"] = iterations
    refuse_other_results(out, RESULTS, about)
    if rank == 0:
        make_folder(out)  # or an error, before anything is computed
    part = data.subset(images, np.array_split(np.arange(len(images)), world)[rank])
    options = {"bars": bars, "protocol": protocol, "pictures": PICTURES // world}
    if find_spec("extras"):
        from extras.classifier import classifier_of

        moved = {"encoder": args.encoder or config["encoder"], "weights": args.weights or config["weights"]}
        classifier = classifier_of(config | moved)
        options["classifier"] = classifier and classifier.to(device)
    found = evaluate_model(inverter, part, args.batch_size, **options)
    if world > 1:
        found = gather(found._replace(features=None))
        divisor, scale = feature_scale(inverter.encoder, images)
    else:
        divisor, scale = scale_of(found.features)
    about[divisor] = scale
    for values in found.iterates:
        values["feature_error"] /= scale
    if rank == 0:
        about |= {"ckpt": args.ckpt, "inference_ms": time_inference(inverter, images)}
        write_evaluation(found._replace(names=images.names), inverter, checkpoint, about, out)


# --- Measuring -------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_model(
    inverter, images, batch_size=4, *, bars=None, protocol=DOCUMENTED, pictures=PICTURES, classifier=None
):
    """Reconstruct and measure the centres of `images`, at the inverter's size.

    images: data.Images, read a batch at a time, or uint8 (N, 256, 256, 3). pictures: number of images whose
    pixels are kept, evenly spaced. classifier: images → logits (B, N, 1, 1), if there is one. Returns an
    Evaluation, whose feature errors are not divided yet.
    """
    lpips = LPIPS().to(inverter.device)
    most = 1 if inverter.device.type == "cpu" else SSIM_WAITS
    kept = dict.fromkeys(evenly_spaced(len(images), pictures))
    measured, features_of_first = [], []  # of each batch, a list: of the iterates and the two baselines
    inverter.eval()
    with tqdm(None, "Evaluating", len(images), unit="image", disable=bars) as bar:
        for first in range(0, len(images), batch_size):
            batch = data.center_crops(images[first : first + batch_size], inverter.size).to(inverter.device)
            features = inverter.encode(batch)
            features_of_first += features[: max(SCALE_IMAGES - first, 0)]
            wanted = target(batch, protocol).clamp(0, 1)
            iterates = inverter.decode_all(features)
            colour = wanted.mean((2, 3), keepdim=True).expand_as(wanted)
            small = thumbnail(wanted, inverter.shape[1:])
            outputs = [image.clamp(0, 1) for image in iterates]
            seen = lpips.features(wanted)
            found = [measure(image, wanted, lpips, protocol, seen) for image in (*outputs, colour, small)]
            for values, image in zip(found[:-2], iterates, strict=True):
                values["feature_error"] = feature_error(inverter.reencode, image, features, 1).tolist()
            if classifier:
                labels = [classifier(image).argmax(1).flatten() for image in (wanted, outputs[-1])]
                found[-3]["same_label"] = torch.eq(*labels).int().tolist()
            measured.append(found)
            for values in measured[-most] if len(measured) >= most else ():
                values["ssim"] = list(values["ssim"])  # waits for the CPU
            pairs = zip(data.to_pixels(wanted), data.to_pixels(outputs[-1]), strict=True)
            for number, pair in enumerate(pairs, first):
                if number in kept:
                    kept[number] = [pixels.clone() for pixels in pair]  # without the rest of the batch
            bar.update(len(batch))
    *iterates, colour, small = [concatenate(parts) for parts in zip(*measured, strict=True)]
    baselines = {"mean_colour": colour, "thumbnail": small}
    return Evaluation(iterates, baselines, kept, torch.stack(features_of_first))


@torch.no_grad()
def time_inference(inverter, pixels, repeats=5):
    """Milliseconds for one image by itself: the median of `repeats`, after a warm-up."""
    image = data.center_crops(pixels[:1], inverter.size).to(inverter.device)
    inverter.eval()
    return 1000 * timed(inverter.device, lambda: inverter(image), repeats)


def gather(found):
    """The Evaluation of all images, from each process's `found` of its part."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, found)
    pictures, first = {}, 0
    for part in parts:
        pictures |= {first + number: pair for number, pair in part.pictures.items()}
        first += len(part.values["psnr"])
    iterates = [concatenate(same) for same in zip(*(part.iterates for part in parts), strict=True)]
    baselines = {kind: concatenate([part.baselines[kind] for part in parts]) for kind in found.baselines}
    return Evaluation(iterates, baselines, pictures)


def concatenate(parts):
    return {name: np.concatenate([list(part[name]) for part in parts]) for name in parts[0]}


# --- Results ---------------------------------------------------------------------------------------------


def write_evaluation(found, inverter, checkpoint, about, out):
    """Print the table of an Evaluation and write its files to `out`; about: more entries of metrics.json."""
    config, values = checkpoint["config"], found.values
    protocol = PROTOCOLS[config["protocol"]]
    metrics = {name: summary(values[name]) for name in METRICS_AND_FEATURE_ERROR}
    baselines = {}
    for kind, part in found.baselines.items():
        baselines[kind] = {name: summary(part[name]) for name in METRICS}
    about = metrics | about | {"images": len(found.names), "parameters": count_parameters(inverter.decoder)}
    about |= {"protocol": protocol.name, "weights": config["weights"], "epoch": checkpoint["epoch"]}
    about |= {"shape": list(inverter.shape), "size": inverter.size, "baselines": baselines}
    if len(found.iterates) > 1:
        labels = METRICS_AND_FEATURE_ERROR
        about["iterates"] = [{name: summary(after[name]) for name in labels} for after in found.iterates]
    (out / "metrics.json").unlink(missing_ok=True)
    columns = [*METRICS_AND_FEATURE_ERROR]
    if "same_label" in values:
        about["top1_agreement"] = float(values["same_label"].mean())
        columns.append("same_label")
    rows = zip(found.names, *(values[name].tolist() for name in columns), strict=True)
    write_csv(out / "per_image.csv", ("image", *columns), rows)
    if find_spec("report"):
        from report.pictures import draw_evaluation

        label = "target, as measured" if protocol.normalized_target else "original"
        draw_evaluation(found, out, label, getattr(inverter.base_decoder, "iterations_per_round", None))
    write_result(out / "metrics.json", about)  # last: where it is, the others are
    if find_spec("extras") and find_spec("report"):
        from extras.trackers import add_test_metrics

        add_test_metrics(out, checkpoint["epoch"], {name: metrics[name]["mean"] for name in METRICS})

    print(
        f"{config['encoder']} {config['layer']} ({config['weights']} weights) + {config['decoder']}, epoch "
        f"{checkpoint['epoch']}, protocol {protocol.name}; {len(found.names)} test images of {about['data']}"
    )
    print(summary_table(metrics))
    for kind, label in FREE_BASELINES.items():
        means = [f"{METRICS[name]} {part['mean']:.4f}" for name, part in baselines[kind].items()]
        print(f"{label}: {', '.join(means)}")
    if "top1_agreement" in about:
        same = about["top1_agreement"]
        print(f"top-1 agreement: {same:.0%} of the reconstructions get their image's label")
    if metrics["psnr"]["mean"] < baselines["mean_colour"]["psnr"]["mean"]:
        print("below the mean colour of the images: the decoder has failed; train longer, or at another --lr")
    for number, after in enumerate(found.iterates if len(found.iterates) > 1 else ()):
        means = [f"{label} {after[name].mean():.4f}" for name, label in METRICS_AND_FEATURE_ERROR.items()]
        print(f"after {number} iterations: {', '.join(means)}")
    print(f"{about['inference_ms']:.1f} ms for an image by itself on {inverter.device}; results in {out}")


if __name__ == "__main__":
    cli_main(lambda: evaluate(ARGS))
