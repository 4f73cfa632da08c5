"""Files to tensors: layouts, split, cache, odd and bad images, and crops."""

import io
import os
import pickle
import resource
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NATURAL
from PIL import Image
from torchvision.transforms import functional as tv

import data
from reconstruct import picture_files
from study import PROTOCOLS, PUBLISHED_CODE
from utils import UserError, user_cache


def test_natural_split_is_640_160_100():
    if not NATURAL.is_dir():
        pytest.skip(f"{NATURAL} is not here")
    splits = {split: data.load_split(str(NATURAL), split) for split in ("train", "val", "test")}
    assert [len(s.names) for s in splits.values()] == [640, 160, 100]
    assert all(s[:].shape == (len(s), 256, 256, 3) for s in splits.values())
    assert not set(splits["train"].names) & set(splits["val"].names)
    # the picture of a name is that file's, decoded and resized by torchvision
    for name in splits["val"].names[:3]:
        with Image.open(NATURAL / "train" / name) as image:
            expected = tv.resize(image.convert("RGB"), [256, 256], antialias=True)
        assert np.array_equal(splits["val"].image(splits["val"].names.index(name)), np.asarray(expected))


def test_split_is_the_seed_42_permutation(photos):
    train, val = (data.load_split(str(photos), split).names for split in ("train", "val"))
    # numpy's RandomState(42).permutation(10), a stream that numpy guarantees for ever
    order = [8, 1, 5, 0, 7, 2, 9, 4, 3, 6]
    assert train == [f"{i:02}.png" for i in order[:8]]
    assert val == [f"{i:02}.png" for i in order[8:]]


def test_div2k_layout(photos, tmp_path):
    (tmp_path / "DIV2K_train_HR").symlink_to(photos / "train")
    (tmp_path / "DIV2K_valid_HR").symlink_to(photos / "test")
    counts = [len(data.load_split(str(tmp_path), split).names) for split in ("train", "val", "test")]
    assert counts == [8, 2, 3]


def test_sample_has_no_photograph_in_two_splits():
    splits = {split: data.load_split("sample", split) for split in ("train", "val", "test")}
    photographs = {split: {name.split("-")[0] for name in s.names} for split, s in splits.items()}
    photographs["train"] = {name.replace("_left", "").replace("_right", "") for name in photographs["train"]}
    assert len(set.union(*photographs.values())) == sum(map(len, photographs.values()))
    assert [len(split) for split in splits.values()] == [98, 8, 14]
    scales = {tuple(name.split("-")[:2]) for name in splits["train"].names}
    assert len(scales) > len(photographs["train"])  # more than one scale
    for split in splits.values():
        assert split[:].shape == (len(split.names), 256, 256, 3) and split[:].dtype == torch.uint8


# --- cache ---------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that were decoded."""
    names, real = [], data.decode
    monkeypatch.setattr(data, "decode", lambda path, *rest: names.append(path.name) or real(path, *rest))
    return names


