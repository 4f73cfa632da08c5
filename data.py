"""From files to tensors: folder layouts, the split, the uint8 cache and random crops."""

import hashlib
import json
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from study import DOCUMENTED, IMAGE_SIZE
from utils import UserError, atomic, locked, same_data, user_cache, write_text

RESIZE = 256  # side of the images that the study crops
SHARD = 4096  # images in a file of the cache, about 800 MB
EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm"}
LAYOUTS = (("DIV2K_train_HR", "DIV2K_valid_HR"), ("train", "test"))  # folders of train + val, and of test
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
    key: str  # changes with the names, the order or the pixels
    side: int = RESIZE  # of the square that validation and test cut their centre from
    resident: torch.Tensor | None = None  # uint8 (P, 3): the pixels of all, in this order, on a GPU

    def __len__(self):
        return len(self.names)

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
        if device.type != "cuda" or 4 * total > torch.cuda.mem_get_info(device)[0]:
            return self
        return self.at(device)

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
        raise UserError(
            f"--data {data}: no such folder; give one with train/ and test/, DIV2K's, or `sample`"
        )
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


def image_files(folder):
    """The image files in `folder` and the folders in it, sorted by path; hidden ones are left out.

    Raises OSError for a folder that cannot be read, and UserError for a name that no text file can hold.
    """

    def refuse(error):
        raise error

    found, seen = [], set()
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(place) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        folders[:] = [name for name in folders if name[0] != "."]
        for name in files:
            if name[0] != "." and os.path.splitext(name)[1].lower() in EXTENSIONS:
                check_name(os.path.join(place, name))
                found.append(Path(place, name))
    return sorted(found)


def check_name(path):
    """Raise UserError for a file's name in another encoding than UTF-8: results name the images."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{ascii(str(path))}: its name is not UTF-8; rename it") from None


def side_of(size):
    """Side of the image that a size×size crop is cut from: 256 for the study's 224."""
    return round(size * RESIZE / IMAGE_SIZE)


def load_split(data, split, cache=None, protocol=DOCUMENTED, bars=None, size=IMAGE_SIZE):
    """Images of `split` (train, val or test) of `data`, a value that `resolve` returned.

    A folder's train and val are 80 and 20 % of its training images, by a permutation with seed 42 (paper
    3.3.1: 640 and 160 of DIV2K's 800). Raises UserError for a folder of another layout, too few images, or an
    image that can't be read. cache: folder of the uint8 cache. protocol: `published` scales the shorter side
    to 256 and keeps the rest of a training image, `documented` squeezes all to 256×256. bars: tqdm's
    `disable`. size: of the crops that will be cut, where another than 224, with as much more around them.
    """
    side = side_of(size)
    if data == "sample":
        return sample_tiles(split, side)
    folder = folder_of(data, split)
    files = image_files(folder)
    least = 1 if split == "test" else 2  # training and validation share a folder
    if len(files) < least:
        kinds = " ".join(sorted(EXTENSIONS))
        raise UserError(f"{folder}: {len(files)} images ({kinds}); at least {least} needed")
    order = np.arange(len(files))
    if split != "test":
        order = np.random.RandomState(42).permutation(len(files))
        cut = min(max(int(0.8 * len(files)), 1), len(files) - 1)
        order = order[:cut] if split == "train" else order[cut:]
    return subset(cached_images(folder, files, cache, protocol, bars, side), order)


def folder_of(data, split):
    """The folder in `data` that has the images of `split`, train, val or test. Raises UserError."""
    for train, test in LAYOUTS:
        folder = Path(data, test if split == "test" else train)
        if folder.is_dir():
            return folder
    wanted = " or ".join(f"{train}/ and {test}/" for train, test in LAYOUTS)
    raise UserError(f"--data {data}: has no folder for the {split} images; expected {wanted}")


def subset(images, order):
    """The Images of these numbers, in this order."""
    names = [images.names[i] for i in order]
    key = hashlib.sha256(f"{images.key} {names}".encode()).hexdigest()
    return replace(images, names=names, sizes=images.sizes[order], places=images.places[order], key=key)


def read_image(path):
    """The image file at `path` as an RGB PIL image, upright, 8 bits a channel, whatever its mode.

    Raises UserError, naming the file, for one that is damaged, no image, of floating-point pixels, or
    absurdly large.
    """
    try:
        with Image.open(path) as image:
            image.verify()  # a PNG's checksums, which decoding alone does not look at
        with Image.open(path) as image:
            image.load()
            if image.mode == "F":
                raise ValueError("floating-point pixels, of no known range")
            if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip to white
                image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # every Pillow plugin has its own kinds
        raise UserError(f"{path}: not an image that can be read ({error}); replace or remove it") from None


def decode(path, protocol=DOCUMENTED, side=RESIZE):
    """The image at `path`, resized (bilinear, antialiased as Pillow's always is), as a uint8 array.

    `documented`: (side, side, 3). `published`: the shorter side is `side`, the shape of the picture stays.
    """
    image = read_image(path)
    if protocol.squeezed:
        size = (side, side)
    else:
        size = [side * length // min(image.size) for length in image.size]
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR))


