"""Files to tensors: layouts, split, cache, odd and bad images, and crops."""

import io
import os
import re
import resource
import shutil
import struct
import subprocess
import time
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import PIL.features
import pytest
import torch
from conftest import NATURAL, REPOSITORY
from PIL import Image, ImageCms, ImageColor, PngImagePlugin
from torchvision.transforms import functional as tv

import data
from extras.own_pictures import picture_files
from utils import PROTOCOLS, UserError, user_cache


def load(folder, split="test", cache=None):
    return data.load_split(str(folder), split, cache)


@pytest.mark.parametrize("names", [("train", "test"), ("DIV2K_train_HR", "DIV2K_valid_HR")])
def test_split_is_the_seed_42_permutation(photos, tmp_path, names):
    for split, name in zip(("train", "test"), names, strict=True):
        (tmp_path / name).symlink_to(photos / split)
    # numpy's RandomState(42).permutation(10), a stream that numpy guarantees for ever
    order = [f"{i:02}.png" for i in (8, 1, 5, 0, 7, 2, 9, 4, 3, 6)]
    assert load(tmp_path, "train").names == order[:8]
    assert load(tmp_path, "val").names == order[8:]
    assert len(load(tmp_path)) == 3


def test_sample_has_no_photograph_in_two_splits():
    splits = [data.load_split("sample", split) for split in ("train", "val", "test")]
    assert [len(images) for images in splits] == [98, 8, 14]
    photographs = [{re.split("-|_left|_right", name)[0] for name in images.names} for images in splits]
    assert len(set.union(*photographs)) == sum(map(len, photographs))
    assert all(images[:].shape == (len(images), 256, 256, 3) for images in splits)


# --- cache ---------------------------------------------------------------------------------------------


@pytest.fixture
def decoding(monkeypatch, tmp_path):
    """Load a split with a cache: the images, and the names of the files that were decoded for it."""
    names, real = [], data.decode
    monkeypatch.setattr(data, "decode", lambda path, **how: names.append(path.name) or real(path, **how))

    def call(folder, split="test"):
        names.clear()
        return load(folder, split, tmp_path / "cache"), sorted(names)

    return call


def test_a_file_is_decoded_when_it_changes_and_only_then(own_photos, decoding, capsys):
    images, decoded = decoding(own_photos)
    first = images[:]
    assert len(decoded) == 3 and "3 images, 0.00 GB in " in capsys.readouterr().out
    images, decoded = decoding(own_photos)
    assert torch.equal(images[:], first) and decoded == [] and capsys.readouterr().out == ""
    changed, touched = own_photos / "test" / "01.jpg", own_photos / "test" / "00.jpg"
    Image.new("RGB", (300, 300), "red").save(changed)
    images, decoded = decoding(own_photos)
    assert decoded == ["01.jpg"] and (images[1:2][..., 0] > 250).all() and torch.equal(images[:1], first[:1])
    changed.unlink()
    images, decoded = decoding(own_photos)
    assert torch.equal(images[:], first[[0, 2]]) and decoded == []
    before = touched.stat()
    os.utime(touched, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert decoding(own_photos)[1] == ["00.jpg"]


def test_another_image_of_the_same_size_and_time_is_decoded_anew(tmp_path):
    (tmp_path / "test").mkdir()
    for colour in ("red", "blue"):
        Image.new("RGB", (256, 256), colour).save(file := tmp_path / "test" / "x.bmp")
        os.utime(file, ns=(10**18, 10**18))
        found = load(tmp_path, cache=tmp_path / "cache").image(0)[0, 0]
        assert tuple(found.tolist()) == ImageColor.getrgb(colour)
        time.sleep(0.02)  # longer than a kernel's tick, which its times are as coarse as


def test_another_pillow_decodes_anew(photos, decoding, tmp_path, monkeypatch):
    def counts():
        return [len(decoding(photos)[1]) for _ in range(2)]

    assert counts() == [3, 0]
    monkeypatch.setattr(PIL.features, "version", lambda name: "9.9.9")
    assert counts() == [3, 0]
    assert len(list((tmp_path / "cache").glob("*/*.u8"))) == 1  # older ones are removed


def test_interrupted_build_goes_on(own_photos, decoding, tmp_path, monkeypatch):
    """Only the shard that was being written is decoded again."""
    monkeypatch.setattr(data, "SHARD", 4)
    real = data.decode

    def interrupted(path, **how):
        if path.name == "05.png":
            raise KeyboardInterrupt
        return real(path, **how)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "decode", interrupted)
        decoding(own_photos, "train")
    train, decoded = decoding(own_photos, "train")
    assert decoded == [f"{i:02}.png" for i in range(4, 10)]
    assert train.key == load(own_photos, "train", tmp_path / "whole").key


