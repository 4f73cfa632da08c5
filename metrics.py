"""PSNR, SSIM, LPIPS and feature errors of images, the loss of the training, and averages."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from skimage.metrics import structural_similarity
from torch import nn

from data import center_crops
from encoders import imagenet_weights
from utils import DOCUMENTED, IMAGENET_MEAN, IMAGENET_STD, METRICS_AND_FEATURE_ERROR, UserError

LPIPS_MIN_SIZE = 31  # pixels
SCALE_IMAGES = 100  # whose features give the scale of feature errors; more change little
TERMS = ("loss", "mse", "lpips", "psnr")  # what Loss returns and an epoch averages
SSIM_POOL = ThreadPoolExecutor()  # one image a core
INTERMEDIATE_WEIGHT = 0.3  # of the MSE of a feedback decoder's images before its last one


def target(images, protocol=DOCUMENTED):
    """What the loss compares an output with: images (B, 3, H, W) in [0, 1], normalised if `published`."""
    if not protocol.normalized_target:
        return images
    mean, std = imagenet_statistics(images.device)
    return (images - mean) / std


@cache
def imagenet_statistics(device):
    return torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=device)[:, :, None, None]  # (2, 3, 1, 1)


def psnr(images, target):
    """Peak signal-to-noise ratio in dB, (B,), of images (B, 3, H, W) in [0, 1] (paper 3.4.1); at most 100."""
    return -10 * torch.log10((images - target).square().mean((1, 2, 3)).clamp_min(1e-10))


def ssim(image, target, protocol=DOCUMENTED):
    """SSIM of two images (3, H, W) in [0, 1] (paper 3.4.2): Wang et al. 2004, or `published`: 7×7 window."""
    pair = image.cpu().numpy(), target.cpu().numpy()
    return structural_similarity(*pair, channel_axis=0, data_range=1.0, **protocol.ssim_window)


@torch.no_grad()
def measure(images, target, lpips, protocol=DOCUMENTED, features=None):
    """{metric: a float for each image} of `images` against `target`, (B, 3, H, W) in [0, 1].

    features: LPIPS's of `target`, if known.
    """
    pairs = images.cpu(), target.cpu(), [protocol] * len(images)
    return {
        "ssim": SSIM_POOL.map(ssim, *pairs),  # an iterator: the GPU goes on while the CPU computes
        "psnr": psnr(images, target).tolist(),
        "lpips": lpips(images, target, features).tolist(),
    }


def thumbnail(images, size):
    """Images (B, 3, H, W) in [0, 1] at size[0] × size[1] pixels, enlarged again: a baseline."""
    reduced = F.adaptive_avg_pool2d(images, size)
    return F.interpolate(reduced, images.shape[2:], mode="bicubic").clamp(0, 1)


@torch.no_grad()
def feature_error(encoder, images, features, scale):
    """‖φ(x) − φ‖ / scale, (B,), of images x (B, 3, H, W) and the features φ they should have."""
    return (encoder(images) - features).square().sum((1, 2, 3)).sqrt() / scale


@torch.no_grad()
def feature_scale(encoder, images, batch_size=4):
    """(name, divisor) of feature errors: the mean distance of two images' features (Mahendran & Vedaldi).

    If all features are equal it is their norm. images: data.Images or uint8 (N, H, W, 3). Raises UserError.
    """
    device = next(encoder.buffers()).device
    crops = (center_crops(part, encoder.input_size) for part in images[:SCALE_IMAGES].split(batch_size))
    return scale_of(torch.cat([encoder(part.to(device)) for part in crops]))


def scale_of(features):
    """feature_scale of the features (N, C, H, W) of images. Raises UserError."""
    features = features.flatten(1)
    norm = features.norm(dim=1).mean().item()
    distance = F.pdist(features).mean().item()  # NaN of one image
    if distance > 1e-5 * norm:  # more than rounding
        return "mean_pairwise_distance", distance
    if not norm > 0:
        raise UserError(f"{len(features)} images: feature errors are divided by their features' norm, {norm}")
    print("feature errors are relative to ‖φ‖, because there is one image, or all have the same features")
    return "feature_norm", norm


class LPIPS(nn.Module):
    """LPIPS v0.1 with AlexNet (Zhang et al. 2018; paper 3.4.3), equal to the lpips package's.

    Unlike the package's, it builds no graph for the target, and its gradient is finite at zero features.
    """

    def __init__(self):
        super().__init__()
        with torch.device("meta"):  # or the unused classifier would take memory and time
            trunk = torchvision.models.alexnet().features[:12]
        state = imagenet_weights("alexnet")
        trunk.load_state_dict({key: state[f"features.{key}"] for key in trunk.state_dict()}, assign=True)
        trunk.to(memory_format=torch.channels_last)
        self.slices = nn.ModuleList(trunk[a:b] for a, b in ((0, 2), (2, 5), (5, 8), (8, 10), (10, 12)))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1))
        folder = Path(importlib.util.find_spec("lpips").origin).parent
        linear = torch.load(folder / "weights/v0.1/alex.pth", map_location="cpu", weights_only=True)
        for i in range(5):
            self.register_buffer(f"linear{i}", linear[f"lin{i}.model.1.weight"])  # (1, C, 1, 1)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode=True):
        return super().train(False)

    def features(self, images):
        """Five feature maps (B, C, h, w) of images in [0, 1], with vectors of unit length."""
        x = (images - self.mean) / self.std
        maps = []
        for layers in self.slices:
            x = layers(x)
            norm = x.square().sum(1, keepdim=True).clamp_min(1e-20).sqrt()
            maps.append(x / (norm + 1e-10))
        return maps

    def forward(self, images, target, features=None):
        """Distances (B,) of `images` from `target`, (B, 3, H, W), which has no gradient.

        features: self.features(target), if known.
        """
        with torch.no_grad():
            wanted = features or self.features(target)
        distance = 0
        for i, (a, b) in enumerate(zip(self.features(images), wanted, strict=True)):
            distance = distance + F.conv2d((a - b).square(), getattr(self, f"linear{i}")).mean((1, 2, 3))
        return distance


class Loss(nn.Module):
    """mse_weight · MSE + lpips_weight · LPIPS (paper 3.3.2); at weight 0 LPIPS is not computed."""

    def __init__(self, mse_weight=0.5, lpips_weight=0.5, protocol=DOCUMENTED):
        super().__init__()
        self.mse_weight = mse_weight
        self.lpips_weight = lpips_weight
        self.protocol = protocol
        self.lpips = LPIPS() if lpips_weight else None

    def forward(self, output, images, intermediate=()):
        """{term of TERMS: (B,)} of output and images (B, 3, H, W); intermediate: earlier outputs."""
        wanted = target(images, self.protocol)
        mse = ((output if self.mse_weight else output.detach()) - wanted).square().mean((1, 2, 3))
        distance = torch.full_like(mse, torch.nan)  # unless there is a weight
        decibels = psnr(output.detach().clamp(0, 1), wanted.clamp(0, 1))
        loss = 0
        if self.mse_weight:
            loss = self.mse_weight * mse
            for image in intermediate:
                error = (image - wanted).square().mean((1, 2, 3))
                loss = loss + INTERMEDIATE_WEIGHT * self.mse_weight * error
        if self.lpips:
            distance = self.lpips(output, wanted)
            loss = loss + self.lpips_weight * distance
        return {"loss": loss, "mse": mse, "lpips": distance, "psnr": decibels}


class Meter:
    """Averages of named values over the images of all processes."""

    def __init__(self, names, device="cpu"):
        device = "cpu" if torch.device(device).type == "mps" else device  # which has no float64
        self.sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in (*names, "images")}

    def add(self, values):
        """Add {name: (B,)}, a value for each image."""
        for name, value in values.items():
            self.sums[name] += value.sum().to(self.sums[name])
        self.sums["images"] += len(value)

    def total(self):
        """The sums over all processes, {name: float}, with the number of `images`."""
        sums = torch.stack(list(self.sums.values()))
        if dist.is_initialized():
            dist.all_reduce(sums)
        return dict(zip(self.sums, sums.tolist(), strict=True))

    def averages(self):
        """{name: mean over all images}."""
        total = self.total()
        return {name: total[name] / total["images"] for name in total if name != "images"}

    def restart(self, total=None):
        """Continue from the sums of `total`, which only one process may be given, or from 0."""
        for name, value in self.sums.items():
            value.fill_(total[name] if total else 0)


def summary(values):
    """{"mean", "std" (population), "min", "max": float} of an array."""
    return {name: float(getattr(values, name)()) for name in ("mean", "std", "min", "max")}


def summary_table(metrics, heading=""):
    """A table of {metric: summary} for the screen."""
    lines = [f"{heading:<16}{'mean ± std':>18}{'min':>10}{'max':>10}"]
    for name, label in METRICS_AND_FEATURE_ERROR.items():
        if name not in metrics:
            continue
        s = metrics[name]
        lines.append(f"{label:<16}{s['mean']:>9.4f} ±{s['std']:>7.4f}{s['min']:>10.4f}{s['max']:>10.4f}")
    return "\n".join(lines)
