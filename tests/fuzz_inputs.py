"""Feed mutated images, checkpoints, YAML files and cache files to the program: each must be refused with one
clear error or give the right result, never a traceback, a hang or a wrong result.

  python tests/fuzz_inputs.py --count 500
"""

import argparse
import copy
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from training import training_on

import checkpoint
import data
from flags import parse_train
from models import load_inverter
from utils import UserError

YAML = "encoder: vgg16\nlayer: block1\ndecoder: tconv\nepochs: 30\nlr: 1e-4\nmse_weight: 0.5\nwidth: null\n"


def mutate(content, draw):
    """`content`, bytes, with parts flipped, cut out, doubled, zeroed or noised."""
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        start = draw.randrange(len(content) or 1)
        part = slice(start, draw.choice((start + 1, start + 4, start + 64, start + 1024, None)))
        old = content[part]
        flipped = bytes(byte ^ 1 << draw.randrange(8) for byte in old)
        content[part] = draw.choice((flipped, b"", 2 * old, bytes(len(old)), draw.randbytes(len(old))))
    return bytes(content)


class Fuzzer:
    """Good files of every kind in `folder`; a method tries one mutation: UserError if it is refused."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.tile = Image.fromarray(data.sample_tiles("test")[:1][0].numpy())
        for name in ("train/0.png", "train/1.png", "train/2.png", "test/0.png"):
            (self.folder / name).parent.mkdir(exist_ok=True)
            self.tile.save(self.folder / name)
        for name in ("good.png", "good.jpg", "good.tif", "good.webp"):
            self.tile.save(self.folder / name)
        self.training = training_on(self.folder, "--width", 4, "--batch-size", 2, "--out", self.folder)
        self.training.best_loss = 0.5
        self.training.epoch = 1
        checkpoint.save_best(self.training)
        checkpoint.save_last(self.training)
        self.good = {name: (self.folder / name).read_bytes() for name in ("best.pt", "last.pt")}
        self.weights = copy.deepcopy(self.training.inverter.decoder.state_dict())

    def same_weights(self, decoder):
        return all(torch.equal(value, self.weights[key]) for key, value in decoder.state_dict().items())

    def image(self, draw):
        good = self.folder / draw.choice(("good.png", "good.png", "good.jpg", "good.tif", "good.webp"))
        bad = self.folder / f"bad{good.suffix}"
        bad.write_bytes(mutate(good.read_bytes(), draw))
        pixels = data.decode(bad)
        assert pixels.shape == (256, 256, 3) and pixels.dtype == np.uint8
        # the other formats have no checksum: what decodes can't be told from a picture
        assert good.suffix != ".png" or np.array_equal(pixels, self.tile), "wrong pixels were accepted"

    def checkpoint(self, draw):
        (self.folder / "bad.pt").write_bytes(mutate(self.good["best.pt"], draw))
        inverter, content = load_inverter(self.folder / "bad.pt")
        assert self.same_weights(inverter.decoder), "wrong weights were accepted"
        assert content["val_loss"] == 0.5

    def last(self, draw):
        (self.folder / "last.pt").write_bytes(mutate(self.good["last.pt"], draw))
        checkpoint.resume(self.training)
        assert self.same_weights(self.training.inverter.decoder), "wrong weights were accepted"
        assert self.training.epoch == 1

    def config(self, draw):
        (self.folder / "bad.yaml").write_bytes(content := mutate(YAML.encode(), draw))
        args = parse_train(["--config", str(self.folder / "bad.yaml")])
        assert args.epochs >= 1 and args.lr > 0 and args.mse_weight >= 0 and 0 <= args.seed < 2**32
        for key, value in yaml.load(content, yaml.BaseLoader).items():  # the text as it stands
            taken = getattr(args, key)
            nothing = taken is None and value in ("null", "Null", "NULL", "~", "")
            assert nothing or str(taken) == value or float(taken) == float(value), "not taken as it stands"

    def cache(self, draw):
        """Its manifest, or the length of its pixels: what is checked of it."""
        cache = self.folder / "cache"
        data.load_split(str(self.folder), "test", cache)
        (file,) = cache.glob(draw.choice(["*/*.json", "*/*.u8"]))
        content = file.read_bytes()
        cut = content[: draw.randrange(len(content))]
        file.write_bytes(mutate(content, draw) if file.suffix == ".json" else cut)
        pixels = data.load_split(str(self.folder), "test", cache)[:]
        assert np.array_equal(pixels[0], self.tile), "wrong pixels were accepted"
        shutil.rmtree(cache)


def hang(number, frame):
    raise TimeoutError("more than 30 seconds")


def check(count, seed=0):
    """Number of `count` mutated inputs that ended in a traceback, a hang or a wrong result."""
    signal.signal(signal.SIGALRM, hang)
    draw, wrong, refused = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(folder)
        tries = [fuzzer.image, fuzzer.checkpoint, fuzzer.last, fuzzer.config, fuzzer.cache]
        for number in range(count):
            kind = tries[number % len(tries)]
            signal.alarm(30)
            try:
                kind(draw)
            except UserError:
                refused += 1
            except BaseException as error:
                wrong += 1
                print(f"{number}: {kind.__name__}: {error!r}", flush=True)
            finally:
                signal.alarm(0)
    print(f"{count} mutated inputs: {refused} refused, {count - refused - wrong} right, {wrong} wrong")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.exit(1 if check(args.count, args.seed) else 0)
