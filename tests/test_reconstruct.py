"""One's own pictures at their own size: padding, tiles without seams, and which decoders can."""

import time
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from training import wake

import data
import pictures
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
    small = np.asarray(Image.open(tmp_path / "small" / "images" / "wide-224.png"))
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


# --- files -----------------------------------------------------------------------------------------------


@pytest.fixture
def small(checkpoint, tmp_path):
    """The path of a checkpoint of a `feedback` decoder that is quick, and not trained."""
    inverter = build_inverter(decoder="feedback", width=8)
    wake(inverter.decoder)
    config = checkpoint["config"] | {"decoder": "feedback", "width": 8}
    path = tmp_path / "small" / "best.pt"
    path.parent.mkdir()
    torch.save(checkpoint | {"decoder": inverter.decoder.state_dict(), "config": config}, path)
    return path


def colours_of(folder):
    """{name: colour of the first pixel} of the strips in a folder, by Pillow."""
    return {path.name: Image.open(path).convert("RGB").getpixel((0, 0)) for path in folder.iterdir()}


def plain(path, colour, size=(20, 20)):
    Image.new("RGB", size, colour).save(path)
    return path


def test_what_this_program_drew_is_no_input(small, tmp_path, run_evaluate, error_line):
    folder = tmp_path / "folder"
    folder.mkdir()
    plain(folder / "a.png", "red")
    flags = ("--ckpt", small, "--images", folder, "--out", folder, "--quiet")
    assert run_evaluate(*flags) == 0
    pictures.draw_grid({"row": [(Image.open(folder / "a.png"), "a")]}, folder / "inversion.png")
    strip = (folder / "images" / "a.png").read_bytes()
    assert run_evaluate(*flags) == 0
    assert [path.name for path in (folder / "images").iterdir()] == ["a.png"]
    assert (folder / "images" / "a.png").read_bytes() == strip
    assert run_evaluate(*flags[:2], "--images", folder / "images") == 2
    assert "no images of yours" in error_line()


def test_other_size_and_iterations_have_files_of_their_own(small, tmp_path, run_evaluate, capsys):
    plain(tmp_path / "a.jpg", "red", (40, 60))
    flags = ("--ckpt", small, "--images", tmp_path / "a.jpg", "--quiet")
    before = {}
    others = ((), ("--size", "224"), ("--iterations", "6"), ("--size", "224", "--iterations", "1"))
    for more, name in zip(others, ("a", "a-224", "a-iterations-6", "a-224-iterations-1"), strict=True):
        assert run_evaluate(*flags, *more) == 0
        strip = small.parent / "images" / f"{name}.png"
        assert str(strip) in capsys.readouterr().out
        assert {path: path.read_bytes() for path in before} == before
        assert sorted(strip.parent.iterdir()) == sorted([*before, strip])
        before[strip] = strip.read_bytes()
    assert len(set(before.values())) == 4


def test_names_that_collide_are_told_apart(small, tmp_path, run_evaluate):
    """Whatever the case, the kind of file, or what a number makes of a name."""
    colours = {"a.bmp": (250, 0, 0), "A.png": (0, 250, 0), "a-1.png": (0, 0, 250), "b/a.png": (9, 9, 9)}
    (tmp_path / "b").mkdir()
    for name, colour in colours.items():
        plain(tmp_path / name, colour)
    files = [tmp_path / name for name in colours]
    flags = ("--ckpt", small, "--quiet", "--images", *files, files[0])  # the last again
    for _ in range(2):
        assert run_evaluate(*flags) == 0
        found = colours_of(small.parent / "images")
        assert len({name.lower() for name in found}) == 4
        assert sorted(found.values()) == sorted(colours.values())


def test_thousands_of_pictures_do_not_wait(small, tmp_path, run_evaluate, monkeypatch):
    files = [Path(f"folder{number}/IMG_{number // 2}.jpg") for number in range(20_000)]
    start = time.perf_counter()
    paths = reconstruct.strip_paths(files, tmp_path)
    assert time.perf_counter() - start < 2
    assert len(set(paths)) == 20_000
    read = []
    real = data.read_image

    def read_image(path):
        read.append(path)
        return real(path)

    monkeypatch.setattr(data, "read_image", read_image)
    files = [plain(tmp_path / f"{number}.png", "red") for number in range(3)]
    assert run_evaluate("--ckpt", small, "--quiet", "--images", *files) == 0
    assert read == files


@pytest.mark.parametrize(
    "name", ["a" * 251, "猫" * 83, "é😀" * 41, "a." + "b" * 247], ids=["Latin", "CJK", "emoji", "dot"]
)
def test_names_as_long_as_can_be(small, tmp_path, run_evaluate, name):
    first, last = plain(tmp_path / f"{name}.png", (250, 0, 0)), plain(tmp_path / "z.png", (0, 0, 250))
    assert len(first.name.encode()) > 245
    assert run_evaluate("--ckpt", small, "--quiet", "--images", first, last) == 0
    found = colours_of(small.parent / "images")
    assert found.pop("z.png") == (0, 0, 250)
    ((strip, colour),) = found.items()
    assert colour == (250, 0, 0) and name.startswith(strip.removesuffix(".png")) and len(strip) > 50
    assert run_evaluate("--ckpt", small, "--quiet", "--size", "224", "--images", first, last) == 0
    assert len(colours_of(small.parent / "images")) == 4


def test_a_picture_that_fails_stops_no_other(small, tmp_path, run_evaluate, error_line, monkeypatch):
    files = [plain(tmp_path / f"{number}.png", "red") for number in range(4)]
    files[1].write_text("no picture")
    real = Image.Image.save

    def save(picture, path, **options):
        if path.name.startswith(".2"):
            raise OSError(28, "No space left on device")
        real(picture, path, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    assert run_evaluate("--ckpt", small, "--quiet", "--images", *files) == 2
    assert "2 of 4 pictures failed" in (line := error_line()) and "1.png" in line and "2.png" in line
    assert sorted(colours_of(small.parent / "images")) == ["0.png", "3.png"]


def test_interrupted_it_leaves_what_is_done(small, tmp_path, run_evaluate, monkeypatch):
    files = [plain(tmp_path / f"{number}.png", "red") for number in range(3)]
    real, calls = data.read_image, []

    def read_image(path):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(data, "read_image", read_image)
    assert run_evaluate("--ckpt", small, "--quiet", "--images", *files) == 130
    assert sorted(colours_of(small.parent / "images")) == ["0.png", "1.png"]
