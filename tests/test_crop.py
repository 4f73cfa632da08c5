"""Cheap training: small crops, several passes an epoch, crops encoded once, and the tuned `fast:` values."""

import errno
import math
import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY
from kill_resume import read_run
from PIL import Image
from training import batches_of, parse, parts_of, train_epoch, validate

import data
import kept
from decoders import AttentionDecoder
from encoders import Encoder, weights_key
from kept import keep_crops
from prepare import check_crop
from study import DEFINING, PUBLISHED, PUBLISHED_CODE
from utils import UserError


@pytest.fixture
def encoded(monkeypatch):
    """The number of images and their side, of every pass through an encoder."""
    sizes = []
    real = Encoder.forward

    def forward(self, images):
        sizes.append((len(images), images.shape[2], images.shape[3]))
        return real(self, images)

    monkeypatch.setattr(Encoder, "forward", forward)
    return sizes


# --- --crop and --passes -------------------------------------------------------------------------------


def test_crops_are_encoded_as_such_and_validation_is_not(photos, tmp_path, run_train, encoded):
    flags = ["--data", photos, "--out", tmp_path, "--crop", 64, "--batch-size", 4, "--epochs", 1, "--quiet"]
    assert run_train(*flags, "--tracker", "none", "--passes", 3, "--no-graphs") == 0
    # whether the crop is possible, three passes of two steps, the validation
    assert encoded == [(1, 64, 64)] + 6 * [(4, 64, 64)] + [(2, 224, 224)]


def test_an_epoch_of_two_passes_draws_what_two_epochs_draw(photos):
    parts = parts_of(photos, "--crop", 32)
    expected = []
    for parts.state.epoch in (2, 3):
        expected += [crops for crops, _ in batches_of(parts)]
    parts = parts_of(photos, "--crop", 32, "--passes", 2)
    parts.state.epoch = 1
    found = [crops for crops, _ in batches_of(parts)]
    assert len(found) == 4 and all(map(torch.equal, found, expected))
    parts.state.step = 3  # resumed in the second pass
    assert torch.equal(next(batches_of(parts))[0], expected[3])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--crop", 51], "vgg16 block1 has a stride of 2 pixels; give a multiple of it"),
        (["--layer", "block5", "--crop", 48], "vgg16 block5 has a stride of 32 pixels"),
        (["--crop", 30], "LPIPS wants at least 31 pixels"),
        (["--crop", 288], "images are 256 pixels wide; at most that"),
        (["--encoder", "alexnet", "--layer", "conv5", "--crop", 32], "alexnet conv5 takes no such image"),
        (
            ["--encoder", "vit_small", "--layer", "block0", "--weights", "random", "--crop", 64],
            "no such image",
        ),
        (
            ["--layer", "block5", "--decoder", "attention", "--width", 8, "--crop", 32, "--batch-size", 7],
            "the last of 8 images, by itself, has one position of vgg16 block5",
        ),
        (["--crop", 0], "0 is not positive"),
    ],
)
def test_impossible_crops_are_refused_before_training(
    photos, tmp_path, run_train, error_line, flags, message
):
    assert run_train("--data", photos, "--out", tmp_path, *flags) == 2
    assert message in error_line()
    assert not (tmp_path / "last.pt").exists()


def test_batches_of_one_in_several_processes_are_refused_too(photos):
    flags = ("--layer", "block5", "--decoder", "attention", "--width", 8, "--crop", 32, "--batch-size", 1)
    parts = parts_of(photos, *flags)
    with pytest.raises(UserError, match="each of 8 images, by itself, has one position of vgg16 block5"):
        check_crop(parts.inverter, parts.config, 8, world=2)


def test_small_crops_need_no_lpips_without_it(photos, tmp_path, run_train):
    flags = ["--crop", 16, "--lpips-weight", 0, "--mse-weight", 1, "--epochs", 1, "--quiet"]
    assert run_train("--data", photos, "--out", tmp_path, *flags) == 0


