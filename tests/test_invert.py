"""Inversion by optimisation: that it finds the picture, what it reports, and its mistakes."""

import shutil

import numpy as np
import pytest
import skimage.data
import torch
from conftest import read_csv, read_json
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

import data
import invert
from encoders import Encoder
from metrics import psnr
from models import load_inverter
from report import inversion, results

FEW = ("--count", 1, "--steps", 2, "--quiet")


@pytest.fixture(scope="module")
def encoder():
    return Encoder("vgg16", "block1")


@pytest.fixture(scope="module")
def pixels(photos):
    return data.load_split(str(photos), "test")[:]


@pytest.fixture
def optimise(run_invert, tmp_path):
    """Run invert.py on the first layer of AlexNet, or another of --layer, for a step: the exit status."""
    short = ("--encoder", "alexnet", "--out", tmp_path, "--steps", 1, "--quiet")
    return lambda *flags: run_invert(*short, *flags)


def content_of(folder):
    return read_json(folder / "inversion.json")


def rows_of(folder):
    return {row["image"]: row for row in read_csv(folder / "inversion.csv")}


def test_finds_the_picture_from_a_blurred_one_and_from_noise(encoder, pixels):
    image = data.center_crops(pixels[:1])[:, :, 64:128, 64:128]
    blurred = torch.nn.functional.avg_pool2d(image, 5, 1, 2, count_include_pad=False)
    grey = invert.noise(image, 0)
    for start, lr, gain in ((blurred, 0.05, 3), (grey, 0.1, 12)):
        found = invert.invert(encoder, encoder(image), start, steps=80, lr=lr, bars=True)
        assert found.min() >= 0 and found.max() <= 1 and not found.requires_grad
        assert psnr(found, image).item() > psnr(start, image).item() + gain


def test_an_image_is_inverted_by_itself_whatever_the_batch(encoder, pixels):
    images = data.center_crops(pixels[:2])[:, :, :32, :32]
    start = invert.noise(images, 0)
    both = invert.invert(encoder, encoder(images), start, steps=5, bars=True)
    alone = invert.invert(encoder, encoder(images[1:]), start[1:], steps=5, bars=True)
    assert torch.equal(start[1:], invert.noise(images[1:], 1)) and not torch.equal(start[0], start[1])
    assert torch.allclose(both[1:], alone, atol=1e-4)


def test_the_prior_leaves_no_blur_in_the_end(encoder, pixels):
    """A prior of constant weight, ten times the default, ends at 37 dB from the picture itself."""
    image = data.center_crops(pixels[:1])[:, :, 64:128, 64:128]
    options = {"steps": 60, "lr": 0.02, "bars": True}
    found = invert.invert(encoder, encoder(image), image, tv_weight=10, **options)
    assert 38.5 < psnr(found, image).item() < 60


def test_total_variation_by_hand():
    image = torch.zeros(1, 3, 2, 2)
    image[0, :, 0, 0] = 0.5  # one of two horizontal neighbours differs by 0.5, and one of two vertical ones
    assert invert.total_variation(image).tolist() == [0.25]


def test_from_a_checkpoint(trained, checkpoint, photos, tmp_path, run_invert, encoder, pixels, capsys):
    flags = ("--ckpt", trained / "best.pt", "--count", 1, "--steps", 12, "--out", tmp_path, "--quiet")
    assert run_invert(*flags) == 0
    screen = capsys.readouterr().out
    found = content_of(tmp_path)
    start, inversion = found["metrics"]["start"], found["metrics"]["inversion"]
    assert (found["start"], found["images"], found["steps"], found["data"]) == ("tconv", 1, 12, str(photos))
    assert (found["lr"], found["tv_weight"]) == (0.02, 0.3)
    image = data.center_crops(pixels[:1])
    features = encoder(image)
    with torch.no_grad():
        output = load_inverter(trained / "best.pt")[0].decoder(features)
    assert start["psnr"]["mean"] == pytest.approx(psnr(output, image).item(), abs=1e-3)
    error = (encoder(output) - features).norm().item() / found["mean_pairwise_distance"]
    assert start["feature_error"]["mean"] == pytest.approx(error, rel=1e-3)
    assert inversion["feature_error"]["mean"] < start["feature_error"]["mean"]
    metrics = {"data": str(photos), "config": checkpoint["config"]}
    note = f"inverted: {inversion['psnr']['mean']:.2f} dB from {start['psnr']['mean']:.2f}"
    assert note in results.inversion(tmp_path, metrics)
    assert results.inversion(tmp_path, metrics | {"config": checkpoint["config"] | {"layer": "block2"}}) == ""
    assert f"{inversion['psnr']['mean']:.4f}" in screen and "feature error" in screen
    assert float(rows_of(tmp_path)["00.jpg"]["inversion_psnr"]) == inversion["psnr"]["mean"]
    with Image.open(tmp_path / "inversion.png") as picture:
        assert picture.height > 500
    (tmp_path / "inversion.json").write_text("[")
    assert "invert again" in results.inversion(tmp_path, metrics)