def test_all_bad_images_are_named_at_once_and_the_others_kept(own_photos, decoding, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 8)
    bad = [own_photos / "train" / f"bad{number:02}.png" for number in range(12)]
    for path in bad:
        path.write_bytes(b"no image")
    with pytest.raises(UserError) as found:
        decoding(own_photos, "train")
    message = str(found.value)
    assert re.findall(r"(\S+): not an image that can be read", message) == [str(path) for path in bad[:10]]
    assert message.endswith("; 12 in all")
    for path in bad:
        path.unlink()
    train, decoded = decoding(own_photos, "train")
    assert decoded == [] and len(train) == 8
    for name, pixels in zip(train.names, train[:], strict=True):
        assert np.array_equal(pixels, data.decode(own_photos / "train" / name))


def test_old_caches_go_by_the_command_of_the_guide(tmp_path):
    (command,) = re.findall(r"^find .*", (REPOSITORY / "docs" / "guide.md").read_text(), re.M)
    cache = tmp_path / ".cache" / "feature-inversion"
    for name, days in (("old", 40), ("new", 20)):
        (cache / name).mkdir(parents=True)
        (cache / name / "x.u8").touch()
        (cache / f"{name}.features").touch()
        for path in cache.glob(f"{name}*"):
            os.utime(path, (time.time() - days * 86400,) * 2)
    subprocess.run(["bash", "-c", command], env=os.environ | {"HOME": str(tmp_path)}, check=True)
    assert sorted(path.name for path in cache.iterdir()) == ["new", "new.features"]


def test_more_images_than_files_may_be_open(photos):
    images, zero = load(photos, "train"), torch.zeros(300, dtype=torch.int64)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, limits[1]))
    try:
        batch = data.crops(images, (zero, zero, zero, zero.bool()), 32)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert torch.equal(batch[299], images.image(0)[:32, :32].permute(2, 0, 1) / 255)


def test_a_name_that_is_no_text_is_named(own_photos):
    name = os.fsencode(own_photos / "train") + b"/caf\xe9.png"
    os.rename(own_photos / "train" / "00.png", name)
    for read in (lambda: load(own_photos, "train"), lambda: picture_files([os.fsdecode(name)])):
        with pytest.raises(UserError, match="udce9.png': its name is not UTF-8"):
            read()


def test_a_running_training_keeps_its_images(own_photos, tmp_path):
    """Though another run meets the folder with other photographs, and builds its cache anew."""
    images = load(own_photos, "train", tmp_path / "cache")
    before = images[:]
    for path in (own_photos / "train").iterdir():
        Image.new("RGB", (256, 256), "red").save(path)
    assert not torch.equal(load(own_photos, "train", tmp_path / "cache")[:], before)
    assert len(list((tmp_path / "cache").glob("*/*.u8"))) == 1 and torch.equal(images[:], before)


def test_finished_cache_needs_no_lock(own_photos, tmp_path, monkeypatch):
    """So that it can be in a folder where nothing may be written."""
    good = load(own_photos, cache=tmp_path)[:]
    monkeypatch.setattr(data, "locked", Mock(side_effect=PermissionError(13, "Permission denied")))
    assert torch.equal(load(own_photos, cache=tmp_path)[:], good)


def test_no_home_folder(monkeypatch, tmp_path):
    """A container's user may have none."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory.")))
    assert user_cache(tmp_path) == tmp_path
    with pytest.raises(UserError, match="--cache"):
        user_cache()


# --- folders -----------------------------------------------------------------------------------------------


def test_links_that_lead_back_and_folders_that_cannot_be_read(own_photos, monkeypatch):
    (own_photos / "test" / "again").symlink_to(own_photos / "test")
    assert len(data.image_files(own_photos / "test")) == 3
    monkeypatch.setattr(os, "scandir", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(PermissionError):
        data.image_files(own_photos / "test")


def test_folders_in_folders(photos, tmp_path):
    """ImageNet's own layout, train/CLASS/x.jpg; the same name may stand in two classes."""
    for number in range(10):
        name = "train/.hidden" if number == 0 else f"train/n{number % 2:02}"
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / "train" / f"{number:02}.png", tmp_path / name / f"{number // 2}.png")
    train, val = (load(tmp_path, split) for split in ("train", "val"))
    pictures = dict(zip(train.names + val.names, [*train[:], *val[:]], strict=True))
    assert sorted(pictures) == [*(f"n00/{i}.png" for i in range(1, 5)), *(f"n01/{i}.png" for i in range(5))]
    assert np.array_equal(pictures["n01/1.png"], Image.open(photos / "train" / "03.png"))


