"""Grids of pictures, and figures of the metrics."""

import io
import math
import zipfile
from itertools import zip_longest

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from PIL import Image, ImageDraw, ImageFont

from utils import METRICS, METRICS_AND_FEATURE_ERROR, atomic, evenly_spaced

MADE_BY = "feature-inversion"  # begins the `Software` text of each PNG
FEW = 20  # images, below which a histogram shows nothing
ERROR_SCALE = "black ≤ 1, white ≥ 80 of 255"  # of error_image


def error_image(a, b):
    """The error of uint8 pixels (H, W, 3), root mean square over channels, on a logarithmic grey scale."""
    error = (a.float() - b.float()).square().mean(-1, keepdim=True).sqrt()
    grey = (error.clamp(1, 80).log() / math.log(80) * 255).round().byte()
    return grey.expand_as(a)


def draw_strip(rows, most=None):
    """A PIL image of `rows`, [[(uint8 image (H, W, 3), [line, line below it])]]; most: height of an image."""
    height = len(rows[0][0][0])
    height = min(height, most or height)
    text = ImageFont.load_default(max(height // 18, 11))
    line, gap = int(1.5 * text.size), max(height // 40, 4)
    drawn = []
    for row in rows:
        panels = []
        for pixels, lines in row:
            image = Image.fromarray(np.ascontiguousarray(pixels))
            size = max(round(image.width * height / image.height), 1), height
            image = image.resize(size, Image.Resampling.BICUBIC)
            width = max(image.width, *(round(text.getlength(words)) for words in lines))
            panel = Image.new("RGB", (width + gap, height + 2 * line + gap), "white")
            panel.paste(image)
            for number, words in enumerate(lines):
                place = (0, height + (number + 0.5) * line)
                ImageDraw.Draw(panel).text(place, words, "black", text, anchor="lm")
            panels.append(panel)
        drawn.append(panels)
    widths = [max(panel.width for panel in column) for column in zip_longest(*drawn, fillvalue=drawn[0][0])]
    strip = Image.new("RGB", (sum(widths), sum(row[0].height for row in drawn)), "white")
    for number, row in enumerate(drawn):
        for place, panel in enumerate(row):
            strip.paste(panel, (sum(widths[:place]), number * panel.height))
    return strip


def from_worst_to_best(psnr, count=6):
    """Indices of `count` images, evenly spaced from the lowest to the highest PSNR."""
    return np.argsort(psnr)[evenly_spaced(len(psnr), count)]


def save_figure(figure, path, dpi=100):
    """Write a matplotlib figure to `path`, whole or not at all."""
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=dpi, metadata={"Software": MADE_BY})


def svg(figure):
    """A matplotlib figure as an SVG element, for a page."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        figure.savefig(text, format="svg")
    return text.getvalue()[text.getvalue().index("<svg") :]


def drawable(text, most=60):
    """`text` for a figure: characters that the font lacks as U+4E2D; the middle of a long text left out."""
    known = get_font(findfont(FontProperties())).get_charmap()
    parts = [char if char.isprintable() and ord(char) in known else f"U+{ord(char):04X}" for char in text]
    while sum(map(len, parts)) > most:
        middle = len(parts) // 2
        parts[middle - 1 : middle + 1] = "…"
    return "".join(parts).replace("$", r"\$")  # which would begin a formula


def draw_grid(rows, path):
    """Draw `rows`: {label: [(uint8 image, title) or None, …]}, all equally long."""
    columns = len(next(iter(rows.values())))
    figure = Figure(figsize=(2.2 * columns + 0.4, 2.4 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (label, cells) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(drawable(label, 32))
        for axis, cell in zip(line, cells, strict=True):
            axis.set(xticks=[], yticks=[])
            if cell:
                axis.imshow(np.asarray(cell[0]))
                axis.set_title(drawable(cell[1], 24), fontsize=8)
    save_figure(figure, path)


def draw_evaluation(found, out, label, trained=None):
    """Draw an Evaluation to the folder `out`; label: of the targets; trained: iterations in training."""
    draw_reconstructions(found, out / "reconstructions.png", label)
    draw_histograms(found.values, out / "histograms.png")
    write_samples(found.pictures, out / "reconstructions.zip")
    if len(found.iterates) > 1:
        draw_iterations(found.iterates, out / "iterations.png", trained)


def draw_reconstructions(found, path, label="original"):
    """Target, reconstruction and error of six images of an Evaluation, by PSNR."""
    pictures, names, psnr = found.pictures, found.names, found.values["psnr"]
    numbers = np.array(list(pictures))
    chosen = numbers[from_worst_to_best(psnr[numbers])]
    rows = {label: [(pictures[number][0], names[number]) for number in chosen]}
    rows["reconstruction"] = [(pictures[number][1], f"{psnr[number]:.2f} dB") for number in chosen]
    errors = [error_image(*pictures[number]) for number in chosen]
    rows["error"] = [(error, ERROR_SCALE if not place else "") for place, error in enumerate(errors)]
    draw_grid(rows, path)


def draw_histograms(values, path):
    """Draw histograms of {metric: (N,)}; of a few images a point for each."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    for axis, (name, label) in zip(figure.subplots(1, len(METRICS)), METRICS.items(), strict=True):
        mean, few = values[name].mean(), len(values[name]) < FEW
        if few:
            axis.plot(np.sort(values[name]), np.arange(1, len(values[name]) + 1), "o")
        else:
            axis.hist(values[name], bins=20)
        axis.axvline(mean, color="black", linestyle="--", label=f"mean {mean:.3f}")
        axis.set(xlabel=label, ylabel="image, in this order" if few else "images")
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    save_figure(figure, path)


def draw_iterations(iterates, path, trained):
    """Draw means after each iteration; iterates: [{metric: (N,)}]; trained: iterations in training."""
    labels = METRICS_AND_FEATURE_ERROR
    figure = Figure(figsize=(12, 3), layout="constrained")
    for axis, (name, label) in zip(figure.subplots(1, len(labels)), labels.items(), strict=True):
        axis.plot([values[name].mean() for values in iterates], marker="o")
        axis.axvline(trained, color="black", linestyle="--", label="trained with")
        axis.set(xlabel="iterations", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend()
    save_figure(figure, path)


def write_samples(pictures, path, count=24):
    """Write `count` of the `pictures`, {number: (target, reconstruction)}, to a zip for results.py.

    It holds N-original.jpg and N-reconstruction.jpg; N is the image's row in per_image.csv, from 0.
    """
    numbers = list(pictures)
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for number in (numbers[i] for i in evenly_spaced(len(numbers), count)):
            for kind, pixels in zip(("original", "reconstruction"), pictures[number], strict=True):
                with archive.open(f"{number:05}-{kind}.jpg", "w") as file:  # with full colour
                    Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=90, subsampling=0)
