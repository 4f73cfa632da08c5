"""What at least two files share: errors, devices, processes, and files written whole or not at all.

Nothing heavy is imported here, so that `--help` and a mistyped flag answer at once.
"""

import csv
import ctypes
import hashlib
import io
import itertools
import json
import os
import re
import sys
import time
import traceback
import zipfile
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from statistics import median

from study import FORMAT

RESULTS = (  # files of an evaluation; the first says what was measured, and is written last
    "metrics.json",
    "per_image.csv",
    "reconstructions.png",
    "histograms.png",
    "reconstructions.zip",
    "iterations.png",  # of decoders that iterate
)
INVERSION = ("inversion.json", "inversion.csv", "inversion.png")  # files of invert.py, likewise
GROUPS = itertools.count()  # of processes, so far
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # colours and bold type, which PyTorch's messages have


class UserError(Exception):
    """Something that the user can put right; shown as one line, `error: …`."""


def run(main):
    """Return `main()`; what the user can put right ends in one line on stderr and exit status 2.

    FEATURE_INVERSION_DEBUG=1 shows the traceback before that line.
    """
    if getattr(sys.stdout, "errors", "") == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # where a terminal knows no arrow, its ? is no error
    try:
        return main()
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # disk full, no permission, a folder where a file should be
        name = f"{error.filename}: " if error.filename else ""
        where = "" if error.filename else " (FEATURE_INVERSION_DEBUG=1 shows where)"
        fail(f"{name}{error.strerror or error}{where}")
    except (MemoryError, RuntimeError) as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            fail(f"--compile: {str(error)[:200]}; leave it out, or install what it wants")
        if not out_of_memory(error):
            raise
        less = "a smaller --batch-size needs less, or in training a smaller --width"
        fail(f"out of memory; {less} ({str(error)[:80]})")


def fail(message):
    """End the process with `error: message`, one line on stderr, and status 2."""
    if os.environ.get("FEATURE_INVERSION_DEBUG") == "1":
        sys.exc_info()[1].__suppress_context__ = False  # what a UserError was raised for
        traceback.print_exc()
    print(f"error: {' '.join(ANSI.sub('', message).split())}", file=sys.stderr)
    sys.exit(2)


def out_of_memory(error):
    """Whether an exception says that memory is too small: Python's, or PyTorch's on the CPU or a GPU."""
    short = "out of memory|allocate memory|size calculation overflowed"
    return isinstance(error, MemoryError) or bool(re.search(short, str(error)))


def first_line(error):
    """The first line of an exception's message, at most 120 characters; its kind, where it has none."""
    return (ANSI.sub("", str(error)).splitlines() or [type(error).__name__])[0][:120]


# --- Files -----------------------------------------------------------------------------------------------


@contextmanager
def atomic(path):
    """Yield a temporary path in the folder of `path` that takes its place when the block succeeds."""
    path = Path(path)
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.tmp{path.suffix[:9]}")  # 255 bytes at most
    try:
        yield temporary
        with open(temporary, "r+b") as file:  # Windows flushes only what it may write
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a full disk names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def locked(path, timeout=-1):
    """The lock of the file `path`, held; the kernel frees it when the process ends, however it ends.

    Raises filelock.Timeout if another has it for `timeout` seconds, UserError where files can't be locked.
    """
    from filelock import FileLock, Timeout

    try:
        return FileLock(path).acquire(timeout)
    except Timeout:
        raise
    except (OSError, NotImplementedError) as error:
        raise UserError(f"{path}: cannot be locked ({error}); choose another folder") from None


def leftovers(path):
    """The temporary files that `atomic` left beside `path`, of processes that were killed meanwhile."""
    name = re.compile(rf"\.{re.escape(path.name[:40])}\.\d+\.tmp{re.escape(path.suffix[:9])}")
    return [file for file in path.parent.glob(".*.tmp*") if name.fullmatch(file.name)]


def write_text(path, text):
    """Write `text` to `path`, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path, header, rows):
    """Write a CSV file of `header` and `rows`, sequences of cells, to `path`, whole or not at all."""
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


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


def user_cache(cache=None):
    """The folder of --cache, or the user's own: ~/.cache/feature-inversion, or as XDG_CACHE_HOME says."""
    if cache:
        return Path(cache)
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise UserError("there is no home folder for the cache; give a --cache FOLDER") from None
    return Path(home, "feature-inversion")


