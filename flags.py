"""The scripts' flags, and YAML files with their values; without torch, so that `--help` is instant."""

import argparse
import reprlib
import sys
from functools import partial
from pathlib import Path

import yaml

from study import DECODERS, FEEDBACK_OPTIONS, INPUT, ITERATIONS, LAYERS, PROTOCOLS
from utils import UserError

# Flags that say how to run, not what: they are no part of a run's configuration.
NOT_CONFIG = ("config", "fast", "resume", "overwrite", "download", "cache", "graphs", "tracker")
NOT_CONFIG += ("quiet", "bars")
MAY_DIFFER = ("out", "device", "tf32")  # between a run and its resumption, or another of its seeds
NO_KEYS = ("help", "config", "fast")  # flags that a YAML file has no values for
LARGEST = 2**31 - 1  # of a whole number; seeds go to 2**32 - 1


class Parser(argparse.ArgumentParser):
    """An argument parser that shows defaults in its help and reports a mistake as a UserError."""

    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False, formatter_class=HelpFormatter)

    def error(self, message):
        raise UserError(f"{message} (--help explains every flag)")

    def parse_known_args(self, args=None, namespace=None):
        found, others = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            if value == "" or isinstance(value, list) and "" in value:  # a shell's variable that is not set
                self.error(f"--{name.replace('_', '-')}: is empty")
        return found, others


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults after each flag that has one, the description as it is written."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def number(kind, text, minimum, maximum=LARGEST):
    """`text` as an int or finite float from `minimum` to `maximum`, else argparse's own error."""
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not {'a whole' if kind is int else 'a'} number"
        ) from None
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


def is_encoder(name):
    """Whether an encoder can have this name."""
    return name in LAYERS or ".py:" in name or name.startswith(("timm/", "torchvision/"))


def split(text, is_name):
    """The names that `text` joins with +. A name may contain +: each is as short as `is_name` allows."""
    names = []
    for part in text.split("+"):
        if names and not is_name(names[-1]):
            names[-1] += f"+{part}"
        else:
            names.append(part)
    return names if is_name(names[-1]) else text.split("+")


def encoders_of(encoder):
    """The encoders that --encoder joins with +."""
    return split(encoder, is_encoder)


def check_encoder(name):
    """Raise UserError for what no encoder can be called."""
    if not is_encoder(name):
        others = "timm/NAME, torchvision/NAME, FILE.py:FUNCTION"
        raise UserError(f"--encoder {name}: not an encoder; choose from {', '.join(LAYERS)}, {others}")


def check_layer(encoder, layer):
    """Raise UserError for names that cannot be; of networks that have no short name, encoders.py knows."""
    for name in encoders_of(encoder):
        check_encoder(name)
    if encoder in LAYERS and layer not in LAYERS[encoder]:
        raise UserError(
            f"--layer {layer}: not a layer of {encoder}; choose from {', '.join(LAYERS[encoder])}"
        )


def add_running_flags(add):
    """What every script that computes takes; add: a group's add_argument."""
    add("--cache", help="folder of decoded images and kept crops (default: ~/.cache/feature-inversion)")
    add("--device", default="auto", help="auto (cuda or cpu), cpu, cuda, cuda:N, or mps: Apple's")
    add("--quiet", action="store_true", help="no progress: neither bars nor a line an epoch")
    add("--bars", action="store_true", help="progress bars even where there is no terminal")


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


def weights_of_each(count, weights):
    """The `--weights` of each of `count` encoders: one word for all, or as many with `+` between them."""

    def is_source(name):
        return name in ("imagenet", "random", "own") or Path(name).is_file()

    sources = [weights] if is_source(weights) else split(weights, is_source)
    return sources if len(sources) == count else [weights] * count


