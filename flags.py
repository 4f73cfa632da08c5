"""The scripts' flags, and YAML files with their values; without torch, so that `--help` is instant."""

import argparse
import os
import re
import reprlib
import sys
from functools import partial
from pathlib import Path

import yaml

from utils import DECODERS, LAYERS, PROTOCOLS, UserError, check_layer, encoders_of, weights_of_each

# Flags that say how to run, not what: they are no part of a run's configuration
NOT_CONFIG = "config fast resume overwrite download cache graphs tracker quiet bars".split()
MAY_DIFFER = ("out", "device", "tf32")  # between a run and its resumption, or another of its seeds
NO_KEYS = ("help", "config", "fast")  # flags that a YAML file has no values for
GONE = ("feedback", "own_weights")  # flags of an earlier version
# The study's recipe: flags that --recipe auto chooses by the layer and the images instead (extras/recipe.py)
STUDY = {"decoder": "tconv", "kept_crops": 0, "epochs": 30, "passes": 1, "batch_size": 4, "optimizer": "adam"}
STUDY |= {"lr": 1e-4, "schedule": "plateau", "clip_grad": 0, "mse_weight": 0.5, "lpips_weight": 0.5}
LARGEST = 2**31 - 1  # of whole numbers; seeds go to 2**32 - 1


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a UserError for a mistake."""

    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False, formatter_class=HelpFormatter)
        self.register("type", None, at_home)  # of flags without a type

    def error(self, message):
        raise UserError(f"{message} (--help explains every flag)")


def at_home(text):
    """`text` with the home folder for `~` in each part of A+B, which the shell leaves in --out=~/x."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")  # an unset variable of the shell
    return "+".join(map(os.path.expanduser, text.split("+")))


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Adds defaults to the help of flags, and keeps the line breaks of the description."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def number(kind, text, minimum, maximum=LARGEST):
    """`text` as an int or finite float from `minimum` to `maximum`, or argparse's error."""
    try:
        if not re.fullmatch(r"[-+.\deE]+", text, re.ASCII):  # int() takes 1_000, too
            raise ValueError
        value = kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
    if not minimum <= value:
        raise argparse.ArgumentTypeError(f"{text} is not {'positive' if minimum else 'zero or positive'}")
    if value > maximum:
        raise argparse.ArgumentTypeError(f"{text} is too large; at most {maximum}")
    return value


positive_int = partial(number, int, minimum=1)
whole_number = partial(number, int, minimum=0)
seed = partial(number, int, minimum=0, maximum=2**32 - 1)
positive_float = partial(number, float, minimum=5e-324, maximum=sys.float_info.max)
non_negative_float = partial(number, float, minimum=0, maximum=sys.float_info.max)


def three_numbers(text):
    """Three numbers with commas between them, as a list of floats, or argparse's error."""
    numbers = [number(float, part.strip(), minimum=-1e9, maximum=1e9) for part in text.split(",")]
    if len(numbers) != 3:
        raise argparse.ArgumentTypeError(f"{text} is not three numbers, as 0.5,0.5,0.5")
    return numbers


# Kinds of flags: a count, a count or 0, and switches that are off or on by default
N = {"type": positive_int, "metavar": "N"}
N_OR_0 = {"type": whole_number, "metavar": "N"}
OFF = {"action": argparse.BooleanOptionalAction, "default": False}
ON = OFF | {"default": True}
TRUST = {"action": "store_true", "help": "run the FILE.py of --ckpt, if it is still as it was in training"}


def add_running_flags(add):
    """Flags of every script that computes; add: a group's add_argument."""
    add("--cache", help="folder for decoded images and kept crops (default: ~/.cache/feature-inversion)")
    add("--device", default="auto", help="auto (cuda if there is one, else cpu), cpu, cuda, cuda:N or mps")
    add("--quiet", **OFF, help="no progress output")
    add("--bars", **OFF, help="progress bars even if the output is not a terminal")


