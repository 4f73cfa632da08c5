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

from utils import (
    DOCUMENTED,
    IMAGE_SIZE,
    UserError,
    atomic,
    digest,
    locked,
    same_data,
    user_cache,
    write_text,
)

RESIZE = 256  # side of the images that the study crops
SHARD = 4096  # images in a file of the cache, about 800 MB
# What Pillow opens, but draws only by other programs, or without knowing which value is white.
UNREAD = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MCIDAS", "MPEG", "SPIDER", "WMF"}
ENDINGS = Image.registered_extensions()  # {".png": "PNG"} and so on
FORMATS = [name for name in Image.OPEN if name not in UNREAD]
EXTENSIONS = {ending for ending, name in ENDINGS.items() if name in {*FORMATS, "MPO"}}
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MB of text or profile in a PNG, not 1
FOLDERS = {"train": ("DIV2K_train_HR", "train"), "test": ("DIV2K_valid_HR", "test")}
FOLDERS["val"] = ("DIV2K_train_HR", "val", "train")
DIV2K_ROOT = "data/DIV2K"
# The colour photographs inside scikit-image, each in one split only; the stereo pair stays together, and what
# is validated and tested on is natural: not the sky at night, the inside of an eye or a microscope's slide.
SAMPLE = {
    "train": (
        "astronaut.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "retina.jpg",
    ),
    "val": ("rocket.jpg",),
    "test": ("chelsea.png", "coffee.png"),
}


@dataclass
class Images:
    """One split, whose images are read from the cache when they are asked for: any number takes no memory."""

    names: list
    sizes: torch.Tensor  # int64 (N, 2), heights and widths
    shards: list  # open files of the cache, or uint8 arrays: pixels, image after image
    places: np.ndarray  # int64 (N, 2): in which shard each image is, and at which byte it begins
    digests: np.ndarray  # uint8 (N, 32): the SHA-256 of each image's pixels
    side: int = RESIZE  # of the square that validation and test cut their centre from
    resident: torch.Tensor | None = None  # uint8 (P, 3): the pixels of all, in this order, on a GPU

    def __len__(self):
        return len(self.names)

    @property
    def key(self):
        """Changes with the names, their order or the pixels, and with nothing else."""
        return short_hash(json.dumps([self.names, self.sizes.tolist(), self.digests.tobytes().hex()]))

    def __getitem__(self, which):
        """The central side×side of the images in a slice or a list of numbers: uint8 (B, side, side, 3)."""
        numbers = range(len(self))[which] if isinstance(which, slice) else which
        shape = (len(numbers), self.side, self.side, 3)
        pixels = torch.empty(shape, dtype=torch.uint8, device=self.sizes.device)
        for place, number in enumerate(numbers):
            pixels[place] = center(self.image(number)[None], self.side)[0]
        return pixels

    def image(self, number):
        """One image, uint8 (H, W, 3): mapped into memory, read where it is used, and held by no one else."""
        height, width = self.sizes[number].tolist()
        if self.resident is not None:
            start = int((self.sizes[:number, 0] * self.sizes[:number, 1]).sum())
            return self.resident[start : start + height * width].view(height, width, 3)
        shard, start = self.places[number].tolist()
        pixels = self.shards[shard]
        if isinstance(pixels, np.ndarray):
            return torch.from_numpy(pixels[start : start + 3 * height * width].reshape(height, width, 3))
        # mode c: what torch would write there would not reach the file
        return torch.from_numpy(np.memmap(pixels, np.uint8, "c", start, (height, width, 3)))

    def to(self, device):
        """The same with its pixels on a GPU that has four times the room; else as it is."""
        total = 3 * int((self.sizes[:, 0] * self.sizes[:, 1]).sum())
        room = device.type == "cuda" and torch.cuda.mem_get_info(device)[0] >= 4 * total
        return self.at(device) if room else self

    def at(self, device):
        """The same with the pixels of all images in the memory of `device`."""
        ends = (self.sizes[:, 0] * self.sizes[:, 1]).cumsum(0).tolist()
        resident = torch.empty(ends[-1], 3, dtype=torch.uint8, device=device)
        for number, end in enumerate(ends):
            image = self.image(number).flatten(0, 1)
            resident[end - len(image) : end] = image
        return replace(self, resident=resident, sizes=self.sizes.to(device))


def resolve(data):
    """The data to use for `--data`: `sample`, or a folder that is there.

    None stands for DIV2K under data/DIV2K if it is there, else for the sample, and says so. Raises
    UserError for a folder that is not there.
    """
    if data is None:
        if Path(DIV2K_ROOT).is_dir():
            return DIV2K_ROOT
        print(
            f"*** No --data and no {DIV2K_ROOT}: using the embedded SAMPLE, nine photographs in tiles. ***\n"
            "*** For the study's data: train.py --download (3.7 GB), or --data FOLDER with its layout. ***"
        )
        return "sample"
    if data != "sample" and not Path(data).is_dir():
        raise UserError(f"--data {data}: no such folder; give one with train/ and test/, DIV2K's or `sample`")
    return str(data)


