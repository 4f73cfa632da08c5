"""Kill a short training at random moments and resume it: nothing may differ from the whole run.

python tests/kill_resume.py --runs 50
"""

import argparse
import csv
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import data
import train
from flags import parse_train

TIMES = ("seconds", "val_seconds", "images_per_second")
FLAGS = ["--epochs", "4", "--batch-size", "1", "--width", "8", "--crop", "32", "--lr", "1e-3"]
FLAGS += ["--lpips-weight", "0", "--val-images", "1", "--resume", "--quiet"]


def same(x, y):
    """Whether two nests of tensors and primitives are bit-identical; NaN is equal to NaN."""
    if torch.is_tensor(x):
        return torch.equal(x, y)
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[key], y[key]) for key in x)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(same, x, y))
    return x == y or x != x and y != y


def read_run(folder):
    """best.pt, last.pt and history.csv of a run, without what equal runs may differ in: folder and times."""
    contents = []
    for name in ("best.pt", "last.pt"):
        state = torch.load(folder / name, weights_only=True)
        state.get("config", {}).pop("out", None)
        for row in state.get("history", []):
            for key in TIMES:
                row.pop(key)
        contents.append(state)
    with open(folder / "history.csv", newline="") as file:
        contents.append([{key: row[key] for key in row if key not in TIMES} for row in csv.DictReader(file)])
    return contents


def run(flags, log):
    """What each process does: train.py with `flags`, printing to the file `log`."""
    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    train.train(parse_train(flags))


def check(runs, seed=0):
    """Number of `runs` killed and resumed trainings that end like the uninterrupted one."""
    draw, good, number = random.Random(seed), 0, 0
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])  # so that each process is at work at once
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for split, count in (("train", 6), ("test", 1)):
            (folder / split).mkdir()
            for i, tile in enumerate(data.sample_tiles(split)[:count]):
                Image.fromarray(tile.numpy()).save(folder / split / f"{i}.png")
        flags = [*FLAGS, "--data", str(folder), "--cache", str(folder / "cache")]

        def start(out):
            process = context.Process(target=run, args=([*flags, "--out", str(out)], folder / "log.txt"))
            process.start()
            return process, time.monotonic()

        data.load_split(str(folder), "train", folder / "cache")  # so that no run has to decode
        process, begin = start(folder / "whole")
        process.join()
        length = time.monotonic() - begin
        expected = read_run(folder / "whole")
        while number < runs:
            out = folder / f"killed{number}"
            process, begin = start(out)
            process.join(draw.uniform(0, length))
            if process.exitcode is not None:  # it was faster than the first ones, so it was not killed
                length = time.monotonic() - begin
                shutil.rmtree(out)
                continue
            process.kill()
            process.join()
            number += 1
            start(out)[0].join()
            equal = same(expected, read_run(out))
            leftovers = [path.name for path in out.iterdir() if ".tmp" in path.name]
            good += equal and not leftovers
            verdict = "identical" if equal else f"DIFFERENT: {(folder / 'log.txt').read_text()}"
            print(f"{number}/{runs}: {verdict}{leftovers or ''}", flush=True)
    print(f"{good} of {runs} identical to the uninterrupted run")
    return good


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.exit(os.EX_OK if check(args.runs, args.seed) == args.runs else 1)