def add_input_flags(add):
    """The images that an encoder takes; add: a group's add_argument."""
    add("--input-size", **N, help="side of the images that the encoder takes (default: its own)")
    what = "with which the encoder normalises its images (default: its own)"
    add("--mean", type=three_numbers, metavar="R,G,B", help=f"mean {what}")
    add("--std", type=three_numbers, metavar="R,G,B", help=f"standard deviation {what}")


def add_data_flags(add):
    """The images of a training; add: a group's add_argument."""
    add("--data", help="DIV2K, a folder with train/ and test/, or `sample` (default: DIV2K if it is there)")
    add("--download", **OFF, help="download DIV2K (3.7 GB) to --data first")
    add("--crop", **N, help="train on N×N crops, to be faster; a multiple of the layer's stride")
    add("--kept-crops", **N_OR_0, help="encode only N crops an image and reuse them, for deep layers")
    add("--train-images", **N, help="train on only N images, evenly spaced (default: all)")
    add("--val-images", **N, help="validate on only N images, evenly spaced (default: all)")


def check_weights(args):
    """Set args.weights to `own` if a FILE.py gives them. Raises UserError; also for a --std of 0."""
    own = [".py:" in name for name in encoders_of(args.encoder)]
    if any(own) and args.weights == "random":
        raise UserError("--weights random: a FILE.py's function decides that; leave it out, or give a file")
    if all(own) and args.weights == "imagenet":
        args.weights = "own"
    sources = weights_of_each(len(own), args.weights)
    if any(source == "own" and not mine for source, mine in zip(sources, own, strict=True)):
        raise UserError("--weights own: only for a FILE.py's function; here imagenet, random or a file")
    if args.std and min(args.std) <= 0:
        raise UserError(f"--std {args.std}: images are divided by it; give three numbers above 0")


# --- train.py ----------------------------------------------------------------------------------------