def of_checkpoint(data, trained_on, ckpt):
    """The data to test the checkpoint at path `ckpt` on, and the folder for the results.

    data: as of `--data`, or None for what it was `trained_on`, whose results lie beside the checkpoint; those
    of other data in a folder of its name there. Raises UserError for a folder that is not there.
    """
    out = Path(ckpt).parent
    source = resolve(data or trained_on)
    if same_data(source, trained_on):
        return trained_on, out
    return source, out / Path(source).resolve().name


@functools.cache
def say(line):
    """Print `line` on stderr, once; of several processes, in the first."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(line, file=sys.stderr)


def image_files(folder):
    """The image files in `folder` and the folders in it, sorted by path; hidden ones are left out.

    Says how many others there are. Raises OSError for a folder that cannot be read, and UserError for a link
    to a missing file or a name that no text file can hold.
    """

    def refuse(error):
        raise error

    found, seen, others = [], set(), []
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(place) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for path in (os.path.join(place, name) for name in files if name[0] != "."):
            if not os.path.isfile(path):
                raise UserError(f"{path}: no file, or a link to a missing one; remove it")
            if os.path.splitext(path)[1].lower() not in EXTENSIONS:
                others.append(path)
            else:
                check_name(path)
                found.append(Path(path))
    if others:
        say(f"{folder}: left out {len(others)} files that are no images by name, such as {min(others)}")
    return sorted(found)


def check_name(path):
    """Raise UserError for a file's name in another encoding than UTF-8: results name the images."""
    if any("\ud800" <= letter <= "\udfff" for letter in str(path)):
        raise UserError(f"{ascii(str(path))}: its name is not UTF-8; rename it")


def side_of(size):
    """Side of the image that a size×size crop is cut from: 256 for the study's 224."""
    return round(size * RESIZE / IMAGE_SIZE)


def load_split(data, split, cache=None, protocol=DOCUMENTED, *, bars=None, size=IMAGE_SIZE):
    """Images of `split` (train, val or test) of `data`, a value that `resolve` returned.

    A folder's train and val are 80 and 20 % of its training images, by a permutation with seed 42 (paper
    3.3.1: 640 and 160 of DIV2K's 800), unless a val/ is beside its train/. Raises UserError for a folder of
    another layout, too few images, or images that can't be read. cache: folder of the uint8 cache. protocol:
    as for `decode`. bars: tqdm's `disable`. size: of the crops, where not 224; images grow with it.
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
    """The folder in `data` that has the images of `split`, train, val or test. Raises UserError."""
    for name in FOLDERS[split]:
        folder = Path(data, name)
        if folder.is_dir() or folder.is_symlink():  # one that leads nowhere is an error, not another layout
            return folder
    raise UserError(f"--data {data}: has no folder for the {split} images, {' or '.join(FOLDERS[split])}")


def subset(images, order):
    """The Images of these numbers, in this order."""
    parts = {name: getattr(images, name)[order] for name in ("sizes", "places", "digests")}
    return replace(images, names=[images.names[i] for i in order], **parts)


def read_image(path, note=say):
    """The image file at `path` as an RGB PIL image, upright, 8 bits a channel, whatever its mode.

    Raises UserError, naming it, for one that is damaged, no image, of unknown range, or absurdly large.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.verify()  # a PNG's checksums, which decoding alone does not look at
        with Image.open(path, formats=FORMATS) as image:
            if image.format == "PNG" and "transparency" in image.info:  # Pillow has only the pixels in 8 bits
                if image.tile[0][3] == "RGB;16B":
                    raise ValueError("one transparent colour of 16 bits a channel")
                image.info["transparency"] *= {"L;2": 85, "L;4": 17}.get(image.tile[0][3], 1)
            image.load()
            with suppress(Exception):  # EXIF that can't be read turns nothing
                ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image, note)
    except Exception as error:  # every Pillow plugin has its own kinds
        raise UserError(f"{path}: not an image that can be read ({error}); replace or remove it") from None


def to_rgb(image, note):
    """A PIL image of any mode as RGB. Raises ValueError where no one knows which value is white.

    Transparent parts become white; colour profiles are ignored, as in most training. Either calls `note`.
    """
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
    """The image at `path`, resized (bilinear, antialiased as Pillow's always is), as a uint8 array.

    `documented`: (side, side, 3). `published`: the shorter side is `side`, the shape of the picture stays.
    """
    image = read_image(path, note)
    size = [side if protocol.squeezed else side * length // min(image.size) for length in image.size]
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR))


def cached_images(folder, files, cache, read, bars=None):
    """Images of `files`, all under `folder`, each decoded once, by `read`, and kept in the folder `cache`.

    An image's key stands for its file's name, size, times and inode, for the code here, and for Pillow.
    """
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
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata; what matters is raised
            rows = build_cache(cache, entries, folder, read, bars)
    rows = [rows[key] for key in entries]
    shards = {shard: number for number, shard in enumerate(dict.fromkeys(row[0] for row in rows))}
    places = np.array([(shards[shard], start) for shard, start, *_ in rows])
    digests = np.array([list(bytes.fromhex(row[4])) for row in rows], np.uint8)
    opened = [open(shard, "rb") for shard in shards]  # another run may replace the files
    return Images(names, torch.tensor([row[2:4] for row in rows]), opened, places, digests)


