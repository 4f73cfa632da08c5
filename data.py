"""From files to tensors: folder layouts, the split, the uint8 cache and random crops."""

import functools
import hashlib
import io
import itertools
import json
import math
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageCms, ImageOps, PngImagePlugin, features
from tqdm import tqdm

from utils import DOCUMENTED, IMAGE_SIZE, UserError, atomic, digest, locked, same_data, user_cache, write_text

RESIZE = 256  # side of the images that the study crops
SHARD = 4096  # images in a file of the cache, about 800 MB
# Pillow needs another program to read these, or does not know which value is white
UNREAD = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MCIDAS", "MPEG", "SPIDER", "WMF"}
ENDINGS = Image.registered_extensions()  # {".png": "PNG", …}
FORMATS = [name for name in Image.OPEN if name not in UNREAD]
EXTENSIONS = {ending for ending, name in ENDINGS.items() if name in {*FORMATS, "MPO"}}
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MB of text or profile in a PNG, not 1
FOLDERS = {"train": ("DIV2K_train_HR", "train"), "test": ("DIV2K_valid_HR", "test")}
FOLDERS["val"] = ("DIV2K_train_HR", "val", "train")
DIV2K_ROOT = "data/DIV2K"
# scikit-image's natural colour images, each in one split; the stereo pair and the unnatural ones train
SAMPLE = {
    "train": "astronaut hubble_deep_field ihc motorcycle_left motorcycle_right retina".split(),
    "val": ["rocket"],
    "test": ["chelsea", "coffee"],
}


@dataclass
class Images:
    """One split. Images are read from the cache on access, so that their number costs no memory."""

    names: list
    sizes: torch.Tensor  # int64 (N, 2), heights and widths
    shards: list  # open files of the cache, or uint8 arrays: pixels, image after image
    places: np.ndarray  # int64 (N, 2): the image's shard, and its first byte there
    digests: np.ndarray  # uint8 (N, 32): the SHA-256 of each image's pixels
    side: int = RESIZE  # of the square that validation and test cut their centre from
    resident: torch.Tensor | None = None  # uint8 (P, 3): the pixels of all images, on a GPU

    def __len__(self):
        return len(self.names)

    @property
    def key(self):
        """A hash of the names, their order and the pixels."""
        return short_hash(json.dumps([self.names, self.sizes.tolist(), self.digests.tobytes().hex()]))

    def __getitem__(self, which):
        """The central side×side of the images in a slice or a list of indices: uint8 (B, side, side, 3)."""
        indices = range(len(self))[which] if isinstance(which, slice) else which
        return torch.stack([center(self.image(i)[None], self.side)[0].clone() for i in indices])

    def image(self, index):
        """One image, uint8 (H, W, 3), mapped into memory: an open file until it is released or cloned."""
        height, width = self.sizes[index].tolist()
        if self.resident is not None:
            start = int(self.sizes[:index].prod(1).sum())
            return self.resident[start : start + height * width].view(height, width, 3)
        shard, start = self.places[index].tolist()
        pixels = self.shards[shard]
        if isinstance(pixels, np.ndarray):
            return torch.from_numpy(pixels[start : start + 3 * height * width].reshape(height, width, 3))
        # mode c: what torch would write there would not reach the file
        return torch.from_numpy(np.memmap(pixels, np.uint8, "c", start, (height, width, 3)))

    def to(self, device):
        """These images, kept on a GPU if they fill less than a quarter of its free memory."""
        size = 3 * int(self.sizes.prod(1).sum())
        fits = device.type == "cuda" and 4 * size <= torch.cuda.mem_get_info(device)[0]
        return self.at(device) if fits else self

    def at(self, device):
        """These images with all pixels in the memory of `device`."""
        areas = self.sizes.prod(1).tolist()
        resident = torch.empty(sum(areas), 3, dtype=torch.uint8, device=device)
        for index, part in enumerate(resident.split(areas)):
            part.copy_(self.image(index).flatten(0, 1))
        return replace(self, resident=resident, sizes=self.sizes.to(device))


def resolve(data):
    """The data for `--data`: `sample` or a folder. None: DIV2K if it is there, else the sample. UserError."""
    if data is None and Path(DIV2K_ROOT).is_dir():
        return DIV2K_ROOT
    if data is None:
        print(
            f"*** No --data and no {DIV2K_ROOT}: using the embedded SAMPLE, tiles of nine images. ***\n"
            "*** For the study's data: train.py --download (3.7 GB), or --data FOLDER with its layout. ***"
        )
        return "sample"
    if data != "sample" and not Path(data).is_dir():
        raise UserError(f"--data {data}: no such folder; give one with train/ and test/, DIV2K's or `sample`")
    return str(data)