def test_files_that_are_no_images_are_left_out_and_counted_once(own_photos, tmp_path, capsys):
    for name in ("notes.txt", "Thumbs.db", "photo", ".hidden.png", "deep/a.xml"):
        (own_photos / "test" / name).parent.mkdir(exist_ok=True)
        (own_photos / "test" / name).write_bytes(b"x")
    (own_photos / "test" / "00.jpg").rename(own_photos / "test" / "00.JPEG")
    for _ in range(2):
        assert load(own_photos, cache=tmp_path).names == ["00.JPEG", "01.jpg", "02.jpg"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{own_photos / 'test'}: left out 4 files") and line.endswith("Thumbs.db")


def test_a_folder_has_what_pillow_reads(photos, tmp_path):
    (tmp_path / "test").mkdir()
    names = {f"x.{suffix}" for suffix in "jfif jpe JPE gif pnm jp2 tga qoi dib pcx ppm apng".split()}
    names |= {"x.avif"} & {f"x{suffix}" for suffix in data.EXTENSIONS}
    with Image.open(photos / "test" / "00.jpg") as image:
        for name in {*names, "x.eps", "x.pdf"}:
            image.save(tmp_path / "test" / name)
        expected = np.asarray(image).astype(int)
    images = load(tmp_path, cache=tmp_path / "cache")
    assert set(images.names) == names
    for name, pixels in zip(images.names, images[:].numpy(), strict=True):
        assert np.abs(pixels - expected).mean() < 12, name  # a GIF has few colours


def test_links_to_nothing_are_named(own_photos):
    (own_photos / "test" / "gone.png").symlink_to(own_photos / "nowhere")
    with pytest.raises(UserError, match="test/gone.png: no file, or a link to a missing one"):
        load(own_photos)
    (own_photos / "val").symlink_to(own_photos / "nowhere")
    with pytest.raises(OSError, match="val"):
        load(own_photos, "val")


def test_own_validation_images(own_photos, tmp_path, capsys):
    """In val/ beside train/: they take the place of a fifth of the training images, not DIV2K's."""
    shutil.copytree(own_photos / "test", own_photos / "val")
    names = {split: load(own_photos, split, tmp_path / "c").names for split in ("train", "val")}
    assert names["train"] == [f"{i:02}.png" for i in range(10)]
    assert names["val"] == [f"{i:02}.jpg" for i in range(3)]
    assert capsys.readouterr().err == f"{own_photos}: training on all of train/, validation on val/\n"
    (own_photos / "train").rename(own_photos / "DIV2K_train_HR")
    assert [len(load(own_photos, split, tmp_path / "c")) for split in ("train", "val")] == [8, 2]


# --- odd and bad images ----------------------------------------------------------------------------------


TURNED = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud}
TURNED |= {5: np.transpose, 6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).T, 8: np.rot90}


@pytest.mark.parametrize("mode", ["RGB", "LA", "P", "1", "I;16"])
def test_any_mode_is_upright(tmp_path, mode):
    grey = np.uint8(255 * np.random.RandomState(0).randint(0, 2, (6, 4)))
    image = Image.fromarray(np.uint16(257) * grey) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    exif = Image.Exif()
    for exif[0x0112], turn in TURNED.items():
        image.save(tmp_path / "turned.png", exif=exif)
        assert np.array_equal(np.asarray(data.read_image(tmp_path / "turned.png"))[..., 0], turn(grey)), exif


def saved(image, kind, **options):
    """The bytes of a PIL image in a format."""
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def tiff(pixels, photometric=1, sample_format=1, bits=None):
    """The bytes of an uncompressed grey TIFF of 4×1 pixels."""
    content, bits = pixels.tobytes(), bits or 8 * pixels.itemsize
    tags = {256: 4, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 134, 277: 1, 278: 1, 279: len(content)}
    entries = [(tag, 3, 1, value, 0) for tag, value in (tags | {339: sample_format}).items()]
    return struct.pack(f"<2sHIH{10 * 'HHIHH'}I", b"II", 42, 8, 10, *sum(entries, ()), 0) + content


