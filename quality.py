"""How soon fast.yaml is as good as the study's recipe, against the plain loop: bench.py --quality."""

import math
import tempfile
import time
from pathlib import Path

import data
from evaluate import evaluate_model
from models import load_inverter
from plain import Elsewhere
from timing import child_gib
from utils import UserError

# What the study's recipe ends at after 30 epochs, on the test images of `natural` (README, Results).
STUDY = {"psnr": 27.92, "ssim": 0.862, "lpips": 0.0236}
FAST = ("--config", "configs/fast.yaml")
TRIALS = 9  # of its number of epochs, from one on


def bench_quality(folder, device, show):
    """Wall time of the shortest fast.yaml as good as STUDY on validation images, against 30 plain epochs.

    The plain loop is measured over one whole epoch, with decoding and validation; ours from the start of
    train.py to its end, with all validations, its images decoded beforehand. Raises UserError if it is never
    as good.
    """
    folder = str(Path(data.resolve(folder)).resolve())
    splits = {split: data.load_split(folder, split) for split in ("train", "val", "test")}
    home = next(Path(folder, train) for train, _ in data.LAYOUTS if Path(folder, train).is_dir())
    files = {split: [home / name for name in splits[split].names] for split in ("train", "val")}
    plain = Elsewhere(device)
    try:
        seconds = plain("epoch", files["train"], 1) * math.ceil(len(files["train"]) / 4)
        seconds += plain("validate", files["val"])
    finally:
        plain.close()
    show("the plain loop's epoch, s", plain_epoch_seconds=seconds)
    show("its 30 epochs, min", plain_minutes=30 * seconds / 60)
    flags = (*FAST, "--data", folder, "--device", str(device), "--quiet")
    for epochs in range(1, TRIALS + 1):
        with tempfile.TemporaryDirectory() as out:
            start = time.perf_counter()
            child_gib("train.py", *flags, "--epochs", epochs, "--out", out)
            wall = time.perf_counter() - start
            inverter = load_inverter(Path(out, "best.pt"))[0].to(device)
        found = mean_metrics(inverter, splits["val"])
        show(f"fast.yaml --epochs {epochs}, s", fast_seconds=wall, validation=found)
        good = found["psnr"] >= STUDY["psnr"] and found["ssim"] >= STUDY["ssim"]
        if good and found["lpips"] <= STUDY["lpips"]:
            show("its test images", test=mean_metrics(inverter, splits["test"]))
            show("the plain loop's time, of ours", time_to_quality=30 * seconds / wall)
            return
    raise UserError(f"--quality {folder}: fast.yaml did not get as good as {STUDY} in {TRIALS} epochs")


def mean_metrics(inverter, images):
    """{metric: mean over Images}."""
    values = evaluate_model(inverter, images[:], bars=True).values
    return {name: float(value.mean()) for name, value in values.items()}