def train_parser(doc=None):
    """train.py's flags; each is also a key of the YAML file, with `_` for `-`."""
    layers = "; ".join(f"{encoder}: {list(names)[0]}…{list(names)[-1]}" for encoder, names in LAYERS.items())
    encoders = f"{', '.join(LAYERS)}, timm/NAME, torchvision/NAME or FILE.py:FUNCTION; A+B: both"
    parser = Parser(doc)
    add = parser.add_argument_group("which features, and what inverts them").add_argument
    add("--encoder", default="vgg16", help=f"frozen network that gives the features: {encoders}")
    add("--layer", default="block1", help=f"layer that gives the features ({layers}; or a module's path)")
    add("--weights", default="imagenet", help="of the encoder: imagenet, random (a control), or a file")
    add_input_flags(add)
    add("--decoder", choices=DECODERS, help="to train; the best are feedback, residual")
    add("--width", **N, help="main number of channels of the decoder; fewer are faster (default: its own)")
    fusion = "how to join the features of A+B: unchanged, with learned weights, or weights at each position"
    add("--fusion", choices=["concat", "weighted", "attention"], help=f"{fusion} (default: concat)")
    add("--iterations", **N, help="how often the feedback decoder corrects its image (default: 3)")
    add("--init", metavar="BEST.PT", help="start from the decoder of this run, to train it further")
    add_data_flags(parser.add_argument_group("images").add_argument)
    add = parser.add_argument_group("training").add_argument
    recipe = "for what is not given: the study's values, or what suits the layer and the images"
    which = "default: study for its four encoders without --minutes"
    add("--recipe", choices=["study", "auto"], help=f"{recipe} ({which})")
    add("--minutes", type=positive_float, metavar="M", help="train for about M minutes, with the validations")
    add("--epochs", **N, help="train for at most N epochs; each ends with a validation")
    add("--passes", **N, help="passes through the images in an epoch; validation comes after all")
    add("--steps", **N, help="steps in an epoch, instead of --passes; --minutes finds them")
    add("--batch-size", **N, help="images in a step of each process; fewer need less memory")
    add("--optimizer", choices=["adam", "muon"], help="muon is better in shallow layers")
    add("--lr", type=positive_float, help="learning rate; with --schedule onecycle the highest")
    schedule = "plateau: halve the learning rate when validation stalls; onecycle: warm up, then fall to 0"
    add("--schedule", choices=["plateau", "onecycle"], help=schedule)
    clip = "scale gradients down to this norm, to keep the training stable; 0: never"
    add("--clip-grad", type=non_negative_float, metavar="NORM", help=clip)
    add("--freeze-bn", **N_OR_0, default=0, help="fix batch norm's statistics after N steps")
    add("--patience", **N, default=15, help="stop after N epochs without a better validation loss")
    add("--mse-weight", type=non_negative_float, help="of MSE in the loss; alone: best PSNR")
    add("--lpips-weight", type=non_negative_float, help="of LPIPS in the loss; 0 is faster")
    add("--protocol", choices=list(PROTOCOLS), default="documented", help="published: as the study's code")
    add("--seed", type=seed, default=42, help="of initialisation, order and crops; others show the spread")
    add = parser.add_argument_group("running").add_argument
    add("--config", help="YAML file with values for these flags; the command line wins")
    add("--fast", action="store_true", help="use the values under `fast:` in --config: a shorter training")
    add("--out", default="runs", help="folder for the results; each run needs its own")
    add("--resume", **OFF, help="continue the run in --out, if there is one")
    add("--overwrite", **OFF, help="replace the run in --out")
    add("--deterministic", **ON, help="the same result each time on CUDA too, except --decoder attention")
    add("--tf32", **ON, help="on CUDA, train with faster, less exact float32 products")
    add("--amp", **OFF, help="compute in bfloat16: faster on GPUs, slow on CPUs")
    add("--compile", **OFF, help="compile the networks first, which pays off in long runs")
    add("--graphs", **ON, help="on CUDA, record a step's kernels and replay them: faster, same result")
    add("--tracker", choices=["tensorboard", "wandb", "none"], default="tensorboard", help="shows the curves")
    add_running_flags(add)
    for action in parser._actions:
        if action.dest in STUDY:
            action.help += f" (study: {STUDY[action.dest]})"
    return parser


def parse_train(argv=None, doc=None):
    """train.py's flags from the command line, else the YAML file, else the defaults. Raises UserError."""
    parser = train_parser(doc)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.fast and not args.config:
        raise UserError("--fast: uses the values under `fast:` in a --config; give one, such as configs/01_…")
    if args.config:
        args = parser.parse_args([*read_config(args.config, parser, args.fast), *argv])
    check_layer(args.encoder, args.layer)
    if args.fusion and len(encoders_of(args.encoder)) == 1:
        raise UserError(f"--fusion: joins several encoders, A+B with --layer a+b; {args.encoder} is one")
    check_weights(args)
    if (args.steps or args.minutes) and args.passes:
        raise UserError("--passes with --steps or --minutes: both say how long an epoch is; give one of them")
    studied = all(name in LAYERS for name in encoders_of(args.encoder)) and not args.minutes
    args.recipe = args.recipe or ("study" if studied else "auto")
    weighted = args.mse_weight is not None or args.lpips_weight is not None  # then the other is the study's
    for flag in STUDY if args.recipe == "study" else ("mse_weight", "lpips_weight") if weighted else ():
        if getattr(args, flag) is None and not (flag == "passes" and (args.steps or args.minutes)):
            setattr(args, flag, STUDY[flag])
    if args.protocol == "published" and (args.mean or args.std):
        raise UserError("--mean and --std: --protocol published uses ImageNet's; leave them out")
    if args.iterations and args.decoder != "feedback":
        raise UserError("--iterations: only with --decoder feedback; no other iterates")
    if args.resume and args.overwrite:
        raise UserError("--resume with --overwrite: give one of them, or --no-resume, --no-overwrite")
    if args.mse_weight == args.lpips_weight == 0:
        raise UserError("--mse-weight 0 --lpips-weight 0: nothing to minimise; give one a positive weight")
    return args