def test_results_are_of_a_checkpoint_wherever_it_lies(
    trained, checkpoint, tmp_path, monkeypatch, run_invert, error_line
):
    """Moved with its folder it is the same; another's results are not replaced, old ones not drawn."""
    run = shutil.copytree(trained, tmp_path / "run")
    assert run_invert("--ckpt", run / "best.pt", *FEW) == 0
    moved = run.rename(tmp_path / "moved")
    monkeypatch.chdir(moved)
    assert run_invert("--ckpt", "best.pt", *FEW) == 0
    assert run_invert("--course", moved, "--out", tmp_path) == 0
    torch.save(checkpoint | {"epoch": 9}, tmp_path / "best.pt")
    shutil.copytree(moved, tmp_path / "results").joinpath("best.pt").unlink()
    assert run_invert("--ckpt", tmp_path / "best.pt", "--out", tmp_path / "results", *FEW) == 2
    assert "is the result of another ckpt" in error_line()
    shutil.copy(tmp_path / "best.pt", moved)
    assert run_invert("--course", moved, "--out", tmp_path) == 2
    assert error_line() == f"{moved / 'inversion.json'} is of an earlier best.pt; invert again"


def test_courses_are_drawn(trained, tmp_path, run_invert, error_line, figures_of):
    flags = ("--ckpt", trained / "best.pt", "--count", 2, "--steps", 4, "--quiet", "--out", tmp_path / "a")
    assert run_invert(*flags) == 0
    found = content_of(tmp_path / "a")
    course = found["course"]
    assert course["step"] == [0, 1, 2, 3, 4] and course["seconds"] == sorted(course["seconds"])
    for moment, kind in ((0, "start"), (-1, "inversion")):
        assert course["psnr"][moment] == pytest.approx(found["metrics"][kind]["psnr"]["mean"], abs=1e-3)
    figures = figures_of(inversion)
    assert run_invert("--course", tmp_path / "a", "--out", tmp_path) == 0
    (line,) = figures[0].axes[0].lines
    assert list(line.get_xdata()) == course["seconds"] and list(line.get_ydata()) == course["psnr"]
    assert line.get_label() == "vgg16 block1 from tconv" and (tmp_path / "course.png").exists()


def test_what_has_no_course(tmp_path, run_invert, refused):
    for message in ("has no inversion.json; invert it first", "not a result of this invert.py"):
        assert message in refused(run_invert, "--course", tmp_path)
        (tmp_path / "inversion.json").write_text("[")


def test_validation_images_to_choose_by(photos, tmp_path, run_invert, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_invert("--encoder", "alexnet", "--data", photos, "--split", "val", *FEW) == 0
    names = data.load_split(str(photos), "val").names
    assert list(rows_of(tmp_path / "runs/noise_alexnet_conv1/val")) == names[:1]


def test_from_noise_and_random_weights(photos, tmp_path, optimise, refused):
    flags = ("--layer", "conv2", "--weights", "random", "--data", photos, "--count", 1)
    assert optimise(*flags) == 0
    found = content_of(tmp_path)
    assert found["lr"] == 0.03
    assert found["tv_weight"] == pytest.approx((224 / 13 / 2) ** 2)  # 13 × 13 positions
    names = ("encoder", "layer", "weights", "start")
    assert [found[name] for name in names] == ["alexnet", "conv2", "random", "noise"]
    for other, kind in (("--layer", "conv1"), "layer"), (("--split", "val"), "split"):
        assert f"is the result of another {kind}" in refused(optimise, *flags, *other)
        assert content_of(tmp_path) == found


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layer", "block2", "--ckpt", "best.pt"], "--layer: only with --encoder and without --ckpt"),
        (["--encoder", "vgg16", "--layer", "conv1"], "not a layer of vgg16"),
        (["--encoder", "vgg19"], "--encoder vgg19: not an encoder"),
        (["--encoder", "torchvision/vgg19"], "give a --layer"),
        (["--steps", "0"], "--steps: 0 is not positive"),
        (["--images", "a.jpg"], "--images a.jpg: no such file or folder"),
        (["--images", "a.jpg", "--data", "sample"], "--data: not with --images"),
        (["--images", "a.jpg", "--count", "2"], "--count: not with --images"),
        (["--course", "a", "--images", "a.jpg"], "--images: not with --course"),
    ],
)
def test_mistakes(flags, message, run_invert, refused):
    assert message in refused(run_invert, *flags)


