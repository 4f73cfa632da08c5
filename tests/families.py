"""Can a network of each family of timm and torchvision be inverted, at a shallow, a middle and a deep layer?

And does a dark square that moves in the image move what changes in the feature map?

python tests/families.py              60 families of timm, drawn with a seed, and all of torchvision
python tests/families.py --count 5    5 of timm

A family is a file of timm or torchvision; its network the one with the fewest parameters, with random
weights; the layers are a tenth, a half and nine tenths down the list of `models.py --encoder`.
"""

import random
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from encoders import build_network, layers_of
from flags import Parser
from models import build_inverter, count_parameters
from utils import UserError


def families_of_both(count):
    """{family: its networks} of `count` families of timm, drawn with a seed, and all of torchvision."""
    known = {family: timm.list_models(module=family) for family in timm.list_modules()}
    known = {family: [f"timm/{name}" for name in names] for family, names in known.items() if names}
    found = {family: known[family] for family in sorted(random.Random(0).sample(sorted(known), count))}
    for name in torchvision.models.list_models(module=torchvision.models):
        family = torchvision.models.get_model_builder(name).__module__
        found.setdefault(family, []).append(f"torchvision/{name}")
    return found


def smallest(names):
    """The network with the fewest parameters, of those that can be built without values if any can."""
    sizes = {}
    for name in names:
        with suppress(RuntimeError), torch.device("meta"):  # a tensor without values was asked for one
            sizes[name] = count_parameters(build_network(name))
    return min(sizes, key=sizes.get) if sizes else names[0]


def picture_of(encoder, layer, size=None):
    """The shape of an image's features at a layer, in which a square moves as in the image."""
    inverter = build_inverter(encoder, layer, "tconv", "random", input_size=size).eval()
    size = inverter.size
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = inverter.encode(image)
        picture = inverter.decode(features)
    assert picture.shape == image.shape and picture.std() > 0
    if features.shape[2] > 2:
        found = square_follows(inverter, image)
        if found < 0.85:  # where all positions see the whole image, one twice as large may show it
            with suppress(Exception):  # it takes no other size
                found = square_follows(inverter, F.interpolate(image, 2 * size))
        assert found > 0.85, f"a square moves otherwise ({found:.2f})"
    return tuple(features.shape[1:])


def square_follows(inverter, image):
    """The lesser of two correlations, of rows and of columns, of a square's place and the features' change.

    Half of the positions, those that change least, do not count.
    """
    places = [(row, column) for row in (0.1, 0.5, 0.9) for column in (0.1, 0.5, 0.9)]
    size = image.shape[2]
    images = image.repeat(1 + len(places), 1, 1, 1)
    for other, (row, column) in zip(images[1:], places, strict=True):
        top, left = (int(place * size - size / 10) for place in (row, column))
        other[:, top : top + size // 5, left : left + size // 5] = 0
    features = inverter.encode(images).double().numpy()
    change = np.abs(features[1:] - features[:1]).sum(1)  # (9, H, W)
    change = np.maximum(change - np.median(change, (1, 2), keepdims=True), 0)
    rows, columns = (np.arange(side) for side in change.shape[1:])
    centres = np.array([change.sum(2) @ rows, change.sum(1) @ columns]) / change.sum((1, 2))
    pairs = zip(centres, np.transpose(places), strict=True)
    return min(np.corrcoef(centre, place)[0, 1] for centre, place in pairs)


def three_layers(network):
    layers = list(layers_of(network))
    return [layers[int(part * len(layers))] for part in (0.1, 0.5, 0.9)]


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
    families = families_of_both(parser.parse_args().count)
    warnings.simplefilter("ignore")
    print("| family | network | layer | what it gives |\n| --- | --- | --- | --- |")
    results = []
    for family, names in tqdm(families.items(), unit="family", disable=None):
        network = smallest(names)
        listed, layers = outcome(three_layers, network)
        for layer in layers if listed else 3 * ["none"]:
            done, result = outcome(picture_of, network, layer) if listed else (False, layers)
            results.append((done, str(result)))
            print(f"| {family.rsplit('.', 1)[-1]} | {network} | {layer} | {result} |", flush=True)
    good = sum(done for done, _ in results)
    tracebacks = sum(result.startswith("TRACEBACK") for _, result in results)
    print(
        f"\n{good} of {len(results)} layers give features, a decoder and a picture; {tracebacks} tracebacks"
    )


if __name__ == "__main__":
    main()
