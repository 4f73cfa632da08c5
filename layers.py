"""Run a network up to a layer and turn the layer's output into feature maps."""

import difflib
import math
from collections import Counter
from contextlib import suppress
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from utils import UserError, first_line

SPOTS = ((0, 1), (1, 4), (2, 2), (3, 0), (4, 3))  # uncorrelated rows and columns of five spots
MAX_DOUBLED = 400  # pixels; twice a larger size takes minutes


class StopForward(Exception):
    """The last layer has run; skip the rest of the network."""


class Layout(NamedTuple):
    """How the output of a layer, for a batch of images, becomes feature maps (B, C, H, W)."""

    kind: str  # `grid` of positions, `tokens` in a row, or one `vector`
    axis: int = 0  # of the tokens, or of the grid's rows; its columns are the next
    side: int = 0  # of the square that the tokens fill
    skipped: int = 0  # class and register tokens, which come first
    windows: int = 1  # each image is cut into windows × windows, which are entries of the batch
    blocks: bool = False  # the windows have an axis of their own, behind the batch
    order: torch.Tensor | None = None  # indices that sort the tokens row by row, if need be


def trace(net, images, look=lambda output: output):
    """Run `net` until it ends or raises StopForward. Returns (started, finished, outputs).

    started: paths of the modules that began; finished: {path: how often}; outputs: {path: look(the first)}.
    """
    started, finished, outputs = set(), Counter(), {}

    def start(path, module, inputs):
        started.add(path)

    def finish(path, module, inputs, output):
        finished[path] += 1
        if path not in outputs:
            outputs[path] = look(output)

    handles = []
    for path, module in net.named_modules():
        handles.append(module.register_forward_pre_hook(partial(start, path)))
        handles.append(module.register_forward_hook(partial(finish, path), prepend=True))  # before Trunk's
    with torch.no_grad(), suppress(StopForward):
        net(images)
    for handle in handles:
        handle.remove()
    return started, finished, outputs


def on_meta_or_cpu(inspect, name, build, size, devices=("meta", "cpu")):
    """inspect(build(), two size×size images), if possible on meta. UserError if `name` refuses them."""
    for device in devices:
        try:
            with torch.device(device):
                net = build().eval()
                net.requires_grad_(False)  # FlopCounterMode fails on parameters that pass through a module
                return inspect(net, torch.zeros(2, 3, size, size))
        except Exception as error:  # each network has its own
            if isinstance(error, UserError) and "--encoder" not in str(error):
                raise
            no = f"--encoder {name}: takes no {size}×{size} images ({first_line(error)})"
            refusal = error if isinstance(error, UserError) else UserError(no)
    raise refusal


def near(name, names):
    """A few of `names` that resemble `name`, or the first ones."""
    return ", ".join(difflib.get_close_matches(name, names, 5, 0.3) or names[:5])


def unused_modules(name, build, paths, size):
    """The paths of modules of the network `name` that the layers at `paths` do not need.

    Raises UserError for a layer that does not exist, does not run exactly once, or gives no tensor.
    """

    def inspect(net, images):
        known = [path for path, _ in net.named_modules() if path]
        _, runs, outputs = trace(net, images)
        for path in paths:
            if path not in known:
                raise UserError(f"--layer {path}: {name} has no such module; near: {near(path, known)}")
            if runs[path] != 1:
                how = f"runs {runs[path]} times" if runs[path] else "never runs"
                raise UserError(f"--layer {path}: {how} for an image; choose one that runs once")
            if not torch.is_tensor(outputs[path]):
                advice = "not one tensor; choose a layer inside or behind it"
                raise UserError(f"--layer {path}: gives a {type(outputs[path]).__name__}, {advice}")
        trunk = Trunk(net, paths)
        started, finished, _ = trace(net, images)  # up to the last layer
        unused = not_started(net, started, finished)
        prune_modules(net, unused)
        try:
            with torch.no_grad():
                shapes = [output.shape for output in trunk.outputs(images)]
        except (AttributeError, TypeError, RuntimeError):  # a pruned module was needed without being run
            return []
        return unused if shapes == [outputs[path].shape for path in paths] else []

    return on_meta_or_cpu(inspect, name, build, size)


def not_started(net, started, finished):
    """The paths of the outermost modules that have not started, in modules that are still running.

    A finished module may have used what it did not run, as nn.MultiheadAttention does its projection.
    """
    kept, done, found = {""}, set(finished), []
    for path in started:
        kept.update(accumulate(path.split("."), "{}.{}".format))  # a.b.c: a, a.b and a.b.c
    for path, _ in net.named_modules():
        parent = path.rpartition(".")[0]
        if parent in done:
            done.add(path)
        elif parent in kept and path not in kept:
            found.append(path)
    return found


def prune_modules(net, unused):
    """Replace the modules of `net` at these paths, so that they take neither memory nor weights."""
    for path in unused:
        parent, _, child = path.rpartition(".")
        setattr(net.get_submodule(parent), child, nn.Identity())


# --- From outputs to feature maps ------------------------------------------------------------------------


