"""Cheap training: small crops, several passes an epoch, and crops encoded once."""

import errno
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from kill_resume import read_run, same
from PIL import Image
from training import batches_of, train_epoch, training_on, validate

import data
from encoders import Encoder
from extras import feature_cache
from extras.feature_cache import cache_features

# --- --crop and --passes -------------------------------------------------------------------------------


def test_an_epoch_of_two_passes_draws_what_two_epochs_draw(photos):
    training = training_on(photos, "--crop", 32)
    expected = []
    for training.epoch in (2, 3):
        expected += [crops for crops, _ in batches_of(training)]
    training = training_on(photos, "--crop", 32, "--passes", 2)
    training.epoch = 1
    found = [crops for crops, _ in batches_of(training)]
    assert len(found) == 4 and all(map(torch.equal, found, expected))
    training.step = 3  # resumed in the second pass
    assert torch.equal(next(batches_of(training))[0], expected[3])


ONE_POSITION = ["--layer", "block5", "--decoder", "attention", "--width", 8, "--crop", 32, "--batch-size"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--crop", 51], "vgg16 block1 has a stride of 2 pixels; give a multiple of it"),
        (["--crop", 30], "LPIPS needs at least 31 pixels"),
        (["--crop", 288], "images are 256 pixels wide; at most that"),
        (["--encoder", "alexnet", "--layer", "conv5", "--crop", 32], "alexnet conv5 takes no such image"),
        ([*ONE_POSITION, 7], "a batch of one image has one position of vgg16 block5"),
        (["--crop", 0], "0 is not positive"),
    ],
)
def test_impossible_crops_are_refused(photos, tmp_path, run_train, error_line, flags, message):
    assert run_train("--data", photos, "--out", tmp_path, *flags) == 2
    assert message in error_line()
    assert not (tmp_path / "last.pt").exists()


def test_alexnets_crops_end_at_their_own_size():
    """Its 64-pixel crops have 7 positions, which 2× steps do not lead back to 64."""
    training = training_on("sample", "--encoder", "alexnet", "--layer", "conv1", "--crop", 64)
    crops, _ = next(batches_of(training))
    assert training.inverter(crops).shape == crops.shape == (4, 3, 64, 64)


@pytest.mark.slow
def test_attention_learnt_on_crops_holds_on_whole_images(photos):
    """On 16 × 16 positions, then on 112 × 112: without a loss of quality, and far above a grey picture."""
    flags = ["--decoder", "attention", "--width", 16, "--crop", 32, "--lr", 3e-3, "--passes", 40]
    training = training_on(photos, *flags, "--lpips-weight", 0, "--mse-weight", 1, "--freeze-bn", 20)
    train_epoch(training)
    training.inverter.eval()
    crops = data.center_crops(training.val_images[:])
    tiles = crops.unfold(2, 32, 32).unfold(3, 32, 32).permute(0, 2, 3, 1, 4, 5)  # (2, 7, 7, 3, 32, 32)
    with torch.no_grad():
        errors = [(training.inverter(part) - part).square().mean() for part in tiles.flatten(1, 2)]
    of_tiles = torch.stack(errors).log10().mean() * -10
    whole, _, _ = validate(training)
    assert whole["psnr"] > of_tiles - 0.5 and whole["psnr"] > 17, (whole["psnr"], of_tiles)


# --- --kept-crops ----------------------------------------------------------------------------------------

DEEP = ["--encoder", "alexnet", "--layer", "conv3", "--crop", 64]
SMALL = ["--width", 8, "--lr", 1e-3, "--epochs", 2, "--lpips-weight", 0, "--val-images", 1, "--quiet"]


@pytest.fixture
def run_kept(photos, tmp_path, run_train):
    """Train a small network on crops of a deep layer, in `out` and with a cache in tmp_path."""

    def call(out, *flags, cache="cache"):
        places = ["--data", photos, "--out", tmp_path / out, "--cache", tmp_path / cache]
        return run_train(*places, *DEEP, *SMALL, *flags)

    return call


