"""Can a network of each family of timm and torchvision be inverted, at a shallow, a middle and a deep layer?

python tests/families.py              60 families of timm, drawn with a seed, and all of torchvision
python tests/families.py --count 5    5 of timm

A family is a file of timm or torchvision; its network the one with the fewest parameters, with random
weights; the layers are a tenth, a half and nine tenths down the list of `models.py --encoder`.
"""

import random
import sys
import warnings
from pathlib import Path

import timm
import torch
import torchvision
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from encoders import layers_of
from flags import Parser
from models import build_inverter, count_parameters
from networks import build_network
from utils import UserError


def families_of_timm(count):
    """{family: names of its networks} of `count` families, drawn with a seed before any is looked at."""
    found = {family: timm.list_models(module=family) for family in timm.list_modules()}
    found = {family: [f"timm/{name}" for name in names] for family, names in found.items() if names}
    return {family: found[family] for family in sorted(random.Random(0).sample(sorted(found), count))}


def families_of_torchvision():
    found = {}
    for name in torchvision.models.list_models(module=torchvision.models):
        family = torchvision.models.get_model_builder(name).__module__.rsplit(".", 1)[1]
        found.setdefault(family, []).append(f"torchvision/{name}")
    return found


def smallest(names):
    """The network with the fewest parameters, of those that can be built without values if any can."""
    sizes = {}
    for name in names:
        try:
            with torch.device("meta"):
                sizes[name] = count_parameters(build_network(name))
        except RuntimeError:  # a tensor without values was asked for one
            continue
    return min(sizes, key=sizes.get) if sizes else names[0]


def three_of(layers):
    """A shallow, a middle and a deep one of a list."""
    return [layers[int(part * len(layers))] for part in (0.1, 0.5, 0.9)]


def picture_of(encoder, layer):
    """The shape of the features of an image at a layer, and of the image that a decoder makes of them."""
    inverter = build_inverter(encoder, layer, "tconv", "random").eval()
    with torch.no_grad():
        features = inverter.encode(torch.rand(1, 3, inverter.size, inverter.size))
        picture = inverter.decode(features)
    assert picture.shape == (1, 3, inverter.size, inverter.size) and picture.std() > 0
    return tuple(features.shape[1:])


def outcome(call, *args):
    """(whether it did what it should, what it gave or the line that it ended in)"""
    try:
        return True, call(*args)
    except UserError as error:
        return False, f"error: {error}"
    except Exception as error:
        return False, f"TRACEBACK {type(error).__name__}: {error}".splitlines()[0]


def main():
    parser = Parser(__doc__)
    parser.add_argument("--count", type=int, default=60, help="families of timm")
    count = parser.parse_args().count
    warnings.simplefilter("ignore")
    families = list(families_of_timm(count).items()) + list(families_of_torchvision().items())
    print("| family | network | layer | what it gives |")
    print("| --- | --- | --- | --- |")
    good, lines, tracebacks = 0, 0, 0
    for family, names in tqdm(families, unit="family", disable=None):
        network = smallest(names)
        listed, layers = outcome(lambda name: three_of(list(layers_of(name))), network)
        for layer in layers if listed else ["none"]:
            done, result = outcome(picture_of, network, layer) if listed else (False, layers)
            good += done
            lines += 1 if listed else 3
            tracebacks += not done and result.startswith("TRACEBACK")
            shown = " × ".join(map(str, result)) if done else result
            print(f"| {family} | {network} | {layer} | {shown} |", flush=True)
    print(f"\n{good} of {lines} layers give features, a decoder and a picture; {tracebacks} tracebacks")


if __name__ == "__main__":
    main()
