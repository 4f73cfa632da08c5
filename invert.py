"""Pixels optimised until their features are the image's own (Mahendran & Vedaldi 2015).

What they recover is a lower bound on what the features hold, and at shallow layers far above any decoder.
"""

import csv
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from evaluate import draw_grid, from_worst_to_best, load_model, measure, summary, to_image
from models import LPIPS, Encoder
from utils import INVERSION, METRICS, UserError, atomic, make_folder, write_text

COLUMNS = METRICS | {"feature_error": "feature error ↓"}


def total_variation(images):
    """Mean squared difference of neighbouring pixels, per image (B,), of (B, 3, H, W): the prior, with β = 2."""
    across, down = images.diff(dim=3).square(), images.diff(dim=2).square()
    return across.mean((1, 2, 3)) + down.mean((1, 2, 3))


def invert(encoder, features, start, steps=300, lr=0.1, tv_weight=0.3, bars=None):
    """Images (B, 3, H, W) in [0, 1] like `start` whose features are those given (B, C, H, W), found from `start`.

    Minimises ‖φ(x) − φ‖² / ‖φ‖² + tv_weight · total variation by Adam, whose rate falls to 0 as a cosine. Each image
    is by itself, whatever the batch.
    """
    images = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([images], lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    size = features.square().sum((1, 2, 3)).clamp_min(1e-12)
    for _ in tqdm(range(steps), "Inverting", unit="step", leave=False, disable=bars):
        distance = (encoder.features(images) - features).square().sum((1, 2, 3)) / size
        optimizer.zero_grad()
        (distance + tv_weight * total_variation(images)).sum().backward()
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            images.clamp_(0, 1)
    return images.detach()


def noise(batch, first):
    """Grey with a little noise, (B, 3, H, W) like `batch`, whose first image is number `first` of those to invert."""
    draws = []
    for number in range(first, first + len(batch)):
        generator = torch.Generator().manual_seed(number)
        draws.append(torch.randn(batch.shape[1:], generator=generator))
    return (0.5 + 0.05 * torch.stack(draws)).clamp(0, 1).to(batch.device)


@torch.no_grad()
def mean_pairwise_distance(encoder, pixels, device, batch_size=4):
    """Mean Euclidean distance of the features of two different images, by which Mahendran & Vedaldi normalise.

    pixels: uint8 (N, 256, 256, 3), at least two.
    """
    parts = pixels.split(batch_size)
    features = torch.cat([encoder(data.center_crops(part).to(device)).flatten(1) for part in parts])
    return F.pdist(features).mean().item()


def invert_split(encoder, decoder, pixels, scale, batch_size=4, bars=None, **options):
    """Invert the features of uint8 `pixels` (N, 256, 256, 3), from what `decoder` makes of them, or from noise if None.

    scale: what feature errors ‖φ(x) − φ‖ are divided by. Returns pictures {"original", "start", "inversion":
    N tensors (3, 224, 224) in [0, 1]} and, for start and inversion, {column of COLUMNS: (N,)}.
    """
    lpips = LPIPS().to(encoder.mean.device)
    pictures = {"original": [], "start": [], "inversion": []}
    values = {kind: {name: [] for name in COLUMNS} for kind in ("start", "inversion")}
    with tqdm(None, "Images", len(pixels), unit="image", disable=bars) as bar:
        for number, part in enumerate(pixels.split(batch_size)):
            batch = data.center_crops(part).to(encoder.mean.device)
            features = encoder(batch)
            if decoder is None:
                start = noise(batch, number * batch_size)
            else:
                with torch.no_grad():
                    start = decoder(features).clamp(0, 1)
            found = {"start": start, "inversion": invert(encoder, features, start, bars=bars, **options)}
            for kind, output in found.items():
                error = (encoder(output) - features).square().sum((1, 2, 3)).sqrt() / scale
                for name, value in (measure(output, batch, lpips) | {"feature_error": error.tolist()}).items():
                    values[kind][name] += value
            for kind, picture in (found | {"original": batch}).items():
                pictures[kind] += picture.cpu()
            bar.update(len(batch))
    return pictures, {kind: {name: np.array(v) for name, v in columns.items()} for kind, columns in values.items()}


def write_inversion(pictures, values, names, about, out):
    """Print the table and write inversion.json, .csv and .png to the folder `out`; about: what the JSON also says."""
    rows = {about["start"]: values["start"], "inversion": values["inversion"]}
    print(f"{'':<16}" + "".join(f"{label:>20}" for label in COLUMNS.values()))
    for kind, columns in rows.items():
        cells = (f"{columns[name].mean():.4f} ± {columns[name].std():.4f}" for name in COLUMNS)
        print(f"{kind:<16}" + "".join(f"{cell:>20}" for cell in cells))
    numbers, table, figure = (out / name for name in INVERSION)
    with atomic(table) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *(f"{kind}_{name}" for kind in values for name in COLUMNS)])
        writer.writerows(zip(names, *(values[kind][name] for kind in values for name in COLUMNS), strict=True))
    chosen = from_worst_to_best(values["inversion"]["psnr"])
    captions = {"original": [name[:24] for name in names]}
    captions |= {kind: [f"{db:.2f} dB" for db in values[kind]["psnr"]] for kind in values}
    labels = {"original": "original", "start": about["start"], "inversion": "inversion"}
    draw_grid({labels[k]: [(to_image(pictures[k][i]), captions[k][i]) for i in chosen] for k in labels}, figure)
    means = {kind: {name: summary(columns[name]) for name in COLUMNS} for kind, columns in values.items()}
    write_text(numbers, json.dumps(about | {"metrics": means}, indent=2))


