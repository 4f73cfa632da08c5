"""Optimise pixels until their features are an image's own (Mahendran & Vedaldi 2015).

  python invert.py --ckpt runs/best.pt                       from a decoder's reconstructions of test images
  python invert.py --encoder vgg16 --layer block3            from noise, without a decoder
  python invert.py --ckpt runs/best.pt --count 4 --steps 100
  python invert.py --ckpt runs/best.pt --images my.jpg       your own pictures, or folders
  python invert.py --course runs/a runs/b --out FOLDER       PSNR against time, of inversions done before

What it recovers is a lower bound on what the features hold. Writes inversion.json, .csv and .png to the
checkpoint's folder (with --images to own/ there), or to --out.
"""

from flags import parse_invert
from utils import cli_main

if __name__ == "__main__":
    ARGS = cli_main(lambda: parse_invert(doc=__doc__))  # before torch is imported: --help answers at once

import math
import re
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from checkpoint import INVERSION, refuse_other_results
from encoders import build_encoder
from extras.own_pictures import picture_files, read_square
from layers import resize
from metrics import LPIPS, LPIPS_MIN_SIZE, feature_error, feature_scale, measure, psnr
from models import load_inverter
from report.inversion import draw_courses, read_course, write_inversion
from utils import (
    INPUT_FLAGS,
    METRICS_AND_FEATURE_ERROR,
    UserError,
    digest,
    disable_bars,
    evenly_spaced,
    keep_freed_memory,
    make_folder,
    processes,
    select_device,
)

REDUCTIONS = (1, 2, 8, 32)  # of the image's height and width at each level
WATCHED = 31  # steps at which PSNR is measured


def main(args):
    """Do what `args` (a Namespace of the flags) ask for. Raises UserError."""
    if args.course:
        courses = [read_course(folder) for folder in args.course]
        return draw_courses(courses, make_folder(args.out or "runs") / "course.png")
    keep_freed_memory()
    with processes(select_device(args.device)) as (_, world, device):
        if world > 1:
            raise UserError("invert.py works in one process; start it without torchrun")
    bars = disable_bars(args)
    files = picture_files(args.images or [])
    encoder, decode, about, out = from_checkpoint(args, device) if args.ckpt else from_noise(args)
    encoder.to(device)
    size = encoder.input_size
    if size < LPIPS_MIN_SIZE:
        raise UserError(f"--input-size {size}: LPIPS needs at least {LPIPS_MIN_SIZE} pixels")
    about["split"] = args.split
    out = Path(args.out or (out if args.split == "test" else out / args.split))
    if files:
        images = data.squares(np.stack([read_square(file, size) for file in files]), list(map(str, files)))
        about["pictures"] = images.key
    refuse_other_results(out, INVERSION, about)
    make_folder(out)  # or an error, before anything is computed
    if not files:
        images = data.load_split(about["data"], args.split, args.cache, bars=bars, size=size)
    chosen = evenly_spaced(len(images), args.count)
    divisor, scale = feature_scale(encoder, images)
    lr, tv_weight = default_options(encoder, decode)
    tv_weight = tv_weight if args.tv_weight is None else args.tv_weight
    options = {"steps": args.steps, "lr": args.lr or lr, "tv_weight": tv_weight}
    about |= options | {"images": len(chosen), divisor: scale}
    print(
        f"{about['encoder']} {about['layer']} ({about['weights']} weights), {args.steps} steps from "
        f"{about['start']}; {len(chosen)} {args.split} images of {about['data']}"
    )
    options |= {"batch_size": args.batch_size, "bars": bars}
    pictures, values, about["course"] = invert_images(encoder, decode, images[chosen], scale, **options)
    write_inversion(pictures, values, [images.names[i] for i in chosen], about, out)
    print(f"results in {out}")


def from_noise(args):
    """The encoder of the flags, no decoder, what the results are of, and a folder for them."""
    about = {name: getattr(args, name) for name in ("encoder", "layer", "weights", *INPUT_FLAGS)}
    encoder = build_encoder(**about)
    about |= {"start": "noise", "data": " ".join(args.images or [data.resolve(args.data)])}
    name = f"noise_{re.sub('[/:]', '_', args.encoder)}_{args.layer}"
    if args.weights != "imagenet":
        name += f"_{Path(args.weights).stem}"
    return encoder, None, about, Path("runs", name)


def from_checkpoint(args, device):
    """The encoder of --ckpt, its inverter's `decode`, what the results are of, and a folder for them."""
    sha256 = digest(args.ckpt)  # first: a training may replace it
    inverter, checkpoint = load_inverter(args.ckpt, args.encoder, args.weights, args.trust_code)
    inverter.to(device)
    config = checkpoint["config"]
    if config["protocol"] != "documented":
        raise UserError(f"{args.ckpt}: invert.py wants pictures to start from; this was trained as published")
    source, out = " ".join(args.images or []), Path(args.ckpt).parent
    if not source:
        source, out = data.of_checkpoint(args.data, config["data"], args.ckpt)
    about = {name: config[name] for name in ("encoder", "layer", "weights")}
    about |= {"start": config["decoder"], "data": source, "ckpt": args.ckpt, "ckpt_sha256": sha256}
    return inverter.encoder, inverter.decode, about, out


# --- The optimisation ------------------------------------------------------------------------------------


