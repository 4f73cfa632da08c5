"""Reconstructions of one's own pictures: whole, at their own size, or their central square at 224×224."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from tqdm import tqdm

import data
from metrics import psnr, target
from pictures import strip, to_pixels
from study import PROTOCOLS
from utils import UserError, atomic, digest, make_folder, out_of_memory

LOCAL = ("tconv", "residual", "feedback")  # decoders, of which a pixel depends on some features around it
WHOLE = 2**20  # pixels that are reconstructed in one go
TILE = 512  # side of what is, of larger pictures, but for its margins
TOLERANCE = 1e-4  # a fortieth of a grey level
STRIP = 64  # height of the picture on which the reach of a network is measured


def picture_files(paths):
    """The image files that `paths` name or that lie in the folders among them. Raises UserError."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            found = data.image_files(path)
            if not found:
                raise UserError(f"--images {path}: no images in this folder that Pillow reads")
            files += found
        elif path.exists():
            data.check_name(path)
            files.append(path)
        else:
            raise UserError(f"--images {path}: no such file or folder")
    return files


def reconstruct_pictures(args, inverter, config, bars=None):
    """Write original | reconstruction | 5× difference of each of args.images to images/ beside the results.

    Of `published`, the original is what its metrics see. Raises UserError for what cannot be read, and for a
    file that would be overwritten: only a PNG that the same checkpoint made of the same picture ever is.
    """
    native = takes_any_size(inverter, config)
    if args.size == "native" and not native:
        names = f"{config['encoder']} {config['layer']} and {config['decoder']}"
        raise UserError(f"--size native: not with {names}, which take {inverter.size}×{inverter.size} pixels")
    native = native and args.size != "224"
    files = picture_files(args.images)
    for file in files:
        data.read_image(file)  # or an error, before anything is written
    out = make_folder(Path(args.out or Path(args.ckpt).parent, "images"))
    made_by = digest(args.ckpt)
    paths = strip_paths(files, out)
    marks = [f"feature-inversion {made_by[:16]} of {digest(file)[:16]}" for file in files]
    for path, mark in zip(paths, marks, strict=True):
        if paths.count(path) > 1 or path.exists() and mark_of(path) != mark:
            raise UserError(f"{path}: would be overwritten; give another --out, or rename the picture")
    jobs = zip(files, paths, marks, strict=True)
    for file, path, mark in tqdm(jobs, "Reconstructing", len(files), unit="image", disable=bars):
        picture = data.read_image(file)
        if not native:
            picture = ImageOps.fit(picture, (inverter.size, inverter.size), Image.Resampling.BILINEAR)
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].to(inverter.device).float() / 255
        with torch.no_grad():
            output = (reconstruct_whole(inverter, image) if native else inverter(image)).clamp(0, 1)
        wanted = target(image, PROTOCOLS[config["protocol"]]).clamp(0, 1)
        about = PngImagePlugin.PngInfo()
        about.add_text("Software", mark)
        with atomic(path) as temporary:
            strip(to_pixels(wanted)[0], to_pixels(output)[0]).save(temporary, pnginfo=about)
        print(f"{file}: {psnr(output, wanted).item():.2f} dB, {path}")


def strip_paths(files, out):
    """The PNG in folder `out` for each of `files`; those of one name are numbered."""
    stems = [file.stem for file in files]
    paths = []
    for number, stem in enumerate(stems, 1):
        name = f"{stem}-{number}" if stems.count(stem) > 1 else stem
        paths.append(out / f"{name}.png")
    return paths


def mark_of(path):
    """What reconstruct_pictures wrote into the PNG at `path` about its origin.

    None where there is nothing, also where it is no PNG that can be read: such a file is never replaced.
    """
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return picture.info.get("Software")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


# --- Any size --------------------------------------------------------------------------------------------


def takes_any_size(inverter, config):
    """Whether what it reconstructs can be a picture of any size, and part by part.

    The decoder is local, and its image is as many times its features as the stride says: not of AlexNet's 27
    positions, whose last step stretches them to 224. The encoder has a position more for a stride more on
    either side: not ViT, which takes no such image.
    """
    _, height, width = inverter.shape
    stride = inverter.stride
    if config["decoder"] not in LOCAL or (height * stride, width * stride) != (inverter.size,) * 2:
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
        raise UserError(
            "the picture is too large for one piece, and each part of it matters to all: --size 224"
        )
    return -(-max(last, 1) // inverter.stride) * inverter.stride
