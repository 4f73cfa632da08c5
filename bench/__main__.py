"""Time experiment 1 against a plain implementation of the study's loop.

  python -m bench
  python -m bench --json bench.json
  python -m bench --batch-size 64 --images 90    the training step alone
  python -m bench --quality FOLDER               wall time to the study's quality instead

Plain: eager, NCHW, 2K PNGs decoded and resized every epoch by four workers, the lpips package with the target
under autograd, the loss read every step, in its own process. Steps are taken by turns, so other load slows
both: compare ratios between machines, not times. On CUDA a plain step copies its batch to the GPU. Not for
Windows.
"""

from flags import Parser, parse_train, positive_int
from utils import UserError, cli_main, select_device, set_determinism, synchronized_time, tf32, write_text


def make_parser():
    """The flags."""
    parser = Parser(__doc__)
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--quality", metavar="FOLDER", help="instead: wall time to the study's quality there")
    parser.add_argument("--images", type=positive_int, default=60, help="photographs to train on")
    parser.add_argument("--batch-size", type=positive_int, help="time the training step alone, of so many")
    parser.add_argument("--rounds", type=positive_int, default=5, help="of six steps, taken by turns")
    parser.add_argument("--device", default="auto", help="as of train.py")
    return parser


if __name__ == "__main__":
    ARGS = cli_main(lambda: make_parser().parse_args())

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

import data
import train
from bench.plain import elsewhere
from evaluate import evaluate_model
from extras.feature_cache import cache_features
from models import load_inverter

STUDY = {"psnr": 27.92, "ssim": 0.862, "lpips": 0.0236}  # its recipe on the test images of natural (README)
FAST = ("--config", "configs/fast.yaml")
TRIALS = 9  # of fast.yaml, of 1 to 9 epochs
VARIANTS = ("--no-graphs", "--no-tf32", "--amp", "--compile", "--amp --compile")  # of a step on CUDA
RECORDED = 30  # steps after which all their CUDA graphs are recorded


def bench(args):
    """Measure, print and, with --json, write."""
    device = select_device(args.device)
    figures = {}
    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise UserError(f"--json {args.json}: no such folder")
    if args.images < 6:
        raise UserError(f"--images {args.images}: at least 6, for a batch of 4 and validation")

    def show(**values):
        figures.update(values)
        short = json.loads(json.dumps(values), parse_float=lambda text: float(f"{float(text):.4g}"))
        print(*(f"{name}: {value}" for name, value in short.items()), sep="\n", flush=True)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    show(device=name, threads=torch.get_num_threads(), torch=torch.__version__)
    if args.quality:
        bench_quality(args.quality, device, show)
    else:
        with tempfile.TemporaryDirectory() as folder:
            make_photographs(folder, args.images)
            if not args.batch_size:
                flags = ("--data", folder, "--cache", f"{folder}/cache", "--out", f"{folder}/run", "--quiet")
                show(training_peak_gib=child_gib("train.py", *flags, "--epochs", 1, "--device", device))
            set_determinism()
            with elsewhere(device) as plain:
                bench_step(plain, folder, device, args, show)
                if not args.batch_size:
                    bench_epoch(plain, folder, device, args.rounds, show)
                    bench_evaluation(plain, folder, device, show)
    if args.json:
        write_text(args.json, json.dumps(figures, indent=2))


def bench_step(plain, folder, device, args, show):
    """A training step, plain and ours; on CUDA also VARIANTS; without --batch-size also other decoders."""
    same = ["--batch-size", str(args.batch_size or 4)]
    kinds, cuda = {"ours": same}, device.type == "cuda"
    if cuda:
        kinds |= {f"ours, {more}": [*same, *more.split()] for more in VARIANTS}
    if cuda and not args.batch_size:  # attention over all 12,544 positions
        kinds |= {name: ["--decoder", name, "--amp"] for name in ("attention", "frequency")}
    if not args.batch_size:
        best = ["--config", "configs/best.yaml", "--optimizer"]
        kinds |= {f"best.yaml, {name}": [*best, name] for name in ("muon", "adam")}
    functions = {"plain": plain.step}
    for name, flags in kinds.items():
        training, batch = training_on(folder, device, *flags)
        functions[name] = partial(step, training, batch)
        if name == "ours":
            plain.keep(batch.cpu().contiguous().numpy())
        if cuda:
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(device)
            for _ in range(RECORDED):
                functions[name]()
            show(**{f"cuda_gib {name}": (torch.cuda.memory_reserved(device) - before) / 2**30})
    seconds = by_turns(device, functions, args.rounds)
    show(**{f"step_ms {name}": 1000 * value for name, value in seconds.items()})
    show(step_speedup=seconds["plain"] / seconds["ours"])


