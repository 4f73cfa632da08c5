"""One's own pictures at their own size: padding, tiles without seams, and which decoders can."""

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from training import wake

import reconstruct
from models import build_inverter, load_inverter
from pictures import to_pixels


def photograph(height, width):
    """A part of a photograph of scikit-image, (1, 3, height, width) in [0, 1]."""
    pixels = torch.tensor(skimage.data.coffee()[:height, :width])
    return pixels.permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("decoder", ["tconv", "residual", "feedback"])
def test_tiles_are_the_whole_without_seams(decoder):
    inverter = build_inverter(decoder=decoder, width=16).eval()
    wake(inverter.decoder)
    image = photograph(301, 423)  # neither is a multiple of the stride
    with torch.no_grad():
        whole = reconstruct.reconstruct_whole(inverter, image)
        tiles = reconstruct.reconstruct_whole(inverter, image, whole=0, tile=128)
    assert whole.shape == tiles.shape == image.shape
    assert (whole - tiles).abs().max() < 1e-3  # a quarter of a grey level
    assert whole.std() > 0.001


def test_padding_by_reflection_is_numpys():
    image = photograph(45, 7)
    padded = reconstruct.pad_to_multiple(image, 32)
    expected = np.pad(image.numpy(), ((0, 0), (0, 0), (0, 19), (0, 25)), "reflect")
    np.testing.assert_array_equal(padded, expected)
    assert reconstruct.pad_to_multiple(photograph(1, 64), 16).shape == (1, 3, 16, 64)


def test_reach_is_what_a_pixel_depends_on():
    """Two convolutions and a pool of block1, the transposed and the last convolution: at most 7 pixels."""
    inverter = build_inverter().eval()
    assert reconstruct.reach(inverter) in (4, 6, 8)


def test_own_pictures_keep_their_size(trained, tmp_path, run_evaluate, capsys):
    picture = to_pixels(photograph(133, 201))[0]
    Image.fromarray(picture.numpy()).save(tmp_path / "mine.png")
    flags = ("--ckpt", trained / "best.pt", "--images", tmp_path / "mine.png", "--quiet")
    assert run_evaluate(*flags, "--out", tmp_path / "native") == 0
    wide = to_pixels(photograph(224, 448))[0]
    Image.fromarray(wide.numpy()).save(tmp_path / "wide.png")
    square = ("--images", tmp_path / "wide.png", "--size", "224", "--out", tmp_path / "small", "--quiet")
    assert run_evaluate("--ckpt", trained / "best.pt", *square) == 0
    small = np.asarray(Image.open(tmp_path / "small" / "images" / "wide.png"))
    assert small.shape == (224, 3 * 224, 3)
    np.testing.assert_array_equal(small[:, :224], wide[:, 112:336])
    strip = np.asarray(Image.open(tmp_path / "native" / "images" / "mine.png"))
    assert strip.shape == (133, 3 * 201, 3)
    np.testing.assert_array_equal(strip[:, :201], picture)
    inverter, _ = load_inverter(trained / "best.pt")
    with torch.no_grad():  # without the padded column and row: away from there it is the same
        inner = inverter(photograph(132, 200)).clamp(0, 1)
    np.testing.assert_allclose(strip[:110, 201:380], to_pixels(inner)[0][:110, :179], atol=1)


@pytest.mark.parametrize(
    ("encoder", "layer", "decoder", "native"),
    [
        ("vgg16", "block5", "residual", True),
        ("resnet34", "layer2", "tconv", True),
        ("alexnet", "conv1", "tconv", False),  # 27 positions of 8 pixels are not 224
        ("vit_small", "block0", "tconv", False),  # takes 224×224 alone
        ("vgg16", "block1", "attention", False),
    ],
)
def test_which_take_a_picture_of_any_size(encoder, layer, decoder, native):
    inverter = build_inverter(encoder, layer, decoder, "random", width=8)
    assert reconstruct.takes_any_size(inverter, {"decoder": decoder}) is native


def test_native_size_wants_a_local_decoder(trained, checkpoint, tmp_path, run_evaluate, error_line):
    Image.fromarray(skimage.data.coffee()).save(tmp_path / "mine.png")
    flags = ("--images", tmp_path / "mine.png", "--size", "native")
    inverter = build_inverter(decoder="attention", width=8)
    config = checkpoint["config"] | {"decoder": "attention", "width": 8}
    content = checkpoint | {"decoder": inverter.decoder.state_dict(), "config": config}
    torch.save(content, tmp_path / "best.pt")
    assert run_evaluate("--ckpt", tmp_path / "best.pt", *flags) == 2
    assert "--size native: not with vgg16 block1 and attention" in error_line()
    assert run_evaluate("--ckpt", trained / "best.pt", "--size", "224") == 2
    assert "--size: only with --images" in error_line()