def test_cache_is_rebuilt_when_a_file_changes_and_only_then(own_photos, decoded, tmp_path):
    def load():
        decoded.clear()
        return data.load_split(str(own_photos), "test", tmp_path / "cache")[:]

    first = load()
    assert len(decoded) == 3
    assert torch.equal(load(), first) and decoded == []
    changed = own_photos / "test" / "01.jpg"
    Image.new("RGB", (300, 300), "red").save(changed)
    second = load()
    assert decoded and (second[1, :, :, 0] > 250).all() and torch.equal(second[0], first[0])
    load()
    assert decoded == []
    changed.unlink()
    assert len(load()) == 2 and decoded
    before = changed.with_name("00.jpg").stat()
    os.utime(changed.with_name("00.jpg"), ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    load()
    assert decoded


def test_cut_off_cache_is_built_again(own_photos, decoded, tmp_path):
    cache = tmp_path / "cache"
    good = data.load_split(str(own_photos), "test", cache)[:]
    (path,) = cache.glob("*/*.u8")
    path.write_bytes(path.read_bytes()[:-1])
    decoded.clear()
    assert torch.equal(data.load_split(str(own_photos), "test", cache)[:], good)
    assert len(decoded) == 3


def test_interrupted_build_goes_on(own_photos, decoded, tmp_path, monkeypatch):
    """Only the shard that was being written is decoded again, and nothing half written stays."""
    monkeypatch.setattr(data, "SHARD", 4)
    whole = data.load_split(str(own_photos), "train", tmp_path / "whole")
    real = data.decode

    def interrupted(path, *rest):
        if path.name == "05.png":
            raise KeyboardInterrupt
        return real(path, *rest)

    cache = tmp_path / "cache"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "decode", interrupted)
        data.load_split(str(own_photos), "train", cache)
    assert len(list(cache.glob("*/*.u8"))) == len(list(cache.glob("*/*.json"))) == 1
    assert not list(cache.glob("*/*tmp*"))
    decoded.clear()
    train = data.load_split(str(own_photos), "train", cache)
    assert sorted(decoded) == [f"{i:02}.png" for i in range(4, 10)]
    assert torch.equal(train[:], whole[:]) and train.names == whole.names and train.key == whole.key
    for name, pixels in zip(train.names, train[:], strict=True):
        with Image.open(own_photos / "train" / name) as image:
            assert np.array_equal(pixels, np.asarray(image))  # it is 256×256 already


def test_more_images_than_files_may_be_open(photos):
    images = data.load_split(str(photos), "train")
    many = [number % len(images) for number in range(300)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, limits[1]))
    try:
        pixels = images[many]
        zero = torch.zeros(300, dtype=torch.int64)
        batch = data.crops(images, torch.tensor(many), zero, zero, zero.bool(), 32)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert torch.equal(pixels[299], images.image(299 % len(images)))
    assert torch.equal(batch[299], pixels[299, :32, :32].permute(2, 0, 1) / 255)


def test_a_name_that_is_no_text_is_named(own_photos):
    os.rename(own_photos / "train" / "00.png", os.fsencode(own_photos / "train") + b"/caf\xe9.png")
    with pytest.raises(UserError, match="udce9.png': its name is not UTF-8"):
        data.load_split(str(own_photos), "train")
    with pytest.raises(UserError, match="its name is not UTF-8"):
        picture_files([os.fsdecode(os.fsencode(own_photos / "train") + b"/caf\xe9.png")])


def test_what_a_split_holds_does_not_grow_with_its_pixels(own_photos, tmp_path):
    """Pixels are read where they are used: the objects of a split are its names, sizes and places."""
    images = data.load_split(str(own_photos), "train", tmp_path / "cache")
    assert images.resident is None and not any(isinstance(shard, np.ndarray) for shard in images.shards)
    held = pickle.dumps(replace(images, shards=[]))
    assert len(held) < 300 * len(images) + 2000 < images.image(0).numel()


def test_a_running_training_keeps_its_images(own_photos, tmp_path):
    """Though another run meets the folder with other photographs, and builds its cache anew."""
    cache = tmp_path / "cache"
    images = data.load_split(str(own_photos), "train", cache)
    before = images[:]
    for path in (own_photos / "train").iterdir():
        Image.new("RGB", (256, 256), "red").save(path)
    assert not torch.equal(data.load_split(str(own_photos), "train", cache)[:], before)
    assert len(list(cache.glob("*/*.u8"))) == 1 and torch.equal(images[:], before)


def test_links_that_lead_back_and_folders_that_cannot_be_read(own_photos, monkeypatch):
    (own_photos / "test" / "again").symlink_to(own_photos / "test")
    assert len(data.image_files(own_photos / "test")) == 3
    (own_photos / "test" / "locked").mkdir()
    real = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        data.image_files(own_photos / "test")