def total_variation(images):
    """Mean squared difference of neighbouring pixels, (B,), of images (B, 3, H, W): the prior, with β = 2."""
    return sum(images.diff(dim=dim).square().mean((1, 2, 3)) for dim in (3, 2))


def default_options(encoder, decode):
    """(learning rate, weight of the total variation), chosen on validation images (docs/tables).

    Deep features do not restore what a large rate destroys of a decoder's output; the coarser the features,
    the less detail they determine.
    """
    # pixels from one position of the features to the next, of several layers the smallest
    stride = encoder.input_size / max(height for _, height, _ in encoder.shapes)
    tv_weight = min((stride / 2) ** 2, 256.0)
    if decode:
        return 0.02 if stride < 8 else 0.002 if stride < 16 else 0.001, 0.3 * tv_weight
    return 0.1 if stride < 4 else 0.03, tv_weight


def invert(encoder, features, start, *, steps=300, lr=0.1, tv_weight=1.0, bars=None, watch=None):
    """Images (B, 3, H, W) in [0, 1], found from `start`, whose features are near `features` (B, C, H, W).

    Minimises ‖φ(x) − φ‖² / ‖φ‖² + tv_weight · total variation by Adam, for each image by itself. The learning
    rate and the weight of the prior fall to 0 as a cosine: the prior helps early, but would blur fine detail.
    Levels of several resolutions are enlarged and added to `start`, because single pixels are slow to agree
    on low frequencies. watch: is called with (step, images) before each step and at the end.
    """
    size = start.shape[2:]
    levels = []
    for reduction in (*REDUCTIONS, max(size)):  # the last has one value for each channel
        smaller = [math.ceil(side / reduction) for side in size]
        levels.append(torch.zeros(*start.shape[:2], *smaller, device=start.device, requires_grad=True))
    optimizer = torch.optim.Adam(levels, lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    norm = features.square().sum((1, 2, 3)).clamp_min(1e-12)

    def current():
        return start + sum(resize(level, size) for level in levels)

    for step in tqdm(range(steps), "Inverting", unit="step", leave=False, disable=bars):
        images = current()
        if watch:
            watch(step, images.detach().clamp(0, 1))
        distance = (encoder(images) - features).square().sum((1, 2, 3)) / norm
        prior = scheduler.get_last_lr()[0] / lr * tv_weight * total_variation(images)
        optimizer.zero_grad()
        (distance + prior).sum().backward()
        optimizer.step()
        scheduler.step()
    images = current().detach().clamp(0, 1)
    if watch:
        watch(steps, images)
    return images


def noise(batch, first):
    """Grey with a little noise, like `batch` (B, 3, H, W); first: the number of its first image, the seed."""
    numbers, shape = range(first, first + len(batch)), batch.shape[1:]
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(number)) for number in numbers]
    return (0.5 + 0.05 * torch.stack(draws)).clamp(0, 1).to(batch.device)


def invert_images(encoder, decode, pixels, scale, *, steps, batch_size=4, bars=None, **options):
    """Invert the features of uint8 `pixels` (N, H, W, 3), from what `decode` makes of them; None: from noise.

    scale: divides feature errors. Returns {"original", "start", "inversion": uint8 (N, size, size, 3)};
    {"start", "inversion": {metric: (N,)}}; and the course, {"step", "seconds" for each image until then,
    "psnr" (mean in dB): a list}.
    """
    moments = evenly_spaced(steps + 1, WATCHED)
    seconds, decibels = np.zeros((2, len(moments)))  # sums over the images
    device = next(encoder.buffers()).device
    lpips = LPIPS().to(device)
    pictures = {"original": [], "start": [], "inversion": []}
    values = {kind: {name: [] for name in METRICS_AND_FEATURE_ERROR} for kind in ("start", "inversion")}
    with tqdm(None, "Images", len(pixels), unit="image", disable=bars) as bar:
        for number, part in enumerate(pixels.split(batch_size)):
            batch = data.center_crops(part, encoder.input_size).to(device)
            with torch.no_grad():
                features = encoder(batch)
                begun = time.perf_counter()
                start = decode(features).clamp(0, 1) if decode else noise(batch, number * batch_size)

            def watch(step, images, batch=batch, begun=begun):
                if step in moments:
                    place = moments.index(step)
                    decibels[place] += psnr(images, batch).sum().item()  # waits for a GPU
                    seconds[place] += time.perf_counter() - begun

            images = invert(encoder, features, start, steps=steps, bars=bars, watch=watch, **options)
            if not torch.isfinite(images).all():
                raise UserError("the pixels are not finite any more; give a smaller --lr or --tv-weight")
            for kind, found in (("original", batch), ("start", start), ("inversion", images)):
                pictures[kind].append(data.to_pixels(found))
                if kind != "original":
                    metrics = measure(found, batch, lpips)
                    metrics["feature_error"] = feature_error(encoder, found, features, scale).tolist()
                    for name, value in metrics.items():
                        values[kind][name] += value
            bar.update(len(batch))
    pictures = {kind: torch.cat(parts) for kind, parts in pictures.items()}
    for kind, metrics in values.items():
        values[kind] = {name: np.array(value, float) for name, value in metrics.items()}
    course = {"step": moments, "seconds": list(seconds / len(pixels)), "psnr": list(decibels / len(pixels))}
    return pictures, values, course


if __name__ == "__main__":
    cli_main(lambda: main(ARGS))
