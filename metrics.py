"""How far an image is from its target: PSNR, SSIM and LPIPS, the loss made of them, and averages of each."""

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
from utils import DOCUMENTED, IMAGENET_MEAN, IMAGENET_STD, METRICS, UserError

LPIPS_MIN_SIZE = 31  # pixels
TERMS = ("loss", "mse", "lpips", "psnr")  # what Loss gives, and an epoch averages
SSIM_POOL = ThreadPoolExecutor()  # each image on one core
INTERMEDIATE_WEIGHT = 0.3  # of the MSE of an iterating decoder's images before the last one


def target(images, protocol=DOCUMENTED):
    """What an output for `images` (B, 3, H, W) in [0, 1] is held against in the loss.

    `documented`: the images. `published`: ImageNet-normalised, about -2.1 to 2.6, which no sigmoid reaches;
    clipped to [0, 1] it is also what the published metrics saw (README, "Protocol").
    """
    if not protocol.normalized_target:
        return images
    mean, std = imagenet_statistics(images.device)
    return (images - mean) / std


@cache
def imagenet_statistics(device):
    """Mean and std of ImageNet's channels, (3, 1, 1) each, copied to a device only once."""
    return torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=device)[:, :, None, None]


def psnr(images, target):
    """Peak signal-to-noise ratio in dB, (B,), of images (B, 3, H, W) in [0, 1] (paper 3.4.1); at most 100."""
    return -10 * torch.log10((images - target).square().mean((1, 2, 3)).clamp_min(1e-10))


def ssim(image, target, protocol=DOCUMENTED):
    """Structural similarity of two images (3, H, W) in [0, 1] (paper 3.4.2).

    `documented`: as Wang et al. 2004 define it, 11×11 Gaussian window. `published`: scikit-image's 7×7
    uniform one.
    """
    pair = image.cpu().numpy(), target.cpu().numpy()
    return structural_similarity(*pair, channel_axis=0, data_range=1.0, **protocol.ssim_window)


@torch.no_grad()
def measure(images, target, lpips, protocol=DOCUMENTED):
    """{metric: one float an image} of `images` against `target`, (B, 3, H, W) in [0, 1]; lpips: an LPIPS.

    SSIM's are an iterator, which waits for the CPU: a GPU can go on until they are wanted.
    """
    pairs = images.cpu(), target.cpu(), [protocol] * len(images)
    return {
        "ssim": SSIM_POOL.map(ssim, *pairs),
        "psnr": psnr(images, target).tolist(),
        "lpips": lpips(images, target).tolist(),
    }


@torch.no_grad()
def feature_error(encoder, images, features, scale):
    """‖φ(x) − φ‖ / scale, (B,), of images (B, 3, H, W), not clamped here, and the features wanted."""
    return (encoder(images) - features).square().sum((1, 2, 3)).sqrt() / scale


@torch.no_grad()
def feature_scale(encoder, images, batch_size=4):
    """(name, number) of what feature errors are divided by: `mean_pairwise_distance`, or `feature_norm`.

    Mahendran & Vedaldi divide by the mean Euclidean distance of two images' features; where no two of them
    are different, it is their norm. images: data.Images or uint8 (N, 256, 256, 3), of which the first 100
    count. Raises UserError where all features are 0 or NaN.
    """
    device = next(encoder.buffers()).device
    features = []
    for part in images[:100].split(batch_size):  # more would take memory, not precision
        features.append(encoder(center_crops(part, encoder.input_size).to(device)).flatten(1))
    features = torch.cat(features)
    norm = features.norm(dim=1).mean().item()
    distance = F.pdist(features).mean().item()  # NaN of one image
    if distance > 1e-5 * norm:  # more than rounding
        return "mean_pairwise_distance", distance
    if not norm > 0:
        raise UserError(f"{len(images)} images: their features have norm {norm}, which errors are divided by")
    print("feature errors are relative to ‖φ‖, because no two images have different features")
    return "feature_norm", norm