def test_folders_in_folders(photos, tmp_path):
    """ImageNet's own layout, train/CLASS/x.jpg; the same name may stand in two classes."""
    for split in ("train", "test"):
        for number, path in enumerate(sorted((photos / split).iterdir())):
            folder = tmp_path / split / f"n{number % 2:02}"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / f"{number // 2}{path.suffix}")
    (tmp_path / "train" / ".hidden").mkdir()
    shutil.copy(photos / "train" / "00.png", tmp_path / "train" / ".hidden")
    train = data.load_split(str(tmp_path), "train", tmp_path / "cache")
    val = data.load_split(str(tmp_path), "val", tmp_path / "cache")
    assert sorted(train.names + val.names) == [f"n{c:02}/{i}.png" for c in (0, 1) for i in range(5)]
    pictures = dict(zip(train.names + val.names, [*train[:], *val[:]], strict=True))
    with Image.open(photos / "train" / "03.png") as image:
        assert np.array_equal(pictures["n01/1.png"], np.asarray(image))


@pytest.mark.parametrize("size", [64, 224])
@pytest.mark.parametrize("protocol", PROTOCOLS.values())
def test_a_gpu_would_gather_the_same_crops(photos, protocol, size):
    images = data.load_split(str(photos), "train", protocol=protocol)
    plan = data.epoch_plan(images.sizes, 42, 3, size)
    crops = data.crops(images, *plan, size)
    assert crops.shape == (8, 3, size, size) and crops.is_contiguous(memory_format=torch.channels_last)
    resident = images.at(torch.device("cpu"))
    assert torch.equal(data.crops(resident, *plan, size), crops)
    assert torch.equal(resident[2:5], images[2:5])


def test_finished_cache_needs_no_lock(own_photos, tmp_path, monkeypatch):
    """So that it can be in a folder where nothing may be written."""
    cache = tmp_path / "cache"
    good = data.load_split(str(own_photos), "test", cache)[:]
    for lock in cache.glob("*/.lock"):
        lock.unlink()

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(data, "locked", refuse)
    assert torch.equal(data.load_split(str(own_photos), "test", cache)[:], good)


# --- odd and bad images ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA", "I;16"])
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_any_mode_is_converted(photos, tmp_path, mode, suffix):
    if (suffix, mode) in {("png", "CMYK"), *(("jpg", m) for m in ("P", "RGBA", "1", "LA", "I;16"))}:
        pytest.skip("no such file can be written")
    with Image.open(photos / "test" / "00.jpg") as image:
        rgb = image.convert("RGB")
    grey = np.asarray(rgb.convert("L"))
    if mode == "I;16":
        odd = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        odd = rgb.quantize() if mode == "P" else rgb.convert(mode)
    odd.save(tmp_path / f"odd.{suffix}")
    result = data.decode(tmp_path / f"odd.{suffix}")
    assert result.shape == (256, 256, 3) and result.dtype == np.uint8
    reference = rgb if mode in ("P", "RGBA", "CMYK") else Image.fromarray(grey).convert("RGB")
    error = result.astype(float) - np.asarray(reference.resize((256, 256), Image.Resampling.BILINEAR))
    assert abs(error.mean()) < 5 and (mode == "1" or np.abs(error).mean() < 4)  # one bit keeps only the mean


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90° clockwise: left becomes top
    image.save(tmp_path / "turned.png", exif=exif)
    result = np.asarray(data.read_image(tmp_path / "turned.png"))
    assert result.shape == (40, 20, 3) and result[5].mean() == 255 and result[35].mean() == 0


