"""Frozen encoders: any network of torchvision or timm, or one's own, up to any of its layers."""

import hashlib
import math
from collections import Counter
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from decoders import resize
from flags import check_layer
from networks import NoInitialisation, build_network, load_network, near, own_input, parse
from study import DOCUMENTED, ENCODERS, IMAGENET_MEAN, IMAGENET_STD, LAYERS
from utils import UserError, digest
from weights import imagenet_weights, weights_from_file

# --- How a network runs up to a layer -------------------------------------------------------------------


class Reached(Exception):
    """The last layer has run: nothing behind it shall."""


class Course:
    """What runs in `net` for `images` until the module at `path` has: names of modules that began, and ended.

    runs: how often that module does in a whole pass; output: its first, and its layout, that of `layout_of`;
    depth: how many modules had ended; whole: nothing of the network may be cut off.
    """

    def __init__(self, net, path, images):
        self.begun, self.ended = set(), set()
        self.runs, self.output, self.layout = 0, None, None
        self.whole = False
        self.tokens = {}
        handles = watch_tokens(net, self.tokens)
        for name, module in net.named_modules():
            handles.append(module.register_forward_pre_hook(partial(self.begin, name)))
            handles.append(module.register_forward_hook(partial(self.end, name)))
        handles.append(net.get_submodule(path).register_forward_hook(self.reach))
        with torch.no_grad():
            net(images)
        for handle in handles:
            handle.remove()
        self.depth = len(self.ended)

    def begin(self, name, *_):
        if not self.runs:
            self.begun.add(name)

    def end(self, name, *_):
        if not self.runs:
            self.ended.add(name)

    def reach(self, module, inputs, output):
        self.runs += 1
        if self.runs == 1:
            self.output = output


def watch_tokens(net, tokens):
    """Have `tokens` say, {path: N}, which modules of `net` are given rows of N tokens; the hooks' handles."""

    def watch(name, module, inputs):
        if inputs and torch.is_tensor(inputs[0]) and inputs[0].dim() == 3:
            tokens[name] = inputs[0].shape[1]

    return [module.register_forward_pre_hook(partial(watch, name)) for name, module in net.named_modules()]


def tried(look, name, size):
    """What `look` finds out of the network `name` and two size×size images of zeros.

    On the meta device where that goes: nothing is computed. Raises UserError where the network refuses them.
    """
    for device in ("meta", "cpu"):  # some networks want to see values
        try:
            with torch.device(device):
                return look(build_network(name).eval(), torch.zeros(2, 3, size, size))
        except UserError as error:
            if device == "cpu" or "--encoder" not in str(error):  # one's own function may want values too
                raise
            refusal = error
        except Exception as error:  # each network has its own
            reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
            refusal = UserError(f"--encoder {name}: takes no {size}×{size} images ({reason})")
    raise refusal


def course_of(name, path, size):
    """The Course of the network `name` up to the module at `path`, of size×size images.

    Raises UserError where there is no such module, and where it does not run once.
    """

    def follow(net, images):
        paths = [found for found, _ in net.named_modules() if found]
        if path not in paths:
            raise UserError(f"--layer {path}: {name} has no such module; near: {near(path, paths)}")
        course = Course(net, path, images)
        if course.runs != 1:
            how = "never runs" if course.runs == 0 else f"runs {course.runs} times"
            raise UserError(f"--layer {path}: {how} for an image; choose one that runs once")
        course.layout = layout_of(course.output, path, net, course.tokens)
        try:
            cut(net, course)
            with torch.no_grad():
                again = Trunk(net, {path: ("map",)})(images)
            course.whole = again.shape != course.output.shape
        except (AttributeError, TypeError):  # a module uses what it does not run: nn.Identity has no weights
            course.whole = True
        return course

    return tried(follow, name, size)