def read_cache(cache):
    """{key: (shard, start, height, width, SHA-256)} of the images in folder `cache`."""
    rows = {}
    for path in cache.glob("*.json"):  # the manifest of a shard, written after its pixels
        with suppress(OSError, ValueError, TypeError, AttributeError):  # of one that is damaged
            check, manifest = json.loads(path.read_text())
            size = sum(3 * height * width for _, height, width, _ in manifest.values())
            shard = path.with_suffix(".u8")
            if (check, size) == (short_hash(json.dumps(manifest)), shard.stat().st_size):
                rows |= {key: (shard, *row) for key, row in manifest.items()}
    return rows


def build_cache(cache, entries, folder, read, bars):
    """Decode the files of `entries`, {key: file}, that `cache` lacks, in parallel; what read_cache returns.

    Raises UserError for images that can't be read, naming all; the others are kept.
    """
    rows, bad, notes = read_cache(cache), [], []
    if len(rows) > 2 * len(entries) or len([*cache.glob("*.u8")]) > 64 + len(entries) / SHARD:
        rows = {}  # most images are gone, or they are in many small shards
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
    """The first 16 hexadecimal digits of the SHA-256 of `text`."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sample_tiles(split, side=RESIZE):
    """side×side tiles of scikit-image's photographs at full, half, quarter size, and of the short side."""
    import skimage  # here, since only the sample needs it

    folder = Path(skimage.__file__).parent / "data"
    tiles, names = [], []
    for name in SAMPLE[split]:
        photo = read_image(folder / name, note=str)  # says nothing
        short = min(photo.size)
        for scale in sorted({short, short // 2, short // 4, side}, reverse=True):
            if scale < side:
                continue
            size = [max(side, round(length * scale / short)) for length in photo.size]
            scaled = np.asarray(photo.resize(size, Image.Resampling.BILINEAR))
            # the fewest tiles that cover the photograph, evenly spaced
            lefts, tops = (np.linspace(0, n - side, math.ceil(n / side)).astype(int) for n in size)
            for top, left in itertools.product(tops, lefts):
                tiles.append(scaled[top : top + side, left : left + side])
                names.append(f"{Path(name).stem}-{scale}-{top}-{left}")
    return squares(np.stack(tiles), names)


def squares(pixels, names):
    """Images in memory: pixels, a uint8 array (N, side, side, 3), and their names."""
    count, side = pixels.shape[:2]
    places = np.stack([np.zeros(count, np.int64), np.arange(count) * 3 * side**2], 1)
    digests = np.array([list(hashlib.sha256(image).digest()) for image in pixels], np.uint8)
    return Images(names, torch.full((count, 2), side), [pixels.reshape(-1)], places, digests, side)


def crops(images, places, size=IMAGE_SIZE):
    """Batched crops of Images → float (B, 3, size, size) in [0, 1], channels last, where the pixels are.

    places: index, tops, lefts, int64 (B,), and flips, bool (B,), left to right: a part of an epoch_plan.
    """
    index, tops, lefts, flips = places
    if images.resident is None:
        corners = zip(index.tolist(), tops.tolist(), lefts.tolist(), strict=True)
        batch = torch.stack(
            # a copy: each image that is mapped into memory is an open file for as long as it is looked at
            [images.image(i)[top : top + size, left : left + size].clone() for i, top, left in corners]
        )
        batch = torch.where(flips[:, None, None, None], batch.flip(2), batch)
    else:  # a GPU gathers them all at once
        heights, widths = images.sizes.unbind(1)
        starts = (heights * widths).cumsum(0) - heights * widths
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
    """Images (B, 3, H, W) in [0, 1] as 8-bit pixels, uint8 (B, H, W, 3), on the CPU."""
    return (255 * images).round().byte().permute(0, 2, 3, 1).cpu()


def epoch_plan(sizes, seed, number, size=IMAGE_SIZE, side=RESIZE):
    """Order, top, left and flip of size×size crops in a pass over images of `sizes` (N, 2), on their device.

    (seed, number of the pass) decides, so that it can be resumed, and is the same on every device.
    """
    generator = torch.Generator().manual_seed(seed * 100_003 + number)
    count, room, device = len(sizes), side - size + 1, sizes.device
    order = torch.randperm(count, generator=generator)
    offsets = torch.randint(0, room, (2, count), generator=generator)
    flips = torch.rand(count, generator=generator) < 0.5
    # (offsets + part) / room is uniform in [0, 1): times the room of this edge it is the offset there, which
    # on an edge of `side` pixels is `offsets` again.
    part = torch.rand(2, count, generator=generator, dtype=torch.float64)
    offsets = ((offsets + part) / room * (sizes.cpu()[order].T - size + 1)).long()
    return order.to(device), *offsets.to(device), flips.to(device)