def bench_epoch(plain, folder, device, rounds, show):
    """Second epochs: a step, plain and ours; an image whole, as a crop, at block5 and with kept crops."""
    slow = plain.epoch(sorted(Path(folder, "train").iterdir()))
    count = len(data.load_split(folder, "train", f"{folder}/cache", bars=True))  # without validation images
    kinds = {
        "block1": [],
        "block1, crop 64": ["--batch-size", str(min(16, count)), "--crop", "64"],
        "block5": ["--layer", "block5"],
        "block5, kept": ["--layer", "block5", "--kept-crops", "1"],
    }
    functions = {name: partial(epoch, training_on(folder, device, *kinds[name])[0]) for name in kinds}
    seconds = by_turns(device, functions, rounds, times=2)
    fast = seconds["block1"] / train.steps_of_a_pass(count, 4, world=1)
    show(plain_epoch_step_ms=1000 * slow, epoch_step_ms=1000 * fast, epoch_speedup=slow / fast)
    show(image_ms={name: 1000 * value / count for name, value in seconds.items()})
    show(crop_speedup=seconds["block1"] / seconds["block1, crop 64"])
    show(kept_crops_speedup=seconds["block5"] / seconds["block5, kept"])


def bench_evaluation(plain, folder, device, show):
    """All three metrics of the photographs, which ours has decoded before."""
    inverter = training_on(folder, device)[0].inverter
    source = (folder, "train", f"{folder}/cache")
    files = [Path(folder, "train", name) for name in data.load_split(*source).names]
    slow = len(files) / seconds_of(device, lambda: plain.evaluate(files))
    fast = len(files) / seconds_of(device, lambda: mean_metrics(inverter, data.load_split(*source)))
    show(plain_eval_images_per_second=slow, eval_images_per_second=fast, eval_speedup=fast / slow)


def bench_quality(folder, device, show):
    """Wall time of the shortest fast.yaml as good as STUDY on validation images, against 30 plain epochs.

    Plain: one measured epoch, with decoding and validation, times 30. Ours: train.py from start to end, with
    validation, on images decoded before. Raises UserError if it is never as good.
    """
    folder = str(Path(data.resolve(folder)).resolve())
    splits = {split: data.load_split(folder, split) for split in ("train", "val", "test")}
    files = {s: [data.folder_of(folder, s) / name for name in splits[s].names] for s in ("train", "val")}
    with elsewhere(device) as plain:
        seconds = plain.epoch(files["train"], 1) * math.ceil(len(files["train"]) / 4)
        seconds += plain.validate(files["val"])
    show(plain_epoch_seconds=seconds, plain_minutes=30 * seconds / 60)
    flags = (*FAST, "--data", folder, "--device", str(device), "--quiet")
    for epochs in range(1, TRIALS + 1):
        with tempfile.TemporaryDirectory() as out:
            command = ("train.py", *flags, "--epochs", epochs, "--out", out)
            wall = seconds_of(device, lambda command=command: child_gib(*command))
            inverter = load_inverter(Path(out, "best.pt"))[0].to(device)
        found = mean_metrics(inverter, splits["val"])
        show(fast_seconds=wall, validation=found)
        good = found["psnr"] >= STUDY["psnr"] and found["ssim"] >= STUDY["ssim"]
        if good and found["lpips"] <= STUDY["lpips"]:
            show(test=mean_metrics(inverter, splits["test"]), time_to_quality=30 * seconds / wall)
            return
    raise UserError(f"--quality {folder}: fast.yaml did not get as good as {STUDY} in {TRIALS} epochs")


# --- What is timed ---------------------------------------------------------------------------------------


def training_on(folder, device, *flags):
    """train.py's Training on the photographs in `folder`, and its first batch."""
    cache = f"{folder}/cache"
    args = parse_train(["--data", folder, "--out", folder, "--cache", cache, "--quiet", *flags])
    training = train.Training(args, device=device)
    if args.kept_crops:
        training.feature_cache = cache_features(training, cache, True)
    return training, next(train.epoch_batches(training))[0]


def step(training, batch):
    with tf32(training.config["tf32"]):
        train.train_step(training, batch)


def epoch(training):
    training.step = 0
    train.train_epoch(training)


def mean_metrics(inverter, images):
    values = evaluate_model(inverter, images, bars=True).values
    return {name: float(value.mean()) for name, value in values.items()}


def make_photographs(folder, count):
    """Fill train/ and test/ in `folder` with `count` PNGs like DIV2K's: enlarged tiles of the sample."""
    tiles = data.sample_tiles("train")[:]

    def make(i):
        name = Path(folder, "test" if i % 10 == 0 else "train", f"{i:04}.png")
        tile = Image.fromarray(tiles[i % len(tiles)].numpy())
        picture = np.asarray(tile.resize((2040, 1356), Image.Resampling.BICUBIC))
        grain = np.random.default_rng(i).normal(0, 4, (1356, 2040, 1))  # a photograph's: large PNGs
        Image.fromarray((picture + grain).clip(0, 255).astype(np.uint8)).save(name, compress_level=6)

    for split in ("train", "test"):
        Path(folder, split).mkdir(exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(make, range(count)))


# --- Measuring -------------------------------------------------------------------------------------------


def seconds_of(device, function):
    start = synchronized_time(device)
    function()
    return synchronized_time(device) - start


def by_turns(device, functions, rounds, times=6):
    """{name: median seconds} of `functions`, called by turns, `times` in a row without the first."""
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name] += [seconds_of(device, function) for _ in range(times)][1:]
    return {name: median(values) for name, values in seconds.items()}


def child_gib(*command):
    """Peak memory in GiB of the largest child so far, after running `command`; UserError if that fails."""
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise UserError(f"{command[1]} ended with status {done.returncode}, as it says above")
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, not KiB
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit


if __name__ == "__main__":
    cli_main(lambda: bench(ARGS))