def cut(net, course):
    """Replace what of `net` runs behind the layer, so that it takes neither memory nor weights.

    That are modules that neither began nor hold one that did, inside one that had begun, but not ended. What
    a module that had ended holds without running it, as nn.MultiheadAttention does its projection, it may
    have used.
    """
    if course.whole:
        return
    kept = set(course.begun)
    for name in course.begun:
        kept.update(ancestors(name))
    for name, _ in list(net.named_modules()):
        parent, _, child = name.rpartition(".")
        if name in kept or parent not in kept:
            continue
        around = next(above for above in ancestors(name) if above in course.begun)
        if around not in course.ended:
            setattr(net.get_submodule(parent), child, nn.Identity())


def ancestors(name):
    """The paths of the modules around the one of this path, the nearest first."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def layout_of(output, path, net, tokens):
    """How the output of the layer at `path` for two images becomes (2, C, H, W): a word, numbers for as_map.

    tokens: what watch_tokens found. Raises UserError for an output that is no feature of an image.
    """
    if not torch.is_tensor(output):
        kind = type(output).__name__
        raise UserError(f"--layer {path}: gives a {kind}, not one tensor; choose a layer inside or behind it")
    shape = tuple(output.shape)
    wrong = UserError(
        f"--layer {path}: gives {shape} for two images: no map, row of tokens or vector of each"
    )
    if not output.is_floating_point() or not 2 <= len(shape) <= 4 or shape[0] % 2:
        raise wrong
    around = [path, *ancestors(path)]
    if len(shape) == 4 and shape[1] != shape[2] and shape[2] in [tokens.get(name) for name in around]:
        if shape[2] == shape[3]:
            raise UserError(f"--layer {path}: gives {shape}, weights between tokens, not features of them")
        if shape[0] > 2:
            raise wrong
        return "heads", *tokens_of(shape[2], net, wrong)
    if shape[0] > 2:  # windows, side by side; other parts of images are in an order of their own
        names = " ".join([path, *(type(net.get_submodule(name)).__name__ for name in around)]).lower()
        across = math.isqrt(shape[0] // 2)
        inside = math.isqrt(math.prod(shape[1:-1]))
        square = across**2 * 2 == shape[0] and inside**2 == math.prod(shape[1:-1])
        if not square or "grid" in names or not ("window" in names or "swin" in names):
            raise wrong
        return "windows", across, inside
    if len(shape) == 2:
        return ("vector",)
    if len(shape) == 4:
        return ("channels last",) if shape[1] == shape[2] != shape[3] else ("map",)
    return "tokens", *tokens_of(shape[1], net, wrong)


def tokens_of(count, net, wrong):
    """(how many come before those of positions, side of the square of these) of a row of tokens."""
    for skipped in (getattr(net, "num_prefix_tokens", 0), *range(9)):
        side = math.isqrt(max(count - skipped, 0))
        if side and side**2 == count - skipped:
            return skipped, side
    raise wrong


def as_map(x, layout):
    """A layer's output as (B, C, H, W)."""
    kind, *numbers = layout
    if kind == "heads":  # (B, heads, N, d)
        kind = "tokens"
        x = x.transpose(1, 2).flatten(2)
    if kind == "vector":
        return x[:, :, None, None]
    if kind == "channels last":
        return x.permute(0, 3, 1, 2)
    if kind == "tokens":
        skipped, side = numbers
        return x[:, skipped:].transpose(1, 2).unflatten(2, (side, side))
    if kind == "windows":
        across, inside = numbers
        x = x.reshape(-1, across, across, inside, inside, x.shape[-1])  # (B, rows, columns, h, w, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
    return x


