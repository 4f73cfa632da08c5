"""What does each layer of a network keep? A decoder for each, measured beside what needs no features.

  python survey.py --encoder timm/resnet50 --data FOLDER           about six layers, spread over the depth
  python survey.py --encoder mynet.py:build --weights mynet.pth --layers 1 4 7 --minutes 2 --images my.jpg
  python survey.py --encoder vgg16 --data sample --minutes 0.5     the study's layers, embedded photographs

Writes survey.png (the image as each layer keeps it, and a chart over the depth), survey.csv, survey.md and
report.html to --out. Each layer has a folder there, an ordinary run of train.py. The same command goes on
where it was interrupted.
"""

from flags import parse_evaluate, parse_survey, parse_train
from utils import cli_main

if __name__ == "__main__":
    ARGS = cli_main(lambda: parse_survey(doc=__doc__))  # before torch is imported: --help answers at once

import time

import numpy as np
import torch

import data
import evaluate
import train
from checkpoint import read_result
from encoders import layers_of
from extras.own_pictures import read_square
from models import load_inverter
from report.page import write_report
from report.survey import Row, draw_survey, survey_table, write_survey
from utils import LAYERS, UserError, disable_bars, evenly_spaced, make_folder

LAYER_COUNT = 6


def survey(args):
    """Train and measure a decoder for each layer, and write the results. Raises UserError."""
    out = make_folder(args.out)
    args.data = data.resolve(args.data)
    if args.images:
        data.read_image(args.images)  # or an error, before anything is trained
    layers = args.layers or choose_layers(args)
    print(f"{args.encoder}: layers {', '.join(layers)}; about {args.minutes:g} min each, and a measurement")
    rows, begun = [], time.monotonic()
    for number, layer in enumerate(layers):
        if number:
            left = (time.monotonic() - begun) / number * (len(layers) - number) / 60
            print(f"about {left:.0f} min left")
        print(f"\nlayer {number + 1} of {len(layers)}: {layer}", flush=True)
        try:
            rows.append(Row(layer, measured(args, layer, out / layer)))
        except UserError as error:
            print(f"{layer}: {error}")
            rows.append(Row(layer, note=str(error)))
    if not any(row.metrics for row in rows):
        raise UserError(f"--encoder {args.encoder}: no layer could be inverted; {rows[0].note}")
    write_survey(rows, out)
    draw_survey(rows, *reconstructions(args, rows, out), out / "survey.png")
    write_report(out)
    print(f"\n{survey_table(rows)}\n{out / 'survey.png'} and report.html show it")


def choose_layers(args):
    """The layers of a study's encoder; else the last of each feature shape, spread over the multiply-adds.

    Where there are fewer shapes, as in a ViT, layers between them fill the widest gaps.
    """
    if args.encoder in LAYERS:
        names = list(LAYERS[args.encoder])
        return [names[i] for i in evenly_spaced(len(names), LAYER_COUNT)]
    found = layers_of(args.encoder, args.input_size)
    outer = {path: found[path] for path in found if path.count(".") < 2 and found[path][0][1] > 1} or found
    cost = {path: outer[path][1] for path in outer}
    shapes = list({outer[path][0]: path for path in outer}.values())
    wanted = np.linspace(cost[shapes[0]], cost[shapes[-1]], min(LAYER_COUNT, len(shapes)))
    chosen = []
    for place in wanted:
        chosen.append(
            min((path for path in shapes if path not in chosen), key=lambda path: abs(cost[path] - place))
        )
    most = max(cost.values())
    while len(chosen) < LAYER_COUNT:
        gaps = {path: min(abs(cost[path] - cost[other]) for other in chosen) for path in outer}
        best = max(outer, key=lambda path: (gaps[path], -path.count(".")))
        if gaps[best] < 0.05 * most:
            break
        chosen.append(best)
    return sorted(chosen, key=list(outer).index)


def measured(args, layer, run):
    """Train and evaluate the run of a layer, as far as that is not done. Returns its metrics.json."""
    common = ["--device", args.device, *(["--cache", args.cache] if args.cache else [])]
    common += ["--quiet"] if args.quiet else ["--bars"] if args.bars else []
    flags = ["--encoder", args.encoder, "--layer", layer, "--weights", args.weights, "--data", args.data]
    for name in ("input_size", "mean", "std", "seed", "minutes"):
        value = getattr(args, name)
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            flags += [f"--{name.replace('_', '-')}={text}"]
    train.train(parse_train([*flags, *common, "--recipe", "auto", "--out", str(run), "--resume"]))
    try:
        return read_result(run / "metrics.json")
    except UserError:  # none yet, or of an earlier best.pt
        own = ["--encoder", args.encoder] if ".py:" in args.encoder else []
        evaluate.evaluate(parse_evaluate(["--ckpt", str(run / "best.pt"), *own, *common]))
    return read_result(run / "metrics.json")


@torch.no_grad()
def reconstructions(args, rows, out):
    """(image (3, size, size) in [0, 1], {layer: its reconstruction}) of --images, else a test image.

    The test image is of median PSNR, on average over the layers.
    """
    image, found = None, {}
    own = args.encoder if ".py:" in args.encoder else None
    for row in (row for row in rows if row.metrics):
        inverter, _ = load_inverter(out / row.layer / "best.pt", own)
        if image is None:
            pixels = pixels_of(args, rows, out, inverter.size)
            image = torch.tensor(pixels).permute(2, 0, 1).float() / 255
        found[row.layer] = inverter(image[None])[0].clamp(0, 1)
    return image, found


def pixels_of(args, rows, out, size):
    """The square of --images, or of the test image of median PSNR, uint8 (size, size, 3)."""
    if args.images:
        return np.asarray(read_square(args.images, size))
    images = data.load_split(args.data, "test", args.cache, bars=disable_bars(args), size=size)
    psnr = sum(row.psnr_by_image(out) for row in rows if row.metrics)
    return data.center(images[[int(psnr.argsort()[len(psnr) // 2])]], size)[0].numpy()


if __name__ == "__main__":
    cli_main(lambda: survey(ARGS))
