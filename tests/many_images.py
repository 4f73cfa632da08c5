"""What a training holds does not grow with the number of images: start to first step, and peak memory.

python tests/many_images.py --count 800 20000        (the cache of 20,000 takes 4 GB of a temporary folder)
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import data

# A training that ends at its first step, with the seconds since its start and its peak memory in MB.
FIRST_STEP = """
import os, resource, sys, time
import train
from flags import parse_train
def stop(*_):
    seconds = time.time() - float(sys.argv[1])
    print("first step:", seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)
    os._exit(0)
train.train_step = stop
train.train(parse_train(sys.argv[2:]))
"""


def first_step(folder, count):
    """(seconds, MB) to the first step of a training on `count` JPEGs, which are decoded already."""
    for split in ("train", "test"):
        (folder / split).mkdir()
    for number, tile in enumerate(data.sample_tiles("train")[:40]):
        Image.fromarray(tile.numpy()).save(folder / "test" / f"{number}.jpg", quality=80)
    for number in range(count):
        os.link(folder / "test" / f"{number % 40}.jpg", folder / "train" / f"{number:06}.jpg")
    flags = ["--data", folder, "--cache", folder / "cache", "--out", folder / "run", "--overwrite", "--quiet"]
    found = []
    for _ in range(3):  # the first builds the cache
        command = [sys.executable, "-c", FIRST_STEP, *map(str, [time.time(), *flags])]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        found.append([float(word) for word in done.stdout.split("first step:")[1].split()])
    return min(found[1:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, nargs="+", default=[800, 20_000])
    for count in parser.parse_args().count:
        with tempfile.TemporaryDirectory() as folder:
            seconds, megabytes = first_step(Path(folder), count)
        print(f"{count:>7} images: first step after {seconds:.1f} s, peak memory {megabytes:.0f} MB")