class Trunk(nn.Module):
    """A network that runs up to a layer: normalised images → that layer's output as a map (B, C, H, W).

    layouts: {path of the layer: what layout_of says}; of several layers the result is a list, in this order.
    """

    def __init__(self, net, layouts):
        super().__init__()
        self.net = net
        self.found = {}
        for path, layout in layouts.items():
            net.get_submodule(path).register_forward_hook(partial(self.keep, path, layout))
        self.wanted = list(layouts)

    def keep(self, path, layout, module, inputs, output):
        """A forward hook. Behind the last layer nothing runs, nor changes it; of those before it, a copy."""
        last = len(self.found) == len(self.wanted) - 1
        self.found[path] = as_map(output if last else output.clone(), layout)
        if last:
            raise Reached

    def forward(self, x):
        self.found.clear()
        try:
            self.net(x)
        except Reached:
            maps = [self.found[path] for path in self.wanted]
            self.found.clear()
            return maps if len(maps) > 1 else maps[0]
        raise RuntimeError("a layer did not run")


# --- The encoder ----------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A frozen network up to one layer: images (B, 3, H, W) in [0, 1] → features (B, C, h, w).

    encoder, layer: names in study.LAYERS, or of build_network and the dotted path of a module. weights:
    `imagenet`, the pretrained ones; `own`, those that a user's own function gives; `random`, its own
    initialisation from `seed`, the control; or the path of a state dict, whose SHA-256 is then
    `weights_sha256`. input_size, mean, std: of the images; the network's own where None. Always in eval mode,
    parameters without gradient (paper 3.1.3); images may have one. Raises UserError for unknown names, layers
    that give no features, and weights that can't be had or don't fit.
    """

    def __init__(
        self,
        encoder="vgg16",
        layer="block1",
        weights="imagenet",
        seed=42,
        protocol=DOCUMENTED,
        input_size=None,
        mean=None,
        std=None,
    ):
        super().__init__()
        names = [full_names(encoder, part, protocol) for part in layer.split("+")]
        name = names[0][0]
        own = own_input(name)
        self.input_size = input_size or own["input_size"]
        self.programs = programs_of(name)
        self.weights_sha256 = None
        with torch.random.fork_rng(devices=[]):
            courses = {path: course_of(name, path, self.input_size) for _, path in names}
            torch.manual_seed(seed)
            loaded = weights not in ("random", "own") and not (weights == "imagenet" and self.programs)
            with NoInitialisation() if loaded else nullcontext():
                net = build_network(name).eval()
        cut(net, max(courses.values(), key=lambda course: course.depth))
        if loaded and weights == "imagenet":
            load_network(net, imagenet_weights(name.removeprefix("torchvision/")), f"--weights {weights}")
        elif loaded:
            load_network(net, weights_from_file(weights), f"--weights {weights}")
            self.weights_sha256 = digest(weights)
        self.shapes = [tuple(as_map(course.output, course.layout).shape[1:]) for course in courses.values()]
        layouts = {path: course.layout for path, course in courses.items()}
        self.trunk = Trunk(net, layouts).to(memory_format=torch.channels_last)
        if not protocol.own_normalization:
            own = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        self.register_buffer("mean", torch.tensor(mean or own["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std or own["std"]).view(3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode=True):
        return super().train(False)

    def forward(self, images):
        return self.trunk((images - self.mean) / self.std)


class JointEncoder(nn.Module):
    """Several encoders at once, or layers of one: their maps, resized to the largest, joined: (B, C, h, w).

    encoder, layer: as `vgg16+alexnet` and `block3+conv2`; weights: one word for all, or as many. shapes: of
    each map, in this order. Of a network that is named several times, all layers are of the same pass.
    """

    def __init__(self, encoder, layer, weights="imagenet", *options, **more):
        super().__init__()
        names, layers = encoder.split("+"), layer.split("+")
        if len(names) != len(layers):
            counts = f"{len(names)} encoders, {len(layers)} layers"
            raise UserError(f"--encoder {encoder} --layer {layer}: {counts}; give as many of each")
        sources = weights.split("+") if weights.count("+") == len(names) - 1 else [weights] * len(names)
        wanted = {}  # (encoder, weights): its layers
        for *pair, part in zip(names, sources, layers, strict=True):
            wanted.setdefault(tuple(pair), []).append(part)
        for (name, _), parts in wanted.items():
            if len(set(parts)) < len(parts):
                raise UserError(f"--encoder {encoder} --layer {layer}: a layer of {name} twice")
        self.encoders = nn.ModuleList(
            Encoder(name, "+".join(parts), source, *options, **more)
            for (name, source), parts in wanted.items()
        )
        self.input_size = self.encoders[0].input_size
        if any(other.input_size != self.input_size for other in self.encoders):
            raise UserError(f"--encoder {encoder}: they take images of different sizes; give an --input-size")
        self.programs = programs_of(encoder)
        hashes = [encoder.weights_sha256 for encoder in self.encoders]
        self.weights_sha256 = hashes if any(hashes) else None
        found = [(*pair, part) for pair, parts in wanted.items() for part in parts]
        self.order = [found.index(place) for place in zip(names, sources, layers, strict=True)]
        shapes = [shape for encoder in self.encoders for shape in encoder.shapes]
        self.shapes = [shapes[number] for number in self.order]

    @property
    def mean(self):
        return self.encoders[0].mean

    def forward(self, images):
        return self.join([encoder(images) for encoder in self.encoders])

    def trunk(self, images):
        """Of images that are normalised already, for all of them alike."""
        return self.join([encoder.trunk(images) for encoder in self.encoders])

    def join(self, found):
        """What the encoders give, a map or a list of maps each, as one."""
        maps = []
        for part in found:
            maps += part if isinstance(part, list) else [part]
        size = torch.Size(max(x.shape[side] for x in maps) for side in (2, 3))
        return torch.cat([resize(maps[number], size) for number in self.order], 1)


def weights_key(encoder):
    """The SHA-256 of all that an encoder computes with: its tensors, and a user's own file."""
    found = hashlib.sha256("".join(encoder.programs.values()).encode())
    for tensor in encoder.state_dict().values():
        found.update(tensor.cpu().contiguous().numpy())
    return found.hexdigest()


