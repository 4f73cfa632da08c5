"""The scripts' flags, and YAML files with their values; without torch, so that `--help` is instant."""

import argparse
import os
import re
import reprlib
import sys
from functools import partial

import yaml

from utils import (
    DECODERS,
    INPUT_FLAGS,
    ITERATIONS,
    LAYERS,
    PROTOCOLS,
    UserError,
    check_layer,
    encoders_of,
    weights_of_each,
)

# Flags that say how to run, not what: they are no part of a run's configuration.
NOT_CONFIG = "config fast resume overwrite download cache graphs tracker quiet bars".split()
MAY_DIFFER = ("out", "device", "tf32")  # between a run and its resumption, or another of its seeds
NO_KEYS = ("help", "config", "fast")  # flags that a YAML file has no values for
GONE = ("feedback", "own_weights")  # flags of an earlier version
TRUST = "run the FILE.py that --ckpt names, if it is what it was trained with"
OFF = {"action": argparse.BooleanOptionalAction, "default": False}  # of a switch
ON = OFF | {"default": True}
LARGEST = 2**31 - 1  # of a whole number; seeds go to 2**32 - 1


class Parser(argparse.ArgumentParser):
    """An argument parser that shows defaults in its help and reports a mistake as a UserError."""

    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False, formatter_class=HelpFormatter)
        self.register("type", None, at_home)  # of flags without a type

    def error(self, message):
        raise UserError(f"{message} (--help explains every flag)")


def at_home(text):
    """`text` with the home folder for `~`, where no shell saw it, as in --out=~/x; in all parts of A+B."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")  # a shell's variable that is not set
    return "+".join(map(os.path.expanduser, text.split("+")))


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults after each flag that has one, the description as it is written."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def number(kind, text, minimum, maximum=LARGEST):
    """`text` as an int or finite float from `minimum` to `maximum`, else argparse's own error."""
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


def add_running_flags(add):
    """What every script that computes takes; add: a group's add_argument."""
    add("--cache", help="folder of decoded images and kept crops (default: ~/.cache/feature-inversion)")
    add("--device", default="auto", help="auto (cuda or cpu), cpu, cuda, cuda:N, or mps: Apple's")
    add("--quiet", **OFF, help="no progress: neither bars nor a line an epoch")
    add("--bars", **OFF, help="progress bars even where there is no terminal")


def add_input_flags(add):
    """What an encoder's images are like; add: a group's add_argument."""
    add("--input-size", type=positive_int, metavar="N", help="side of its images (default: its own)")
    what = "of its images' channels, three numbers (default: its own)"
    add("--mean", type=three_numbers, metavar="R,G,B", help=f"mean {what}")
    add("--std", type=three_numbers, metavar="R,G,B", help=f"std {what}")


def check_weights(args):
    """Set args.weights to `own` where a user's own function gives them.

    Raises UserError for weights that can't be had, and for a --std that is not positive.
    """
    own = [".py:" in name for name in encoders_of(args.encoder)]
    if any(own) and args.weights == "random":
        raise UserError("--weights random: a FILE.py's function decides that; leave it out, or give a file")
    if all(own) and args.weights == "imagenet":
        args.weights = "own"
    sources = weights_of_each(len(own), args.weights)
    if any(source == "own" and not mine for source, mine in zip(sources, own, strict=True)):
        raise UserError("--weights own: what a FILE.py's function gives; here imagenet, random or a file")
    if args.std and min(args.std) <= 0:
        raise UserError(f"--std {args.std}: images are divided by it; give three numbers above 0")


def three_numbers(text):
    """Three numbers with commas between them, as a list of floats, else argparse's own error."""
    numbers = [number(float, part.strip(), minimum=-1e9, maximum=1e9) for part in text.split(",")]
    if len(numbers) != 3:
        raise argparse.ArgumentTypeError(f"{text} is not three numbers, as 0.5,0.5,0.5")
    return numbers


# --- train.py ----------------------------------------------------------------------------------------


