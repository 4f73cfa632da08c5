"""Frozen encoders: any network of torchvision or timm, or one's own, up to any of its layers."""

import hashlib
import math
from collections import Counter
from contextlib import nullcontext, suppress
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from decoders import resize
from flags import check_layer, weights_of_each
from networks import NoInitialisation, build_network, load_network, near, own_input, parse
from study import DOCUMENTED, ENCODERS, IMAGENET_MEAN, IMAGENET_STD, LAYERS
from utils import UserError, digest, first_line
from weights import imagenet_weights, weights_from_file

# --- How a network runs up to a layer -------------------------------------------------------------------


class Reached(Exception):
    """The last layer has run: nothing behind it shall."""


class Trace:
    """A whole pass of `net` over `images`, module by module, by their paths.

    begun, ended: in this order; outputs: {path: its first}; passed: {path: how many had begun then, and
    ended}; costs: {path: what `cost` said then}; tokens: {path: N} of those that were given rows of N tokens.
    """

    def __init__(self, net, images, cost=lambda: 0):
        self.begun, self.ended = [], []
        self.outputs, self.passed, self.costs, self.tokens = {}, {}, {}, {}
        self.cost = cost
        handles = []
        for path, module in net.named_modules():
            handles.append(module.register_forward_pre_hook(partial(self.begin, path)))
            handles.append(module.register_forward_hook(partial(self.end, path)))
        with torch.no_grad():
            net(images)
        for handle in handles:
            handle.remove()

    def begin(self, path, module, inputs):
        self.begun.append(path)
        if inputs and torch.is_tensor(inputs[0]) and inputs[0].dim() == 3:
            self.tokens[path] = inputs[0].shape[1]

    def end(self, path, module, inputs, output):
        self.ended.append(path)
        if path not in self.outputs:
            self.outputs[path] = output
            self.passed[path] = len(self.begun), len(self.ended)
            self.costs[path] = self.cost()


class Course(NamedTuple):
    """What is to be known of a network before it runs up to some of its layers."""

    layouts: dict  # {path of a layer: what layout_of says}
    shapes: list  # (C, H, W) of each
    unused: list  # paths of modules that can be left out


def tried(look, name, size):
    """What `look` finds out of the network `name` and two size×size images of zeros.

    On the meta device where that goes: nothing is computed. Raises UserError where the network refuses them.
    """
    for device in ("meta", "cpu"):  # some networks want to see values
        try:
            with torch.device(device):
                net = build_network(name).eval()
                net.requires_grad_(False)  # FlopCounterMode fails where a parameter goes through a module
                return look(net, torch.zeros(2, 3, size, size))
        except UserError as error:
            if device == "cpu" or "--encoder" not in str(error):  # one's own function may want values too
                raise
            refusal = error
        except Exception as error:  # each network has its own
            refusal = UserError(f"--encoder {name}: takes no {size}×{size} images ({first_line(error)})")
    raise refusal


def course_of(name, paths, size):
    """The Course of the network `name` up to the modules at `paths`, of size×size images.

    Raises UserError where there is no such module, and where one does not run once.
    """

    def follow(net, images):
        known = [path for path, _ in net.named_modules() if path]
        for path in paths:
            if path not in known:
                raise UserError(f"--layer {path}: {name} has no such module; near: {near(path, known)}")
        trace = Trace(net, images)
        for path in paths:
            if (runs := trace.ended.count(path)) != 1:
                how = f"runs {runs} times" if runs else "never runs"
                raise UserError(f"--layer {path}: {how} for an image; choose one that runs once")
        outputs = {path: trace.outputs[path] for path in paths}
        layouts = {path: layout_of(output, path, net, trace.tokens) for path, output in outputs.items()}
        shapes = [tuple(as_map(outputs[path], layouts[path]).shape[1:]) for path in paths]
        unused = unused_of(net, trace, paths)
        leave_out(net, unused)
        try:
            with torch.no_grad():
                maps = Trunk(net, layouts)(images)
            again = [tuple(x.shape[1:]) for x in (maps if len(paths) > 1 else [maps])]
        except (AttributeError, TypeError, RuntimeError):  # a module needs one that it does not run: keep all
            again = None
        return Course(layouts, shapes, unused if again == shapes else [])

    return tried(follow, name, size)


def unused_of(net, trace, paths):
    """The paths of modules of `net` that are of no use to the layers at `paths`: what runs behind the last.

    That are modules that neither began nor hold one that did, inside one that had begun, but not ended. What
    a module that had ended holds without running it, as nn.MultiheadAttention does its projection, it may
    have used.
    """
    count_begun, count_ended = max(trace.passed[path] for path in paths)  # when the last layer ended
    begun = set(trace.begun[:count_begun])
    ended = set(trace.ended[:count_ended])
    kept = begun.union(*map(ancestors, begun))
    unused = []
    for path, _ in net.named_modules():
        if path not in kept and path.rpartition(".")[0] in kept:
            around = next(above for above in ancestors(path) if above in begun)
            if around not in ended:
                unused.append(path)
    return unused


