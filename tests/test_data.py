"""Files to tensors: layouts, split, cache, odd and bad images, and crops."""

import io
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.features
import pytest
import torch
from conftest import NATURAL, REPOSITORY
from PIL import Image, ImageCms, PngImagePlugin
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


def test_a_file_is_decoded_when_it_changes_and_only_then(own_photos, decoded, tmp_path):
    def load():
        decoded.clear()
        return data.load_split(str(own_photos), "test", tmp_path / "cache")[:]

    first = load()
    assert len(decoded) == 3
    assert torch.equal(load(), first) and decoded == []
    changed = own_photos / "test" / "01.jpg"
    Image.new("RGB", (300, 300), "red").save(changed)
    second = load()
    assert decoded == ["01.jpg"] and (second[1, :, :, 0] > 250).all() and torch.equal(second[0], first[0])
    load()
    assert decoded == []
    changed.unlink()
    assert torch.equal(load(), first[[0, 2]]) and decoded == []
    before = changed.with_name("00.jpg").stat()
    os.utime(changed.with_name("00.jpg"), ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    load()
    assert decoded == ["00.jpg"]


@pytest.fixture
def bitmaps(tmp_path):
    """A folder with a red, a green and a blue BMP, which have the same size and time."""
    (tmp_path / "data" / "test").mkdir(parents=True)
    for name in ("red", "green", "blue"):
        Image.new("RGB", (256, 256), name).save(tmp_path / "data" / "test" / f"{name}.bmp")
        os.utime(tmp_path / "data" / "test" / f"{name}.bmp", ns=(10**18, 10**18))
    return tmp_path / "data"


def colours_of(folder, cache):
    """{name: its first pixel} of the test images in `folder`."""
    images = data.load_split(str(folder), "test", cache)
    return {Path(name).stem: tuple(images.image(i)[0, 0].tolist()) for i, name in enumerate(images.names)}


def test_files_that_change_places_or_keep_their_time_are_decoded_anew(bitmaps, tmp_path):
    cache, red, green = tmp_path / "cache", bitmaps / "test" / "red.bmp", bitmaps / "test" / "green.bmp"
    assert colours_of(bitmaps, cache)["red"] == (255, 0, 0)
    aside = red.rename(tmp_path / "aside")
    green.rename(red)
    aside.rename(green)
    assert colours_of(bitmaps, cache) == {"red": (0, 128, 0), "green": (255, 0, 0), "blue": (0, 0, 255)}
    time.sleep(0.02)  # longer than a kernel's tick, which its times are as coarse as
    red.write_bytes((bitmaps / "test" / "blue.bmp").read_bytes())
    os.utime(red, ns=(10**18, 10**18))
    assert colours_of(bitmaps, cache)["red"] == (0, 0, 255)


def test_another_pillow_or_decoder_decodes_anew(bitmaps, decoded, tmp_path, monkeypatch):
    def load():
        decoded.clear()
        data.load_split(str(bitmaps), "test", tmp_path / "cache")
        return len(decoded)

    assert (load(), load()) == (3, 0)
    monkeypatch.setattr(PIL.features, "version", lambda name: "9.9.9")
    assert (load(), load()) == (3, 0)
    other = tmp_path / "data.py"
    other.write_text(Path(data.__file__).read_text() + "# changed")
    monkeypatch.setattr(data, "__file__", str(other))
    assert (load(), load()) == (3, 0)
    assert len(list((tmp_path / "cache").glob("*/*.u8"))) == 1  # older ones are removed


def test_key_of_images_is_of_their_names_order_and_pixels(own_photos, tmp_path):
    def key(folder, split="train"):
        return data.load_split(str(folder), split, tmp_path / "cache").key

    train, val = key(own_photos), key(own_photos, "val")
    copy = shutil.copytree(own_photos, tmp_path / "copy", copy_function=shutil.copyfile)
    (copy / "train" / "00.png").touch()
    assert (key(copy), key(copy, "val")) == (train, val) and train != val
    changed = Image.open(copy / "train" / "00.png")  # of the training images
    changed.putpixel((9, 9), (1, 2, 3))
    changed.save(copy / "train" / "00.png")
    assert key(copy) != train and key(copy, "val") == val
    images = data.load_split(str(own_photos), "train", tmp_path / "cache")
    assert data.subset(images, np.arange(8)).key == train != data.subset(images, [*range(7, -1, -1)]).key


def test_many_small_changes_leave_few_files(own_photos, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 1)
    for number in range(70):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(own_photos / "test" / "00.jpg")
        data.load_split(str(own_photos), "test", tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*/*.u8"))) <= 3


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


@pytest.mark.parametrize("count", [3, 12])
def test_all_bad_images_are_named_at_once_and_the_others_kept(photos, decoded, tmp_path, count, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 8)
    folder = Path(shutil.copytree(photos / "train", tmp_path / "data" / "test"))
    for number in range(count):
        (folder / f"bad{number:02}.png").write_bytes(b"no image")
    with pytest.raises(UserError) as found:
        data.load_split(str(tmp_path / "data"), "test", tmp_path / "cache")
    named = re.findall(r"(bad\d+.png): not an image that can be read", str(found.value))
    assert named == [f"bad{number:02}.png" for number in range(min(count, 10))]
    assert str(found.value).endswith("; 12 in all") == (count == 12)
    for bad in folder.glob("bad*"):
        bad.unlink()
    decoded.clear()
    images = data.load_split(str(tmp_path / "data"), "test", tmp_path / "cache")
    assert decoded == [] and len(images) == 10
    for name, pixels in zip(images.names, images[:], strict=True):
        with Image.open(folder / name) as image:
            assert np.array_equal(pixels, np.asarray(image))


def test_size_of_the_cache_is_said_when_it_is_built(own_photos, tmp_path, capsys):
    for expected in ("3 images, 0.00 GB in ", ""):
        data.load_split(str(own_photos), "test", tmp_path / "cache")
        assert expected in (said := capsys.readouterr().out) and bool(said) == bool(expected)


def test_old_caches_go_by_the_command_of_the_readme(tmp_path):
    (command,) = re.findall(r"^find .*", (REPOSITORY / "README.md").read_text(), re.M)
    cache = tmp_path / ".cache" / "feature-inversion"
    for name, days in (("old", 40), ("new", 20)):
        (cache / name).mkdir(parents=True)
        (cache / name / "x.u8").touch()
        (cache / f"{name}.features").touch()
        for path in (cache / f"{name}.features", cache / name):
            os.utime(path, (time.time() - days * 86400,) * 2)
    subprocess.run(["bash", "-c", command], env=os.environ | {"HOME": str(tmp_path)}, check=True)
    assert sorted(path.name for path in cache.iterdir()) == ["new", "new.features"]


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


TURNED = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud}
TURNED |= {5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 8: np.rot90}
TURNED |= {7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 0: lambda a: a, 9: lambda a: a}


@pytest.mark.parametrize("turn", TURNED)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "I;16", "RGBA", "LA"])
def test_any_mode_is_upright(tmp_path, mode, turn):
    grey = np.uint8(255 * np.random.RandomState(0).randint(0, 2, (6, 4)))
    image = Image.fromarray(grey)
    image = Image.fromarray(np.uint16(257) * grey) if mode == "I;16" else image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = turn
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(data.read_image(tmp_path / "turned.png"))[..., 0], TURNED[turn](grey))


def ifd(*entries, order="<", behind=b""):
    """The bytes of a TIFF file with one directory of (tag, type, count, value), and what is `behind` it."""
    kinds = {1: "B3x", 3: "H2x", 4: "I", 8: "h2x", 9: "i"}
    packed = [
        struct.pack(f"{order}HHI{kinds[kind]}", tag, kind, count, value)
        for tag, kind, count, value in entries
    ]
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8)
    return head + struct.pack(f"{order}H", len(packed)) + b"".join(packed) + bytes(4) + behind


def tiff(pixels, width, height, bits, photometric, sample_format=1, order="<"):
    """The bytes of an uncompressed grey TIFF."""
    offset = 8 + 2 + 12 * 10 + 4
    entries = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 1, bits), (259, 3, 1, 1)]
    entries += [(262, 3, 1, photometric), (273, 4, 1, offset), (277, 3, 1, 1), (278, 3, 1, height)]
    entries += [(279, 4, 1, len(pixels)), (339, 3, 1, sample_format)]
    return ifd(*entries, order=order, behind=pixels)


GREYS = np.array([[0, 1000, 2048, 4095]])  # of 12 bits


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (tiff(bytes.fromhex("0003e8800fff"), 4, 1, 12, 1), GREYS / 4095),
        (tiff(GREYS.astype("<u2").tobytes(), 4, 1, 16, 1), GREYS / 65535),
        (tiff(GREYS.astype(">u2").tobytes(), 4, 1, 16, 1, order=">"), GREYS / 65535),
        (tiff((16 * GREYS).astype("<u2").tobytes(), 4, 1, 16, 0), 1 - 16 * GREYS / 65535),
        (tiff((GREYS // 16).astype(np.uint8).tobytes(), 4, 1, 8, 0), 1 - GREYS // 16 / 255),
        (tiff(GREYS.astype("<u4").tobytes(), 4, 1, 32, 1), None),
        (tiff(GREYS.astype("<i4").tobytes(), 4, 1, 32, 1, 2), None),
        (tiff(GREYS.astype("<i2").tobytes(), 4, 1, 16, 1, 2), None),
        (tiff(GREYS.astype(np.int8).tobytes(), 4, 1, 8, 1, 2), None),
        (tiff(GREYS.astype("<f4").tobytes(), 4, 1, 32, 1, 3), None),
    ],
)
def test_grey_tiffs_are_right_or_refused(tmp_path, content, expected):
    (tmp_path / "grey.tif").write_bytes(content)
    if expected is None:
        with pytest.raises(UserError, match="grey.tif: not an image .* of no known range"):
            data.read_image(tmp_path / "grey.tif")
    else:
        found = np.asarray(data.read_image(tmp_path / "grey.tif"))
        assert np.array_equal(found, np.repeat(np.round(255 * expected)[..., None], 3, 2))


def test_grey_of_more_than_8_bits_in_other_formats(tmp_path):
    grey = np.array([[0, 300, 40_000, 65_535]], np.uint16)
    (tmp_path / "a.pgm").write_bytes(b"P5 4 1 65535\n" + grey.astype(">u2").tobytes())
    (tmp_path / "b.pgm").write_bytes(b"P5 4 1 4095\n" + (grey >> 4).astype(">u2").tobytes())
    Image.fromarray(grey).save(tmp_path / "c.png")
    Image.fromarray(grey).save(tmp_path / "d.jp2", irreversible=False)
    for path in sorted(tmp_path.iterdir()):
        assert np.asarray(data.read_image(path))[0, :, 0].tolist() == [0, 1, 156, 255], path


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *(("RGBA", suffix) for suffix in ("png", "tif", "webp", "tga", "jp2", "ico")),
        *(("LA", suffix) for suffix in ("png", "tif")),
        *(("P", "png"), ("P", "gif"), ("PA", "tif")),
    ],
)
def test_transparent_parts_are_white(tmp_path, mode, suffix):
    """Of a dark grey logo with three stripes: transparent, opaque and in between."""
    stripes = np.repeat([[0, 1, 2]], 39, 0).repeat(13, 1)
    opacity = [0, 255, 255] if suffix == "gif" else [0, 255, 100]
    alpha = np.array(opacity)[stripes]
    if mode[0] == "P":
        image = Image.fromarray(np.uint8(stripes))
        image.putpalette([60] * 9)
        image.info["transparency"] = 0 if suffix == "gif" else bytes(opacity)
        image = image.convert(mode)
    else:
        image = Image.fromarray(np.uint8(np.stack([*[alpha * 0 + 60] * (len(mode) - 1), alpha], 2)))
    image.save(tmp_path / f"logo.{suffix}", lossless=True, sizes=[(39, 39)])
    found = np.asarray(data.read_image(tmp_path / f"logo.{suffix}"))
    assert np.abs(found - (60 * alpha + 255 * (255 - alpha))[..., None] / 255).max() <= 1


def png(depth, colour, row, shade):
    """The bytes of a PNG, 4 × 1 pixels, with one transparent colour, tRNS."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = struct.pack(">IIBBBBB", 4, 1, depth, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + chunk(b"tRNS", struct.pack(f">{len(shade)}H", *shade))
    return b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png(1, 0, bytes([0b01010000]), [1]), [0, 255, 0, 255]),
        (png(1, 0, bytes([0b01010000]), [0]), [255, 255, 255, 255]),
        (png(2, 0, bytes([0b00011011]), [2]), [0, 85, 255, 255]),
        (png(4, 0, bytes([0x05, 0xAF]), [10]), [0, 85, 255, 255]),
        (png(8, 0, bytes([0, 10, 20, 30]), [10]), [0, 255, 20, 30]),
        (png(16, 0, struct.pack(">4H", 0, 257, 1, 65535), [0]), [255, 1, 0, 255]),
        (png(8, 2, bytes([0, 0, 0, 0, 0, 1, 7, 7, 7, 9, 9, 9]), [0, 0, 0]), [255, 0, 7, 9]),
        (png(8, 2, bytes([0, 0, 0, 0, 0, 1, 7, 7, 7, 9, 9, 9]), [9, 9, 8]), [0, 0, 7, 9]),
    ],
    ids=["1 bit", "1 bit, 0", "2 bits", "4 bits", "8 bits", "16 bits", "RGB", "RGB, none"],
)
def test_one_transparent_colour_is_white(tmp_path, content, expected):
    (tmp_path / "x.png").write_bytes(content)
    assert np.asarray(data.read_image(tmp_path / "x.png"))[0, :, 0].tolist() == expected


def test_one_transparent_colour_of_16_bits_a_channel_is_refused(tmp_path):
    """Pillow keeps 8 of them, so which pixels have it is not known."""
    row = struct.pack(">12H", *[256, 512, 768] * 4)
    (tmp_path / "x.png").write_bytes(png(16, 2, row, [256, 512, 768]))
    with pytest.raises(UserError, match="one transparent colour of 16 bits a channel"):
        data.read_image(tmp_path / "x.png")


def test_what_is_read_otherwise_is_said_once(own_photos, tmp_path, capsys):
    for path in (own_photos / "test").iterdir():
        Image.new("RGBA", (300, 300), (0, 0, 0, 0)).save(path.with_suffix(".png"))
        path.unlink()
    assert (data.load_split(str(own_photos), "test", tmp_path)[:] == 255).all()
    said = capsys.readouterr().err
    assert said == f"{own_photos / 'test'}: 3 images: transparent parts are put on white\n"
    data.load_split(str(own_photos), "test", tmp_path)
    assert capsys.readouterr().err == ""


def test_other_colour_profiles_are_said_and_srgb_is_not(photos, tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    other = srgb.replace(b"rXYZ", b"none", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"none", b"gXYZ", 1)
    with Image.open(photos / "test" / "00.jpg") as image:
        for mode in ("RGB", "L", "CMYK", "RGBA"):
            for profile, said in ((srgb, []), (other, ["a colour profile other than sRGB is ignored"])):
                for suffix in ("tif", "jpg", "png")[: 1 if mode == "RGBA" else 2 if mode == "CMYK" else 3]:
                    picture, path, notes = image.convert(mode), tmp_path / f"x.{suffix}", []
                    picture.save(path, icc_profile=profile)
                    found = data.read_image(path, notes.append)
                    assert notes == (said if mode != "L" else []), (mode, suffix)
                    with Image.open(path) as stored:
                        assert np.array_equal(found, stored.convert("RGB"))
        notes = []
        image.save(tmp_path / "x.png", icc_profile=b"no profile")
        assert np.array_equal(data.read_image(tmp_path / "x.png", notes.append), image) and len(notes) == 1


def test_odd_metadata_is_no_reason_to_refuse(photos, tmp_path):
    with Image.open(photos / "test" / "00.jpg") as image:
        pixels = np.asarray(image)
        text = PngImagePlugin.PngInfo()
        text.add_text("comment", "word " * 500_000, zip=True)
        image.save(tmp_path / "text.png", pnginfo=text)
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", "word " * 500_000, zip=True)
        image.save(tmp_path / "itext.png", pnginfo=text)
        image.save(tmp_path / "profile.png", icc_profile=bytes(3_000_000))
        negative = ifd((0x0112, 3, 1, 6), (0x9999, 8, 1, -5), (0x999A, 9, 1, -70_000))
        image.save(tmp_path / "negative.png", exif=b"Exif\0\0" + negative)
        image.save(tmp_path / "cut.png", exif=b"Exif\0\0" + negative[:15])
    for path in tmp_path.iterdir():
        expected = np.rot90(pixels, -1) if path.stem == "negative" else pixels
        assert np.array_equal(data.read_image(path), expected), path


def test_first_of_several_frames(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    for suffix in ("gif", "png", "tif", "webp", "mpo"):
        path = tmp_path / f"x.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
        found = np.asarray(data.read_image(path)).astype(int)
        assert np.abs(found - [255, 0, 0]).max() <= 2, suffix


def test_sent_in_files():
    folder = NATURAL.parent / "inputs"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    means = {"grey12.tif": 140, "grey16_exif6.png": 140, "alpha_rgba.png": 165}
    for path in folder.iterdir():
        if path.suffix in data.EXTENSIONS:
            found = np.asarray(data.read_image(path))
            assert found.mean() == pytest.approx(means.get(path.name, found.mean()), abs=1), path
            assert path.name != "grey16_exif6.png" or found.shape[0] > found.shape[1]


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


def test_other_files_are_counted_once(own_photos, tmp_path, capsys):
    for name in ("notes.txt", "Thumbs.db", "photo", ".hidden", "deep/a.xml"):
        (own_photos / "train" / name).parent.mkdir(exist_ok=True)
        (own_photos / "train" / name).write_bytes(b"x")
    for split in ("train", "val", "train"):
        data.load_split(str(own_photos), split, tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{own_photos / 'train'}: left out 4 files") and line.endswith("Thumbs.db")


def test_a_folder_has_what_pillow_reads(photos, tmp_path):
    (tmp_path / "test").mkdir()
    names = {f"x.{suffix}" for suffix in "jfif jpe JPE gif pgm pnm jp2 tga qoi dib pcx ppm apng".split()}
    if ".avif" in data.EXTENSIONS:
        names.add("x.avif")
    with Image.open(photos / "test" / "00.jpg") as image:
        for name in {*names, "x.eps", "x.pdf"}:
            image.convert("L" if name == "x.pgm" else "RGB").save(tmp_path / "test" / name)
        expected = np.asarray(image).astype(int)
    images = data.load_split(str(tmp_path), "test", tmp_path / "cache")
    assert set(images.names) == names
    for name, pixels in zip(images.names, images[:].numpy(), strict=True):
        wanted = expected.mean(2, keepdims=True) if name == "x.pgm" else expected
        assert np.abs(pixels - wanted).mean() < 12, name  # a GIF has few colours


def test_postscript_is_never_run(photos, tmp_path):
    """Whatever a file is called."""
    with Image.open(photos / "test" / "00.jpg") as image:
        image.save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    with pytest.raises(UserError, match="cannot identify"):
        data.read_image(tmp_path / "x.png")


@pytest.mark.parametrize("name", ["gone.png", "gone"])
def test_links_to_nothing_are_named(own_photos, name):
    (own_photos / "test" / name).symlink_to(own_photos / "nowhere" / name)
    with pytest.raises(UserError, match=f"test/{name}: no file, or a link to a missing one"):
        data.load_split(str(own_photos), "test")
    (own_photos / "val").symlink_to(own_photos / "nowhere")
    with pytest.raises(OSError, match="val"):
        data.load_split(str(own_photos), "val")


def test_own_validation_images(own_photos, tmp_path, capsys):
    """In val/ beside train/: they take the place of a fifth of the training images, not DIV2K's."""
    shutil.copytree(own_photos / "test", own_photos / "val")
    names = {s: data.load_split(str(own_photos), s, tmp_path / "c").names for s in ("train", "val", "test")}
    assert names["train"] == [f"{i:02}.png" for i in range(10)]
    assert names["val"] == names["test"] == [f"{i:02}.jpg" for i in range(3)]
    assert data.folder_of(str(own_photos), "val") == own_photos / "val"
    assert capsys.readouterr().err == f"{own_photos}: training on all of train/, validation on val/\n"
    (own_photos / "train").rename(own_photos / "DIV2K_train_HR")
    counts = [len(data.load_split(str(own_photos), split, tmp_path / "c")) for split in ("train", "val")]
    assert counts == [8, 2]


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
