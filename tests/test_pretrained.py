"""The decoders in pretrained/: what they are, and that they still do what their figures say."""

import json

import pytest
from conftest import REPOSITORY

from data import load_split
from evaluate import evaluate_model
from models import load_inverter
from utils import load

FOLDER = REPOSITORY / "pretrained"
NAMES = [path.stem for path in sorted(FOLDER.glob("*.pt"))]


def figures(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def test_they_are_small_and_each_has_its_figures():
    assert {f"vgg16_block{i}" for i in range(1, 6)} | {f"alexnet_conv{i}" for i in (1, 3, 5)} == set(NAMES)
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) <= 12e6
    assert [path.stem for path in sorted(FOLDER.glob("*.json"))] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_their_figures_are_of_the_same_training(name):
    config = load(FOLDER / f"{name}.pt")["config"]
    assert config["crop"]
    assert figures(name)["config"] == config


@pytest.mark.parametrize("name", NAMES)
def test_photographs_that_training_never_saw(name):
    """Four tiles of scikit-image's: at most 3 dB below what the 100 test images have."""
    inverter, _ = load_inverter(FOLDER / f"{name}.pt")
    found = evaluate_model(inverter, load_split("sample", "test")[::4])
    assert found.values["psnr"].mean() > figures(name)["psnr"]["mean"] - 3