def same_data(a, b):
    """Whether two values that data.resolve returned are the same data."""
    return a == b or "sample" not in (a, b) and Path(a).resolve() == Path(b).resolve()


def seeds_of(run):
    """The folders of a run's seeds, `seed1` and so on, in the order of their numbers."""
    numbers = {path.name.removeprefix("seed"): path for path in run.glob("seed*") if path.is_dir()}
    return [numbers[number] for number in sorted(filter(str.isdecimal, numbers), key=int)]


def seed_folders(run):
    """A run's folders: [`run`] if it was evaluated; else its seeds, `seed1` and so on, that were.

    If none was, one all the same: the first of its seeds, or `run`.
    """
    if (run / "metrics.json").exists():
        return [run]
    seeds = seeds_of(run)
    return [path for path in seeds if (path / "metrics.json").exists()] or (seeds or [run])[:1]


def write_result(path, content):
    """Write a result, a dictionary, to the JSON file at `path`; its `ckpt` is told as it lies from there."""
    if "ckpt" in content:
        ckpt = Path(content["ckpt"])
        place = os.path.relpath(ckpt.parent.resolve() / ckpt.name, path.parent.resolve())
        content = content | {"ckpt": place}
    write_text(path, json.dumps(content, indent=2))


@contextmanager
def reading(what, advice):
    """Raise UserError of `what`, why and `advice`, where the block cannot read a file or make sense of it."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # json, csv, zipfile and what looks into their content have many kinds
        raise UserError(f"{what} ({error!r}); {advice}") from None


def read_result(path):
    """The content of the result at `path`. Raises UserError for none, or one of an earlier checkpoint."""
    command = "invert" if path.name in INVERSION else "evaluate"
    if not path.exists():
        raise UserError(f"{path.parent}: has no {path.name}; {command} it first")
    content = json.loads(path.read_text(encoding="utf-8"))
    ckpt = path.parent / content["ckpt"] if "ckpt_sha256" in content else None  # older results have none
    if ckpt and ckpt.is_file() and digest(ckpt) != content["ckpt_sha256"]:
        raise UserError(f"{path} is of an earlier {ckpt.name}; {command} again")
    return content


def results_of(run):
    """The files of results in the folder `run`, and in folders there of those that are of its best.pt."""
    found = [run / name for name in RESULTS + INVERSION]
    for files in (RESULTS, INVERSION):
        for path in (*run.glob(f"*/{files[0]}"), *run.glob(f"*/*/{files[0]}")):
            with suppress(Exception):  # of another program
                ckpt = json.loads(path.read_text(encoding="utf-8"))["ckpt"]
                if (path.parent / ckpt).resolve() == (run / "best.pt").resolve():
                    found += [path.with_name(name) for name in files]
    return found


def refuse_other_results(out, files, about):
    """Raise UserError if the folder `out` holds the results, or the best.pt, of other than `about` says.

    files: RESULTS, INVERSION or that of the baselines, of which the first, a JSON file, has the keys and
    values of `about`, a dictionary; its `data` and `ckpt` may have another name for the same.
    """
    best, first = out / "best.pt", out / files[0]
    if "ckpt_sha256" in about and best.exists() and digest(best) != about["ckpt_sha256"]:
        raise UserError(f"{best}: is another than --ckpt, or newer by now; give another --out")
    advice = "give another --out, or remove it"
    if not first.exists():
        found = [out / name for name in files if (out / name).exists()]
        if found and not best.exists():  # else an evaluation of it was interrupted
            raise UserError(f"{found[0]}: no finished evaluation wrote it; {advice}")
        return
    with reading(f"{first}: not a result of this program", advice):
        content = json.loads(first.read_text(encoding="utf-8"))
        if "config" in about:
            content["config"] = about["config"] | content["config"]  # which may lack flags that are newer
        other = [key for key in about if key != "ckpt_sha256" and content.get(key) != about[key]]
        places = {"data": content.get("data"), "ckpt": out / content.get("ckpt", "")}
        other = [key for key in other if key not in places or not same_data(places[key], about[key])]
    if other:
        raise UserError(f"{first}: is the result of another {other[0]}; {advice}")


def digest(path, algorithm="sha256"):
    """The digest of the file at `path`, as hexadecimal digits."""
    found = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def save(state, path):
    """torch.save `state` (tensors and primitives) to `path`, whole or not at all."""
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load(path, what="checkpoint", legacy=False):
    """Load a file that `save` wrote, onto the CPU, running no code from it.

    Every byte is checked against the archive's CRC-32; legacy: a file in PyTorch's format before 1.6, which
    is no archive, is read too. Raises UserError, naming `path` and `what` it should have been.
    """
    import torch

    try:
        if not legacy or zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise UserError(f"{path}: damaged (CRC of {damaged} is wrong)")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not legacy and isinstance(content, dict) and content.get("format", FORMAT) > FORMAT:
            raise UserError(f"{path}: written by a newer version of this program; update it")
        return content
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what}") from None
    except UserError:
        raise
    except Exception as error:  # zip, pickle and torch each have their own for a file that is not theirs
        if out_of_memory(error):
            raise
        reason = first_line(str(error).rpartition("WeightsUnpickler error: ")[2] or error)
        if held := re.match(r"Unsupported global: GLOBAL (\S+)", reason):
            reason = f"it holds {held[1]}; torch.save(net.state_dict(), PATH) writes tensors alone"
        raise UserError(f"{path}: not a {what} that can be read safely ({reason})") from None


# --- Running ---------------------------------------------------------------------------------------------


def evenly_spaced(total, count):
    """At most `count` whole numbers from 0 to `total` − 1, evenly spaced, with the first and the last."""
    count = min(count, total)
    return [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]


def disable_bars(args, rank=0):
    """tqdm's `disable`: True with --quiet and in other processes; None, off without a terminal, else.

    --bars is for run_all.sh, which reads standard error while a person watches it.
    """
    if args.quiet or rank:
        return True
    return False if args.bars else None


def keep_freed_memory():
    """Have glibc keep large freed blocks for the next ones, rather than give each back to the kernel.

    A training step allocates and frees tensors of 50 MB by the dozen; to have the kernel map and zero each
    anew took a fifth of the step. No effect on other systems.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped by itself
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def select_device(name):
    """`auto`, `cpu`, `cuda`, `cuda:N` or `mps` as a torch.device; UserError for one that is not there.

    On CUDA float32 is float32 from then on, outside of `tf32`.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"(cpu|mps)(:0)?|cuda(:0|:[1-9]\d?)?", name):
        raise UserError(f"--device {name}: use auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: PyTorch has no such GPU of Apple's here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise UserError(f"--device {name}: this machine has {count} CUDA devices; use --device cpu")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # where graphs are recorded, too
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return device


@contextmanager
def tf32(allowed):
    """Within `with`, if `allowed`: CUDA's float32 convolutions and matrix products on the tensor cores.

    They read 10 bits of a number's mantissa there, and add up in float32. For training steps alone: no
    validation, evaluation or metric depends on it.
    """
    import torch

    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = allowed
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


@contextmanager
def processes(device):
    """Join the processes that torchrun started, if it did: (rank, number of processes, device of this one).

    NCCL on CUDA, gloo on the CPU. Only the first process prints. Without WORLD_SIZE there is one, whatever
    RANK says. `with` ends it.
    """
    import torch.distributed as dist

    text = os.environ.get("WORLD_SIZE", "1")
    advice = "start with torchrun, or unset WORLD_SIZE"
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise UserError(f"WORLD_SIZE is {text!r}, which is no number of processes: {advice}")
    world = int(text)
    if world == 1:
        yield 0, 1, device
        return
    if device.type == "mps":
        raise UserError("--device mps: one process only; start it without torchrun")
    if missing := {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
        raise UserError(f"WORLD_SIZE is {world}, but {', '.join(sorted(missing))} not set: {advice}")
    for name in ("RANK", "LOCAL_RANK"):
        if not os.environ[name].isdecimal() or int(os.environ[name]) >= world:
            raise UserError(f"{name} is {os.environ[name]!r}, should be 0 to {world - 1}: {advice}")
    if device.type == "cuda":
        device = select_device(f"cuda:{os.environ['LOCAL_RANK']}")
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"training {next(GROUPS)}", store)  # where no earlier group left anything
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank else sys.stdout):
            yield rank, world, device
    finally:
        dist.destroy_process_group()


def timed(device, function, repeats=5):
    """Median seconds of `function`, after one call that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        start = wait(device)
        function()
        seconds.append(wait(device) - start)
    return median(seconds[1:])


def wait(device):
    """The time in seconds, when a GPU has done what it was given."""
    if device.type != "cpu":
        import torch

        torch.mps.synchronize() if device.type == "mps" else torch.cuda.synchronize(device)
    return time.perf_counter()
