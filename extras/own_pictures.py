"""Reconstructions of one's own pictures: whole, at their own size, or their central square at 224×224."""

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

WHOLE = 2**20  # pixels that are reconstructed in one go
TILE = 512  # side of what is, of larger pictures, but for its margins
TOLERANCE = 1e-4  # a fortieth of a grey level
STRIP = 64  # height of the picture on which the reach of a network is measured


def picture_files(paths):
    """The image files of `paths`, and of folders among them but for our own. Raises UserError."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"--images {path}: no such file or folder")
        data.check_name(path)
        found = data.image_files(path) if path.is_dir() else [path]
        found = [file for file in found if file == path or not mark_of(file).startswith(MADE_BY)]
        if not found:
            raise UserError(f"--images {path}: no images of yours in this folder that Pillow reads")
        files += found
    return list(dict.fromkeys(files))


def read_square(file, size):
    """The central square of the image file, scaled to size×size pixels, as a PIL image. Raises UserError."""
    return ImageOps.fit(data.read_image(file), (size, size), Image.Resampling.BILINEAR)


def reconstruct_pictures(args, inverter, config, bars=None):
    """Write original | reconstruction | 5× difference of each of args.images to images/ beside the results.

    Of `published`, the original is what its metrics see. Raises UserError for a file that would be replaced:
    only a PNG that the same checkpoint made of the same picture, in the same way, ever is. A picture that
    cannot be read or written stops no other; UserError names it in the end.
    """
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
        if path.exists() and mark_of(path) != f"{made_by} of {digest(file)[:16]}":
            raise UserError(f"{path}: would be overwritten; give another --out, or rename the picture")
    failed = []
    for file, path in tqdm(jobs, "Reconstructing", unit="image", disable=bars):
        try:
            picture = data.read_image(file) if native else read_square(file, inverter.size)
            image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
            image = image.to(inverter.device).float() / 255
            with torch.no_grad():
                output = (reconstruct_whole(inverter, image) if native else inverter(image)).clamp(0, 1)
            wanted = target(image, PROTOCOLS[config["protocol"]]).clamp(0, 1)
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
        raise UserError(f"{len(failed)} of {len(files)} pictures failed: {'; '.join(failed[:3])}")


def strip_paths(files, out, how=""):
    """The PNG in folder `out` for each of `files`; those of one name, whatever its case, are numbered."""
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
    """What this program wrote into the PNG at `path` about its origin; "" where that cannot be read."""
    with suppress(OSError, SyntaxError, ValueError), PngImagePlugin.PngImageFile(path) as picture:  # any size
        return str(picture.info.get("Software", ""))
    return ""


# --- Any size --------------------------------------------------------------------------------------------


def takes_any_size(inverter, config):
    """Whether what it reconstructs can be a picture of any size, and part by part.

    The decoder is local, and its image is as many times its features as the stride says: not of AlexNet's 27
    positions, whose last step stretches them to 224. The encoder has a position more for a stride more on
    either side: not ViT, which takes no such image.
    """
    _, height, width = inverter.shape
    stride = inverter.stride
    if not BUILDERS[config["decoder"]].local or (height * stride, width * stride) != (inverter.size,) * 2:
        return False
    try:
        return inverter.shape_at(inverter.size + stride)[1:] == (height + 1, width + 1)
    except Exception as error:  # each network has its own
        if out_of_memory(error):
            raise
        return False


def reconstruct_whole(inverter, image, whole=WHOLE, tile=TILE):
    """The reconstruction (1, 3, H, W) of an image (1, 3, H, W) in [0, 1] of any size.

    Sides that the layer's stride does not divide are padded by reflection, and cut again. What has more than
    `whole` pixels is done in tiles, each with as much around it as matters to it, so that there are no seams.
    """
    height, width = image.shape[2:]
    stride = inverter.stride
    padded = pad_to_multiple(image, stride)
    if padded.shape[2] * padded.shape[3] <= whole:
        return inverter(padded)[..., :height, :width]
    margin = reach(inverter)
    output = torch.empty_like(padded)
    for top in range(0, padded.shape[2], tile):
        for left in range(0, padded.shape[3], tile):
            above, before = max(top - margin, 0), max(left - margin, 0)
            part = inverter(padded[..., above : top + tile + margin, before : left + tile + margin])
            part = part[..., top - above :, left - before :][..., :tile, :tile]
            output[..., top : top + tile, left : left + tile] = part
    return output[..., :height, :width]


def pad_to_multiple(image, stride):
    """The image (1, 3, H, W), its right and lower sides padded by reflection to multiples of `stride`."""
    rows, columns = (np.pad(np.arange(side), (0, -side % stride), "reflect") for side in image.shape[2:])
    return image[:, :, rows][..., columns]


def reach(inverter):
    """From how many pixels away a pixel is changed by more than TOLERANCE; a multiple of the stride.

    Measured: two pictures of noise that are the same in their right half only.
    """
    draw = torch.Generator().manual_seed(0)
    for width in (512, 1024, 2048, 4096):
        half = width // 2
        a, b = torch.rand(2, 1, 3, STRIP, width, generator=draw).to(inverter.device)
        b[..., half:] = a[..., half:]
        changed = (inverter(a) - inverter(b)).abs().amax((0, 1, 2)) > TOLERANCE
        last = int((changed * torch.arange(1, width + 1, device=changed.device)).max()) - half
        if last <= half // 2:  # well before the end
            break
    else:
        raise UserError("the picture is too large for one piece, and each part matters to all: --size 224")
    return -(-max(last, 1) // inverter.stride) * inverter.stride
