"""What needs no features: images as a single colour. A decoder below their own mean colours has failed."""

import json

import numpy as np
from tqdm import tqdm

import data
from metrics import LPIPS, measure, summary, summary_table, target
from study import DOCUMENTED, METRICS
from utils import make_folder, refuse_other_results, write_text


def constant_colour(targets):
    """One colour for all images (N, 3, H, W): the mean of all their pixels."""
    return targets.mean((2, 3), keepdim=True).mean(0, keepdim=True).expand_as(targets)


def mean_colour(targets):
    """The mean colour of each image of (N, 3, H, W)."""
    return targets.mean((2, 3), keepdim=True).expand_as(targets)


# By name, what makes images (N, 3, H, W) of all targets, likewise and in [0, 1].
BASELINES = {"constant colour": constant_colour, "mean colour": mean_colour}


def measure_baselines(targets, batch_size=4, bars=None, protocol=DOCUMENTED):
    """{baseline: {metric: its summary}} of targets (N, 3, H, W) in [0, 1]; bars: tqdm's `disable`."""
    lpips = LPIPS().to(targets.device)
    found = {}
    with tqdm(None, "Measuring", len(BASELINES) * len(targets), unit="image", disable=bars) as bar:
        for name, baseline in BASELINES.items():
            values = {metric: [] for metric in METRICS}
            parts = zip(baseline(targets).split(batch_size), targets.split(batch_size), strict=True)
            for output, wanted in parts:
                for metric, value in measure(output.clamp(0, 1), wanted, lpips, protocol).items():
                    values[metric] += value
                bar.update(len(wanted))
            found[name] = {metric: summary(np.array(value)) for metric, value in values.items()}
    return found


def write_baselines(source, out, protocol, device, batch_size=4, cache=None, bars=None):
    """Measure the baselines on the test images of `source`, print them, write baselines.json to folder `out`.

    source: what data.resolve returned. Raises UserError, also for a baselines.json of other data or protocol.
    """
    about = {"data": source, "protocol": protocol.name}
    refuse_other_results(out, ("baselines.json",), about)
    images = data.load_split(source, "test", cache, protocol, bars)
    wanted = target(data.center_crops(images[:]).to(device), protocol).clamp(0, 1)
    found = measure_baselines(wanted, batch_size, bars, protocol)
    about |= {"images": len(images.names), "baselines": found}
    path = make_folder(out) / "baselines.json"
    write_text(path, json.dumps(about, indent=2))
    print(f"Baselines, protocol {protocol.name}; {len(images.names)} test images of {source}")
    for name, metrics in found.items():
        print(summary_table(metrics, name))
    print(f"results in {path}")