def leave_out(net, unused):
    """Replace the modules of `net` at these paths, so that they take neither memory nor weights."""
    for path in unused:
        parent, _, child = path.rpartition(".")
        setattr(net.get_submodule(parent), child, nn.Identity())


def ancestors(name):
    """The paths of the modules around the one of this path, the nearest first."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def layout_of(output, path, net, tokens):
    """How the output of the layer at `path` for two images becomes (2, C, H, W): a word, numbers for as_map.

    tokens: a Trace's. Raises UserError for an output that is no feature of an image.
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


class ConvReLU(nn.Conv2d):
    """A convolution and the ReLU behind it, by one kernel of cuDNN where no gradient is wanted.

    It spares two passes over the largest maps of a training step, bias and ReLU.
    """

    def forward(self, x):
        here = x.is_cuda and torch.version.cuda  # AMD's GPUs call themselves CUDA, too
        if not here or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return F.relu(super().forward(x), inplace=True)
        amp = torch.is_autocast_enabled("cuda")
        if amp and torch.cuda.get_device_capability(x.device) < (8, 0):  # without cuDNN's bfloat16
            return F.relu(super().forward(x), inplace=True)
        tensors = x, self.weight, self.bias
        if amp:
            tensors = (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in tensors)
        return torch.cudnn_convolution_relu(*tensors, self.stride, self.padding, self.dilation, self.groups)


def fuse(net, wanted):
    """Make one module of each convolution and ReLU in a row of `net`, but of a convolution at these paths."""
    for around, row in net.named_modules():
        children = list(row.named_children()) if type(row) is nn.Sequential else []
        for (name, conv), (behind, relu) in pairwise(children):
            plain = type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and conv.bias is not None
            path = f"{around}.{name}".removeprefix(".")
            if plain and type(relu) is nn.ReLU and type(conv.padding) is tuple and path not in wanted:
                conv.__class__ = ConvReLU
                setattr(row, behind, nn.Sequential())  # passes on what it is given


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

    Up to several layers, `a+b`, a list of maps, which JointEncoder joins. encoder, layer: names in
    study.LAYERS, or of build_network and the dotted path of a module. weights: `imagenet`, the pretrained
    ones; `own`, those that a user's own function gives; `random`, its own initialisation from `seed`, the
    control; or the path of a state dict, whose SHA-256 is then `weights_sha256`. input_size, mean, std: of
    the images; the network's own where None. Always in eval mode, parameters without gradient (paper 3.1.3);
    images may have one. Raises UserError for unknown names, layers that give no features, and weights that
    can't be had or don't fit.
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
            course = course_of(name, [path for _, path in names], self.input_size)
            torch.manual_seed(seed)
            if weights == "imagenet" and self.programs:
                weights = "own"
            loaded = weights not in ("random", "own")
            with NoInitialisation() if loaded else nullcontext():
                net = build_network(name).eval()
        leave_out(net, course.unused)
        if weights == "imagenet":
            state = imagenet_weights(name.removeprefix("torchvision/"), net.state_dict())
            load_network(net, state, "--weights imagenet")
        elif loaded:
            load_network(net, weights_from_file(weights), f"--weights {weights}")
            self.weights_sha256 = digest(weights)
        self.shapes = course.shapes
        if not self.programs:  # torchvision's and timm's run their rows as a whole
            fuse(net, course.layouts)
        self.trunk = Trunk(net, course.layouts).to(memory_format=torch.channels_last)
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
    each map, as they are joined: those of a network that is named several times, which runs once, together.
    """

    def __init__(self, encoder, layer, weights="imagenet", *options, **more):
        super().__init__()
        names, layers = encoder.split("+"), layer.split("+")
        if len(names) != len(layers):
            counts = f"{len(names)} encoders, {len(layers)} layers"
            raise UserError(f"--encoder {encoder} --layer {layer}: {counts}; give as many of each")
        sources = weights_of_each(names, weights)
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
        self.shapes = [shape for encoder in self.encoders for shape in encoder.shapes]

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
        return torch.cat([resize(x, size) for x in maps], 1)


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

    def follow(net, images):
        with FlopCounterMode(display=False) as counter:
            trace = Trace(net, images, counter.get_total_flops)
        runs = Counter(trace.ended)
        layers = {}
        for path, output in trace.outputs.items():
            if path and runs[path] == 1:
                with suppress(UserError):
                    shape = tuple(as_map(output, layout_of(output, path, net, trace.tokens)).shape[1:])
                    layers[path] = shape, trace.costs[path] / 4  # two images, two operations
        return layers

    layers = tried(follow, name, input_size or own_input(name)["input_size"])
    if not layers:
        raise UserError(f"--encoder {encoder}: no module in it runs once and gives features")
    return layers
