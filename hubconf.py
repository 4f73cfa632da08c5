"""For torch.hub: decoders that are ready to use, and any other, each with its encoder.

inverter = torch.hub.load("/path/to/this/repository", "vgg16_block1", source="local")
reconstruction = inverter(images)  # images: (B, 3, 224, 224) in [0, 1]
"""

dependencies = ["torch", "torchvision", "timm", "lpips", "skimage", "yaml"]

import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # torch.hub's own ends with the call

from models import build_inverter, load_inverter


def inverter(*args, **options):
    """models.build_inverter: an Inverter with an untrained decoder, for any encoder and layer."""
    return build_inverter(*args, **options)


def pretrained(path):
    """The Inverter of a best.pt, on the CPU, in eval mode."""
    return load_inverter(path)[0]


for file in sorted((HERE / "pretrained").glob("*.pt")):  # vgg16_block1 and so on
    globals()[file.stem] = partial(pretrained, file)