class LPIPS(nn.Module):
    """LPIPS v0.1 with AlexNet (Zhang et al. 2018; paper 3.4.3), equal to the lpips package's.

    Takes images (B, 3, H, W) in [0, 1], H and W at least LPIPS_MIN_SIZE. The package's scaling of [-1, 1]
    images is ImageNet normalisation of [0, 1] ones. Written out, because training needs the target's
    features without autograd, and a finite gradient where a feature vector is zero.
    """

    def __init__(self):
        super().__init__()
        with torch.device("meta"):  # no memory or time for the classifier
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
        """Five maps (B, C, h, w) of unit-length feature vectors."""
        x = (images - self.mean) / self.std
        maps = []
        for layers in self.slices:
            x = layers(x)
            norm = x.square().sum(1, keepdim=True).clamp_min(1e-20).sqrt()
            maps.append(x / (norm + 1e-10))
        return maps

    def forward(self, images, target):
        """Distances (B,) of `images` from `target`, which has no gradient."""
        with torch.no_grad():
            wanted = self.features(target)
        distance = 0
        for i, (a, b) in enumerate(zip(self.features(images), wanted, strict=True)):
            distance = distance + F.conv2d((a - b).square(), getattr(self, f"linear{i}")).mean((1, 2, 3))
        return distance


class Loss(nn.Module):
    """mse_weight · MSE + lpips_weight · LPIPS of outputs against images' targets (paper 3.3.2).

    A term with weight zero takes no part in the gradient, and LPIPS is then not computed.
    """

    def __init__(self, mse_weight=0.5, lpips_weight=0.5, protocol=DOCUMENTED):
        super().__init__()
        self.mse_weight = mse_weight
        self.lpips_weight = lpips_weight
        self.protocol = protocol
        self.lpips = LPIPS() if lpips_weight else None

    def forward(self, output, images, intermediate=()):
        """{term of TERMS: (B,), one value an image} of output and images (B, 3, H, W) in [0, 1].

        `lpips` is NaN where it was not asked for; `psnr`, in dB, is against the target clipped to [0, 1].
        intermediate: earlier outputs; their MSE counts in `loss` alone, with INTERMEDIATE_WEIGHT.
        """
        wanted = target(images, self.protocol)
        mse = ((output if self.mse_weight else output.detach()) - wanted).square().mean((1, 2, 3))
        loss = 0
        if self.mse_weight:
            loss = self.mse_weight * mse
            for image in intermediate:
                error = (image - wanted).square().mean((1, 2, 3))
                loss = loss + INTERMEDIATE_WEIGHT * self.mse_weight * error
        if self.lpips:
            distance = self.lpips(output, wanted)
            loss = loss + self.lpips_weight * distance
        else:
            distance = torch.full_like(mse, torch.nan)
        return {
            "loss": loss,
            "mse": mse,
            "lpips": distance,
            "psnr": psnr(output.detach().clamp(0, 1), wanted.clamp(0, 1)),
        }


class Meter:
    """Averages of named values per image (not per batch, which may differ in size), over all processes."""

    def __init__(self, names, device="cpu"):
        device = "cpu" if torch.device(device).type == "mps" else device  # which has no float64
        self.sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in (*names, "images")}

    def add(self, values):
        """Add {name: (B,)}, one value an image."""
        for name, value in values.items():
            self.sums[name] += value.sum().to(self.sums[name])
        self.sums["images"] += len(value)

    def total(self):
        """The sums over all processes, {name: float}, and the number of `images`."""
        sums = torch.stack(list(self.sums.values()))
        if dist.is_initialized():
            dist.all_reduce(sums)
        return dict(zip(self.sums, sums.tolist(), strict=True))

    def averages(self):
        """{name: mean over the images of all processes}."""
        total = self.total()
        images = total.pop("images")
        return {name: value / images for name, value in total.items()}

    def restart(self, total=None):
        """Go on from what `total` gave, or from nothing; of several processes one gets the sums of all."""
        for name, value in self.sums.items():
            value.fill_(total[name] if total else 0)


def summary(values):
    """Mean, standard deviation (population), minimum and maximum of an array, as a dictionary of floats."""
    return {name: float(getattr(values, name)()) for name in ("mean", "std", "min", "max")}


def summary_table(metrics, heading=""):
    """A table for the screen of {metric: its summary}."""
    lines = [f"{heading:<16}{'mean ± std':>18}{'min':>10}{'max':>10}"]
    for name, label in METRICS.items():
        s = metrics[name]
        lines.append(f"{label:<16}{s['mean']:>9.4f} ±{s['std']:>7.4f}{s['min']:>10.4f}{s['max']:>10.4f}")
    return "\n".join(lines)