def three_numbers(text):
    """Three numbers with commas between them, as a list of floats, else argparse's own error."""
    numbers = [number(float, part, minimum=-1e9, maximum=1e9) for part in text.split(",")]
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
    looks = "of the feedback decoder: how often it looks at the encoder and corrects the image"
    looks += f" (default: {ITERATIONS})"
    add("--iterations", type=positive_int, metavar="K", help=looks)
    sees = "of the feedback decoder: what it sees then (default: residual)"
    add("--feedback", choices=["residual", "gradient", "both"], help=sees)
    own = "of the feedback decoder: weights of its own for each iteration"
    add("--own-weights", action="store_true", help=own)
    add = parser.add_argument_group("images").add_argument
    add("--data", help="folder of DIV2K or with train/ and test/; `sample` (default: DIV2K if there)")
    add("--download", action="store_true", help="first fetch DIV2K (3.7 GB) into --data")
    crop = "side of a training crop in pixels: a multiple of the layer's stride (default: the input size)"
    add("--crop", type=positive_int, metavar="N", help=crop)
    kept = "encode N crops of each image once and keep them in the cache: for deep layers; 0: none"
    add("--kept-crops", type=whole_number, default=0, metavar="N", help=kept)
    some = "on N of its images, evenly spaced (default: all)"
    add("--train-images", type=positive_int, metavar="N", help=f"train {some}")
    add("--val-images", type=positive_int, metavar="N", help=f"validate {some}")
    add = parser.add_argument_group("training (defaults: the study's)").add_argument
    add("--epochs", type=positive_int, default=30, help="at most; validation follows each")
    add("--passes", type=positive_int, default=1, help="through the training images, in an epoch")
    add("--batch-size", type=positive_int, default=4, help="images a step, per process")
    both = "adam, or muon, which learns more in the same time in shallow layers (muon.py)"
    add("--optimizer", choices=["adam", "muon"], default="adam", help=both)
    add("--lr", type=positive_float, default=1e-4, help="learning rate; onecycle: the highest")
    add("--schedule", choices=["plateau", "onecycle"], default="plateau", help="of the learning rate")
    clip = "scale a gradient of a larger norm down to this one; 0: never"
    add("--clip-grad", type=non_negative_float, default=0, metavar="NORM", help=clip)
    freeze = "then fix batch norm's statistics; 0: never"
    add("--freeze-bn", type=whole_number, default=0, metavar="STEPS", help=freeze)
    add("--patience", type=positive_int, default=15, help="epochs without a better validation loss")
    add("--mse-weight", type=non_negative_float, default=0.5, help="weight of MSE in the loss")
    lpips = "weight of LPIPS in the loss; 0: not computed"
    add("--lpips-weight", type=non_negative_float, default=0.5, help=lpips)
    add("--protocol", choices=list(PROTOCOLS), default="documented", help="published: the study's code")
    add("--seed", type=seed, default=42, help="of initialisation, order, crops and flips")
    running = parser.add_argument_group("running")
    add = running.add_argument
    add("--config", help="YAML file with values of these flags; the command line wins")
    fast = "also the values under `fast:` in --config: an optimisation tuned for that experiment"
    add("--fast", action="store_true", help=fast)
    add("--out", default="runs", help="folder of this run")
    again = running.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from last.pt in --out, if it is there")
    again.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    switch = argparse.BooleanOptionalAction
    repeatable = "repeatable on CUDA too (not the attention decoder there)"
    add("--deterministic", action=switch, default=True, help=repeatable)
    fast = "on CUDA: the training's float32 convolutions and products in TF32"
    add("--tf32", action=switch, default=True, help=fast)
    add("--amp", action=switch, default=False, help="encoder and decoder in bfloat16 (slow on CPUs)")
    add("--compile", action=switch, default=False, help="torch.compile them first; for long runs")
    graphs = "on CUDA record a step's kernels and launch them at once; one process only, equal results"
    add("--graphs", action=switch, default=True, help=graphs)
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
        raise UserError(
            f"--fusion: joins several encoders, A+B with --layer a+b; there is one, {args.encoder}"
        )
    check_weights(args)
    if args.protocol == "published" and (args.mean or args.std):
        raise UserError("--mean and --std: --protocol published has ImageNet's; leave them out")
    for name in FEEDBACK_OPTIONS:
        if getattr(args, name) and args.decoder != "feedback":
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}: only with --decoder feedback; {args.decoder} does not iterate")
    if not args.mse_weight and not args.lpips_weight:
        raise UserError(
            "--mse-weight 0 --lpips-weight 0: nothing to minimise; give at least one a positive weight"
        )
    return args


def config_of(args):
    """The configuration of a run, {flag: value}, from train.py's flags."""
    return {flag: value for flag, value in vars(args).items() if flag not in NOT_CONFIG}


