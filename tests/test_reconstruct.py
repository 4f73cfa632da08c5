"""One's own pictures at their own size: padding, tiles without seams, and which decoders can."""

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from training import wake

import data
from data import to_pixels
from extras import own_pictures
from models import build_inverter, load_inverter
from report import pictures


def photograph(height, width):
    """A part of a photograph of scikit-image, (1, 3, height, width) in [0, 1]."""
    pixels = torch.tensor(skimage.data.coffee()[:height, :width])
    return pixels.permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("decoder", ["tconv", "residual", "feedback"])
def test_tiles_are_the_whole_without_seams(decoder):
    inverter = build_inverter(decoder=decoder, width=8).eval()
    wake(inverter.decoder)
    image = photograph(301, 423)  # neither is a multiple of the stride
    with torch.no_grad():
        whole = own_pictures.reconstruct_whole(inverter, image)
        tiles = own_pictures.reconstruct_whole(inverter, image, whole=0, tile=128)
    assert whole.shape == tiles.shape == image.shape
    assert (whole - tiles).abs().max() < 1e-3  # a quarter of a grey level
    assert whole.std() > 0.001


def test_own_pictures_keep_their_size_or_are_the_central_square(trained, tmp_path, run_evaluate):
    picture, wide = to_pixels(photograph(133, 201))[0], to_pixels(photograph(224, 448))[0]
    for name, pixels, *size in ("mine", picture), ("wide", wide, "--size", "224"):
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{name}.png")
        flags = ("--ckpt", trained / "best.pt", "--images", tmp_path / f"{name}.png", "--quiet")
        assert run_evaluate(*flags, *size, "--out", tmp_path) == 0
    files = [
        tmp_path / "images" / f"{name}.png" for name in (f"mine_{trained.name}", f"wide_{trained.name}_224")
    ]
    strip, small = (np.asarray(Image.open(file)) for file in files)
    np.testing.assert_array_equal(small[:224, :224], wide[:, 112:336])
    np.testing.assert_array_equal(strip[:133, :201], picture)
    inverter, _ = load_inverter(trained / "best.pt")
    with torch.no_grad():  # without the padded column and row: away from there it is the same
        inner = inverter(photograph(132, 200)).clamp(0, 1)
    np.testing.assert_allclose(strip[:110, 205:384], to_pixels(inner)[0][:110, :179], atol=1)


@pytest.mark.parametrize(
    ("encoder", "layer", "decoder", "native"),
    [
        ("resnet34", "layer2", "residual", True),
        ("alexnet", "conv1", "tconv", False),  # 27 positions of 8 pixels are not 224
        ("vit_small", "block0", "tconv", False),  # takes 224×224 alone
    ],
)
def test_which_take_a_picture_of_any_size(encoder, layer, decoder, native):
    inverter = build_inverter(encoder, layer, decoder, "random", width=8)
    assert own_pictures.takes_any_size(inverter, {"decoder": decoder}) is native


@pytest.fixture
def checkpoint_of(checkpoint, tmp_path):
    """Give the path of a checkpoint of such a decoder that is quick, and not trained."""

    def write(decoder):
        inverter = build_inverter(decoder=decoder, width=8)
        wake(inverter.decoder)
        config = checkpoint["config"] | {"decoder": decoder, "width": 8}
        path = tmp_path / "small" / "best.pt"
        path.parent.mkdir()
        torch.save(checkpoint | {"decoder": inverter.decoder.state_dict(), "config": config}, path)
        return path

    return write


def test_native_size_wants_a_local_decoder(checkpoint_of, tmp_path, run_evaluate, refused):
    picture = plain(tmp_path / "a.png", "red")
    flags = ("--ckpt", checkpoint_of("attention"), "--images", picture, "--size", "native")
    line = refused(run_evaluate, *flags)
    assert "--size native: not with small, which takes 224×224 pixels" in line
    assert "--size: only with --images" in refused(run_evaluate, "--ckpt", "best.pt", "--size", "224")


# --- files -----------------------------------------------------------------------------------------------


@pytest.fixture
def small(checkpoint_of):
    return checkpoint_of("feedback")


@pytest.fixture
def draw(small, run_evaluate):
    """Reconstruct pictures: the exit status."""
    return lambda *flags: run_evaluate("--ckpt", small, "--quiet", "--images", *flags)


@pytest.fixture
def colours(small):
    """Give {name: colour of the first pixel} of the strips, by Pillow."""
    strips = small.parent / "images"
    return lambda: {path.name: Image.open(path).convert("RGB").getpixel((0, 0)) for path in strips.iterdir()}


@pytest.fixture
def four(tmp_path):
    """The files of four pictures."""
    return [plain(tmp_path / f"{number}.png", "red") for number in range(4)]


def plain(path, colour, size=(20, 20)):
    Image.new("RGB", size, colour).save(path)
    return path


