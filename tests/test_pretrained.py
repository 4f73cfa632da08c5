"""The decoders in pretrained/: what they are, and that they still do what their figures say."""

import json

import pytest
from conftest import REPOSITORY

from data import load_split
from evaluate import evaluate_model
from models import load_inverter

FOLDER = REPOSITORY / "pretrained"
NAMES = [*(f"vgg16_block{i}" for i in range(1, 6)), *(f"alexnet_conv{i}" for i in (1, 3, 5))]


def test_they_are_small_and_each_has_its_figures():
    for suffix in ("pt", "json"):
        assert {path.stem for path in FOLDER.glob(f"*.{suffix}")} == set(NAMES)
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) <= 12e6


@pytest.mark.parametrize("name", NAMES)
def test_photographs_that_training_never_saw(name):
    """Four tiles of scikit-image's: at most 3 dB below what the 100 test images have."""
    figures = json.loads((FOLDER / f"{name}.json").read_text())
    inverter, checkpoint = load_inverter(FOLDER / f"{name}.pt")
    assert checkpoint["config"] == checkpoint["config"] | figures["config"]  # of the same training
    found = evaluate_model(inverter, load_split("sample", "test")[::4])
    assert found.values["psnr"].mean() > figures["psnr"]["mean"] - 3