def train_parser(doc=None):
    """train.py's flags; each is also a key of the YAML file, with `_` for `-`."""
    layers = "; ".join(f"{encoder}: {list(names)[0]}…{list(names)[-1]}" for encoder, names in LAYERS.items())
    parser = Parser(doc)
    add = parser.add_argument_group("what is inverted, and by what").add_argument
    names = f"{', '.join(LAYERS)}, timm/NAME, torchvision/NAME or FILE.py:FUNCTION"
    add("--encoder", default="vgg16", help=f"frozen network: {names}")
    add("--layer", default="block1", help=f"where its features are taken ({layers}; or a module's path)")
    add("--weights", default="imagenet", help="`imagenet`; `random`, the control; or a state-dict file")
    add_input_flags(add)
    add("--decoder", choices=DECODERS, default="tconv", help="trained network")
    add("--width", type=positive_int, help="the decoder's main number of channels (default: its own)")
    joined = "of several encoders, A+B with --layer a+b: as they are, weighed, or weighed at each position"
    add("--fusion", choices=["concat", "weighted", "attention"], help=f"{joined} (default: concat)")
    looks = f"of the feedback decoder: how often it corrects the image (default: {ITERATIONS})"
    add("--iterations", type=positive_int, metavar="K", help=looks)
    add("--init", metavar="BEST.PT", help="start from another run's decoder, on other data or at other rates")
    add = parser.add_argument_group("images").add_argument
    add("--data", help="folder of DIV2K or with train/ and test/; `sample` (default: DIV2K if there)")
    add("--download", **OFF, help="first fetch DIV2K (3.7 GB) into --data")
    crop = "side of a training crop in pixels: a multiple of the layer's stride (default: the input size)"
    add("--crop", type=positive_int, metavar="N", help=crop)
    kept = "encode N crops of each image once and keep them in the cache: for deep layers; 0: none"
    add("--kept-crops", type=whole_number, default=0, metavar="N", help=kept)
    add("--train-images", type=positive_int, metavar="N", help="train on N, evenly spaced (default: all)")
    add("--val-images", type=positive_int, metavar="N", help="validate on N, evenly spaced (default: all)")
    add = parser.add_argument_group("training (defaults: the study's)").add_argument
    add("--epochs", type=positive_int, default=30, help="at most; validation follows each")
    add("--passes", type=positive_int, default=1, help="through the training images, in an epoch")
    add("--batch-size", type=positive_int, default=4, help="images a step, per process")
    add("--optimizer", choices=["adam", "muon"], default="adam", help="muon: faster in shallow layers")
    add("--lr", type=positive_float, default=1e-4, help="learning rate; onecycle: the highest")
    add("--schedule", choices=["plateau", "onecycle"], default="plateau", help="of the learning rate")
    clip = "scale a gradient of a larger norm down to this one; 0: never"
    add("--clip-grad", type=non_negative_float, default=0, metavar="NORM", help=clip)
    freeze = "then fix batch norm's statistics; 0: never"
    add("--freeze-bn", type=whole_number, default=0, metavar="STEPS", help=freeze)
    add("--patience", type=positive_int, default=15, help="epochs without a better validation loss")
    add("--mse-weight", type=non_negative_float, default=0.5, help="weight of MSE in the loss")
    add("--lpips-weight", type=non_negative_float, default=0.5, help="weight of LPIPS; 0: not computed")
    add("--protocol", choices=list(PROTOCOLS), default="documented", help="published: the study's code")
    add("--seed", type=seed, default=42, help="of initialisation, order, crops and flips")
    add = parser.add_argument_group("running").add_argument
    add("--config", help="YAML file with values of these flags; the command line wins")
    add("--fast", action="store_true", help="also the values under `fast:` in --config, tuned for it")
    add("--out", default="runs", help="folder of this run")
    add("--resume", **OFF, help="go on from last.pt in --out, if it is there")
    add("--overwrite", **OFF, help="replace the run in --out")
    add("--deterministic", **ON, help="repeatable on CUDA too (not the attention decoder there)")
    add("--tf32", **ON, help="on CUDA: the training's float32 convolutions and products in TF32")
    add("--amp", **OFF, help="encoder and decoder in bfloat16 (slow on CPUs)")
    add("--compile", **OFF, help="torch.compile them first; for long runs")
    add("--graphs", **ON, help="on CUDA launch a step's recorded kernels at once; one process, equal results")
    trackers = ["tensorboard", "wandb", "none"]
    add("--tracker", choices=trackers, default="tensorboard", help="live curves; wandb: install it")
    add_running_flags(add)
    return parser


def parse_train(argv=None, doc=None):
    """train.py's command line over YAML file over defaults → argparse.Namespace. Raises UserError."""
    parser = train_parser(doc)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.fast and not args.config:
        raise UserError("--fast: takes the values under `fast:` of a --config; give one, as configs/01_…")
    if args.config:
        args = parser.parse_args([*read_config(args.config, parser, args.fast), *argv])
    check_layer(args.encoder, args.layer)
    if args.fusion and len(encoders_of(args.encoder)) == 1:
        one = f"there is one, {args.encoder}"
        raise UserError(f"--fusion: joins several encoders, A+B with --layer a+b; {one}")
    check_weights(args)
    if args.protocol == "published" and (args.mean or args.std):
        raise UserError("--mean and --std: --protocol published has ImageNet's; leave them out")
    if args.iterations and args.decoder != "feedback":
        raise UserError(f"--iterations: only with --decoder feedback; {args.decoder} does not iterate")
    if args.resume and args.overwrite:
        raise UserError("--resume with --overwrite: give one of them, or --no-resume, --no-overwrite")
    if not args.mse_weight and not args.lpips_weight:
        raise UserError("--mse-weight 0 --lpips-weight 0: nothing to minimise; give one a positive weight")
    return args