def test_strips_are_image_reconstruction_and_error(draw, small, tmp_path, capsys):
    """Of each kind of image, and written again without a word."""
    folder, out = tmp_path / "folder", small.parent / "images"
    folder.mkdir()
    Image.effect_mandelbrot((500, 90), (-2, -1, 1, 1), 20).convert("CMYK").save(tmp_path / "wide.jpg")
    Image.new("LA", (7, 300), (128, 40)).save(folder / "thin.png")
    assert draw(tmp_path / "wide.jpg", folder) == 0
    assert capsys.readouterr().out.count(" dB from small") == 2
    with Image.open(out / "wide_small.png") as picture:
        pixels = np.asarray(picture)[:90].astype(int)
    image, output, error = (pixels[:, left : left + 500] for left in (0, 504, 1008))  # 4 between them
    expected = np.sqrt(((image - output) ** 2).mean(2, keepdims=True)).clip(1, 80)
    np.testing.assert_allclose(
        error, np.broadcast_to(255 * np.log(expected) / np.log(80), error.shape), atol=0.6
    )
    with Image.open(out / "thin_small.png") as picture:
        assert picture.height > 300
    assert draw(tmp_path / "wide.jpg", folder) == 0


def test_unrelated_picture_is_never_replaced(draw, small, tmp_path, refused):
    """Neither a person's own images/cat_small.png, nor a damaged one, nor the strip of another cat.jpg."""
    photo, strip = plain(tmp_path / "cat.jpg", "blue"), small.parent / "images" / "cat_small.png"
    assert draw(photo) == 0
    whole, own = strip.read_bytes(), plain(tmp_path / "own.png", "red").read_bytes()
    for content in (own, b"no picture", whole[:30], whole):
        strip.write_bytes(content)
        if content == whole:
            plain(photo, "green")
        assert "cat_small.png: would be overwritten" in refused(draw, photo) and strip.read_bytes() == content


def test_what_this_program_drew_is_no_input(draw, tmp_path, refused):
    folder = tmp_path / "folder"
    folder.mkdir()
    plain(folder / "a.png", "red")
    assert draw(folder, "--out", folder) == 0
    pictures.draw_grid({"row": [(Image.open(folder / "a.png"), "a")]}, folder / "inversion.png")
    strip = (folder / "images" / "a_small.png").read_bytes()
    assert draw(folder, "--out", folder) == 0
    assert [path.read_bytes() for path in (folder / "images").iterdir()] == [strip]
    assert "no images of yours" in refused(draw, folder / "images")


def test_other_size_and_iterations_have_files_of_their_own(draw, small, tmp_path, capsys):
    plain(tmp_path / "a.jpg", "red", (40, 60))
    before = {}
    others = ((), ("--size", "224"), ("--iterations", "6"), ("--size", "224", "--iterations", "1"))
    for more, name in zip(others, ("", "_224", "_iterations-6", "_224_iterations-1"), strict=True):
        assert draw(tmp_path / "a.jpg", *more) == 0
        strip = small.parent / "images" / f"a_small{name}.png"
        assert str(strip) in capsys.readouterr().out
        before[strip] = strip.read_bytes()
        assert {path: path.read_bytes() for path in strip.parent.iterdir()} == before
    assert len(set(before.values())) == 4


def test_several_decoders_in_one_strip(draw, small, trained, tmp_path, capsys, run_evaluate):
    plain(tmp_path / "a.jpg", "red", (60, 40))
    checkpoints = ("--ckpt", small, trained / "best.pt")
    assert run_evaluate(*checkpoints, "--images", tmp_path / "a.jpg", "--thumbnails", "--quiet") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" dB from ")[1] for line in lines[:2]] == ["small", trained.name]
    strip = small.parent / "images" / f"a_small+{trained.name}.png"
    assert lines[2] == str(strip)
    assert Image.open(strip).height > 2 * 40
    assert draw(tmp_path / "a.jpg") == 0  # another decoder alone is not refused
    assert run_evaluate(*checkpoints, "--quiet") == 2
    assert run_evaluate(*checkpoints, "--images", tmp_path / "nowhere.jpg", "--quiet") == 2


def test_names_that_collide_are_told_apart(draw, colours, tmp_path):
    """Whatever the case, the kind of file, or what a number makes of a name."""
    given = {"a.bmp": (250, 0, 0), "A.png": (0, 250, 0), "a-1.png": (0, 0, 250), "b/a.png": (9, 9, 9)}
    (tmp_path / "b").mkdir()
    files = [plain(tmp_path / name, colour) for name, colour in given.items()]
    for _ in range(2):
        assert draw(*files, files[0]) == 0
        found = colours()
        assert len({name.lower() for name in found}) == 4
        assert sorted(found.values()) == sorted(given.values())


@pytest.mark.parametrize("name", ["é😀" * 41, "a." + "b" * 247], ids=["emoji", "dot"])
def test_names_as_long_as_can_be(draw, colours, tmp_path, name):
    picture = plain(tmp_path / f"{name}.png", (250, 0, 0))
    assert len(picture.name.encode()) > 245
    assert draw(picture) == draw(picture, "--size", "224") == 0
    strips = colours()
    assert len(strips) == 2 and all(strip[:50] == name[:50] for strip in strips)


def test_a_picture_that_fails_stops_no_other(draw, colours, four, refused, monkeypatch):
    four[1].write_text("no picture")
    real = Image.Image.save

    def save(picture, path, **options):
        if path.name.startswith(".2"):
            raise OSError(28, "No space left on device")
        real(picture, path, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    assert (
        "2 of 4 images failed" in (line := refused(draw, *four)) and "1.png" in line and "2_small.png" in line
    )
    assert sorted(colours()) == ["0_small.png", "3_small.png"]


def test_interrupted_it_leaves_what_is_done(draw, colours, four, monkeypatch):
    real = data.read_image

    def read_image(path):
        if path == four[2]:
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(data, "read_image", read_image)
    assert draw(*four) == 130
    assert sorted(colours()) == ["0_small.png", "1_small.png"]
