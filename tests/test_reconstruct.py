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
    files = [tmp_path / "images" / name for name in ("mine.png", "wide-224.png")]
    strip, small = (np.asarray(Image.open(file)) for file in files)
    assert small.shape == (224, 3 * 224, 3) and strip.shape == (133, 3 * 201, 3)
    np.testing.assert_array_equal(small[:, :224], wide[:, 112:336])
    np.testing.assert_array_equal(strip[:, :201], picture)
    inverter, _ = load_inverter(trained / "best.pt")
    with torch.no_grad():  # without the padded column and row: away from there it is the same
        inner = inverter(photograph(132, 200)).clamp(0, 1)
    np.testing.assert_allclose(strip[:110, 201:380], to_pixels(inner)[0][:110, :179], atol=1)


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
    flags = ("--ckpt", checkpoint_of("attention"), "--images", tmp_path, "--size", "native")
    assert "--size native: not with vgg16 block1 and attention" in refused(run_evaluate, *flags)
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


def test_strips_are_original_reconstruction_and_difference(draw, small, tmp_path, capsys):
    """Of each kind of image, and written again without a word."""
    folder, out = tmp_path / "folder", small.parent / "images"
    folder.mkdir()
    Image.effect_mandelbrot((500, 90), (-2, -1, 1, 1), 20).convert("CMYK").save(tmp_path / "wide.jpg")
    Image.new("LA", (7, 300), (128, 40)).save(folder / "thin.png")
    assert draw(tmp_path / "wide.jpg", folder) == 0
    assert capsys.readouterr().out.count(" dB, ") == 2
    for name, size in {"wide.png": (500, 90), "thin.png": (7, 300)}.items():
        with Image.open(out / name) as picture:
            original, output, difference = np.split(np.asarray(picture).astype(int), 3, axis=1)
        assert original.shape[1::-1] == size
        assert np.array_equal(difference, (5 * np.abs(original - output)).clip(0, 255))
    assert draw(tmp_path / "wide.jpg", folder) == 0


def test_unrelated_picture_is_never_replaced(draw, small, tmp_path, refused):
    """Neither a person's own images/cat.png, nor one that is damaged, nor the strip of another cat.jpg."""
    photo, strip = plain(tmp_path / "cat.jpg", "blue"), small.parent / "images" / "cat.png"
    assert draw(photo) == 0
    whole, own = strip.read_bytes(), plain(tmp_path / "own.png", "red").read_bytes()
    for content in (own, b"no picture", whole[:30], whole):
        strip.write_bytes(content)
        if content == whole:
            plain(photo, "green")
        assert "cat.png: would be overwritten" in refused(draw, photo) and strip.read_bytes() == content


def test_what_this_program_drew_is_no_input(draw, tmp_path, refused):
    folder = tmp_path / "folder"
    folder.mkdir()
    plain(folder / "a.png", "red")
    assert draw(folder, "--out", folder) == 0
    pictures.draw_grid({"row": [(Image.open(folder / "a.png"), "a")]}, folder / "inversion.png")
    strip = (folder / "images" / "a.png").read_bytes()
    assert draw(folder, "--out", folder) == 0
    assert [path.read_bytes() for path in (folder / "images").iterdir()] == [strip]
    assert "no images of yours" in refused(draw, folder / "images")


def test_other_size_and_iterations_have_files_of_their_own(draw, small, tmp_path, capsys):
    plain(tmp_path / "a.jpg", "red", (40, 60))
    before = {}
    others = ((), ("--size", "224"), ("--iterations", "6"), ("--size", "224", "--iterations", "1"))
    for more, name in zip(others, ("a", "a-224", "a-iterations-6", "a-224-iterations-1"), strict=True):
        assert draw(tmp_path / "a.jpg", *more) == 0
        strip = small.parent / "images" / f"{name}.png"
        assert str(strip) in capsys.readouterr().out
        before[strip] = strip.read_bytes()
        assert {path: path.read_bytes() for path in strip.parent.iterdir()} == before
    assert len(set(before.values())) == 4


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
    assert "2 of 4 images failed" in (line := refused(draw, *four)) and "1.png" in line and "2.png" in line
    assert sorted(colours()) == ["0.png", "3.png"]


def test_interrupted_it_leaves_what_is_done(draw, colours, four, monkeypatch):
    real = data.read_image

    def read_image(path):
        if path == four[2]:
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(data, "read_image", read_image)
    assert draw(*four) == 130
    assert sorted(colours()) == ["0.png", "1.png"]
