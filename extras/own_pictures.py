"""Reconstructions of the user's images: whole, at their own size, or their central square at 224×224."""

from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from tqdm import tqdm

import data
from metrics import psnr, target
from models import BUILDERS
from report.pictures import MADE_BY, difference_image
from utils import PROTOCOLS, UserError, atomic, digest, make_folder, out_of_memory

WHOLE = 2**20  # pixels; larger images are reconstructed in tiles
TILE = 512  # side of a tile without its margins
TOLERANCE = 1e-4  # a fortieth of a grey level
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


def read_square(file, size):
    """The central square of an image file, scaled to size×size, as a PIL image. Raises UserError."""
    return ImageOps.fit(data.read_image(file), (size, size), Image.Resampling.BILINEAR)


def reconstruct_pictures(args, inverter, config, bars=None):
    """Write original | reconstruction | 5× difference of args.images. Failures end in one UserError."""
    native = takes_any_size(inverter, config)
    if args.size == "native" and not native:
        names = f"{config['encoder']} {config['layer']} and {config['decoder']}"
        raise UserError(f"--size native: not with {names}, which take {inverter.size}×{inverter.size} pixels")
    how = f"-{inverter.size}" if native and args.size == "224" else ""
    how += f"-iterations-{args.iterations}" if args.iterations else ""
    native = native and args.size != "224"
    files = picture_files(args.images)
    out = make_folder(Path(args.out or Path(args.ckpt).parent, "images"))
    made_by = f"{MADE_BY} {digest(args.ckpt)[:16]}{how}"
    jobs = list(zip(files, strip_paths(files, out, how), strict=True))
    for file, path in tqdm(jobs, "Checking", unit="image", leave=False, disable=bars):
        # only the PNG that this checkpoint made of the same image in the same way is replaced
        if path.exists() and mark_of(path) != f"{made_by} of {digest(file)[:16]}":
            raise UserError(f"{path}: would be overwritten; give another --out, or rename the image")
    failed = []
    for file, path in tqdm(jobs, "Reconstructing", unit="image", disable=bars):
        try:
            image = data.read_image(file) if native else read_square(file, inverter.size)
            image = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(inverter.device).float() / 255
            with torch.no_grad():
                output = (reconstruct_whole(inverter, image) if native else inverter(image)).clamp(0, 1)
            wanted = target(image, PROTOCOLS[config["protocol"]]).clamp(0, 1)  # what the metrics see
            pair = data.to_pixels(wanted)[0], data.to_pixels(output)[0]
            about = PngImagePlugin.PngInfo()
            about.add_text("Software", f"{made_by} of {digest(file)[:16]}")
            strip = Image.fromarray(torch.cat([*pair, difference_image(*pair)], 1).numpy())
            with atomic(path) as temporary:
                strip.save(temporary, pnginfo=about)
            print(f"{file}: {psnr(output, wanted).item():.2f} dB, {path}")
        except (UserError, OSError) as error:
            failed.append(str(error))
            print(error)
    if failed:
        raise UserError(f"{len(failed)} of {len(files)} images failed: {'; '.join(failed[:3])}")


def strip_paths(files, out, how=""):
    """A PNG in folder `out` for each of `files`; equal names, whatever their case, get numbers."""
    most = 235 - len(how)  # of the 255 bytes that a file's name may have
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
