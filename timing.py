"""What bench.py measures with: photographs, times, the machine's peak, and what a process or a GPU took."""

import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

import data
from utils import UserError, timed, wait


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


def link_photographs(source, folder, count):
    """Link `count` training images of `source` in `folder`/train. Raises UserError if there are fewer."""
    files = data.image_files(data.folder_of(source, "train"))[:count]
    if len(files) < count:
        raise UserError(f"--data {source}: {len(files)} training images; --images {count} are wanted")
    Path(folder, "train").mkdir()
    for number, file in enumerate(files):  # files in several folders may have one name
        Path(folder, "train", f"{number:05}{file.suffix}").symlink_to(file.resolve())


def by_turns(device, functions, rounds, times=6, before=0):
    """{name: median seconds} of `functions`, called by turns, `times` in a row without the first.

    before: how often each is called beforehand, until its CUDA graphs are recorded.
    """
    for function in functions.values():
        for _ in range(before):
            function()
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            for turn in range(times):
                start = wait(device)
                function()
                if turn:
                    seconds[name].append(wait(device) - start)
    return {name: median(values) for name, values in seconds.items()}


def peak_flops(device):
    """Floating-point operations a second of the best of three float32 matrix products."""
    best = 0
    for n in (1024, 2048, 4096):
        a, b = torch.rand(2, n, n, device=device)
        best = max(best, 2 * n**3 / timed(device, lambda a=a, b=b: a @ b))
    return best


def child_gib(*command):
    """Peak memory in GiB of the largest child so far, after running `command`.

    Raises UserError if that fails.
    """
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, cwd=Path(__file__).parent)
    if done.returncode:
        raise UserError(f"{command[1]} ended with status {done.returncode}, as it says above")
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def kernels(function):
    """A table of what the GPU spends `function`'s time on, the most first."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(5):
            function()
        torch.cuda.synchronize()
    return profile.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=90
    )