def test_alexnets_crops_end_at_their_own_size(photos):
    """Its 64-pixel crops have 7 positions, which 2× steps do not lead back to 64."""
    parts = parts_of(photos, "--encoder", "alexnet", "--layer", "conv1", "--crop", 64)
    crops, _ = next(batches_of(parts))
    assert parts.inverter(crops).shape == crops.shape == (4, 3, 64, 64)
    assert math.isfinite(train_epoch(parts)["loss"])


@pytest.mark.parametrize("size", [64, 224])
def test_published_crops_are_anywhere_in_the_picture(photos, tmp_path, size):
    """Also as a GPU that holds all pixels gathers them."""
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for number, shape in enumerate([(400, 300), (300, 411), (600, 256), (256, 256), (301, 300)]):
            with Image.open(photos / "train" / f"{number:02}.png") as image:
                image.resize(shape).save(tmp_path / split / f"{number}.png")
    images = data.load_split(str(tmp_path), "train", tmp_path / "cache", PUBLISHED_CODE)
    resident = images.at(torch.device("cpu"))
    lowest = []
    for number in range(20):
        order, *places = data.epoch_plan(images.sizes, 1, number, size)
        tops, lefts, _ = places
        heights, widths = images.sizes[order].unbind(1)
        assert (tops + size <= heights).all() and (lefts + size <= widths).all()
        lowest.append((tops + size - heights).max() + 3)
        crops = data.crops(images, order, *places, size)
        assert torch.equal(data.crops(resident, order, *places, size), crops)
    assert max(lowest) > 0 and torch.equal(resident[1:3], images[1:3])


def test_training_and_validation_on_some_images(photos, tmp_path, run_train, encoded):
    flags = ["--data", photos, "--out", tmp_path, "--epochs", 1, "--quiet", "--crop", 64, "--batch-size", 3]
    assert run_train(*flags, "--train-images", 3, "--val-images", 1) == 0
    assert encoded[-2:] == [(3, 64, 64), (1, 224, 224)]


def test_attention_has_nothing_of_the_size_of_the_map():
    states = []
    for side in (32, 112):
        net = AttentionDecoder((64, side, side), 16, size=2 * side)
        states.append({name: tensor.shape for name, tensor in net.state_dict().items()})
    assert states[0] == states[1]


@pytest.mark.slow
def test_attention_learnt_on_crops_holds_on_whole_images(photos):
    """On 16 × 16 positions, then on 112 × 112: without a loss of quality, and far above a grey picture."""
    flags = ["--decoder", "attention", "--width", 32, "--crop", 32, "--lr", 3e-3, "--passes", 40]
    parts = parts_of(photos, *flags, "--lpips-weight", 0, "--mse-weight", 1, "--freeze-bn", 20)
    train_epoch(parts)
    parts.inverter.eval()
    errors = []
    with torch.no_grad():
        for image in data.center_crops(parts.val[:]):
            tiles = image.unfold(1, 32, 32).unfold(2, 32, 32).permute(1, 2, 0, 3, 4).flatten(0, 1)
            errors.append((parts.inverter(tiles) - tiles).square().mean())
    of_crops = torch.stack(errors).log10().mean() * -10
    whole, _, _ = validate(parts)
    assert whole["psnr"] > of_crops - 0.5 and whole["psnr"] > 17, (whole["psnr"], of_crops)


# --- --kept-crops ----------------------------------------------------------------------------------------

DEEP = ["--encoder", "alexnet", "--layer", "conv3", "--width", 16, "--lr", 1e-3, "--epochs", 2, "--quiet"]


