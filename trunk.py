"""A network up to a layer: how it runs, what of it is of no use there, and how an output becomes a map."""

import math
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from networks import build_network, near
from utils import UserError, first_line


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