def of_checkpoint(data, trained_on, ckpt):
    """Which data to test a checkpoint on, and the folder for the results. Raises UserError."""
    out = Path(ckpt).parent
    source = resolve(data or trained_on)
    if same_data(source, trained_on):
        return trained_on, out
    return source, out / Path(source).resolve().name


@functools.cache
def say(line):
    """Print `line` on stderr once, in the first process."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(line, file=sys.stderr)


def image_files(folder):
    """Image files in `folder` and its subfolders, sorted, without hidden ones. Raises OSError, UserError."""

    def refuse(error):
        raise error

    found, seen, others = [], set(), []
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(place) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for path in (Path(place, name) for name in files if name[0] != "."):
            if not path.is_file():
                raise UserError(f"{path}: no file, or a link to a missing one; remove it")
            if path.suffix.lower() in EXTENSIONS:
                check_name(path)
                found.append(path)
            else:
                others.append(path)
    if others:
        say(f"{folder}: left out {len(others)} files that are not images, such as {min(others)}")
    return sorted(found)


def check_name(path):
    """Raise UserError for a file name that is not UTF-8: the results are text files and name the images."""
    if any("\ud800" <= letter <= "\udfff" for letter in str(path)):
        raise UserError(f"{ascii(str(path))}: its name is not UTF-8; rename it")


def side_of(size):
    """Side of the image that a size×size crop is cut from: 256 for the study's 224."""
    return round(size * RESIZE / IMAGE_SIZE)


def load_split(data, split, cache=None, protocol=DOCUMENTED, *, bars=None, size=IMAGE_SIZE):
    """Images of `split` (train, val or test) of `data`, a value that `resolve` returned.

    Without a val/, train and val are 80 and 20 % of the training images, in the order of a permutation with
    seed 42 (paper 3.3.1). bars: tqdm's `disable`. size: side of the crops. Raises UserError.
    """
    side = side_of(size)
    if data == "sample":
        return sample_tiles(split, side)
    folder = folder_of(data, split)
    shared = split != "test" and folder_of(data, "train") == folder_of(data, "val")
    if split != "test" and not shared:
        say(f"{data}: training on all of train/, validation on val/")
    files = image_files(folder)
    if len(files) < 1 + shared:
        raise UserError(f"{folder}: {len(files)} images that Pillow reads; at least {1 + shared} needed")
    order = np.arange(len(files))
    if shared:
        order = np.random.RandomState(42).permutation(len(files))
        cut = min(max(int(0.8 * len(files)), 1), len(files) - 1)
        order = order[:cut] if split == "train" else order[cut:]
    resized = "" if side == RESIZE else f"{side} "
    place = user_cache(cache) / short_hash(f"{resized}{protocol.name} {folder.resolve()}")
    read = functools.partial(decode, protocol=protocol, side=side)
    images = cached_images(folder, files, place, read, bars)
    return subset(replace(images, side=side), order)


def folder_of(data, split):
    """The folder in `data` with the images of `split`. Raises UserError."""
    for name in FOLDERS[split]:
        folder = Path(data, name)
        if folder.is_dir() or folder.is_symlink():  # a broken link is an error, not another layout
            return folder
    raise UserError(f"--data {data}: has no folder for the {split} images, {' or '.join(FOLDERS[split])}")


def subset(images, order):
    """The Images with these indices, in this order."""
    parts = {name: getattr(images, name)[order] for name in ("sizes", "places", "digests")}
    return replace(images, names=[images.names[i] for i in order], **parts)


