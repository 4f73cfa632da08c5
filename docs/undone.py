"""Undo AlexNet's last convolution: features.9 from features.10, and what a decoder of features.9 makes of it.

  python docs/undone.py runs/conv4/best.pt --data imagenet

features.10 are linear in features.9, as many numbers, and these are a ReLU's: not negative, four fifths of
them 0. So least squares that keeps to what is not negative finds them again.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import conv2d, conv_transpose2d
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
from encoders import imagenet_weights
from flags import Parser, positive_int
from metrics import psnr
from models import load_inverter
from utils import UserError, cli_main

WANTED = "alexnet conv4 imagenet documented"
BATCH = 16


@torch.no_grad()
def undo(features, weight, bias, steps=1000):
    """The x ≥ 0, (B, C, H, W), whose convolution, padded by 1, is nearest to `features` (B, K, H, W).

    weight, bias: of the convolution, (K, C, 3, 3) and (K,). FISTA (Beck & Teboulle 2009), which begins anew
    where it overshoots (O'Donoghue & Candès 2015), each image by itself.
    """
    wanted = features - bias[:, None, None]
    draw = torch.Generator().manual_seed(0)
    direction = torch.randn(1, weight.shape[1], *features.shape[2:], generator=draw)
    for _ in range(100):  # power iteration: the largest eigenvalue is the gradient's Lipschitz constant
        direction /= direction.norm()
        direction = conv_transpose2d(conv2d(direction, weight, padding=1), weight, padding=1)
    lipschitz = 1.1 * direction.norm()  # a little more, because it comes near from below
    x = torch.zeros(len(features), *direction.shape[1:])
    ahead, momentum = x, 1.0
    for _ in range(steps):
        gradient = conv_transpose2d(conv2d(ahead, weight, padding=1) - wanted, weight, padding=1)
        following = (ahead - gradient / lipschitz).clamp_min(0)
        change = following - x
        overshoots = ((ahead - following) * change).sum((1, 2, 3), keepdim=True) > 0
        grown = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = following + (momentum - 1) / grown * change * ~overshoots
        x, momentum = following, grown
    return x


def main():
    parser = Parser(__doc__)
    parser.add_argument("ckpt", help="best.pt of a decoder of --encoder alexnet --layer conv4, features.9")
    parser.add_argument("--data", default="sample", help="whose test images")
    parser.add_argument("--steps", type=positive_int, default=1000, metavar="N", help="of least squares")
    args = parser.parse_args()
    inverter, checkpoint = load_inverter(args.ckpt)
    names = " ".join(checkpoint["config"][name] for name in ("encoder", "layer", "weights", "protocol"))
    if names != WANTED:
        raise UserError(f"{args.ckpt}: a decoder of {names}, not of {WANTED}")
    state = imagenet_weights("alexnet")
    weight, bias = state["features.10.weight"], state["features.10.bias"]
    images = data.load_split(args.data, "test")
    errors, own, found = [], [], []
    for first in tqdm(range(0, len(images), BATCH), "Undoing", unit="batch", disable=None):
        batch = data.center_crops(images[first : first + BATCH], inverter.size)
        features = inverter.encode(batch)
        undone = undo(conv2d(features, weight, bias, padding=1), weight, bias, args.steps)
        distance = (undone - features).flatten(1).norm(dim=1)
        errors += (distance / features.flatten(1).norm(dim=1)).tolist()
        for maps, values in ((features, own), (undone, found)):
            with torch.no_grad():
                values += psnr(inverter.decode(maps).clamp(0, 1), batch).tolist()
    print(f"{len(images)} images: features.9 found to {max(errors):.1e} of their norm, or nearer")
    print(f"PSNR from features.9 {np.mean(own):.2f} dB, from those found {np.mean(found):.2f} dB")


if __name__ == "__main__":
    cli_main(main)