def test_kept_crops_train_as_today(tmp_path, run_kept, monkeypatch):
    """With as many as epochs; float16 moves the losses by less than a thousandth."""
    runs = {}
    for name, flags in {"today": [], "float16": ["--kept-crops", 2], "float32": ["--kept-crops", 2]}.items():
        monkeypatch.setattr(feature_cache, "DTYPE", np.float32 if name == "float32" else np.float16)
        assert run_kept(name, *flags, "--no-tf32", cache=name) == 0
        runs[name] = [float(row["val_loss"]) for row in read_run(tmp_path / name)[2]]
    assert runs["float32"] == pytest.approx(runs["today"], rel=1e-5)
    assert runs["float16"] == pytest.approx(runs["today"], rel=1e-3)
    assert len(set(runs["today"])) == 2


def test_kept_crops_are_encoded_once(tmp_path, run_kept, capsys):
    assert run_kept("first", "--kept-crops", 2) == 0
    said = capsys.readouterr().err
    assert "encoding 2 crops of each of 8 images once, into" in said and "about 0." in said
    (file,) = (tmp_path / "cache").glob("*.features")
    whole, written = file.read_bytes(), file.stat().st_mtime_ns
    assert len(whole) == 2 * 8 * 384 * 3 * 3 * 2
    assert run_kept("second", "--kept-crops", 2) == 0
    assert file.stat().st_mtime_ns == written and "encoding" not in capsys.readouterr().err
    file.write_bytes(whole[:-1])  # a copy that was cut short
    assert run_kept("third", "--kept-crops", 2) == 0
    assert file.read_bytes() == whole
    first, *others = (read_run(tmp_path / name)[0]["decoder"] for name in ("first", "second", "third"))
    assert same(first, others[0]) and same(first, others[1])


def test_key_of_kept_crops(photos, own_photos, tmp_path):
    """Whatever changes the features, the crops or the images makes another file; a copied folder does not."""

    def files(folder, *flags):
        training = training_on(folder, *DEEP, "--lpips-weight", 0, "--kept-crops", 2, *flags)
        cache_features(training, tmp_path, True)
        return len(list(tmp_path.glob("*.features")))

    others = (["--seed", 1], ["--layer", "conv4"], ["--kept-crops", 1], ["--crop", 96], ["--amp"])
    others += (["--weights", "random"], ["--protocol", "published"])
    for number, other in enumerate([[], *others], 1):
        assert files(photos, *other) == number
    assert files(photos) == files(own_photos) == number
    Image.new("RGB", (256, 256), "red").save(own_photos / "train" / "00.png")
    assert files(own_photos) == number + 1


def test_kept_crops_are_those_of_the_epochs_and_come_again(photos, tmp_path):
    training = training_on(photos, *DEEP, "--kept-crops", 2)
    crops = cache_features(training, tmp_path, True)
    for training.epoch in (0, 1, 2):
        today = [batch for batch, _ in batches_of(training)]
        for (batch, features), wanted in zip(batches_of(training, kept=crops), today, strict=True):
            expected = training.inverter.encode(batch)
            torch.testing.assert_close(features, expected, rtol=2e-3, atol=2e-3)
            assert torch.equal(batch, wanted) == (training.epoch < 2)


def test_disk_too_small_for_kept_crops(tmp_path, run_kept, error_line, monkeypatch):
    free = feature_cache.shutil._ntuple_diskusage(9, 9, 10**6)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: free)
    assert run_kept("run", "--kept-crops", 5, "--crop", 224) == 2
    assert "--kept-crops 5 of 8 images take 0.01 GB, the disk has 0.00 GB left" in error_line()
    assert not list((tmp_path / "cache").glob("*features*"))


def test_full_disk_leaves_no_half_file(tmp_path, run_kept, capsys, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    some = np.zeros(9, np.float16)
    monkeypatch.setattr(feature_cache, "encode", Mock(side_effect=[some, some, some, full]))
    assert run_kept("run", "--kept-crops", 2) == 2
    last = capsys.readouterr().err.splitlines()[-1]  # after what is going to be written
    assert last.startswith("error: ") and "No space left on device" in last
    assert not [path for path in (tmp_path / "cache").glob("*features*") if path.suffix != ".lock"]


def test_features_too_large_for_float16(run_kept, error_line, monkeypatch):
    real = Encoder.forward
    monkeypatch.setattr(Encoder, "forward", lambda self, images: 1e6 * real(self, images))
    assert run_kept("run", "--kept-crops", 1) == 2
    assert "too large for float16" in error_line()
