"""Reconstructions of the user's images: whole, at their own size, or their central square at 224×224."""

from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from tqdm import tqdm

import data
from metrics import psnr, target, thumbnail
from models import BUILDERS
from report.pictures import ERROR_SCALE, MADE_BY, draw_strip, error_image
from utils import PROTOCOLS, UserError, atomic, digest, make_folder, out_of_memory

WHOLE = 2**20  # pixels; larger images are reconstructed in tiles
TILE = 512  # side of a tile without its margins
TOLERANCE = 1e-4  # a fortieth of a grey level
SHOWN = 480  # pixels, height of an image beside several others
STRIP = 64  # height of the image on which `reach` is measured


def picture_files(paths):
    """The image files of `paths`, files or folders, but for this program's results. Raises UserError."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"--images {path}: no such file or folder")
        data.check_name(path)
        found = [path]
        if path.is_dir():
            found = [file for file in data.image_files(path) if not mark_of(file).startswith(MADE_BY)]
        if not found:
            raise UserError(f"--images {path}: no images of yours in this folder that Pillow reads")
        files += found
    return list(dict.fromkeys(files))


def square(image, size):
    """The central square of a PIL image, scaled to size×size."""
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)


def read_square(file, size):
    """The central square of an image file, scaled to size×size, as a PIL image. Raises UserError."""
    return square(data.read_image(file), size)


def reconstruct_pictures(args, opened, bars=None):
    """Write a strip for each of args.images: the image, and its reconstruction by each checkpoint.

    opened: [(name of the checkpoint, its inverter, its configuration)]; of one, the strip has its error, too.
    Failures end in one UserError.
    """
    anywhere = [takes_any_size(inverter, config) for _, inverter, config in opened]
    for (name, inverter, _), native in zip(opened, anywhere, strict=True):
        if args.size == "native" and not native:
            raise UserError(
                f"--size native: not with {name}, which takes {inverter.size}×{inverter.size} pixels"
            )
    how = f"_{args.size}" if args.size and any(anywhere) else ""
    how += f"_iterations-{args.iterations}" if args.iterations else ""
    files = picture_files(args.images)
    out = make_folder(Path(args.out or Path(args.ckpt).parent, "images"))
    names = "+".join(name for name, *_ in opened)
    jobs = list(zip(files, strip_paths(files, out, f"_{names}"[:150] + how), strict=True))
    for file, path in tqdm(jobs, "Checking", unit="image", leave=False, disable=bars):
        if path.exists() and mark_of(path) != f"{MADE_BY} of {digest(file)[:16]}":  # another image's
            raise UserError(f"{path}: would be overwritten; give another --out, or rename the image")
    failed = []
    for file, path in tqdm(jobs, "Reconstructing", unit="image", disable=bars):
        try:
            image, panels = data.read_image(file), []
            for (name, inverter, config), native in zip(opened, anywhere, strict=True):
                whole = native and args.size != "224"
                panels.append(
                    reconstruct(image if whole else square(image, inverter.size), whole, inverter, config)
                )
                print(f"{file}: {panels[-1].psnr:.2f} dB from {name}", flush=True)
            labels = [f"{config['encoder']} {config['layer']}" for _, _, config in opened]
            about = PngImagePlugin.PngInfo()
            about.add_text("Software", f"{MADE_BY} of {digest(file)[:16]}")
            with atomic(path) as temporary:
                strip_of(panels, labels, args.thumbnails).save(temporary, pnginfo=about)
            print(path)
        except (UserError, OSError) as error:
            failed.append(str(error))
            print(error)
    if failed:
        raise UserError(f"{len(failed)} of {len(files)} images failed: {'; '.join(failed[:3])}")


class Panel(NamedTuple):
    """An image and its reconstruction, uint8 (H, W, 3), PSNR in dB, and a thumbnail of the features' size."""

    image: torch.Tensor
    reconstruction: torch.Tensor
    psnr: float
    thumbnail: torch.Tensor
    thumbnail_psnr: float


