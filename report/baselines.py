"""Baselines that need no features: images as one colour, or as a few pixels. A good decoder beats them."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from checkpoint import refuse_other_results, write_result
from metrics import LPIPS, measure, summary, summary_table, target, thumbnail
from utils import DOCUMENTED, IMAGE_SIZE, METRICS, PROTOCOLS, make_folder, write_csv


def reduced(side, targets, mean):
    return thumbnail(targets, (side, side))


SIDES = (6, 7, 13, 14, 27, 28, 56, 112)  # pixels, of the feature maps of the study's layers
# {name: a function of targets (B, 3, H, W) in [0, 1] and the mean colour of all (3, 1, 1)}
BASELINES = {
    "constant colour": lambda targets, mean: mean.expand_as(targets),  # one for all images
    "mean colour": lambda targets, mean: targets.mean((2, 3), keepdim=True).expand_as(targets),
} | {f"thumbnail {side} × {side}": partial(reduced, side) for side in SIDES}


@torch.no_grad()
def measure_baselines(images, device, batch_size=4, bars=None, protocol=DOCUMENTED):
    """{baseline: {metric: (N,)}} of Images, measured as decoders are."""
    lpips = LPIPS().to(device)

    def batches():
        for first in range(0, len(images), batch_size):
            part = images[first : first + batch_size].to(device)
            yield target(data.center_crops(part), protocol).clamp(0, 1)

    mean = sum(batch.cpu().double().mean((2, 3)).sum(0) for batch in batches()) / len(images)
    mean = mean.float().to(device)[:, None, None]
    values = {name: {metric: [] for metric in METRICS} for name in BASELINES}
    with tqdm(None, "Measuring", len(images), unit="image", disable=bars) as bar:
        for wanted in batches():
            for name, baseline in BASELINES.items():
                for metric, value in measure(baseline(wanted, mean), wanted, lpips, protocol).items():
                    values[name][metric] += value
            bar.update(len(wanted))
    return {name: {key: np.array(found[key]) for key in METRICS} for name, found in values.items()}


def write_baselines(args, device, bars=None):
    """Measure the baselines on the test images of args.data, print them and write baselines.json.

    Each one's results, which `evaluate.py --compare` reads like a run's, have a folder in baselines/.
    """
    protocol, source, out = PROTOCOLS[args.protocol], data.resolve(args.data), Path(args.out or "runs")
    about = {"data": source, "protocol": protocol.name}
    refuse_other_results(out, ("baselines.json",), about)
    path = make_folder(out) / "baselines.json"
    images = data.load_split(source, "test", args.cache, protocol, bars=bars)
    about |= {"images": len(images), "size": IMAGE_SIZE}
    print(f"Baselines, protocol {protocol.name}; {len(images)} test images of {source}")
    summaries = {}
    for name, values in measure_baselines(images, device, args.batch_size, bars, protocol).items():
        summaries[name] = {metric: summary(value) for metric, value in values.items()}
        print(summary_table(summaries[name], name))
        folder = make_folder(out / "baselines" / name.replace(" × ", "x").replace(" ", "_"))
        rows = zip(images.names, *(values[metric].tolist() for metric in METRICS), strict=True)
        write_csv(folder / "per_image.csv", ("image", *METRICS), rows)
        write_result(folder / "metrics.json", summaries[name] | about)
    write_result(path, about | {"baselines": summaries})
    print(f"results in {path}")