def config_of(args):
    """The configuration of a run, {flag: value}."""
    return {flag: value for flag, value in vars(args).items() if flag not in NOT_CONFIG}


def with_defaults(config, path=None):
    """A saved configuration, with defaults for newer flags. With its path, UserError for unknown flags."""
    flags = parse_train([])
    for name in config.keys() - vars(flags).keys() if path else ():
        if config[name] not in (None, False, "residual"):  # flags of an earlier version, switched off
            value = reprlib.repr(config[name])
            raise UserError(f"{path}: trained with {name} {value}, which this version does not have")
    return config_of(flags) | config


class TextLoader(yaml.BaseLoader):
    """Every value is text, so that a layer 0.10 is not 0.1; null is None. It knows no tag that runs code."""

    def construct_scalar(self, node):
        null = node.style is None and node.value in ("", "~", "null", "Null", "NULL")  # not in quotes
        return None if null else super().construct_scalar(node)

    def construct_mapping(self, node, deep=False):
        """A dictionary. Raises UserError for a key that stands twice."""
        keys = [str(key.value) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"has the key {key} twice")
        return super().construct_mapping(node, deep)


def read_config(path, parser, fast=False):
    """The YAML file at `path`, with `fast` also its key `fast`, as command-line flags. Raises UserError."""
    actions = {action.dest: action for action in parser._actions if action.dest not in NO_KEYS}
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, TextLoader)
        tuned = values.pop("fast", {}) if isinstance(values, dict) else None
        if not (isinstance(values, dict) and isinstance(tuned, dict)):
            raise UserError("should have lines of `key: value`, and such lines under `fast:`, if any")
        if fast and not tuned:
            raise UserError("has no lines of `key: value` under `fast:`, which --fast uses")
        flags, tuned = (
            {key: as_flags(key, found[key], actions) for key in found} for found in (values, tuned)
        )
        parser.parse_args([*sum(flags.values(), []), *sum(tuned.values(), [])])
    except (yaml.YAMLError, OSError, RecursionError, ValueError, UserError) as error:
        raise UserError(f"--config {path}: {error}") from None
    return sum((flags | tuned if fast else flags).values(), [])


def as_flags(name, value, actions):
    """A key of a YAML file and its value as command-line flags. Raises UserError."""
    if name in GONE and value in (None, "false", "residual"):
        return []
    if name not in actions:
        raise UserError(f"unknown key {reprlib.repr(name)}; the keys are {', '.join(actions)}, fast")
    action, flag = actions[name], name.replace("_", "-")
    if isinstance(value, list) and action.type is three_numbers:
        value = ",".join(map(str, value))
    if value is None and action.default is None:  # not given
        return []
    if not isinstance(value, str):
        value = "null" if value is None else reprlib.repr(value)
        raise UserError(f"{name}: {value} should be a number or a word")
    if isinstance(action, argparse.BooleanOptionalAction):
        if value.lower() not in yaml.SafeLoader.bool_values:
            raise UserError(f"{name}: {reprlib.repr(value)} should be true or false")
        return [f"--{flag}" if yaml.SafeLoader.bool_values[value.lower()] else f"--no-{flag}"]
    return [f"--{flag}={value}"]


# --- evaluate.py and invert.py -------------------------------------------------------------------------


