"""The study's names and protocols; errors, files, devices and processes. Imports nothing heavy."""

import csv
import ctypes
import hashlib
import io
import os
import re
import sys
import tempfile
import time
import traceback
import zipfile
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import NamedTuple

# --- The study: names and protocols ------------------------------------------------------------------------

ENCODERS = {  # by short name
    "vgg16": "torchvision/vgg16",
    "resnet34": "torchvision/resnet34",
    "vit_small": "timm/vit_small_patch16_224",
    "alexnet": "torchvision/alexnet",
}
LAYERS = {  # their modules, shallow to deep
    "vgg16": {f"block{i}": f"features.{place}" for i, place in enumerate((4, 9, 16, 23, 30), 1)},
    "resnet34": {f"layer{i}": f"layer{i}" for i in range(1, 5)},
    "vit_small": {f"block{i}": f"blocks.{i}" for i in range(12)},
    "alexnet": {f"conv{i}": f"features.{place}" for i, place in enumerate((2, 5, 7, 9, 12), 1)},
}
DECODERS = {  # by name, the class in decoders.py
    "tconv": "TransposedConv",
    "frequency": "FrequencyDecoder",
    "wavelet": "WaveletDecoder",
    "attention": "AttentionDecoder",
    "residual": "ResidualDecoder",
    "feedback": "FeedbackDecoder",
}
ITERATIONS = 3  # default of the feedback decoder
INPUT_FLAGS = ("input_size", "mean", "std")  # describe the encoder's images
METRICS = {"psnr": "PSNR (dB) ↑", "ssim": "SSIM ↑", "lpips": "LPIPS ↓"}
METRICS_AND_FEATURE_ERROR = METRICS | {"feature_error": "feature error ↓"}
FREE_BASELINES = {"mean_colour": "mean colour", "thumbnail": "thumbnail of the features' size"}
IMAGE_SIZE = 224
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
WANG_2004 = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}  # 11×11 window


class Protocol(NamedTuple):
    """How images are prepared, compared and measured (docs/guide.md). The defaults are `documented`."""

    name: str = "documented"
    squeezed: bool = True  # resize images to 256×256; else their shorter side to 256
    normalized_target: bool = False  # for the loss; the metrics clip it to [0, 1]
    ssim_window: dict = WANG_2004  # options of skimage.metrics.structural_similarity
    lowest_lr: float = 1e-7  # ReduceLROnPlateau's min_lr
    vit_shift: int = 0  # added to the number of ViT's block, modulo 12
    own_normalization: bool = True  # by the mean and std of the network's training; else ImageNet's


DOCUMENTED = Protocol()
PUBLISHED = Protocol(
    name="published",
    squeezed=False,
    normalized_target=True,
    ssim_window={"win_size": 7},
    lowest_lr=1e-6,
    vit_shift=-1,
    own_normalization=False,
)
PROTOCOLS = {protocol.name: protocol for protocol in (DOCUMENTED, PUBLISHED)}


def is_encoder(name):
    """Whether an encoder can have this name."""
    return name in LAYERS or ".py:" in name or name.startswith(("timm/", "torchvision/"))


def encoders_of(encoder):
    """The encoders in --encoder A+B."""
    return encoder.split("+")


def weights_of_each(count, weights):
    """The --weights of each of `count` encoders: one for all, or as many joined with +."""
    sources = weights.split("+")
    return sources if len(sources) == count else [weights] * count


def user_files(encoder):
    """Each FILE.py in an --encoder."""
    return [name.rpartition(":")[0] for name in encoders_of(encoder) if ".py:" in name]


def check_encoder(name):
    """Raise UserError unless an encoder can have this name."""
    if not is_encoder(name):
        choices = ", ".join([*LAYERS, "timm/NAME, torchvision/NAME, FILE.py:FUNCTION"])
        raise UserError(f"--encoder {name}: not an encoder; choose from {choices}")


def check_layer(encoder, layer):
    """Raise UserError for an unknown encoder, or an unknown layer of one with a short name."""
    for name in encoders_of(encoder):
        check_encoder(name)
    if encoder in LAYERS and layer not in LAYERS[encoder]:
        choices = ", ".join(LAYERS[encoder])
        raise UserError(f"--layer {layer}: not a layer of {encoder}; choose from {choices}")


# --- Errors ------------------------------------------------------------------------------------------------

ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # colours in PyTorch's messages


class UserError(Exception):
    """A mistake that the user can correct, shown as one line, `error: …`."""


def cli_main(main):
    """Return `main()`. What the user can mend ends in a line on stderr, `error: …`, and status 2."""
    if getattr(sys.stdout, "errors", "") == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without → prints ?
    try:
        return main()
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # disk full, no permission, a folder where a file should be
        name, what = error.filename, error.strerror or error
        fail(f"{name}: {what}" if name else f"{what} (FEATURE_INVERSION_DEBUG=1 shows where)")
    except (MemoryError, RuntimeError) as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            fail(f"--compile: {str(error)[:200]}; leave it out, or install what it needs")
        if not out_of_memory(error):
            raise
        less = "a smaller --batch-size needs less, or in training a smaller --width"
        fail(f"out of memory; {less} ({str(error)[:80]})")


def fail(message):
    """Print `error: message`, with FEATURE_INVERSION_DEBUG=1 after the traceback; end with status 2."""
    if os.environ.get("FEATURE_INVERSION_DEBUG") == "1":
        sys.exc_info()[1].__suppress_context__ = False
        traceback.print_exc()
    print(f"error: {' '.join(ANSI.sub('', message).split())}", file=sys.stderr)
    sys.exit(2)