def test_kept_crops_train_as_today(photos, tmp_path, run_train, monkeypatch):
    """With as many as epochs; float16 moves the losses by less than a thousandth."""
    runs = {}
    for name, flags in {"today": [], "float16": ["--kept-crops", 2], "float32": ["--kept-crops", 2]}.items():
        monkeypatch.setattr(kept, "DTYPE", np.float32 if name == "float32" else np.float16)
        out = tmp_path / name
        flags = [*DEEP, *flags, "--no-tf32"]
        assert run_train("--data", photos, "--out", out, "--cache", tmp_path / name, *flags) == 0
        runs[name] = [float(row["val_loss"]) for row in read_run(out)[2]]
    assert runs["float32"] == pytest.approx(runs["today"], rel=1e-5)
    assert runs["float16"] == pytest.approx(runs["today"], rel=1e-3)
    assert len(set(runs["today"])) == 2


def test_kept_crops_are_encoded_once(photos, tmp_path, run_train, encoded, capsys):
    flags = ["--data", photos, "--cache", tmp_path / "cache", *DEEP, "--kept-crops", 2]
    assert run_train(*flags, "--out", tmp_path / "first") == 0
    said = capsys.readouterr().err
    assert "encoding 2 crops of each of 8 images once: 0.00 GB in" in said and "about 0." in said
    # 8 images twice for the time and twice for the file, 2 to validate, once for two epochs
    assert [count for count, _, _ in encoded] == [8, 8, 8, 8, 2]
    (file,) = (tmp_path / "cache").glob("*.features")
    assert file.stat().st_size == 2 * 8 * 384 * 13 * 13 * 2
    encoded.clear()
    assert run_train(*flags, "--out", tmp_path / "second") == 0
    assert [count for count, _, _ in encoded] == [2] and "encoding" not in capsys.readouterr().err
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])  # a copy that was cut short
    assert run_train(*flags, "--out", tmp_path / "third") == 0
    assert file.read_bytes() == whole
    first, *others = (read_run(tmp_path / name)[0]["decoder"] for name in ("first", "second", "third"))
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)


def test_key_of_kept_crops(photos, own_photos, tmp_path):
    """Whatever changes the features, the crops or the images makes another file."""
    Image.new("RGB", (256, 256), "red").save(own_photos / "train" / "00.png")
    flags = ["--encoder", "alexnet", "--layer", "conv3", "--lpips-weight", 0, "--crop", 96, "--kept-crops", 2]
    others = (["--seed", 1], ["--layer", "conv4"], ["--kept-crops", 1], ["--crop", 64], ["--amp"])
    others += (["--weights", "random"], ["--protocol", "published"])
    for number, other in enumerate([[], *others], 1):
        parts = parts_of(photos, *flags, *other)
        for _ in range(2):
            keep_crops(parts.train, parts.inverter, parts.config, tmp_path, True)
            assert len(list(tmp_path.glob("*.features"))) == number
    parts = parts_of(own_photos, *flags)
    keep_crops(parts.train, parts.inverter, parts.config, tmp_path, True)
    assert len(list(tmp_path.glob("*.features"))) == number + 1


def test_kept_crops_are_those_of_a_copied_folder_too(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "copy", copy_function=shutil.copyfile)
    for folder in (photos, tmp_path / "copy"):
        parts = parts_of(folder, "--encoder", "alexnet", "--layer", "conv3", "--crop", 96, "--kept-crops", 1)
        keep_crops(parts.train, parts.inverter, parts.config, tmp_path, True)
    assert len(list(tmp_path.glob("*.features"))) == 1


def test_kept_crops_are_those_of_the_epochs_and_come_again(photos, tmp_path):
    parts = parts_of(photos, "--encoder", "alexnet", "--layer", "conv3", "--kept-crops", 2, "--crop", 192)
    crops = keep_crops(parts.train, parts.inverter, parts.config, tmp_path, True)
    for parts.state.epoch in (0, 1, 2):
        today = [batch for batch, _ in batches_of(parts)]
        for (batch, features), wanted in zip(batches_of(parts, kept=crops), today, strict=True):
            expected = parts.inverter.encode(batch)
            torch.testing.assert_close(features, expected, rtol=2e-3, atol=2e-3)
            assert torch.equal(batch, wanted) == (parts.state.epoch < 2)