def parse_evaluate(argv=None, doc=None):
    """evaluate.py's flags. Raises UserError."""
    parser = Parser(doc)
    what = parser.add_argument_group("what to do")
    ckpt = "checkpoint of train.py to measure, with --images also several (default: runs/best.pt)"
    what.add_argument("--ckpt", nargs="+", metavar="BEST.PT", help=ckpt)
    add = what.add_mutually_exclusive_group().add_argument
    add("--images", nargs="+", metavar="PATH", help="instead: reconstruct your images, or folders of them")
    add("--baselines", action="store_true", help="instead: measure baselines that need no features")
    add("--report", metavar="RUNS", help="instead: write a page with the results of all runs in a folder")
    add("--compare", nargs="+", metavar="RUN", help="instead: compare each run with the first")
    add = parser.add_argument_group("how").add_argument
    add("--encoder", metavar="FILE.py:FUNCTION", help="encoder of --ckpt, run from this file")
    add("--weights", metavar="FILE", help="weights of that encoder, if --ckpt's file was moved")
    add("--trust-code", **TRUST)
    add("--data", help="folder with test images, or `sample` (default: the checkpoint's)")
    add("--size", choices=["native", "224"], help="of --images: whole (default if possible), or the centre")
    small = "of --images: show below each reconstruction the image at the features' resolution"
    add("--thumbnails", action="store_true", help=small)
    add("--protocol", choices=list(PROTOCOLS), help="of --baselines (default: documented)")
    add("--out", help="folder for the results (default: the checkpoint's, or one inside for other --data)")
    add("--iterations", **N, help="corrections by a feedback decoder (default: as in training)")
    add("--batch-size", **N, default=4, help="images at a time, which changes only speed and memory")
    add_running_flags(add)
    args = parser.parse_args(argv)
    of_ckpt = ("ckpt", "encoder", "weights", "trust_code", "iterations")
    refuse_ignored(args, "report", (*of_ckpt, "data", "cache", "out"))
    refuse_ignored(args, "images", ("data", "cache"))
    refuse_ignored(args, "compare", (*of_ckpt, "data", "cache"))
    refuse_ignored(args, "baselines", of_ckpt)
    if args.compare and len(args.compare) < 2:
        raise UserError("--compare: takes two runs or more, and compares the others with the first")
    for flag in ("size", "thumbnails"):
        if getattr(args, flag) and not args.images:
            raise UserError(f"--{flag}: only with --images")
    if args.ckpt and len(args.ckpt) > 1 and not args.images:
        raise UserError("--ckpt: several only with --images; measure one at a time")
    if args.protocol and not args.baselines:
        raise UserError("--protocol: only with --baselines; a checkpoint knows its own")
    args.ckpts = args.ckpt or ["runs/best.pt"]
    args.ckpt = args.ckpts[0]
    if not (args.data or args.images or args.baselines or args.report or args.compare):
        check_data_of(Path(args.ckpt))
    args.protocol = args.protocol or "documented"
    return args


def check_data_of(ckpt):
    """Raise UserError if the data that a checkpoint was trained on are gone, before it takes time to load it.

    They stand in the run's config.yaml, or in NAME.json beside NAME.pt.
    """
    for file in (ckpt.with_name("config.yaml"), ckpt.with_suffix(".json")):
        try:
            content = yaml.load(file.read_text(encoding="utf-8"), TextLoader)  # JSON is YAML
            data = content.get("config", content).get("data")
        except (OSError, ValueError, AttributeError, yaml.YAMLError, UserError):
            continue
        if data and data != "sample" and not Path(data).is_dir():
            what = f"{ckpt}: was trained on {data}, which is not here"
            raise UserError(f"{what}; give --data, a folder with images in test/, or `sample`, or --images")


def refuse_ignored(args, flag, ignored):
    """Raise UserError if one of the flags `ignored` is given together with `flag`, which ignores it."""
    for name in ignored:
        if getattr(args, flag) and getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')}: not with --{flag}")