def bomb():
    """A PNG of a few bytes that declares 60,000 × 60,000 pixels."""
    content = io.BytesIO()
    Image.new("RGB", (1, 1)).save(content, "png")
    content = bytearray(content.getvalue())
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize("damage", ["truncated", "zero bytes", "text", "bomb", "floats"])
def test_bad_image_is_named(own_photos, damage):
    bad = own_photos / "train" / "04.png"
    content = bad.read_bytes()
    floats = io.BytesIO()
    Image.new("F", (9, 9), 0.5).save(floats, "tiff")
    contents = {
        "truncated": content[: len(content) // 2],
        "zero bytes": b"",
        "text": b"not an image",
        "bomb": bomb(),
    }
    bad.write_bytes((contents | {"floats": floats.getvalue()})[damage])
    with pytest.raises(UserError, match="04.png: not an image that can be read"):
        data.load_split(str(own_photos), "train")


def test_files_that_are_no_images_are_ignored(own_photos):
    for name in (".hidden.png", "notes.txt", "Thumbs.db"):
        (own_photos / "test" / name).write_bytes(b"x")
    (own_photos / "test" / "00.jpg").rename(own_photos / "test" / "00.JPEG")
    assert data.load_split(str(own_photos), "test").names == ["00.JPEG", "01.jpg", "02.jpg"]


# --- crops -----------------------------------------------------------------------------------------------


def test_crops_are_torchvisions():
    pixels = torch.randint(0, 256, (5, 256, 256, 3), dtype=torch.uint8)
    index, tops, lefts = torch.tensor([3, 0, 4]), torch.tensor([0, 32, 7]), torch.tensor([5, 0, 32])
    flips = torch.tensor([False, True, True])
    batch = data.crops(data.squares(pixels.numpy(), list("abcde")), index, tops, lefts, flips)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    for i in range(3):
        expected = tv.crop(pixels[index[i]].permute(2, 0, 1), int(tops[i]), int(lefts[i]), 224, 224)
        expected = tv.hflip(expected) if flips[i] else expected
        assert torch.equal(batch[i], expected.float() / 255)
    expected = tv.center_crop(pixels.permute(0, 3, 1, 2), [224, 224]).float() / 255
    assert torch.equal(data.center_crops(pixels), expected)


def test_published_images_keep_their_shape(tmp_path):
    """torchvision's Resize(256), random crops anywhere in it, and CenterCrop(224) for validation."""
    photos = [Image.fromarray(p.numpy()) for p in data.sample_tiles("test")[:5]]
    (tmp_path / "train").mkdir()
    for i, size in enumerate([(400, 300), (300, 411), (600, 200), (256, 256), (301, 300)]):
        photos[i] = photos[i].resize(size)
        photos[i].save(tmp_path / "train" / f"{i}.png")
    resized = {
        f"{i}.png": torch.from_numpy(np.array(tv.resize(p, 256))).permute(2, 0, 1)
        for i, p in enumerate(photos)
    }
    train, val = (
        data.load_split(str(tmp_path), split, protocol=PUBLISHED_CODE) for split in ("train", "val")
    )
    assert (len(train.names), len(val.names)) == (4, 1)
    expected = tv.center_crop(resized[val.names[0]], [224, 224])[None].float() / 255
    assert torch.equal(data.center_crops(val[:]), expected)
    for epoch in range(20):
        plan = data.epoch_plan(train.sizes, 42, epoch)
        for i, top, left, flip, crop in zip(*plan, data.crops(train, *plan), strict=True):
            expected = tv.crop(resized[train.names[i]], int(top), int(left), 224, 224)
            assert (
                expected.shape == (3, 224, 224)
                and top + 224 <= train.sizes[i, 0]
                and left + 224 <= train.sizes[i, 1]
            )
            assert torch.equal(crop, (tv.hflip(expected) if flip else expected) / 255)


def test_epoch_plan_reaches_every_crop_of_a_wide_image():
    _, tops, lefts, _ = data.epoch_plan(torch.tensor([[256, 300]]).expand(9000, 2), seed=1, number=0)
    assert sorted(set(tops.tolist())) == list(range(33))
    counts = torch.bincount(lefts)
    assert len(counts) == 77 and counts.min() > 0.5 * 9000 / 77 and counts.max() < 1.6 * 9000 / 77


def test_epoch_plan_uses_every_image_once_and_every_crop():
    squares = torch.full((5000, 2), 256)
    order, tops, lefts, flips = data.epoch_plan(squares, seed=42, number=3)
    assert sorted(order.tolist()) == list(range(5000))
    assert sorted(set(tops.tolist())) == sorted(set(lefts.tolist())) == list(range(33))
    assert 0.47 < flips.float().mean() < 0.53
    again = data.epoch_plan(squares, seed=42, number=3)
    assert all(torch.equal(a, b) for a, b in zip((order, tops, lefts, flips), again, strict=True))
    assert not torch.equal(data.epoch_plan(squares, 42, 4)[0], order)


def test_no_home_folder(monkeypatch, tmp_path):
    """A container's user may have none."""

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert user_cache(tmp_path) == tmp_path
    with pytest.raises(UserError, match="--cache"):
        user_cache()