def config_of(args):
    """The configuration of a run, {flag: value}, from train.py's flags."""
    return {flag: value for flag, value in vars(args).items() if flag not in NOT_CONFIG}


def with_defaults(config, path=None):
    """A saved configuration with the defaults of flags that are newer than it.

    path: of the file that has it, which it must not say something in that this version does not know.
    """
    flags = parse_train([])
    for name in config.keys() - vars(flags).keys() if path else ():
        if config[name] not in (None, False, "residual"):  # else it is as if there were no such flag
            value = reprlib.repr(config[name])
            raise UserError(f"{path}: trained with {name} {value}, which this version does not have")
    return config_of(flags) | config


def read_config(path, parser, fast=False):
    """The YAML file at `path` as command-line flags, checked like them. Raises UserError.

    fast: with what stands under its key `fast`, too.
    """
    actions = {action.dest: action for action in parser._actions if action.dest not in NO_KEYS}
    try:
        with open(path, encoding="utf-8") as file:
            nodes = nodes_of(yaml.compose(file, yaml.SafeLoader))
        tuned = nodes_of(nodes.pop("fast"), "fast: ") if "fast" in nodes else {}
        if fast and not tuned:
            raise UserError("has no lines of `key: value` under `fast:`, which --fast takes")
        flags = {name: as_flags(name, nodes[name], actions) for name in nodes}
        tuned = {name: as_flags(name, tuned[name], actions) for name in tuned}
        parser.parse_args([*sum(flags.values(), []), *sum(tuned.values(), [])])
    except (yaml.YAMLError, OSError, RecursionError, ValueError, UserError) as error:
        raise UserError(f"--config {path}: {error}") from None
    return sum((flags | tuned if fast else flags).values(), [])


def nodes_of(node, where=""):
    """{key: node of its value} of a YAML node, a mapping. Raises UserError."""
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{where}should have lines of `key: value`")
    nodes = {}
    for key, value in node.value:
        if str(key.value) in nodes:
            raise UserError(f"{where}has the key {key.value} twice")
        nodes[str(key.value)] = value
    return nodes


def as_flags(name, node, actions):
    """A key and the YAML node of its value as a part of a command line. Raises UserError.

    actions: what defines each flag. It gets the text as it stands, as from a command line: a seed 010 is 10,
    a layer 0.10 not 0.1.
    """
    text, null = node.value, node.tag.endswith(":null")
    if name in GONE and text in ("null", "false", "residual"):
        return []
    if name not in actions:
        raise UserError(f"unknown key {reprlib.repr(name)}; the keys are {', '.join(actions)}, fast")
    action, flag = actions[name], name.replace("_", "-")
    if isinstance(node, yaml.SequenceNode) and action.type is three_numbers:
        text = ",".join(str(part.value) for part in text)
    elif not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{name}: a {node.id} should be a number or a word")
    if isinstance(action, argparse.BooleanOptionalAction):
        if text.lower() not in yaml.SafeLoader.bool_values:
            raise UserError(f"{name}: {reprlib.repr(text)} should be true or false")
        return [f"--{flag}" if yaml.SafeLoader.bool_values[text.lower()] else f"--no-{flag}"]
    if null and action.default is not None:
        raise UserError(f"{name}: null should be a number or a word")
    return [] if null else [f"--{flag}={text}"]


# --- evaluate.py and invert.py -------------------------------------------------------------------------