def parse_survey(argv=None, doc=None):
    """survey.py's flags. Raises UserError."""
    parser = Parser(doc)
    add = parser.add_argument_group("what to survey").add_argument
    add("--encoder", default="vgg16", help="any --encoder of train.py, but one that + joins")
    add("--layers", nargs="+", metavar="LAYER", help="as --layer of train.py (default: about six)")
    add("--weights", default="imagenet", help="of the encoder: imagenet, random (a control), or a file")
    add_input_flags(add)
    add("--data", help="a folder with train/ and test/, or `sample` (default: DIV2K if it is there)")
    add("--images", metavar="PATH", help="your image for the strip (default: a test image)")
    add = parser.add_argument_group("how").add_argument
    add("--minutes", type=positive_float, default=2, metavar="M", help="of training for each layer")
    add("--seed", type=seed, default=42, help="of initialisation, order and crops")
    add("--out", help="folder for the results (default: runs/survey_ENCODER)")
    add_running_flags(add)
    args = parser.parse_args(argv)
    if len(encoders_of(args.encoder)) > 1:
        raise UserError(f"--encoder {args.encoder}: one at a time; survey each by itself")
    for layer in args.layers or LAYERS.get(args.encoder, [""]):
        check_layer(args.encoder, layer)
    check_weights(args)
    args.out = args.out or f"runs/survey_{re.sub('[^A-Za-z0-9.]+', '_', args.encoder)}"
    return args


def parse_invert(argv=None, doc=None):
    """invert.py's flags. Raises UserError."""
    parser = Parser(doc)
    add = parser.add_argument_group("what to invert").add_argument
    add("--ckpt", help="start from the reconstructions of this checkpoint (default: runs/best.pt)")
    add("--encoder", help="start from noise, for any --encoder of train.py; with --ckpt: its moved FILE.py")
    add("--layer", help="of --encoder (default: the first, if the encoder has a short name)")
    add("--weights", help="of --encoder (default: imagenet); with --ckpt: its moved file of weights")
    add("--trust-code", **TRUST)
    add_input_flags(add)
    add("--images", nargs="+", metavar="PATH", help="your images, or folders of them, instead of test images")
    add("--data", help="folder with test images, or `sample` (default: the checkpoint's)")
    add("--split", choices=["test", "val"], help="val: to choose --lr and --tv-weight (default: test)")
    add("--count", **N, help="number of images, evenly spaced (default: 10)")
    add = parser.add_argument_group("how").add_argument
    add("--course", nargs="+", metavar="FOLDER", help="instead: draw PSNR against time of these inversions")
    add("--steps", **N, default=300, help="steps of Adam; more come closer")
    rate = "learning rate (default: 0.1, from stride 4 on 0.03; --ckpt: 0.02, from 8 on 0.002, 16 on 0.001)"
    add("--lr", type=positive_float, help=rate)
    prior = "of total variation, for smooth images (default: (stride / 2)² up to 256; --ckpt: 0.3 of it)"
    add("--tv-weight", type=non_negative_float, help=prior)
    add("--batch-size", **N, default=4, help="images at a time, which changes only speed and memory")
    add("--out", help="folder for the results (default: the checkpoint's; from noise: runs/noise_…)")
    add_running_flags(add)
    args = parser.parse_args(argv)
    refuse_ignored(args, "course", ("ckpt", "encoder", "images", "data", "lr", "tv_weight", "cache"))
    refuse_ignored(args, "images", ("data", "split", "count", "cache"))
    args.split = args.split or ("own" if args.images else "test")
    args.count = args.count or (LARGEST if args.images else 10)
    noise = args.encoder and not args.ckpt
    if noise:
        args.layer = args.layer or next(iter(LAYERS.get(args.encoder, ())), None)
        check_layer(args.encoder, args.layer)
        if not args.layer:
            raise UserError(f"--encoder {args.encoder}: give a --layer; python models.py lists them")
        args.weights = args.weights or "imagenet"
        check_weights(args)
    for name in ("layer", "input_size", "mean", "std"):
        if getattr(args, name) and not noise:
            raise UserError(f"--{name.replace('_', '-')}: only with --encoder and without --ckpt")
    args.ckpt = args.ckpt or (None if noise else "runs/best.pt")
    return args