def invert_test_images(args, device, bars):
    """Do what `args`, evaluate.py's flags with --invert, ask for. Raises UserError."""
    if args.encoder:
        about = {name: getattr(args, name) for name in ("encoder", "layer")} | {"weights": args.weights or "imagenet"}
        encoder, decoder = Encoder(**about), None
        about |= {"start": "noise", "data": data.resolve(args.data)}
        name = f"noise_{args.encoder}_{args.layer}" + (f"_{Path(args.weights).stem}" if args.weights else "")
        cache, out = args.cache, Path("runs", name)
    else:
        encoder, decoder, checkpoint = load_model(args.ckpt)
        config = checkpoint["config"]
        if config["protocol"] != "documented":
            raise UserError(f"{args.ckpt}: --invert wants pictures to start from; this one was trained as published")
        about = {name: config[name] for name in ("encoder", "layer", "weights")}
        about |= {"start": config["decoder"], "data": data.resolve(args.data or config["data"]), "ckpt": args.ckpt}
        decoder, cache, out = decoder.to(device), args.cache or config["cache"], Path(args.ckpt).parent
    encoder, out = encoder.to(device), make_folder(args.out or out)
    images = data.load_split(about["data"], "test", cache, bars=bars)
    if len(images.names) < 2:
        raise UserError(f"{about['data']}: one test image; --invert divides errors by the distance of two")
    chosen = np.linspace(0, len(images.names) - 1, min(args.count, len(images.names))).round().astype(int)
    scale = mean_pairwise_distance(encoder, images.pixels[:100], device)  # more would take memory, not precision
    options = {"steps": args.steps, "tv_weight": args.tv_weight}
    about |= options | {"images": len(chosen), "mean_pairwise_distance": scale}
    print(
        f"{about['encoder']} {about['layer']} ({about['weights']} weights), {args.steps} steps from "
        f"{about['start']}; {len(chosen)} test images of {about['data']}"
    )
    pictures, values = invert_split(encoder, decoder, images.pixels[chosen], scale, args.batch_size, bars, **options)
    write_inversion(pictures, values, [images.names[i] for i in chosen], about, out)
    print(f"results in {out}")