def read_image(path, note=say):
    """The image at `path`, upright, as RGB. Raises UserError if it is damaged, huge or of unknown range."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.verify()  # a PNG's checksums, which decoding ignores
        with Image.open(path, formats=FORMATS) as image:
            if image.format == "PNG" and "transparency" in image.info:  # Pillow has only the pixels in 8 bits
                if image.tile[0][3] == "RGB;16B":
                    raise ValueError("one transparent colour of 16 bits a channel")
                image.info["transparency"] *= {"L;2": 85, "L;4": 17}.get(image.tile[0][3], 1)
            image.load()
            with suppress(Exception):  # unreadable EXIF
                ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image, note)
    except Exception as error:  # every Pillow plugin has its own kinds
        raise UserError(f"{path}: not an image that can be read ({error}); replace or remove it") from None


def to_rgb(image, note):
    """A PIL image of any mode as RGB; calls `note` with what is lost. Raises ValueError."""
    if profile := image.info.get("icc_profile"):
        moved = 255
        with suppress(Exception):  # a profile that is damaged, or not of RGB
            colours = image.resize((64, 64), Image.Resampling.NEAREST).convert("RGB")
            srgb = ImageCms.profileToProfile(colours, io.BytesIO(profile), ImageCms.createProfile("sRGB"))
            moved = max(most for _, most in ImageChops.difference(colours, srgb).getextrema())
        if moved > 1:
            note("a colour profile other than sRGB is ignored")
    tags = image.tag_v2 if image.format == "TIFF" else {}
    bits = tags.get(258, (16,))[0]
    if image.mode == "F" or bits > 16 or {*tags.get(339, (1,))} != {1}:
        raise ValueError("signed, floating-point or 32-bit pixels, of no known range")
    if image.mode[0] == "I":  # grey of more than 8 bits, which convert() would clip to white
        pixels = np.asarray(image)
        grey = np.interp(pixels, (0, 2**bits - 1), (255, 0) if tags.get(262) == 0 else (0, 255))
        opaque = 255 * (pixels != image.info.get("transparency", -1))
        image = Image.fromarray(np.stack([grey.round(), opaque], 2).astype(np.uint8))
    image = image.convert("LA") if image.mode == "La" else image  # or it would lose its transparency
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    if image.getextrema()[3][0] < 255:
        note("transparent parts are put on white")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def decode(path, protocol=DOCUMENTED, side=RESIZE, note=say):
    """The image at `path`, uint8 (H, W, 3): side×side, or of `published` with `side` as its shorter side."""
    image = read_image(path, note)  # Pillow's bilinear filter is antialiased
    size = [side if protocol.squeezed else side * length // min(image.size) for length in image.size]
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR))


def cached_images(folder, files, cache, read, bars=None):
    """Images of `files` in `folder`; `read` decodes new or changed ones, the folder `cache` keeps all."""
    names = [file.relative_to(folder).as_posix() for file in files]
    made_by = [digest(__file__), *map(features.version, ("pil", *features.get_supported_codecs()))]
    entries = {}  # {key: file}
    for name, file in zip(names, files, strict=True):
        found = file.stat()  # a program can set the mtime, but not the ctime
        about = [name, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, made_by]
        entries[short_hash(json.dumps(about))] = file
    rows = read_cache(cache)
    if not entries.keys() <= rows.keys():
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / ".lock"), warnings.catch_warnings():  # a second run waits, then finds the cache
            warnings.simplefilter("ignore")  # Pillow's, about odd metadata
            rows = build_cache(cache, entries, folder, read, bars)
    rows = [rows[key] for key in entries]
    shards = {shard: number for number, shard in enumerate(dict.fromkeys(row[0] for row in rows))}
    places = np.array([(shards[shard], start) for shard, start, *_ in rows])
    digests = np.array([list(bytes.fromhex(row[4])) for row in rows], np.uint8)
    opened = [open(shard, "rb") for shard in shards]  # another run may replace the files
    return Images(names, torch.tensor([row[2:4] for row in rows]), opened, places, digests)


def read_cache(cache):
    """{key: (shard, start, height, width, SHA-256)} of the images in the folder `cache`."""
    rows = {}
    for path in cache.glob("*.json"):  # a shard's manifest, written after its pixels
        with suppress(OSError, ValueError, TypeError, AttributeError):  # a damaged one
            check, manifest = json.loads(path.read_text())
            size = sum(3 * height * width for _, height, width, _ in manifest.values())
            shard = path.with_suffix(".u8")
            if (check, size) == (short_hash(json.dumps(manifest)), shard.stat().st_size):
                rows |= {key: (shard, *row) for key, row in manifest.items()}
    return rows


def build_cache(cache, entries, folder, read, bars):
    """Decode what `cache` lacks of `entries`, {key: file}. Raises one UserError for all bad images."""
    rows, bad, notes = read_cache(cache), [], []
    if len(rows) > 2 * len(entries) or len([*cache.glob("*.u8")]) > 64 + len(entries) / SHARD:
        rows = {}  # start again: most images are gone, or there are many small shards
    missing = [key for key in entries if key not in rows]
    progress = {"desc": f"Decoding {folder}", "total": len(missing), "unit": "image", "disable": bars}
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for first in range(0, len(missing), SHARD):
            part, manifest = missing[first : first + SHARD], {}
            jobs = {key: pool.submit(read, entries[key], note=notes.append) for key in part}
            shard = cache / f"{short_hash(' '.join(part))}.u8"
            with atomic(shard) as temporary, open(temporary, "wb") as file:
                for key in tqdm(part, initial=first, **progress):
                    try:
                        image = jobs.pop(key).result()
                    except UserError as error:
                        bad.append(str(error))
                        continue
                    manifest[key] = file.tell(), *image.shape[:2], hashlib.sha256(image).hexdigest()
                    file.write(image)
            check = short_hash(json.dumps(manifest))
            write_text(shard.with_suffix(".json"), json.dumps([check, manifest]))
            rows |= {key: (shard, *row) for key, row in manifest.items()}
    finally:
        pool.shutdown(cancel_futures=True)
    for what in sorted(set(notes)):
        say(f"{folder}: {notes.count(what)} images: {what}")
    if bad:
        raise UserError("; ".join(sorted(bad)[:10]) + f"; {len(bad)} in all" * (len(bad) > 10))
    used = {rows[key][0] for key in entries}
    for old in [*cache.glob("*.u8"), *cache.glob("*.json")]:
        if old.with_suffix(".u8") not in used:
            old.unlink()
    if not bars:
        print(f"{folder}: {len(entries)} images, {sum(map(os.path.getsize, used)) / 1e9:.2f} GB in {cache}")
    return rows


def short_hash(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sample_tiles(split, side=RESIZE):
    """side×side tiles of scikit-image's images, scaled to their full, half and quarter size and to `side`."""
    import skimage  # here, since only the sample needs it

    tiles, names = [], []
    for name in SAMPLE[split]:
        (path,) = Path(skimage.__file__).parent.glob(f"data/{name}.*")
        image = read_image(path, note=str)  # prints nothing
        short = min(image.size)
        scales = {scale for scale in (short, short // 2, short // 4, side) if scale >= side}
        for scale in sorted(scales, reverse=True):
            size = [max(side, round(length * scale / short)) for length in image.size]
            scaled = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
            # the fewest tiles that cover the image, evenly spaced
            lefts, tops = (np.linspace(0, n - side, math.ceil(n / side)).astype(int) for n in size)
            for top, left in itertools.product(tops, lefts):
                tiles.append(scaled[top : top + side, left : left + side])
                names.append(f"{name}-{scale}-{top}-{left}")
    return squares(np.stack(tiles), names)


def squares(pixels, names):
    """Images in memory, of a uint8 array (N, side, side, 3) and their names."""
    count, side = pixels.shape[:2]
    places = np.stack([np.zeros(count, np.int64), np.arange(count) * 3 * side**2], 1)
    digests = np.array([list(hashlib.sha256(image).digest()) for image in pixels], np.uint8)
    return Images(names, torch.full((count, 2), side), [pixels.reshape(-1)], places, digests, side)


def crops(images, places, size=IMAGE_SIZE):
    """Crops at `places`, a part of an epoch_plan → float (B, 3, size, size) in [0, 1], channels last."""
    index, tops, lefts, flips = places  # int64 (B,), flips bool
    if images.resident is None:
        corners = zip(index.tolist(), tops.tolist(), lefts.tolist(), strict=True)
        parts = (images.image(i)[top : top + size, left : left + size].clone() for i, top, left in corners)
        batch = torch.stack(list(parts))
        batch = torch.where(flips[:, None, None, None], batch.flip(2), batch)
    else:  # a GPU gathers all at once
        areas, widths = images.sizes.prod(1), images.sizes[:, 1]
        starts = areas.cumsum(0) - areas
        span = torch.arange(size, device=index.device)
        rows = tops[:, None] + span
        columns = lefts[:, None] + torch.where(flips[:, None], size - 1 - span, span)
        begins = starts[index, None] + rows * widths[index, None]  # (B, size), of each row
        batch = images.resident[begins[:, :, None] + columns[:, None, :]]  # (B, size, size, 3)
    return batch.permute(0, 3, 1, 2).float().div_(255)


def center(pixels, size):
    """The central size×size of pixels (B, H, W, 3)."""
    top, left = ((length - size) // 2 for length in pixels.shape[1:3])
    return pixels[:, top : top + size, left : left + size]


def center_crops(pixels, size=IMAGE_SIZE):
    """The centre of uint8 pixels (B, H, W, 3) → float (B, 3, size, size) in [0, 1], channels last."""
    return center(pixels, size).permute(0, 3, 1, 2).float().div_(255)


def to_pixels(images):
    """Images (B, 3, H, W) in [0, 1] as uint8 (B, H, W, 3), on the CPU."""
    return (255 * images).round().byte().permute(0, 2, 3, 1).cpu()


def epoch_plan(sizes, seed, number, size=IMAGE_SIZE, side=RESIZE):
    """Index, top, left and horizontal flip, (N,) each, of the crops of a pass; the same on every device."""
    generator = torch.Generator().manual_seed(seed * 100_003 + number)
    count, room, device = len(sizes), side - size + 1, sizes.device
    order = torch.randperm(count, generator=generator)
    offsets = torch.randint(0, room, (2, count), generator=generator)
    flips = torch.rand(count, generator=generator) < 0.5
    # (offsets + part) / room is uniform in [0, 1): on an edge of `side` pixels it gives `offsets` again
    part = torch.rand(2, count, generator=generator, dtype=torch.float64)
    offsets = ((offsets + part) / room * (sizes.cpu()[order].T - size + 1)).long()
    return order.to(device), *offsets.to(device), flips.to(device)