def cached_images(folder, files, cache, protocol, bars, side):
    """Images of `decode` of `files`, all under `folder`, each decoded once and kept in `cache`, in shards.

    A shard is NAME.u8, its pixels, and NAME.json, written after it, the manifest that it is trusted by; NAME
    stands for what its files are called, their sizes and their modification times. An interrupted build goes
    on with the shards that are missing.
    """
    size = "" if side == RESIZE else f"{side} "
    where = hashlib.sha256(f"{size}{protocol.name} {folder.resolve()}".encode()).hexdigest()[:16]
    cache = user_cache(cache) / where
    names = [file.relative_to(folder).as_posix() for file in files]
    parts = [slice(first, first + SHARD) for first in range(0, len(files), SHARD)]
    paths = []
    for part in parts:
        stats = [file.stat() for file in files[part]]
        entries = [(name, s.st_size, s.st_mtime_ns) for name, s in zip(names[part], stats, strict=True)]
        paths.append(cache / hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16])
    sizes = [read_manifest(path) for path in paths]
    if None in sizes:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / ".lock"):  # a second run waits, then finds the cache
            sizes = [read_manifest(path) for path in paths]
            missing = [files[part] for part, found in zip(parts, sizes, strict=True) if found is None]
            with tqdm(None, f"Decoding {folder}", sum(map(len, missing)), unit="image", disable=bars) as bar:
                for number, part in enumerate(parts):
                    if sizes[number] is None:
                        sizes[number] = write_shard(paths[number], files[part], protocol, side, bar)
            keep = {path.name for path in paths}
            for old in [*cache.glob("*.u8"), *cache.glob("*.json")]:  # of images that have changed
                if old.stem not in keep:
                    old.unlink()
    places = []
    for number, found in enumerate(sizes):
        starts = np.cumsum([0, *(3 * height * width for height, width in found[:-1])])
        places.append(np.stack([np.full(len(found), number), starts], 1))
    key = hashlib.sha256(" ".join([where, *(path.name for path in paths)]).encode()).hexdigest()
    shards = [open(path.with_suffix(".u8"), "rb") for path in paths]  # another run may replace the files
    return Images(names, torch.tensor(np.concatenate(sizes)), shards, np.concatenate(places), key, side)


def read_manifest(path):
    """[height, width] of each image in the shard at `path`, or None if it is not whole."""
    try:
        sizes = json.loads(path.with_suffix(".json").read_text())
        total = sum(3 * height * width for height, width in sizes if min(height, width) > 0)
        return sizes if path.with_suffix(".u8").stat().st_size == total else None
    except (OSError, ValueError, TypeError):
        return None


def write_shard(path, files, protocol, side, bar):
    """Decode `files` in parallel into the shard at `path`; [height, width] of each."""
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata; what matters is raised
        sizes = []
        try:
            with atomic(path.with_suffix(".u8")) as temporary, open(temporary, "wb") as file:
                for image in pool.map(decode, files, repeat(protocol), repeat(side)):
                    file.write(np.ascontiguousarray(image))
                    sizes.append(list(image.shape[:2]))
                    bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    write_text(path.with_suffix(".json"), json.dumps(sizes))
    return sizes


def sample_tiles(split, side=RESIZE):
    """side×side tiles of scikit-image's photographs at full, half, quarter size, and of the short side."""
    import skimage  # here, since only the sample needs it

    folder = Path(skimage.__file__).parent / "data"
    tiles, names = [], []
    for name in SAMPLE[split]:
        photo = read_image(folder / name)
        short = min(photo.size)
        for scale in sorted({short, short // 2, short // 4, side}, reverse=True):
            if scale < side:
                continue
            width, height = (max(side, round(length * scale / short)) for length in photo.size)
            scaled = np.asarray(photo.resize((width, height), Image.Resampling.BILINEAR))
            for top in even_steps(height, side):
                for left in even_steps(width, side):
                    tiles.append(scaled[top : top + side, left : left + side])
                    names.append(f"{Path(name).stem}-{scale}-{top}-{left}")
    return squares(np.stack(tiles), names)


def squares(pixels, names):
    """Images in memory: pixels, a uint8 array (N, side, side, 3), and their names."""
    count, side = pixels.shape[:2]
    places = np.stack([np.zeros(count, np.int64), np.arange(count) * 3 * side**2], 1)
    key = hashlib.sha256(pixels).hexdigest()
    return Images(names, torch.full((count, 2), side), [pixels.reshape(-1)], places, key, side)


def even_steps(length, side):
    """Offsets of the fewest tiles of `side` pixels that cover `length` pixels, evenly spaced."""
    return [int(offset) for offset in np.linspace(0, length - side, math.ceil(length / side))]


def crops(images, index, tops, lefts, flips, size=IMAGE_SIZE):
    """Batched crops of Images → float (B, 3, size, size) in [0, 1], channels last, where the pixels are.

    index, tops, lefts: int64 (B,); flips: bool (B,), mirrored left to right.
    """
    if images.resident is None:
        places = zip(index.tolist(), tops.tolist(), lefts.tolist(), strict=True)
        batch = torch.stack(
            # a copy: each image that is mapped into memory is an open file for as long as it is looked at
            [images.image(i)[top : top + size, left : left + size].clone() for i, top, left in places]
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