def png(depth, row, shade):
    """The bytes of a grey PNG of 4×1 pixels, of which one shade is transparent."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", 4, 1, depth, 0, 0, 0, 0), b"tRNS": struct.pack(">H", shade)}
    content = b"\x89PNG\r\n\x1a\n"
    for kind, part in (chunks | {b"IDAT": zlib.compress(b"\0" + row), b"IEND": b""}).items():
        content += struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part))
    return content


SHADES = np.array([[0, 1000, 2048, 4095]], np.uint16)  # of 12 bits
GREY = np.array([[0, 300, 40_000, 65_535]], np.uint16)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (tiff(np.frombuffer(bytes.fromhex("0003e8800fff"), np.uint8), bits=12), [0, 62, 128, 255]),
        (tiff(SHADES), [0, 4, 8, 16]),
        (tiff(16 * SHADES, photometric=0), [255, 193, 127, 0]),
        (b"P5 4 1 65535\n" + GREY.astype(">u2").tobytes(), [0, 1, 156, 255]),
        (saved(Image.fromarray(GREY), "png"), [0, 1, 156, 255]),
        (png(2, bytes([0b00011011]), 2), [0, 85, 255, 255]),
        (png(4, bytes([0x05, 0xAF]), 10), [0, 85, 255, 255]),
        (png(16, GREY.astype(">u2").tobytes(), 300), [0, 255, 156, 255]),
    ],
    ids=len,
)
def test_greys_and_transparent_colours_are_right(tmp_path, content, expected):
    (tmp_path / "x.png").write_bytes(content)  # Pillow goes by the content
    found = np.asarray(data.read_image(tmp_path / "x.png"))
    assert found.shape == (1, 4, 3) and found[0, :, 0].tolist() == expected


FORMATS = {"RGBA": "png tif webp tga jp2 ico", "LA": "png tif", "P": "png gif", "PA": "tif"}


@pytest.mark.parametrize(
    ("mode", "suffix"), [(mode, suffix) for mode in FORMATS for suffix in FORMATS[mode].split()]
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


def test_what_is_read_otherwise_is_said_once(own_photos, tmp_path, capsys):
    for path in (own_photos / "test").iterdir():
        Image.new("RGBA", (300, 300), (0, 0, 0, 0)).save(path.with_suffix(".png"))
        path.unlink()
    for _ in range(2):
        assert (load(own_photos, cache=tmp_path)[:] == 255).all()
    said = capsys.readouterr().err
    assert said == f"{own_photos / 'test'}: 3 images: transparent parts are put on white\n"


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace(b"rXYZ", b"none", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"none", b"gXYZ", 1)


@pytest.mark.parametrize("profile", [SRGB, SWAPPED, b"no profile"], ids=["srgb", "swapped", "damaged"])
@pytest.mark.parametrize("kind", ["RGB.png", "CMYK.jpg", "RGBA.tif", "L.png"])
def test_other_colour_profiles_are_said_and_srgb_is_not(photos, tmp_path, kind, profile):
    path, notes = tmp_path / kind, []
    with Image.open(photos / "test" / "00.jpg") as image:
        image.convert(path.stem).save(path, icc_profile=profile)
    found = data.read_image(path, notes.append)
    same = profile == SRGB or (profile == SWAPPED and path.stem == "L")  # a grey of which is a grey
    assert notes == ([] if same else ["a colour profile other than sRGB is ignored"])
    with Image.open(path) as stored:
        assert np.array_equal(found, stored.convert("RGB"))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_odd_metadata_is_no_reason_to_refuse(photos, tmp_path):
    with Image.open(photos / "test" / "00.jpg") as image:
        pixels = np.asarray(image)
        for name, method in (("comment", "add_text"), ("XML:com.adobe.xmp", "add_itxt")):
            text = PngImagePlugin.PngInfo()
            getattr(text, method)(name, "word " * 500_000, zip=True)
            image.save(tmp_path / f"{method}.png", pnginfo=text)
        image.save(tmp_path / "profile.png", icc_profile=bytes(3_000_000))
        image.save(tmp_path / "cut.png", exif=b"Exif\0\0II*\0\x08\0\0\0\x03\0")
    for path in tmp_path.iterdir():
        assert np.array_equal(data.read_image(path), pixels), path


def test_first_of_several_frames(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    for suffix in ("gif", "png", "tif", "webp", "mpo"):
        path = tmp_path / f"x.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
        found = np.asarray(data.read_image(path)).astype(int)
        assert np.abs(found - [255, 0, 0]).max() <= 2, suffix


INPUTS = NATURAL.resolve().parent / "inputs"


@pytest.mark.skipif(not INPUTS.is_dir(), reason=f"{INPUTS} is not here")
def test_sent_in_files():
    """What users sent: 12 bits, turned 16 bits, transparency, a profile."""
    means = {"grey12.tif": 140, "grey16_exif6.png": 140, "alpha_rgba.png": 165}
    for path in INPUTS.iterdir():
        if path.suffix in data.EXTENSIONS:
            found = np.asarray(data.read_image(path))
            assert found.mean() == pytest.approx(means.get(path.name, found.mean()), abs=1), path
            assert path.name != "grey16_exif6.png" or found.shape[0] > found.shape[1]


WHOLE = saved(Image.linear_gradient("L"), "png")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (WHOLE[: len(WHOLE) // 2], ""),
        (b"", ""),
        (b"not an image", "cannot identify"),
        (b"P5 60000 60000 255\n", "decompression bomb"),
        (tiff(SHADES.astype("<u4")), "of no known range"),
        (tiff(SHADES.astype("<i2"), sample_format=2), "of no known range"),
        (tiff(SHADES.astype("<f4"), sample_format=3), "of no known range"),
        (saved(Image.new("RGB", (9, 9)), "eps"), "cannot identify"),  # no PostScript is ever run
    ],
    ids=len,
)
def test_bad_image_is_named(tmp_path, content, reason):
    (tmp_path / "04.png").write_bytes(content)
    with pytest.raises(UserError, match=f"04.png: not an image that can be read .*{reason}"):
        data.read_image(tmp_path / "04.png")


# --- crops -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 224])
@pytest.mark.parametrize("protocol", PROTOCOLS.values())
def test_crops_are_torchvisions(tmp_path, protocol, size):
    """Resize, random crops and flips; also as a GPU that holds all pixels gathers them."""
    (tmp_path / "train").mkdir()
    resized = {}
    shapes = [(400, 300), (300, 411), (600, 200), (256, 256), (301, 300)]
    for tile, shape in zip(data.sample_tiles("test")[:5], shapes, strict=True):
        photo, name = Image.fromarray(tile.numpy()).resize(shape), f"{len(resized)}.png"
        photo.save(tmp_path / "train" / name)
        photo = tv.resize(photo, [256, 256] if protocol.squeezed else 256)
        resized[name] = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    train, val = (data.load_split(str(tmp_path), s, protocol=protocol) for s in ("train", "val"))
    expected = tv.center_crop(resized[val.names[0]], [224, 224])[None] / 255
    assert len(train) == 4 and torch.equal(data.center_crops(val[:]), expected)
    resident = train.at(torch.device("cpu"))
    assert torch.equal(resident[1:3], train[1:3])
    reached = []
    for epoch in range(20):
        plan = data.epoch_plan(train.sizes, 42, epoch, size)
        crops = data.crops(train, plan, size)
        assert crops.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(data.crops(resident, plan, size), crops)
        for i, top, left, flip, crop in zip(*plan, crops, strict=True):
            expected = tv.crop(resized[train.names[i]], int(top), int(left), size, size)
            assert torch.equal(crop, (tv.hflip(expected) if flip else expected) / 255)
        reached.append((plan[1] + size - train.sizes[plan[0], 0]).max())
    assert -3 < max(reached) <= 0  # to the last rows


def test_a_pass_uses_every_image_once_and_every_crop():
    sizes = torch.tensor([[256, 300]]).expand(9000, 2)
    plan = order, tops, lefts, flips = data.epoch_plan(sizes, seed=1, number=3)
    assert sorted(order.tolist()) == list(range(9000))
    for offsets, places in ((tops, 33), (lefts, 77)):
        counts = torch.bincount(offsets) * places / 9000
        assert len(counts) == places and counts.min() > 0.5 and counts.max() < 1.6
    assert 0.47 < flips.float().mean() < 0.53
    assert all(map(torch.equal, plan, data.epoch_plan(sizes, 1, 3)))
    assert not torch.equal(data.epoch_plan(sizes, 1, 4)[0], order)
