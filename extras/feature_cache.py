"""--kept-crops: features of seeded crops, encoded once and kept on disk; for layers with small features."""

import itertools
import json
import math
import shutil
import sys
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data import crops, epoch_plan, short_hash
from encoders import encoder_sha256
from utils import UserError, atomic, leftovers, locked, timed, user_cache

ENCODED = 16  # crops at a time
DTYPE = np.float16  # changes the validation loss by a thousandth at most (tests/test_crop.py)


class FeatureCache(NamedTuple):
    """K crops of each of N images, and their features."""

    features: np.ndarray  # float16 (K, N, C, h, w), memory-mapped
    places: list  # K of `places_by_image`

    def batch(self, pass_index, index):
        """Features (B, C, h, w) in float16, and index, tops, lefts and flips, of the images `index`.

        pass_index: of the pass through the images; after K passes the crops come again.
        """
        kept = pass_index % len(self.places)
        features = torch.from_numpy(self.features[kept, index.cpu().numpy()])
        return features, index, *(part[index] for part in self.places[kept])


def places_by_image(images, seed, pass_index, size):
    """Top, left and flip, (N,) each, that the plan of this pass draws for each image."""
    order, *drawn = epoch_plan(images.sizes, seed, pass_index, size, images.side)
    return [part[order.argsort()] for part in drawn]


def cache_features(training, cache=None, bars=None):
    """The FeatureCache of a Training, read from the folder `cache` or encoded into it; bars: tqdm's disable.

    Raises UserError if the disk is too small or a feature too large for float16.
    """
    config, images, inverter = training.config, training.train_images, training.inverter
    count, size = config["kept_crops"], config["crop"]
    places = [places_by_image(images, config["seed"], number, size) for number in range(count)]
    shape = (count, len(images), *inverter.shape_at(size))
    about = {name: config[name] for name in ("encoder", "layer", "protocol", "seed", "crop", "amp")}
    about |= {"images": images.key, "shape": shape, "weights": encoder_sha256(inverter.encoder)}
    about |= {"dtype": np.dtype(DTYPE).name, "device": inverter.device.type}
    path = user_cache(cache) / f"{short_hash(json.dumps(about, sort_keys=True))}.features"
    size_on_disk = math.prod(shape) * np.dtype(DTYPE).itemsize
    if not is_whole(path, size_on_disk):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")):  # another process waits, then finds it
            if not is_whole(path, size_on_disk):
                write_features(path, size_on_disk, places, training, bars)
    return FeatureCache(np.memmap(path, DTYPE, "r", shape=shape), places)


def is_whole(path, size):
    """Whether the file at `path` has all of its bytes: it may be a copy that was cut short."""
    return path.exists() and path.stat().st_size == size


def write_features(path, size_on_disk, places, training, bars):
    """Encode the crops at `places`, in the order of the images, into `path`; say how long it takes."""
    for old in leftovers(path):
        old.unlink()
    count, free = len(training.train_images), shutil.disk_usage(path.parent).free
    if free < size_on_disk:
        need = f"--kept-crops {len(places)} of {count} images take {size_on_disk / 1e9:.2f} GB"
        left = f"the disk has {free / 1e9:.2f} GB left; fewer of them, or another --cache"
        raise UserError(f"{path}: {need}, {left}")
    parts = torch.arange(count).split(ENCODED)
    seconds = timed(training.device, lambda: encode(training, places[0], parts[0]), 1)
    minutes = seconds * len(parts) * len(places) / 60
    what = f"encoding {len(places)} crops of each of {count} images once, into {path}"
    print(f"{what}: about {minutes:.1f} min", file=sys.stderr)
    bar = tqdm(None, "Encoding crops", len(places) * count, unit="crop", disable=bars)
    with bar, atomic(path) as temporary, open(temporary, "wb") as file:
        for where, part in itertools.product(places, parts):
            file.write(encode(training, where, part))
            bar.update(len(part))


def encode(training, places, part):
    """Features, a float16 array (B, C, h, w), of the crops at `places` of the images `part`."""
    images, inverter = training.train_images, training.inverter
    part = part.to(images.sizes.device)
    batch = crops(images, (part, *(drawn[part] for drawn in places)), training.config["crop"])
    features = inverter.encode(batch.to(inverter.device)).float().contiguous().cpu().numpy()
    with np.errstate(over="ignore"):
        features = features.astype(DTYPE)
    if not np.isfinite(features).all():
        raise UserError("--kept-crops: a feature of this layer is too large for float16; train without it")
    return features