@torch.no_grad()
def reconstruct(image, whole, inverter, config):
    """The Panel of a PIL image; whole: of any size, else as large as the encoder takes."""
    image = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(inverter.device).float() / 255
    output = (reconstruct_whole(inverter, image) if whole else inverter(image)).clamp(0, 1)
    wanted = target(image, PROTOCOLS[config["protocol"]]).clamp(0, 1)  # what the metrics see
    sides = [-(-side // inverter.stride) for side in image.shape[2:]] if whole else inverter.shape[1:]
    small = thumbnail(wanted, sides)
    pixels = [data.to_pixels(part)[0] for part in (wanted, output, small)]
    return Panel(*pixels[:2], psnr(output, wanted).item(), pixels[2], psnr(small, wanted).item())


def strip_of(panels, labels, thumbnails=False):
    """A picture of the image, its reconstructions and, of one, its error; thumbnails below."""
    row = [(panels[0].image, ["the image", ""])]
    row += [
        (part.reconstruction, [name, f"{part.psnr:.1f} dB"])
        for part, name in zip(panels, labels, strict=True)
    ]
    rows = [row]
    if len(panels) == 1:
        row.append((error_image(panels[0].image, panels[0].reconstruction), ["error", ERROR_SCALE]))
    if thumbnails:
        rows.append([(torch.full_like(panels[0].image, 255), ["", ""])])
        for part in panels:
            rows[1].append((part.thumbnail, ["thumbnail of its size", f"{part.thumbnail_psnr:.1f} dB"]))
    return draw_strip(rows, most=None if len(panels) == 1 else SHOWN)


def strip_paths(files, out, how=""):
    """A PNG in folder `out` for each of `files`; equal names, whatever their case, get numbers."""
    most = 235 - len(how.encode())  # of the 255 bytes that a file's name may have
    stems = [file.stem.encode()[:most].decode(errors="ignore") for file in files]
    count = Counter(map(str.casefold, stems))
    taken = {stem for stem in count if count[stem] > 1}
    paths = []
    for number, stem in enumerate(stems, 1):
        while stem.casefold() in taken:
            stem += f"-{number}"
        taken.add(stem.casefold())
        paths.append(out / f"{stem}{how}.png")
    return paths


def mark_of(path):
    """The `Software` text of the PNG at `path`, by which this program knows its results; "" without one."""
    with suppress(OSError, SyntaxError, ValueError), PngImagePlugin.PngImageFile(path) as image:  # any size
        return str(image.info.get("Software", ""))
    return ""


def takes_any_size(inverter, config):
    """Whether images of any size can be reconstructed, and in tiles."""
    _, height, width = inverter.shape
    stride = inverter.stride
    # the decoder sees all positions, or stretches its image to 224, as for AlexNet's 27 positions
    if not BUILDERS[config["decoder"]].local or (height * stride, width * stride) != (inverter.size,) * 2:
        return False
    try:
        return inverter.shape_at(inverter.size + stride)[1:] == (height + 1, width + 1)
    except Exception as error:  # the encoder, such as a ViT, takes no larger image
        if out_of_memory(error):
            raise
        return False


def reconstruct_whole(inverter, image, whole=WHOLE, tile=TILE):
    """Reconstruct an image (1, 3, H, W) in [0, 1] of any size, in tiles if larger than `whole` pixels."""
    height, width = image.shape[2:]
    padded = pad_to_multiple(image, inverter.stride)
    if padded.shape[2] * padded.shape[3] <= whole:
        return inverter(padded)[..., :height, :width]
    margin = reach(inverter)  # so that no seams are seen
    output = torch.empty_like(padded)
    for top in range(0, padded.shape[2], tile):
        for left in range(0, padded.shape[3], tile):
            above, before = max(top - margin, 0), max(left - margin, 0)
            part = inverter(padded[..., above : top + tile + margin, before : left + tile + margin])
            part = part[..., top - above :, left - before :][..., :tile, :tile]
            output[..., top : top + tile, left : left + tile] = part
    return output[..., :height, :width]


def pad_to_multiple(image, stride):
    """The image (1, 3, H, W), padded by reflection at the right and bottom to multiples of `stride`."""
    rows, columns = (np.pad(np.arange(side), (0, -side % stride), "reflect") for side in image.shape[2:])
    return image[:, :, rows][..., columns]


def reach(inverter):
    """The distance, a multiple of the stride, from which a pixel changes another by more than TOLERANCE."""
    generator = torch.Generator().manual_seed(0)
    for width in (512, 1024, 2048, 4096):
        half = width // 2
        a, b = torch.rand(2, 1, 3, STRIP, width, generator=generator).to(inverter.device)
        b[..., half:] = a[..., half:]  # noise that differs in the left half only
        changed = (inverter(a) - inverter(b)).abs().amax((0, 1, 2)) > TOLERANCE
        last = int((changed * torch.arange(1, width + 1, device=changed.device)).max()) - half
        if last <= half // 2:  # well before the end
            return -(-max(last, 1) // inverter.stride) * inverter.stride
    raise UserError("the image is too large for one piece, and each part matters to all: use --size 224")