def layouts_of(shape, count, orders=()):
    """Each Layout that an output for `count` images may have, the likeliest first; orders: token_orders'."""
    if shape[0] == count and math.prod(shape[1:]) == max(shape[1:], default=0):
        return [Layout("vector")]
    found = []
    in_blocks = len(shape) > 2 and shape[0] == count and shape[1] != shape[2]  # not weights between N tokens
    for blocks in (False, True)[: 1 + in_blocks]:
        batch, *axes = (shape[0] * shape[1], *shape[2:]) if blocks else shape
        windows = math.isqrt(batch // count)
        if windows**2 * count != batch or blocks and windows == 1:
            continue
        around = {"windows": windows, "blocks": blocks}
        for axis, (rows, columns) in enumerate(pairwise(axes), 1):
            if rows == columns > 1:
                found.append(Layout("grid", axis, **around))
        for axis, tokens in enumerate(axes, 1):
            side = math.isqrt(tokens)
            found += [Layout("tokens", axis, side, order=order) for order in orders if len(order) == tokens]
            for skipped in range(9 if windows == 1 else 1):
                side = math.isqrt(max(tokens - skipped, 0))
                if side > 1 and side**2 == tokens - skipped:
                    found.append(Layout("tokens", axis, side, skipped, **around))
    return found


def known_layout(output):
    """The Layout of a layer with a short name: (B, C, H, W), or tokens. Channels may be as many as rows."""
    return Layout("grid", 2) if output.dim() == 4 else layouts_of(output.shape, 1)[0]


def token_orders(net):
    """The orders that sort tokens row by row, from networks of timm that know them, as Hiera."""
    orders = {}
    for number, (_, size) in net.reroll.schedule.items() if hasattr(net, "reroll") else ():
        orders[size[0]] = net.reroll(torch.arange(math.prod(size))[None, :, None], number).flatten()
    return list(orders.values())


def spot_corners(size):
    """The side of a spot in a size×size image, and the upper left corners of five spots, (5, 2)."""
    side = max(size // 6, 1)
    return side, torch.tensor(SPOTS) * (size - side) // (len(SPOTS) - 1)


def moving_spot(size):
    """Images (6, 3, size, size) in [0, 1]: noise, and the same with a white spot at five places."""
    noise = torch.rand(3, size, size, generator=torch.Generator().manual_seed(0))
    images = noise.repeat(1 + len(SPOTS), 1, 1, 1)
    side, corners = spot_corners(size)
    for image, (top, left) in zip(images[1:], corners.tolist(), strict=True):
        image[:, top : top + side, left : left + side] = 1
    return images


def follows(change, size):
    """Whether the centre of `change`, (5, H, W), is where the spots of a size×size image are."""
    side, corners = spot_corners(size)
    change = change.double() / change.sum((1, 2), keepdim=True)  # NaN where nothing has changed
    for along, spots in ((change.sum(2), corners[:, 0]), (change.sum(1), corners[:, 1])):
        places = (torch.arange(along.shape[1]) + 0.5) / along.shape[1]
        pair = torch.stack([along @ places.double(), (spots + side / 2) / size])
        if not (torch.corrcoef(pair)[0, 1] > 0.9 and pair.diff(dim=0).abs().max() < 0.35):
            return False
    return True


def find_layout(output, size, orders=(), any_size=False):
    """The Layout with most positions in which an output for moving_spot(size) changes where the spot is.

    None if there is none. Shapes alone decide nothing: tokens may have an order of their own, and channels be
    as many as rows. any_size: only a grid, which is one for images of other sizes, too.
    """
    if not torch.is_tensor(output) or not output.is_floating_point() or output.dim() < 2:
        return None
    positions = {}  # of each layout
    for layout in layouts_of(tuple(output.shape), 1 + len(SPOTS), orders):
        if layout.kind == "vector":
            return None if any_size else layout
        maps = as_map(output.detach().float(), layout)
        change = (maps[1:] - maps[:1]).square().sum(1)
        windows = F.adaptive_avg_pool2d(change[None], layout.windows)[0]
        everywhere = change.flatten(1).median(1).values[:, None, None]  # what every position sees a little of
        moves = follows((change - everywhere).clamp_min(0), size)
        moves = moves and (layout.windows == 1 or follows(windows, size))  # heads are no windows
        if moves or layout.kind == "grid" and maps.shape[2:] == (2, 2):  # where a spot is nearly everywhere
            positions[layout] = change[0].numel()
    best = max(positions, key=positions.get, default=None)
    return None if any_size and best and (best.kind != "grid" or best.windows > 1) else best


def as_map(x, layout):
    """A layer's output as (B, C, H, W)."""
    kind, axis, side, skipped, windows, blocks, order = layout
    if kind == "vector":
        return x.flatten(1)[:, :, None, None]
    if blocks:
        x = x.flatten(0, 1)
    if kind == "grid":
        x = x.movedim((axis, axis + 1), (-2, -1))
    else:
        x = x.movedim(axis, -1)[..., skipped:]
        if order is not None:
            x = x[..., order]
        x = x.unflatten(-1, (side, side))
    x = x.flatten(1, -3) if x.dim() > 3 else x[:, None]
    if windows > 1:
        x = x.unflatten(0, (-1, windows, windows))  # (B, rows, columns, C, h, w)
        x = x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    return x


def inspect_layers(name, build, size, check=True):
    """{path: ((C, H, W), multiply-adds up to there)} of the modules that can be a layer, in running order.

    build: makes the network `name`. check: find the layouts with moving_spot, else by shapes alone.
    """

    def inspect(net, images):
        images = 4 * moving_spot(size) - 2 if check else images
        orders = token_orders(net)

        def look(output):
            shape = getattr(output, "shape", None)
            layout = find_layout(output, size, orders) if check else [*layouts_of(shape, 2), None][0]
            return layout, shape, counter.get_total_flops() / (2 * len(images))

        with FlopCounterMode(display=False) as counter:
            _, runs, outputs = trace(net, images, look)
        larger = {}
        if check and size <= MAX_DOUBLED and any(found[0] is None for found in outputs.values()):
            with suppress(Exception):  # many networks take no other size
                find = partial(find_layout, size=2 * size, any_size=True)
                *_, larger = trace(net, 4 * moving_spot(2 * size) - 2, find)
        layers = {}
        for path, (layout, shape, cost) in outputs.items():
            layout = layout or larger.get(path)
            if path and runs[path] == 1 and layout:
                layers[path] = tuple(as_map(torch.empty(shape), layout).shape[1:]), cost
        return layers

    return on_meta_or_cpu(inspect, name, build, size, ["cpu"] if check else ["meta", "cpu"])


def resize(x, size):
    """`x` (B, C, H, W) as (B, C, *size), bilinear."""
    if x.shape[2:] == size:
        return x
    return resize_by_products(x, size) if x.is_cuda else F.interpolate(x, size, mode="bilinear")


def resize_by_products(x, size):
    """F.interpolate as matrix products: on a GPU its own gradient is not repeatable, or slow."""
    eyes = (torch.eye(old, device=x.device, dtype=x.dtype)[None] for old in x.shape[2:])
    sides = zip(eyes, size, strict=True)
    rows, columns = (F.interpolate(eye, new, mode="linear")[0].T for eye, new in sides)  # (new, old)
    x = columns @ x.permute(0, 2, 3, 1)  # (B, H, width, C), as channels last lies in memory
    x = rows @ x.flatten(2)  # (B, height, width · C)
    return x.unflatten(2, (size[1], -1)).permute(0, 3, 1, 2)


class Trunk(nn.Module):
    """A network up to `paths`, after find_layouts: normalised images → a map (B, C, H, W), or a list."""

    def __init__(self, net, paths):
        super().__init__()
        self.net = net
        self.paths = list(paths)
        self.layouts = []
        self.found = {}
        for path in paths:
            net.get_submodule(path).register_forward_hook(partial(self.keep, path))

    def keep(self, path, module, inputs, output):
        """A forward hook: keep the output, as a copy if modules that follow could change it in place."""
        last = len(self.found) == len(self.paths) - 1
        self.found[path] = output if last else output.clone()
        if last:
            raise StopForward

    def outputs(self, x):
        """Each layer's output."""
        self.found.clear()
        with suppress(StopForward):
            self.net(x)
            raise RuntimeError("a layer did not run")
        outputs = [self.found[path] for path in self.paths]
        self.found.clear()
        return outputs

    @torch.no_grad()
    def find_layouts(self, normalize, size, orders=(), known=False):
        """Find the layouts of the outputs for size×size images; returns each layer's (C, H, W).

        known: take them from the shapes. A small map shows nothing if each of its positions sees the whole
        image; an image twice as large may. Raises UserError for a layer that gives no feature maps.
        """
        outputs = self.outputs(normalize(moving_spot(size)[: 1 if known else None]))
        if known:
            found = [known_layout(output) for output in outputs]
        else:
            found = [find_layout(output, size, orders) for output in outputs]
        if None in found and size <= MAX_DOUBLED:
            with suppress(Exception):  # many networks take no other size
                larger = self.outputs(normalize(moving_spot(2 * size)))
                larger = [find_layout(output, 2 * size, any_size=True) for output in larger]
                found = [layout or other for layout, other in zip(found, larger, strict=True)]
        for number, (path, layout) in enumerate(zip(self.paths, found, strict=True)):
            if layout is None:
                gives = f"{tuple(outputs[number].shape)} for {1 + len(SPOTS)} images, no feature map"
                advice = "it does not change where the image changes; choose a layer around it"
                raise UserError(f"--layer {path}: gives {gives}: {advice}")
            self.register_buffer(f"order{number}", layout.order, persistent=False)
            self.layouts.append(layout._replace(order=None))
        return [tuple(as_map(x, layout).shape[1:]) for x, layout in zip(outputs, found, strict=True)]

    def forward(self, x):
        maps = []
        for number, (output, layout) in enumerate(zip(self.outputs(x), self.layouts, strict=True)):
            maps.append(as_map(output, layout._replace(order=getattr(self, f"order{number}"))))
            if len(maps[-1]) != len(x):
                raise RuntimeError(f"{self.paths[number]} cuts such images into other windows")
        return maps if len(maps) > 1 else maps[0]
