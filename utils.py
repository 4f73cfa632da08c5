"""What the scripts share: names, errors, devices, and files that are written whole or not at all.

Nothing heavy is imported here, so that `--help` and a mistyped flag answer at once.
"""

import argparse
import ctypes
import io
import os
import re
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

# The layers of each encoder, shallow to deep (models.py builds them), and the decoders (decoders.py).
LAYERS = {
    "vgg16": [f"block{i}" for i in range(1, 6)],
    "resnet34": [f"layer{i}" for i in range(1, 5)],
    "vit_small": [f"block{i}" for i in range(12)],
    "alexnet": [f"conv{i}" for i in range(1, 6)],
}
DECODERS = ["tconv", "frequency", "wavelet", "attention"]
TRACKERS = ["tensorboard", "wandb", "none"]
METRICS = {"psnr": "PSNR (dB) ↑", "ssim": "SSIM ↑", "lpips": "LPIPS ↓"}
RESULTS = (  # files of an evaluation
    "metrics.json",
    "per_image.csv",
    "reconstructions.png",
    "histograms.png",
    "reconstructions.zip",
)
INVERSION = ("inversion.json", "inversion.csv", "inversion.png")  # files of evaluate.py --invert
PROTOCOLS = ["documented", "published"]  # the recipe that a number was measured with: README, "Protocol"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class UserError(Exception):
    """Something that the user can put right; shown as one line, `error: …`."""


class Parser(argparse.ArgumentParser):
    """An argument parser that shows defaults in its help and reports a mistake as a UserError."""

    def __init__(self, doc, **kwargs):
        super().__init__(description=doc, allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (--help explains every flag)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults after each flag that has one, the description as it is written."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def positive_int(text):
    return at_least(int, text, 1)


def whole_number(text):
    return at_least(int, text, 0, 2**32)


def positive_float(text):
    return at_least(float, text, 5e-324)


def non_negative_float(text):
    return at_least(float, text, 0)


def at_least(kind, text, minimum, limit=float("inf")):
    """`text` as an int or float from `minimum` to below `limit`; else argparse's own error, with the value."""
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number") from None
    if not minimum <= value < limit:
        bound = "positive" if minimum else "zero or positive"
        raise argparse.ArgumentTypeError(f"{text} is not {bound}{f' and below {limit}' if value >= limit else ''}")
    return value


def check_layer(encoder, layer):
    """Raise UserError unless `layer` is one of `encoder`'s."""
    if encoder not in LAYERS:
        raise UserError(f"--encoder {encoder}: not an encoder; choose from {', '.join(LAYERS)}")
    if layer not in LAYERS[encoder]:
        raise UserError(f"--layer {layer}: not a layer of {encoder}; choose from {', '.join(LAYERS[encoder])}")


def run(main):
    """Return `main()`; what the user can put right ends in one line on stderr and exit status 2."""
    try:
        return main()
    except UserError as error:
        sys.exit(fail(str(error)))
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # disk full, no permission, a folder where a file should be
        name = f"{error.filename}: " if error.filename else ""
        sys.exit(fail(f"{name}{error.strerror or error}"))
    except (MemoryError, RuntimeError) as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            sys.exit(fail(f"--compile: {str(error)[:200]}; leave it out, or install what it wants"))
        short = "out of memory|allocate memory|size calculation overflowed"
        if isinstance(error, RuntimeError) and not re.search(short, str(error)):
            raise
        sys.exit(fail(f"out of memory; a smaller --batch-size or --width needs less ({str(error)[:80]})"))


def fail(message):
    """Print `error: message` as one line on stderr and return the exit status for it, 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


@contextmanager
def atomic(path):
    """Yield a temporary path in the folder of `path` that takes its place when the block succeeds."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a full disk names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write `text` to `path`, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_folder(path):
    """Create the folder `path` if need be and return it as a Path; raise UserError if it can't hold files."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {path}: cannot write there ({error.strerror})") from None
    return path


def save(state, path):
    """torch.save `state` (tensors and primitives) to `path`, whole or not at all."""
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load(path, what="checkpoint", mmap=False, legacy=False):
    """Load a file that `save` wrote, onto the CPU, running no code from it.

    Every byte is checked against the archive's CRC-32; legacy: a file in PyTorch's format before 1.6, which is
    no archive, is read too. Raises UserError, naming `path` and `what` it should have been, for a file that
    is missing, damaged or of another kind.
    """
    import torch

    try:
        if not legacy or zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise UserError(f"{path}: damaged (CRC of {damaged} is wrong)")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what}") from None
    except UserError:
        raise
    except Exception as error:  # zip, pickle and torch each have their own for a file that is not theirs
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a {what} that can be read safely ({reason[:120]})") from None


def select_device(name):
    """`auto`, `cpu`, `cuda` or `cuda:N` as a torch.device; raises UserError for one that is not there."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: use auto, cpu, cuda or cuda:N")
    return device


def disable_bars(args, rank=0):
    """tqdm's `disable`: True with --quiet and in all processes but the first; None, off without a terminal, else.

    --bars is for run_all.sh, which reads standard error while a person watches it.
    """
    return True if args.quiet or rank else False if args.bars else None


def keep_freed_memory():
    """Have glibc keep large freed blocks for the next ones, rather than give each back to the kernel.

    A training step allocates and frees tensors of 50 MB by the dozen; to have the kernel map and zero each anew took
    a fifth of the step. No effect on other systems.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped by itself
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def start_processes(device):
    """Join the processes that torchrun started, if it did: (rank, number of processes, device of this one).

    NCCL on CUDA, gloo on the CPU. Only the first process prints.
    """
    import torch
    import torch.distributed as dist

    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        if missing := {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
            missing = ", ".join(sorted(missing))
            raise UserError(f"WORLD_SIZE is {world}, but {missing} not set: start with torchrun, or unset WORLD_SIZE")
        if device.type == "cuda":
            device = select_device(f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")
    return int(os.environ.get("RANK", 0)), world, device
