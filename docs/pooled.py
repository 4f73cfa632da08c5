"""AlexNet's first convolution at fewer positions: its features averaged over 2×2, 4×4 or 8×8 of the 55×55.

evidence.sh inverts them, as `--encoder docs/pooled.py:by_4`.
"""

import torchvision
from torch import nn

from weights import imagenet_weights


def pooled(factor):
    net = torchvision.models.alexnet()
    net.load_state_dict(imagenet_weights("alexnet"), strict=False)  # the classifier may be missing
    return nn.Sequential(*net.features[:2], nn.AvgPool2d(factor))


def by_2():
    return pooled(2)


def by_4():
    return pooled(4)


def by_8():
    return pooled(8)