def parse_evaluate(argv=None, doc=None):
    """evaluate.py's command line → argparse.Namespace. Raises UserError."""
    parser = Parser(doc)
    what = parser.add_argument_group("what to do")
    what.add_argument("--ckpt", help="measure this checkpoint, which train.py wrote (default: runs/best.pt)")
    add = what.add_mutually_exclusive_group().add_argument
    add("--images", nargs="+", metavar="PATH", help="instead: reconstruct these pictures and folders")
    add("--baselines", action="store_true", help="instead: what needs no features, on --data as of train.py")
    add("--report", metavar="RUNS", help="instead: the page and tables of the experiments in this folder")
    add("--compare", nargs="+", metavar="RUN", help="instead: how they differ from the first, image by image")
    add = parser.add_argument_group("how").add_argument
    add("--encoder", metavar="FILE.py:FUNCTION", help="of --ckpt: where that is now; it is run")
    add("--weights", metavar="FILE", help="of --ckpt: where its file of weights is now")
    add("--trust-code", action="store_true", help=TRUST)
    add("--data", help="folder whose test images to use, or `sample` (default: the checkpoint's)")
    add("--size", choices=["native", "224"], help="of --images: whole (default, if it can), or their centre")
    add("--protocol", choices=list(PROTOCOLS), help="of --baselines (default: documented)")
    add("--out", help="folder for the results (default: the checkpoint's, or in it one named like --data)")
    add("--iterations", type=positive_int, metavar="K", help="of feedback decoders (default: as in training)")
    add("--batch-size", type=positive_int, default=4, help="images at a time; results don't depend on it")
    add_running_flags(add)
    args = parser.parse_args(argv)
    of_ckpt = ("ckpt", "encoder", "weights", "trust_code", "iterations")
    refuse_ignored(args, "report", (*of_ckpt, "data", "cache", "out"))
    refuse_ignored(args, "images", ("data", "cache"))
    refuse_ignored(args, "compare", (*of_ckpt, "data", "cache"))
    if args.compare and len(args.compare) < 2:
        raise UserError("--compare: takes two runs or more, the first of which the others are held against")
    refuse_ignored(args, "baselines", of_ckpt)
    if args.size and not args.images:
        raise UserError("--size: only with --images")
    if args.protocol and not args.baselines:
        raise UserError("--protocol: only with --baselines; a checkpoint knows its own")
    args.ckpt = args.ckpt or "runs/best.pt"
    args.protocol = args.protocol or "documented"
    return args


def refuse_ignored(args, flag, ignored):
    """Raise UserError if one of the flags `ignored` is given beside `flag`, which makes no use of it."""
    for name in ignored:
        if getattr(args, flag) and getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')}: not with --{flag}")


def parse_invert(argv=None, doc=None):
    """invert.py's command line → argparse.Namespace. Raises UserError."""
    parser = Parser(doc)
    add = parser.add_argument_group("what is inverted").add_argument
    add("--ckpt", help="start from this checkpoint's reconstructions (default: runs/best.pt)")
    add("--encoder", help="start from noise: any that train.py takes; with --ckpt: where its FILE.py is now")
    add("--layer", help="of --encoder (default: its first, if it has a short name)")
    add("--weights", help="`imagenet` (default), `random` or a file; with --ckpt: where its file is now")
    add("--trust-code", action="store_true", help=TRUST)
    add_input_flags(add)
    add("--images", nargs="+", metavar="PATH", help="your own pictures and folders, instead of test images")
    add("--data", help="folder whose test images to use, or `sample` (default: the checkpoint's)")
    add("--split", choices=["test", "val"], help="val: to choose --lr and --tv-weight by (default: test)")
    add("--count", type=positive_int, help="images, evenly spaced among all (default: 10)")
    add = parser.add_argument_group("how").add_argument
    add("--course", nargs="+", metavar="FOLDER", help="instead: draw PSNR against time of inversions there")
    add("--steps", type=positive_int, default=300, help="of Adam")
    rate = "Adam's rate (default: 0.1, from stride 4 on 0.03; with --ckpt 0.02, from 8 on 0.002, 16 on 0.001)"
    add("--lr", type=positive_float, help=rate)
    prior = "of the total variation, at first (default: (stride / 2)², at most 256; with --ckpt 0.3 of it)"
    add("--tv-weight", type=non_negative_float, help=prior)
    add("--batch-size", type=positive_int, default=4, help="images at a time; results don't depend on it")
    add("--out", help="folder for the results (default: the checkpoint's; from noise: runs/noise_…)")
    add_running_flags(add)
    args = parser.parse_args(argv)
    refuse_ignored(args, "course", ("ckpt", "encoder", "images", "data", "lr", "tv_weight", "cache"))
    refuse_ignored(args, "images", ("data", "split", "count", "cache"))
    args.split = args.split or ("own" if args.images else "test")
    args.count = args.count or (LARGEST if args.images else 10)
    noise = args.encoder and not args.ckpt
    if noise:
        if args.encoder in LAYERS:
            args.layer = args.layer or list(LAYERS[args.encoder])[0]
        check_layer(args.encoder, args.layer)
        if not args.layer:
            raise UserError(f"--encoder {args.encoder}: give a --layer; python models.py lists them")
        args.weights = args.weights or "imagenet"
        check_weights(args)
    for name in ("layer", *INPUT_FLAGS):
        if getattr(args, name) and not noise:
            raise UserError(f"--{name.replace('_', '-')}: only with --encoder and without --ckpt")
    args.ckpt = args.ckpt or (None if noise else "runs/best.pt")
    return args
