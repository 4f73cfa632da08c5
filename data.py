"""From files to tensors: folder layouts, the split, the uint8 cache, random crops, and the DIV2K download."""

import hashlib
import http.client
import math
import os
import shutil
import stat
import time
import urllib.error
import urllib.request
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps
from tqdm import tqdm

from study import DOCUMENTED
from utils import UserError, digest, load, save

RESIZE, CROP = 256, 224
EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm"}
LAYOUTS = (("DIV2K_train_HR", "DIV2K_valid_HR"), ("train", "test"))  # folders of train + val, and of test
DIV2K_ROOT = "data/DIV2K"
DIV2K = (  # url, md5, bytes (None: as the server says)
    (
        "https://data.vision.ee.ethz.ch/cvl/DIV2K/DIV2K_train_HR.zip",
        "bdc2d9338d4e574fe81bf7d158758658",
        3_530_603_713,
    ),
    ("https://data.vision.ee.ethz.ch/cvl/DIV2K/DIV2K_valid_HR.zip", "9fcdda83005c5e5997799b69f955ff88", None),
)
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


class Images(NamedTuple):
    """One split in memory."""

    pixels: torch.Tensor  # uint8 (N, 256, 256, 3); or (P, 3), image after image, where their sizes differ
    names: list
    sizes: torch.Tensor  # int64 (N, 2), heights and widths

    def to(self, device):
        return self._replace(pixels=self.pixels.to(device), sizes=self.sizes.to(device))


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
            "*** For the study's data: --download (3.7 GB), or --data FOLDER with train/ and test/.  ***"
        )
        return "sample"
    if data != "sample" and not Path(data).is_dir():
        raise UserError(
            f"--data {data}: no such folder; give one with train/ and test/, DIV2K's, or `sample`"
        )
    return str(data)


def image_files(folder):
    """The image files in `folder`, sorted by name; hidden ones are left out."""
    return sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in EXTENSIONS and p.name[0] != ".")


def load_split(data, split, cache=None, protocol=DOCUMENTED, bars=None):
    """Images of `split` (train, val or test) of `data`, a value that `resolve` returned.

    A folder's train and val are 80 and 20 % of its training images, by a permutation with seed 42 (paper
    3.3.1: 640 and 160 of DIV2K's 800). Raises UserError for a folder of another layout, too few images, or an
    image that can't be read. cache: folder of the uint8 cache. protocol: `published` scales the shorter side
    to 256 and keeps the rest of a training image, `documented` squeezes all to 256×256. bars: tqdm's
    `disable`.
    """
    if data == "sample":
        return sample_tiles(split)
    for train, test in LAYOUTS:
        folder = Path(data, test if split == "test" else train)
        if folder.is_dir():
            break
    else:
        wanted = " or ".join(f"{train}/ and {test}/" for train, test in LAYOUTS)
        raise UserError(f"--data {data}: has no folder for the {split} images; expected {wanted}")
    files = image_files(folder)
    if len(files) < (1 if split == "test" else 2):
        few = (
            "at least 1 is needed"
            if split == "test"
            else "at least 2 are needed, for training and validation"
        )
        raise UserError(f"{folder}: {len(files)} images ({' '.join(sorted(EXTENSIONS))}); {few}")
    order = np.arange(len(files))
    if split != "test":
        order = np.random.RandomState(42).permutation(len(files))
        cut = min(max(int(0.8 * len(files)), 1), len(files) - 1)
        order = order[:cut] if split == "train" else order[cut:]
    whole = cached_images(folder, files, cache, protocol, bars)
    names = [files[i].name for i in order]
    if split == "train" and not protocol.squeezed:
        sizes = torch.tensor([whole[i].shape[:2] for i in order])
        return Images(torch.cat([whole[i].flatten(0, 1) for i in order]), names, sizes)
    return squares([whole[i] for i in order], names)


def squares(whole, names):
    """Images of the central 256×256 of uint8 tensors (H, W, 3)."""
    pixels = torch.stack([center(image[None], RESIZE)[0] for image in whole])
    return Images(pixels, names, torch.full((len(names), 2), RESIZE))


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