def read_config(path, parser, fast=False):
    """The YAML file at `path` as command-line flags, checked like them. Raises UserError.

    fast: with what stands under its key `fast`, too.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        values = yaml.safe_load(text)
    except (yaml.YAMLError, OSError, RecursionError, ValueError) as error:
        raise UserError(f"--config {path}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: is {type(values).__name__}, should be lines of `key: value`")
    tuned = values.pop("fast", {})
    if not isinstance(tuned, dict) or fast and not tuned:
        raise UserError(f"--config {path}: has no lines of `key: value` under `fast:`, which --fast takes")
    try:
        written = texts_of(yaml.compose(text, yaml.SafeLoader))
        flags = flags_of(values, written, parser)
        tuned = flags_of(tuned, written.get("fast") or {}, parser)
        parser.parse_args([*flags, *tuned])
    except (UserError, RecursionError) as error:
        raise UserError(f"--config {path}: {error}") from None
    return [*flags, *tuned] if fast else flags


def texts_of(mapping):
    """{key: its value's text, or of a mapping the same} of a YAML node. Raises UserError for a key twice."""
    texts = {}
    for key, value in mapping.value:
        if key.value in texts:
            raise UserError(f"has the key {key.value} twice")
        texts[key.value] = texts_of(value) if isinstance(value, yaml.MappingNode) else value.value
    return texts


def flags_of(values, written, parser):
    """{key: value} of a YAML file as a part of a command line; written: {key: its text}. Raises UserError."""
    actions = {action.dest: action for action in parser._actions if action.dest not in NO_KEYS}
    flags = []
    for key, value in values.items():
        if key not in actions:
            known = ", ".join(actions)
            raise UserError(f"unknown key {reprlib.repr(key)}; the keys are {known}")
        try:
            flags += as_flags(actions[key], value, written.get(key))
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
    return flags


def as_flags(action, value, written):
    """A YAML value of the flag that `action` defines, as a part of a command line. Raises UserError.

    written: its text, which is what a flag that takes words gets: a layer 0.10 is not 0.1.
    """
    name = action.dest.replace("_", "-")
    if isinstance(action.default, bool):
        if not isinstance(value, bool):
            raise UserError(f"{reprlib.repr(value)} should be true or false")
        if value:
            return [f"--{name}"]
        return [f"--no-{name}"] if isinstance(action, argparse.BooleanOptionalAction) else []
    if value is None and action.default is None:
        return []
    if isinstance(value, list) and action.type is three_numbers:
        value = ",".join(map(str, value))
    word = action.type is None and not isinstance(value, bool) and value is not None
    if word and isinstance(written, str):
        value = written
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(f"{reprlib.repr(value)} should be a number or a word")
    return [f"--{name}={value}"]


# --- evaluate.py and invert.py -------------------------------------------------------------------------


def parse_evaluate(argv=None, doc=None):
    """evaluate.py's command line → argparse.Namespace. Raises UserError."""
    parser = Parser(doc)
    what = parser.add_argument_group("what to do")
    add = what.add_argument
    add("--ckpt", help="measure this checkpoint, which train.py wrote (default: runs/best.pt)")
    add = what.add_mutually_exclusive_group().add_argument
    add("--images", nargs="+", metavar="PATH", help="instead: reconstruct these pictures and folders")
    add("--baselines", action="store_true", help="instead: what needs no features, on --data as of train.py")
    add("--report", metavar="RUNS", help="instead: the page and tables of the experiments in this folder")
    compared = "instead: how these runs differ from the first of them, image by image, with intervals"
    add("--compare", nargs="+", metavar="RUN", help=compared)
    add("--invert", action="store_true", help="instead: says which command does that, invert.py")
    add = parser.add_argument_group("how").add_argument
    add("--data", help="folder whose test images to use, or `sample` (default: the checkpoint's)")
    size = "of --images: the whole picture, or its central square (default: native where the decoder can)"
    add("--size", choices=["native", "224"], help=size)
    add("--protocol", choices=list(PROTOCOLS), help="of --baselines (default: documented)")
    out = "folder for the results (default: the checkpoint's, and in it one named like other --data)"
    add("--out", help=out)
    looks = "of a feedback decoder: how often it looks at the encoder (default: as in training)"
    add("--iterations", type=positive_int, metavar="K", help=looks)
    add("--batch-size", type=positive_int, default=4, help="images at a time; results don't depend on it")
    add_running_flags(add)
    args, unknown = parser.parse_known_args(argv)
    if args.invert:
        raise UserError("--invert: is a script of its own, python invert.py, which takes --ckpt or --encoder")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    refuse_ignored(args, "report", ("ckpt", "data", "cache", "out", "iterations"))
    refuse_ignored(args, "images", ("data", "cache"))
    refuse_ignored(args, "compare", ("ckpt", "data", "cache", "iterations"))
    if args.compare and len(args.compare) < 2:
        raise UserError("--compare: takes two runs or more, the first of which the others are held against")
    refuse_ignored(args, "baselines", ("ckpt", "iterations"))
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
    add("--encoder", help="start from noise, without a checkpoint: any that train.py takes")
    add("--layer", help="of --encoder (default: its first, if it has a short name)")
    add("--weights", help="of --encoder: `imagenet`, `random` or a file (default: imagenet)")
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
    if args.encoder and args.ckpt:
        raise UserError("--encoder with --ckpt: the checkpoint knows its own; give one of them")
    if args.encoder:
        if args.encoder in LAYERS:
            args.layer = args.layer or list(LAYERS[args.encoder])[0]
        check_layer(args.encoder, args.layer)
        if not args.layer:
            raise UserError(f"--encoder {args.encoder}: give a --layer; python models.py lists them")
        args.weights = args.weights or "imagenet"
        check_weights(args)
    for name in ("layer", "weights", *INPUT):
        if getattr(args, name) and not args.encoder:
            raise UserError(f"--{name.replace('_', '-')}: only with --encoder")
    args.ckpt = args.ckpt or "runs/best.pt"
    return args