def test_key_of_weights_is_theirs():
    keys = {weights_key(Encoder("alexnet", "conv1", "random", seed)) for seed in (1, 1, 2)}
    assert len(keys) == 2


def test_disk_too_small_for_kept_crops(photos, tmp_path, run_train, error_line, monkeypatch):
    monkeypatch.setattr(kept.shutil, "disk_usage", lambda path: kept.shutil._ntuple_diskusage(9, 9, 10**6))
    flags = ["--data", photos, "--out", tmp_path / "run", "--cache", tmp_path / "cache", *DEEP]
    assert run_train(*flags, "--kept-crops", 5) == 2
    assert "--kept-crops 5 of 8 images take 0.01 GB, the disk has 0.00 GB left" in error_line()
    assert not list((tmp_path / "cache").glob("*features*"))


def test_full_disk_leaves_no_half_file(photos, tmp_path, run_train, capsys, monkeypatch):
    real, calls = kept.encode, []

    def full(*args):
        calls.append(1)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(kept, "encode", full)
    flags = ["--data", photos, "--out", tmp_path / "run", "--cache", tmp_path / "cache", *DEEP]
    assert run_train(*flags, "--kept-crops", 2) == 2
    last = capsys.readouterr().err.splitlines()[-1]  # after what is going to be written
    assert last.startswith("error: ") and "No space left on device" in last
    assert [path.suffix for path in (tmp_path / "cache").glob("*.*") if "features" in path.name] == []


def test_features_too_large_for_float16(photos, tmp_path, run_train, error_line, monkeypatch):
    real = Encoder.forward
    monkeypatch.setattr(Encoder, "forward", lambda self, images: 1e6 * real(self, images))
    flags = ["--data", photos, "--out", tmp_path / "run", "--cache", tmp_path / "cache", *DEEP]
    assert run_train(*flags, "--kept-crops", 1) == 2
    assert "too large for float16" in error_line()


# --- --fast ----------------------------------------------------------------------------------------------


def test_every_experiment_has_an_optimisation_of_its_own():
    for name in PUBLISHED:
        path = REPOSITORY / "configs" / f"{name}.yaml"
        tuned = yaml.safe_load(path.read_text())["fast"]
        assert {"lr", "batch_size", "crop", "epochs"} <= set(tuned)
        study = vars(parse("--config", path))
        fast = vars(parse("--config", path, "--fast"))
        assert not set(tuned) & {*DEFINING, "data", "protocol", "seed", "weights"}
        assert all(float(fast[key]) == float(tuned[key]) for key in ("lr", "batch_size", "crop", "epochs"))
        assert (study["lr"], study["crop"], study["epochs"], study["batch_size"]) == (1e-4, None, 30, 4)


def test_command_line_wins_over_fast():
    path = REPOSITORY / "configs" / "02_vgg16_block2_tconv.yaml"
    assert parse("--config", path, "--fast", "--lr", 0.5).lr == 0.5


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("layer: block2\n", ["--fast"], "has no lines of `key: value` under `fast:`"),
        ("fast: 3\n", [], "fast: should have lines of `key: value`"),
        ("fast:\n  lr: quick\n", [], "'quick' is not a number"),
        ("fast:\n  speed: 3\n", [], "unknown key 'speed'"),
    ],
)
def test_fast_values_are_checked(tmp_path, run_train, error_line, content, flags, message):
    (tmp_path / "x.yaml").write_text(content)
    assert run_train("--config", tmp_path / "x.yaml", *flags) == 2
    assert message in error_line()


def test_fast_wants_a_configuration(run_train, error_line):
    assert run_train("--fast") == 2
    assert "give one" in error_line()