def programs_of(encoder):
    """{file: its SHA-256} of the users' own that an encoder's name, or several names joined by `+`, say."""
    files = [parse(name)[0] for name in encoder.split("+") if ".py:" in name]
    return {file: digest(file) for file in files}


def build_encoder(encoder, layer, *options, **more):
    """An Encoder, or of names with `+` between them a JointEncoder."""
    kind = JointEncoder if "+" in encoder + layer else Encoder
    return kind(encoder, layer, *options, **more)


def full_names(encoder, layer, protocol=DOCUMENTED):
    """The network's name for build_network and the module's path in it, of names that may be short."""
    check_layer(encoder, layer)
    path = LAYERS.get(encoder, {}).get(layer, layer)
    if encoder == "vit_small" and protocol.vit_shift:
        paths = list(LAYERS[encoder].values())
        path = paths[(paths.index(path) + protocol.vit_shift) % len(paths)]
    return ENCODERS.get(encoder, encoder), path


def layers_of(encoder, input_size=None):
    """{path: ((C, H, W), multiply-adds up to there)} of the modules that can be a layer, as they run.

    input_size: of the images; the network's own where None. Raises UserError where there is none.
    """
    name = ENCODERS.get(encoder, encoder)
    found, runs, tokens = {}, Counter(), {}

    def follow(net, images):
        for results in (found, runs, tokens):  # of the device that was tried before
            results.clear()
        watch_tokens(net, tokens)
        for path, module in net.named_modules():
            module.register_forward_hook(partial(record, path, net))
        with torch.no_grad(), counter:
            net(images)

    def record(path, net, module, inputs, output):
        runs[path] += 1
        try:
            layout = layout_of(output, path, net, tokens)
        except UserError:
            return
        found[path] = tuple(as_map(output, layout).shape[1:]), counter.get_total_flops() / 4  # two images

    counter = FlopCounterMode(display=False)
    tried(follow, name, input_size or own_input(name)["input_size"])
    layers = {path: values for path, values in found.items() if path and runs[path] == 1}
    if not layers:
        raise UserError(f"--encoder {encoder}: no module in it runs once and gives features")
    return layers