def decode(path, protocol=DOCUMENTED):
    """The image at `path`, resized (bilinear, antialiased as Pillow's always is), as a uint8 array.

    `documented`: (256, 256, 3). `published`: the shorter side is 256, and the shape of the picture stays.
    """
    image = read_image(path)
    if protocol.squeezed:
        size = (RESIZE, RESIZE)
    else:
        size = [RESIZE * side // min(image.size) for side in image.size]
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR))


def cached_images(folder, files, cache=None, protocol=DOCUMENTED, bars=None):
    """`decode` of `files`, all in `folder`: a list of uint8 tensors, made once and kept in a file in `cache`.

    The file is used as long as every image has the name, size and modification time that it had.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(cache or Path(home, "feature-inversion"))
    name = hashlib.sha256(f"{protocol.name} {folder.resolve()}".encode()).hexdigest()[:16]
    path = cache / f"{name}.pt"
    manifest = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    images = read_cache(path, manifest)
    if images is None:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):  # a second run waits, then finds the cache
            images = read_cache(path, manifest)
            if images is None:
                images = decode_all(files, protocol, f"Decoding {folder}", bars)
                save({"files": manifest, "images": images}, path)
    return images


def read_cache(path, manifest):
    """The images in the cache file at `path` if they are of the files that `manifest` lists, else None.

    Without a lock, since a file is written whole or not at all, and its folder may be shared and read-only.
    """
    if not path.exists():
        return None
    try:
        stored = load(path, "cache of images", mmap=True)
        return stored["images"] if stored["files"] == manifest else None
    except (UserError, KeyError, TypeError) as error:
        print(f"{error}; decoding again")
        return None


def decode_all(files, protocol, title, bars=None):
    """`decode` of `files`, in parallel, as a list of uint8 tensors."""
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata; what matters is raised
        decoded = pool.map(decode, files, [protocol] * len(files))
        try:
            bar = tqdm(decoded, title, len(files), unit="image", disable=bars)
            return [torch.from_numpy(image.copy()) for image in bar]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def sample_tiles(split):
    """256×256 tiles of scikit-image's photographs at full, half, quarter size, and of the short side."""
    import skimage  # here, since only the sample needs it

    folder = Path(skimage.__file__).parent / "data"
    tiles, names = [], []
    for name in SAMPLE[split]:
        photo = read_image(folder / name)
        short = min(photo.size)
        for side in sorted({short, short // 2, short // 4, RESIZE}, reverse=True):
            if side < RESIZE:
                continue
            width, height = (max(RESIZE, round(length * side / short)) for length in photo.size)
            scaled = np.asarray(photo.resize((width, height), Image.Resampling.BILINEAR))
            for top in even_steps(height):
                for left in even_steps(width):
                    tiles.append(torch.from_numpy(scaled[top : top + RESIZE, left : left + RESIZE].copy()))
                    names.append(f"{Path(name).stem}-{side}-{top}-{left}")
    return squares(tiles, names)


def even_steps(length):
    """Offsets of the fewest 256-pixel tiles that cover `length` pixels, evenly spaced."""
    return [int(offset) for offset in np.linspace(0, length - RESIZE, math.ceil(length / RESIZE))]


def crops(images, index, tops, lefts, flips):
    """Batched crops of Images → float (B, 3, 224, 224) in [0, 1], channels last, on their device.

    index, tops, lefts: int64 (B,); flips: bool (B,), mirrored left to right.
    """
    heights, widths = images.sizes.unbind(1)
    starts = (heights * widths).cumsum(0) - heights * widths
    span = torch.arange(CROP, device=index.device)
    rows = tops[:, None] + span
    columns = lefts[:, None] + torch.where(flips[:, None], CROP - 1 - span, span)
    rows = starts[index, None] + rows * widths[index, None]  # (B, 224), where each begins
    batch = images.pixels.view(-1, 3)[rows[:, :, None] + columns[:, None, :]]  # (B, 224, 224, 3)
    return batch.permute(0, 3, 1, 2).float().div_(255)


def center(pixels, size):
    """The central size×size of pixels (B, H, W, 3)."""
    top, left = ((length - size) // 2 for length in pixels.shape[1:3])
    return pixels[:, top : top + size, left : left + size]


def center_crops(pixels):
    """The central 224×224 of uint8 pixels (B, H, W, 3) → float (B, 3, 224, 224) in [0, 1], channels last."""
    return center(pixels, CROP).permute(0, 3, 1, 2).float().div_(255)


def epoch_plan(sizes, seed, epoch):
    """Order, top, left and flip in an epoch of images of `sizes` (N, 2), on their device.

    (seed, epoch) decides, so that an epoch can be resumed, and is the same on every device.
    """
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    count, room, device = len(sizes), RESIZE - CROP + 1, sizes.device
    order = torch.randperm(count, generator=generator)
    offsets = torch.randint(0, room, (2, count), generator=generator)
    flips = torch.rand(count, generator=generator) < 0.5
    # Along a side that is longer than 256 there is more room; what 256 leaves is drawn as it would be
    # without.
    part = torch.rand(2, count, generator=generator, dtype=torch.float64)
    offsets = ((offsets + part) / room * (sizes.cpu()[order].T - CROP + 1)).long()
    return order.to(device), *offsets.to(device), flips.to(device)


# --- The DIV2K download --------------------------------------------------------------------------------


def download_div2k(root, archives=None, bars=None):
    """Download, verify and unpack DIV2K into `root`; what is already there is not fetched again.

    An interrupted download goes on where it stopped. Raises UserError when the server can't be reached
    or what it sends is not the archive.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    for url, md5, size in archives or DIV2K:
        name = url.rsplit("/", 1)[1]
        with FileLock(root / f".{name}.lock"):  # a second run waits for the first one's download
            if (root / Path(name).stem).is_dir():
                print(f"{root / Path(name).stem} is there")
                continue
            fetch(url, root / name, md5, size, bars=bars)
            unpack(root / name, root, bars)
            (root / name).unlink()


def fetch(url, path, md5, size=None, attempts=5, bars=None):
    """Download `url` to `path` through `path`.part, resuming up to `attempts` times, and check size and MD5.

    Nothing is fetched if `path` is there and has that MD5.
    """
    if path.exists() and digest(path, "md5") == md5:
        return
    part = path.with_name(f"{path.name}.part")
    for attempt in range(attempts):
        have = part.stat().st_size if part.exists() else 0
        if have and have == size:
            break
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                if response.status != 206:  # the server sends all of it again
                    have = 0
                if "Content-Length" not in response.headers:
                    raise ValueError("the server does not say how long it is")
                total = have + int(response.headers["Content-Length"])
                if size and total != size:
                    raise UserError(f"{url}: {total} bytes there, {size} expected")
                with open(part, "ab" if have else "wb") as file:
                    with tqdm(
                        None,
                        path.name,
                        total,
                        initial=have,
                        unit="B",
                        unit_scale=True,
                        unit_divisor=1024,
                        disable=bars,
                    ) as bar:
                        while chunk := response.read(1 << 20):
                            file.write(chunk)
                            bar.update(len(chunk))
            if part.stat().st_size == total:
                break
            reason = f"connection closed after {part.stat().st_size} of {total} bytes"
        except urllib.error.HTTPError as error:
            if error.code == 416:  # nothing is left to send: what we have is whole or wrong
                break
            reason = f"HTTP {error.code} {error.reason}"
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = str(error)
        if attempt < attempts - 1:
            time.sleep(attempt)
    else:
        raise UserError(f"{url}: {reason}; run again to go on from {part}")
    if (found := digest(part, "md5")) != md5:
        part.unlink()
        raise UserError(f"{url}: MD5 {found}, expected {md5}; deleted, run again")
    os.replace(part, path)


def unpack(path, root, bars=None):
    """Unpack the zip at `path` so that its one folder, named like it, appears in `root` whole or not at all.

    Raises UserError for members that are absolute, climb out with `..`, or are links.
    """
    target = root / path.stem
    temporary = root / f".{path.stem}.unpacking"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                parts = member.filename.replace("\\", "/").split("/")
                if parts[0] != path.stem or ".." in parts or stat.S_ISLNK(member.external_attr >> 16):
                    raise UserError(f"{path}: unsafe member {member.filename!r}; nothing was unpacked")
            for member in tqdm(archive.infolist(), f"Unpacking {path.name}", unit="file", disable=bars):
                archive.extract(member, temporary)
        os.replace(temporary / path.stem, target)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path}: cannot be unpacked ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
