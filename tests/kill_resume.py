"""Kill a short training with SIGKILL at random moments and resume it: nothing may differ from the uninterrupted run.

python tests/kill_resume.py --runs 50
"""

import argparse
import csv
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import data

TIMES = ("seconds", "images_per_second")


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
    """best.pt, last.pt and history.csv of a run, without what two equal runs may differ in: folder and times."""
    contents = []
    for name in ("best.pt", "last.pt"):
        state = torch.load(folder / name, weights_only=True)
        state["config"].pop("out")
        for row in state.get("history", []):
            for key in TIMES:
                row.pop(key)
        contents.append(state)
    with open(folder / "history.csv", newline="") as file:
        contents.append([{key: row[key] for key in row if key not in TIMES} for row in csv.DictReader(file)])
    return contents


def check(runs, seed=0):
    """Number of `runs` killed and resumed trainings that end like the uninterrupted one."""
    draw, good = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for split, count in (("train", 6), ("test", 1)):
            (folder / split).mkdir()
            for i, tile in enumerate(data.sample_tiles(split).pixels[:count]):
                Image.fromarray(tile.numpy()).save(folder / split / f"{i}.png")
        command = [sys.executable, "train.py", "--data", folder, "--cache", folder / "cache", "--epochs", 4]
        command += ["--batch-size", 1, "--width", 8, "--lr", "1e-3", "--resume", "--quiet", "--out"]
        command = [str(part) for part in command]

        def start(out):
            return subprocess.Popen(
                [*command, str(out)], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )

        process, begin = start(folder / "whole"), time.monotonic()
        process.stdout.readline()  # its first line: imports are over
        first = time.monotonic() - begin
        process.communicate()
        length = time.monotonic() - begin - first
        expected = read_run(folder / "whole")
        for number in range(runs):
            out, kills = folder / f"killed{number}", 0
            process = start(out)
            process.stdout.readline()
            try:
                process.wait(draw.uniform(0, length))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
            epochs = sum(1 for _ in open(out / "history.csv")) - 1 if (out / "history.csv").exists() else 0
            output = start(out).communicate(timeout=600)[0]
            equal = same(expected, read_run(out))
            leftovers = [path.name for path in out.iterdir() if ".tmp" in path.name]
            good += equal and not leftovers
            print(f"{number + 1}/{runs}: {'killed' if kills else 'over'} after {epochs} epochs, "
                  f"{'identical' if equal else 'DIFFERENT: ' + output}{leftovers or ''}", flush=True)  # fmt: skip
    print(f"{good} of {runs} identical to the uninterrupted run")
    return good


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.exit(os.EX_OK if check(args.runs, args.seed) == args.runs else 1)