@pytest.mark.parametrize("kind", ["one", "three that are the same"])
def test_feature_error_of_one_image_is_relative_to_its_features(own_photos, tmp_path, optimise, kind, capsys):
    first, *others = sorted((own_photos / "test").iterdir())
    for file in others:
        file.unlink()
        if kind != "one":
            shutil.copy(first, file)
    assert optimise("--data", own_photos) == 0
    assert "relative to ‖φ‖" in capsys.readouterr().out
    image = data.center_crops(data.load_split(str(own_photos), "test")[:1])
    encoder = Encoder("alexnet", "conv1")
    features, grey = (encoder(images).double().numpy() for images in (image, invert.noise(image, 0)))
    norm = np.linalg.norm(features.ravel())
    assert content_of(tmp_path)["feature_norm"] == pytest.approx(norm, rel=1e-5)
    error = np.linalg.norm((grey - features).ravel()) / norm
    assert float(rows_of(tmp_path)["00.jpg"]["start_feature_error"]) == pytest.approx(error, rel=1e-4)


def test_a_checkpoint_that_was_trained_as_published(checkpoint, tmp_path, run_invert, refused):
    config = checkpoint["config"] | {"protocol": "published"}
    torch.save(checkpoint | {"config": config}, tmp_path / "best.pt")
    assert "trained as published" in refused(run_invert, "--ckpt", tmp_path / "best.pt")


def test_own_pictures(checkpoint, tmp_path, run_invert, refused, capsys):
    """From a checkpoint whose data is not there any more; the central square, by hand, of what is 2 : 1."""
    config = checkpoint["config"] | {"data": str(tmp_path / "gone")}
    torch.save(checkpoint | {"config": config}, tmp_path / "best.pt")
    wide = skimage.data.coffee()[:224, :448]
    folder, red, own = tmp_path / "folder", tmp_path / "red.jpg", tmp_path / "own"
    folder.mkdir()
    Image.fromarray(wide).save(folder / "wide.png")
    Image.new("RGB", (30, 50), "red").save(red)
    flags = ("--ckpt", tmp_path / "best.pt", "--steps", 2, "--quiet", "--images")
    assert run_invert(*flags, folder, red) == 0
    assert f"results in {own}" in capsys.readouterr().out
    rows = rows_of(own)
    assert list(rows) == [str(folder / "wide.png"), str(red)]
    image = torch.tensor(wide[:, 112:336]).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        output = load_inverter(tmp_path / "best.pt")[0](image).clamp(0, 1)
    expected = peak_signal_noise_ratio(image[0].numpy(), output[0].numpy(), data_range=1)
    assert float(rows[str(folder / "wide.png")]["start_psnr"]) == pytest.approx(expected, abs=1e-3)
    found = content_of(own)
    assert (found["images"], found["split"], found["start"]) == (2, "own", "tconv")
    Image.new("RGB", (30, 50), "blue").save(red)
    assert "is the result of another pictures" in refused(run_invert, *flags, folder, red)
    assert content_of(own) == found


def test_one_picture_of_ones_own_from_noise(tmp_path, run_invert, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(skimage.data.coffee()).save("my.jpg")
    assert run_invert("--encoder", "alexnet", "--images", "my.jpg", "--steps", 1, "--quiet") == 0
    found = content_of(tmp_path / "runs/noise_alexnet_conv1/own")
    assert (found["images"], found["start"]) == (1, "noise") and found["feature_norm"] > 0


def test_what_is_no_picture_any_more_is_one_line(photos, tmp_path, optimise, refused):
    line = refused(optimise, "--data", photos, "--count", 1, "--steps", 3, "--lr", 1e30)
    assert "not finite" in line and "--lr" in line
    assert not list(tmp_path.glob("inversion*"))


def test_images_too_small_for_lpips_are_refused_first(own, photos, optimise, refused, monkeypatch):
    monkeypatch.setattr(invert, "invert_images", None)
    flags = ("--encoder", f"{own}:build", "--layer", "first.0", "--data", photos)
    assert "--input-size 28: LPIPS needs at least 31 pixels" in refused(optimise, *flags, "--input-size", 28)
