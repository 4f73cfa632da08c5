"""What a training has before its first step: settings, checks, what features are like, optimiser, rates."""

import copy
import math
import os

import torch
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

import data
from decoders import Fused
from download import download_div2k
from metrics import SMALLEST
from models import Inverter, count_parameters
from muon import Muon
from utils import UserError, disable_bars, keep_freed_memory, out_of_memory

MEASURED = 64  # crops, from which the deviation of features is taken


def set_up(deterministic=True):
    """Repeatable algorithms, where there are, or else the fastest; freed memory kept.

    Where there are none PyTorch warns and goes on: on CUDA the gradient of attention is not repeatable.
    """
    keep_freed_memory()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = not deterministic


def download(args):
    """Fetch DIV2K into args.data, which is then where it is."""
    if args.data == "sample":
        raise UserError("--download --data sample: the sample needs no download; give a folder for DIV2K")
    args.data = args.data or data.DIV2K_ROOT
    download_div2k(args.data, bars=disable_bars(args))


def steps_of_a_pass(images, batch_size, world):
    """Steps in which `world` processes take all `images`. Raises UserError if `batch_size` is too large."""
    if batch_size * world > images:
        raise UserError(
            f"--batch-size {batch_size} × {world} processes: more than the {images} training images"
        )
    return math.ceil(images / (batch_size * world))


def check_crop(inverter, config, images, world):
    """Raise UserError unless encoder, decoder and LPIPS take crops of this size; images: their number."""
    crop = config["crop"]
    layer = f"{config['encoder']} {config['layer']}"
    side = data.side_of(inverter.size)
    if crop > side:
        raise UserError(f"--crop {crop}: images are {side} pixels wide; at most that")
    if crop % inverter.stride and crop != inverter.size:
        raise UserError(
            f"--crop {crop}: {layer} has a stride of {inverter.stride} pixels; give a multiple of it"
        )
    if inverter.size < SMALLEST:
        raise UserError(f"--input-size {inverter.size}: LPIPS wants at least {SMALLEST} pixels")
    if config["lpips_weight"] and crop < SMALLEST:
        raise UserError(f"--crop {crop}: LPIPS wants at least {SMALLEST} pixels")
    try:
        shape = inverter.shape_at(crop)
    except Exception as error:  # each network has its own
        if out_of_memory(error):
            raise
        raise UserError(f"--crop {crop}: {layer} takes no such image ({error})") from None
    left = images % config["batch_size"] if world == 1 else 0  # several processes have full batches
    smallest = left or config["batch_size"]
    joined = world > 1 and inverter.device.type == "cuda"  # batch norm counts over all processes there
    if smallest == 1 and shape[1:] == (1, 1) and not joined:  # it may want more than one value
        try:
            features = torch.zeros(1, *shape, device=inverter.device)
            trial = Inverter(inverter.encoder, copy.deepcopy(inverter.decoder), inverter.shape)
            trial.train().decode(features, (crop, crop))
        except ValueError as error:
            which = "the last" if world == 1 else "each"
            raise UserError(
                f"--crop {crop}: {which} of {images} images, by itself, has one position of {layer}; "
                f"another --crop or --batch-size ({error})"
            ) from None


@torch.no_grad()
def measure_features(inverter, images, config):
    """Tell the decoder the mean and deviation of each channel of the features, over the first crops."""
    plan = data.epoch_plan(images.sizes, config["seed"], 0, config["crop"], images.side)
    parts = zip(*(part[:MEASURED].split(4) for part in plan), strict=True)
    features = [
        inverter.encode(data.crops(images, *part, config["crop"]).to(inverter.device)) for part in parts
    ]
    features = torch.cat(features).float()
    if isinstance(inverter.decoder, Fused):
        sources = features.split(inverter.decoder.channels, 1)
        deviation = torch.stack([source.std() for source in sources])
        inverter.decoder.deviation.copy_(deviation.clamp_min(0.01 * deviation.mean()).clamp_min(1e-12))
        features = inverter.decoder.fuse(features)
        if not hasattr(inverter.core, "deviation"):
            return
    deviation, mean = torch.std_mean(features, (0, 2, 3), keepdim=True)
    smallest = (0.01 * deviation.mean()).clamp_min(1e-12)  # of channels that are hardly ever on
    inverter.core.mean.copy_(mean[0])
    inverter.core.deviation.copy_(deviation[0].clamp_min(smallest))


def make_optimizer(inverter, lr, optimizer="adam"):
    """`muon` or `adam` (paper 3.3.4) over the decoder's parameters; Adam, begun on a GPU, is one kernel."""
    parameters = inverter.decoder.parameters()
    if optimizer == "muon":
        return Muon(parameters, lr)
    fused = True if inverter.device.type == "cuda" else None
    return torch.optim.Adam(parameters, lr, fused=fused)


def make_scheduler(optimizer, config, steps, lowest_lr):
    """The learning rate's: `plateau` (paper 3.3.4), or `onecycle`, which warms up and anneals."""
    if config["schedule"] == "plateau":
        return ReduceLROnPlateau(optimizer, factor=0.5, patience=5, min_lr=lowest_lr)
    return OneCycleLR(optimizer, config["lr"], config["epochs"] * steps, cycle_momentum=False)


def description(config, inverter, train_count, val_count, steps, world, device):
    """What will happen, in three lines."""
    shape = " × ".join(map(str, inverter.shape))
    return (
        f"{config['encoder']} {config['layer']}, {config['weights']} weights: features {shape}\n"
        f"{config['decoder']} decoder: {count_parameters(inverter.decoder):,} trainable parameters\n"
        f"{config['data']}: {train_count} training and {val_count} validation images, crops of "
        f"{config['crop']}×{config['crop']}, {steps} steps an epoch, {world} × {device}, to {config['out']}"
    )
