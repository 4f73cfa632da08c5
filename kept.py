"""Features of seeded crops, encoded once and kept on disk, for layers whose features are small."""

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
from encoders import weights_key
from utils import UserError, atomic, leftovers, locked, timed, user_cache

ENCODED = 16  # crops at a time
DTYPE = np.float16  # a thousandth of the validation loss, at most, from float32 (tests/test_crop.py)


class KeptCrops(NamedTuple):
    """K crops of each of N images, and their features."""

    features: np.ndarray  # float16 (K, N, C, h, w), memory-mapped
    places: list  # K of `places_by_image`

    def of(self, number, index):
        """Features, (B, C, h, w) in float32, tops, lefts and flips of the images `index`.

        number: of the pass through the images. What the first K passes draw is kept, and comes again.
        """
        kept = number % len(self.places)
        features = torch.from_numpy(self.features[kept, index.cpu().numpy()]).to(index.device).float()
        return features, *(part[index] for part in self.places[kept])


def places_by_image(images, seed, number, size):
    """Top, left and flip, (N,) each, that the plan of this pass draws for each image."""
    order, *drawn = epoch_plan(images.sizes, seed, number, size, images.side)
    of_image = order.argsort()
    return [part[of_image] for part in drawn]


def keep_crops(images, inverter, config, cache=None, bars=None):
    """The KeptCrops of `images` that `config` asks for, read from `cache` or encoded into it.

    Says beforehand, on stderr, how much it writes and how long that takes. Raises UserError where the disk is
    too small or a feature too large for float16.
    """
    count, size = config["kept_crops"], config["crop"]
    places = [places_by_image(images, config["seed"], number, size) for number in range(count)]
    shape = (count, len(images), *inverter.shape_at(size))
    about = {name: config[name] for name in ("encoder", "layer", "protocol", "seed", "crop", "amp")}
    about |= {"images": images.key, "shape": shape, "weights": weights_key(inverter.encoder)}
    about |= {"dtype": np.dtype(DTYPE).name, "device": inverter.device.type}
    path = user_cache(cache) / f"{short_hash(json.dumps(about, sort_keys=True))}.features"
    size_on_disk = math.prod(shape) * np.dtype(DTYPE).itemsize
    if not is_whole(path, size_on_disk):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")):  # another process waits, then finds it
            if not is_whole(path, size_on_disk):
                write_features(path, images, inverter, places, size, size_on_disk, bars)
    return KeptCrops(np.memmap(path, DTYPE, "r", shape=shape), places)


def is_whole(path, size):
    """Whether the file at `path` is there with all of its bytes: it may be a copy that was cut short."""
    return path.exists() and path.stat().st_size == size


def write_features(path, images, inverter, places, size, size_on_disk, bars):
    """Encode the crops at `places`, in the images' own order, into the file at `path`."""
    for old in leftovers(path):  # of processes that were killed
        old.unlink()
    free = shutil.disk_usage(path.parent).free
    gigabytes = f"{size_on_disk / 1e9:.2f} GB"
    if free < size_on_disk:
        raise UserError(
            f"{path}: --kept-crops {len(places)} of {len(images)} images take {gigabytes}, the disk has "
            f"{free / 1e9:.2f} GB left; fewer of them, or another --cache"
        )
    parts = torch.arange(len(images)).split(ENCODED)
    seconds = timed(inverter.device, lambda: encode(images, inverter, places[0], parts[0], size), 1)
    minutes = seconds * len(parts) * len(places) / 60
    print(
        f"encoding {len(places)} crops of each of {len(images)} images once: {gigabytes} in {path}, "
        f"about {minutes:.1f} min",
        file=sys.stderr,
    )
    total = len(places) * len(images)
    bar = tqdm(None, "Encoding crops", total, unit="crop", disable=bars)
    with bar, atomic(path) as temporary, open(temporary, "wb") as file:
        for where, part in itertools.product(places, parts):
            file.write(encode(images, inverter, where, part, size))
            bar.update(len(part))


def encode(images, inverter, places, part, size):
    """Features, a float16 array (B, C, h, w), of the crops at `places` of the images `part`."""
    part = part.to(images.sizes.device)
    batch = crops(images, part, *(drawn[part] for drawn in places), size)
    features = inverter.encode(batch.to(inverter.device)).float().contiguous().cpu().numpy()
    with np.errstate(over="ignore"):
        features = features.astype(DTYPE)
    if not np.isfinite(features).all():
        raise UserError("--kept-crops: a feature of this layer is too large for float16; train without it")
    return features
