"""AlexNet's first convolution at fewer positions: its features averaged over 2×2, 4×4 or 8×8 of the 55×55.

docs/evidence.sh inverts them, as `--encoder docs/pooled.py:by_4`.
"""

import torchvision
from torch import nn

from encoders import imagenet_weights


def pooled(factor):
    convolutions = torchvision.models.alexnet().features
    prefix = "features."
    state = {key: tensor for key, tensor in imagenet_weights("alexnet").items() if key.startswith(prefix)}
    convolutions.load_state_dict({key.removeprefix(prefix): tensor for key, tensor in state.items()})
    return nn.Sequential(*convolutions[:2], nn.AvgPool2d(factor))


def by_2():
    return pooled(2)


def by_4():
    return pooled(4)


def by_8():
    return pooled(8)