def out_of_memory(error):
    """Whether an exception, Python's or PyTorch's, says that the memory of the CPU or GPU is too small."""
    messages = "out of memory|allocate memory|size calculation overflowed"
    return isinstance(error, MemoryError) or bool(re.search(messages, str(error)))


def first_line(error):
    """The first line of an exception's message, at most 120 characters; its type if it has none."""
    return (ANSI.sub("", str(error)).splitlines() or [type(error).__name__])[0][:120]


# --- Files -------------------------------------------------------------------------------------------------

FORMAT = 1  # of best.pt and last.pt; raise it if earlier versions would misread the file


@contextmanager
def atomic(path):
    """Yield a temporary path beside `path` that replaces it when the block succeeds."""
    path = Path(path)
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.tmp{path.suffix[:9]}")  # 255 bytes at most
    try:
        yield temporary
        with open(temporary, "r+b") as file:  # Windows flushes only files open for writing
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a full disk names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def leftovers(path):
    """The temporary files that killed processes left beside `path`."""
    name = re.compile(rf"\.{re.escape(path.name[:40])}\.\d+\.tmp{re.escape(path.suffix[:9])}")
    return [file for file in path.parent.glob(".*.tmp*") if name.fullmatch(file.name)]


def locked(path, timeout=-1):
    """A held lock of the file `path`. Raises filelock.Timeout after `timeout` seconds, UserError."""
    from filelock import FileLock, Timeout

    try:
        return FileLock(path).acquire(timeout)
    except OSError as error:
        if isinstance(error, Timeout):
            raise
        raise UserError(f"{path}: cannot be locked ({error}); choose another folder") from None


def write_text(path, text):
    """Write `text` to `path`, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path, header, rows):
    """Write `header` and `rows` to the CSV file `path`, whole or not at all."""
    with atomic(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def make_folder(path):
    """Create the folder `path` and return it as a Path. Raises UserError if it cannot hold files."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"--out {path}: cannot write there ({error.strerror})") from None
    return path


def user_cache(cache=None):
    """The folder of --cache, by default feature-inversion in XDG_CACHE_HOME or ~/.cache. Raises UserError."""
    if cache:
        return Path(cache)
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise UserError("there is no home folder for the cache; give a --cache FOLDER") from None
    return Path(home, "feature-inversion")


def same_data(a, b):
    """Whether two values of --data name the same data."""
    return a == b or "sample" not in (a, b) and Path(a).resolve() == Path(b).resolve()


def digest(path, algorithm="sha256"):
    """The digest of the file at `path`, in hexadecimal."""
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
    """Load a file of `save`, or if `legacy` any of PyTorch's, onto the CPU, running no code. UserError."""
    import torch

    try:
        if not legacy or zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise UserError(f"{path}: damaged (CRC of {damaged} is wrong)")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not legacy and isinstance(content, dict) and content.get("format", FORMAT) > FORMAT:
            raise UserError(f"{path}: written by a newer version of this program; update it")
        return content
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what}") from None
    except Exception as error:  # zip, pickle and torch have many types
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        reason = first_line(str(error).rpartition("WeightsUnpickler error: ")[2] or error)
        if held := re.match(r"Unsupported global: GLOBAL (\S+)", reason):
            reason = f"it holds {held[1]}; torch.save(net.state_dict(), PATH) writes tensors alone"
        raise UserError(f"{path}: not a {what} that can be read safely ({reason})") from None


# --- Devices and processes ---------------------------------------------------------------------------------


def evenly_spaced(total, count):
    """At most `count` integers, evenly spaced from 0 to `total` − 1."""
    count = min(count, total)
    return [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]


def disable_bars(args, rank=0):
    """tqdm's `disable`: with --quiet or rank > 0 True, with --bars False, else None (if no terminal)."""
    if args.quiet or rank:
        return True
    return False if args.bars else None


def keep_freed_memory():
    """Have glibc keep freed memory: to map it anew took a fifth of a training step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def set_determinism(deterministic=True):
    """Deterministic algorithms, a warning where PyTorch has none (attention on CUDA); or else the fastest."""
    import torch

    keep_freed_memory()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = not deterministic


def select_device(name):
    """The torch.device for --device. Turns TF32 off. Raises UserError for a device that is not there."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"(cpu|mps)(:0)?|cuda(:0|:[1-9]\d?)?", name):
        raise UserError(f"--device {name}: use auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: PyTorch finds no Apple GPU here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise UserError(f"--device {name}: this machine has {count} CUDA devices; use --device cpu")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # CUDA graphs are recorded on the current device
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return device


@contextmanager
def tf32(allowed):
    """Within `with`: whether CUDA's float32 convolutions and matrix products may use TF32."""
    import torch

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def processes(device):
    """A context that joins torchrun's processes, if any, and gives (rank, world size, device)."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return nullcontext((0, 1, device))
    from extras.distributed import join_processes

    return join_processes(device)


def timed(device, function, repeats=5):
    """Median seconds of `repeats` calls of `function`, after a warm-up call."""
    seconds = []
    for _ in range(repeats + 1):
        start = synchronized_time(device)
        function()
        seconds.append(synchronized_time(device) - start)
    return median(seconds[1:])


def synchronized_time(device):
    """The time in seconds after the device has finished its work."""
    if device.type != "cpu":
        import torch

        torch.mps.synchronize() if device.type == "mps" else torch.cuda.synchronize(device)
    return time.perf_counter()
