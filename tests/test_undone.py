"""docs/undone.py: AlexNet's features.9 are found again in features.10, which are linear in them."""

import re
import sys

import numpy as np
import pytest
import torch
from conftest import status
from scipy.optimize import nnls
from torch.nn.functional import conv2d

from docs import undone


def test_least_squares_are_scipys():
    """Of features that no such maps have, so that something is left over."""
    torch.manual_seed(0)
    weight, bias = torch.randn(3, 2, 3, 3), torch.randn(3)
    features = torch.randn(2, 3, 4, 5)
    units = torch.eye(2 * 4 * 5).reshape(-1, 2, 4, 5)
    matrix = conv2d(units, weight, padding=1).flatten(1).T.double().numpy()
    found = undone.undo(features, weight, bias, steps=3000)
    for image, x in zip(features, found, strict=True):
        wanted, left = nnls(matrix, (image - bias[:, None, None]).flatten().double().numpy())
        assert left > 1
        np.testing.assert_allclose(x.flatten(), wanted, atol=1e-3)


@pytest.mark.slow
def test_a_decoder_gets_what_it_was_trained_for(photos, run_train, tmp_path, monkeypatch, capsys):
    run = ["--data", photos, "--encoder", "alexnet", "--layer", "conv4", "--out", tmp_path, "--quiet"]
    assert (
        run_train(*run, "--decoder", "residual", "--width", 8, "--epochs", 1, "--lr", 1e-3, "--crop", 64) == 0
    )
    flags = [str(tmp_path / "best.pt"), "--data", str(photos), "--steps", "600"]
    monkeypatch.setattr(sys, "argv", ["undone.py", *flags])
    capsys.readouterr()
    assert status(undone.main) == 0
    images, error, own, found = re.search(
        r"(\d+) images: features.9 found to (\S+) of their norm, or nearer\n"
        r"PSNR from features.9 (\S+) dB, from those found (\S+) dB\n",
        capsys.readouterr().out,
    ).groups()
    assert int(images) == 3 and float(error) < 0.02
    assert abs(float(own) - float(found)) <= 0.02 and float(own) > 5


def test_a_decoder_of_another_layer(trained, monkeypatch, error_line):
    monkeypatch.setattr(sys, "argv", ["undone.py", str(trained / "best.pt")])
    assert status(undone.main) == 2
    wanted = "a decoder of vgg16 block1 imagenet documented, not of alexnet conv4 imagenet documented"
    assert error_line() == f"{trained / 'best.pt'}: {wanted}"
