"""Running a network up to a layer, and turning the output into feature maps."""

import difflib
import math
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from utils import UserError, first_line

SPOTS = ((0, 1), (1, 4), (2, 2), (3, 0), (4, 3))  # rows and columns of five spots, which are uncorrelated
MAX_DOUBLED = 400  # pixels; larger images take minutes at twice the size


class StopForward(Exception):
    """The last layer has run; skip the rest of the network."""


class Trace:
    """A whole pass of `net` over `images`, module by module, by their paths.

    begun, ended: in this order; outputs: {path: what `look` makes of its first}; passed: {path: how many had
    begun then, and ended}.
    """

    def __init__(self, net, images, look=lambda output: output):
        self.begun, self.ended = [], []
        self.outputs, self.passed = {}, {}
        self.look = look
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

    def end(self, path, module, inputs, output):
        self.ended.append(path)
        if path not in self.outputs:
            self.outputs[path] = self.look(output)
            self.passed[path] = len(self.begun), len(self.ended)


class Layout(NamedTuple):
    """How the output of a layer, for a batch of images, becomes feature maps (B, C, H, W)."""

    kind: str  # `grid` of positions, `tokens` in a row, or a `vector` of each image
    axis: int = 0  # of the grid's rows, whose columns are the next; of the tokens
    side: int = 0  # of the square of positions that tokens are
    skipped: int = 0  # class and register tokens, before those of positions
    windows: int = 1  # the image is cut into windows × windows, each an entry of the batch
    blocks: bool = False  # the windows have an axis of their own, behind the batch
    order: torch.Tensor | None = None  # of the tokens, row by row, where the network has another


def on_meta_or_cpu(inspect, name, build, size, devices=("meta", "cpu")):
    """`inspect(net, images)` of the network `name`, which `build` makes, and two size×size images.

    On the meta device if the network runs there, which computes nothing. Raises UserError where the network
    refuses the images.
    """
    for device in devices:
        try:
            with torch.device(device):
                net = build().eval()
                net.requires_grad_(False)  # FlopCounterMode fails on parameters that pass through a module
                return inspect(net, torch.zeros(2, 3, size, size))
        except UserError as error:
            if device == "cpu" or "--encoder" not in str(error):  # a FILE.py may need values, too
                raise
            refusal = error
        except Exception as error:  # each network has its own
            refusal = UserError(f"--encoder {name}: takes no {size}×{size} images ({first_line(error)})")
    raise refusal


def near(name, names):
    """A few of `names` that resemble `name`, or the first ones."""
    return ", ".join(difflib.get_close_matches(name, names, 5, 0.3) or names[:5])


def unused_modules(name, build, paths, size):
    """The paths of modules that the layers at `paths` do not need, in the network `name` of `build`.

    Raises UserError where there is no such layer, where one does not run once, and where one gives no tensor.
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
            if not torch.is_tensor(output := trace.outputs[path]):
                advice = "not one tensor; choose a layer inside or behind it"
                raise UserError(f"--layer {path}: gives a {type(output).__name__}, {advice}")
        unused = unused_of(net, trace, paths)
        prune_modules(net, unused)
        try:
            with torch.no_grad():
                again = [output.shape for output in Trunk(net, paths).outputs(images)]
        except (AttributeError, TypeError, RuntimeError):  # a module needs one that it does not run: keep all
            return []
        return unused if again == [trace.outputs[path].shape for path in paths] else []

    return on_meta_or_cpu(follow, name, build, size)


def unused_of(net, trace, paths):
    """The paths of modules of `net` that are of no use to the layers at `paths`: what runs behind the last.

    That are modules that neither began nor hold one that did, inside one that had begun, but not ended. What
    a module that had ended holds without running it, as nn.MultiheadAttention does its projection, it may
    have used.
    """
    count_begun, count_ended = max(trace.passed[path] for path in paths)  # when the last layer ended
    begun, ended = set(trace.begun[:count_begun]), set(trace.ended[:count_ended])
    kept = begun.union(*map(ancestors, begun))
    unused = []
    for path, _ in net.named_modules():
        if path not in kept and path.rpartition(".")[0] in kept:
            if next(above for above in ancestors(path) if above in begun) not in ended:
                unused.append(path)
    return unused


def prune_modules(net, unused):
    """Replace the modules of `net` at these paths, so that they take neither memory nor weights."""
    for path in unused:
        parent, _, child = path.rpartition(".")
        setattr(net.get_submodule(parent), child, nn.Identity())


def ancestors(name):
    """The paths of the modules around the one of this path, the nearest first."""
    while name:
        name = name.rpartition(".")[0]
        yield name


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
            known = [order for order in orders if len(order) == tokens]
            found += [Layout("tokens", axis, math.isqrt(tokens), order=order) for order in known]
            for skipped in range(9 if windows == 1 else 1):
                side = math.isqrt(max(tokens - skipped, 0))
                if side > 1 and side**2 == tokens - skipped:
                    found.append(Layout("tokens", axis, side, skipped, **around))
    return found


def token_orders(net):
    """The orders in which tokens become rows of positions, of networks of timm that say so, as Hiera does."""
    orders = {}
    if hasattr(net, "reroll"):
        for number, (_, size) in net.reroll.schedule.items():
            orders[size[0]] = net.reroll(torch.arange(math.prod(size))[None, :, None], number).flatten()
    return list(orders.values())


def spot_corners(size):
    """Side of a spot in a size×size image, and the upper left corners of five spots, (5, 2)."""
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
    """The Layout by which an output for moving_spot(size)'s images changes where the spot is, or None.

    Of several the one with the most positions. So shapes alone decide nothing: tokens may lie in an order of
    their own, and channels be as many as rows. any_size: a grid, as it is for images of other sizes, or None.
    """
    if not torch.is_tensor(output) or not output.is_floating_point() or output.dim() < 2:
        return None
    found = {}  # layout: positions
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
            found[layout] = change[0].numel()
    best = max(found, key=found.get, default=None)
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

    build: makes the network `name`. check: a spot that moves in size×size images must move in the feature
    maps, with random weights; else shapes decide.
    """

    def follow(net, images):
        images = 4 * moving_spot(size) - 2 if check else images
        orders = token_orders(net)

        def look(output):
            cost = counter.get_total_flops() / (2 * len(images))
            if check:
                return cost, find_layout(output, size, orders), getattr(output, "shape", None)
            return cost, next(iter(layouts_of(output.shape, len(images))), None), output.shape

        with FlopCounterMode(display=False) as counter:
            own = Trace(net, images, look)
        larger = {}
        if check and size <= MAX_DOUBLED and any(layout is None for _, layout, _ in own.outputs.values()):
            with suppress(Exception):  # many networks take no other size
                find = partial(find_layout, size=2 * size, any_size=True)
                larger = Trace(net, 4 * moving_spot(2 * size) - 2, find).outputs
        layers = {}
        for path, (cost, layout, shape) in own.outputs.items():
            layout = layout or larger.get(path)
            if path and own.ended.count(path) == 1 and layout:
                layers[path] = tuple(as_map(torch.empty(shape), layout).shape[1:]), cost
        return layers

    return on_meta_or_cpu(follow, name, build, size, ["cpu"])


def resize(x, size):
    """`x` (B, C, H, W) as (B, C, *size), bilinear: maps to each other's size, or to an image's."""
    if x.shape[2:] == size:
        return x
    return resize_by_products(x, size) if x.is_cuda else F.interpolate(x, size, mode="bilinear")


def resize_by_products(x, size):
    """What F.interpolate gives, as matrix products: on a GPU its own gradient is not repeatable, or slow."""
    rows, columns = (bilinear_weights(*pair, x) for pair in zip(x.shape[2:], size, strict=True))
    x = columns @ x.permute(0, 2, 3, 1)  # (B, H, width, C), as channels last lies in memory
    x = rows @ x.flatten(2)  # (B, height, width · C)
    return x.unflatten(2, (size[1], -1)).permute(0, 3, 1, 2)


def bilinear_weights(old, new, like):
    """(new, old), with the type and device of `like`: what each of `new` positions takes of each of `old`."""
    eye = torch.eye(old, device=like.device, dtype=like.dtype)
    return F.interpolate(eye[None], new, mode="linear")[0].T


class Trunk(nn.Module):
    """A network that runs up to a layer: normalised images → that layer's output as maps (B, C, H, W).

    paths: of the layers; of several the result is a list, in this order. find_layouts comes first.
    """

    def __init__(self, net, paths):
        super().__init__()
        self.net = net
        self.paths = list(paths)
        self.layouts = []
        self.found = {}
        for path in paths:
            net.get_submodule(path).register_forward_hook(partial(self.keep, path))

    def keep(self, path, module, inputs, output):
        """A forward hook. Behind the last layer nothing runs, nor changes it; of those before it, a copy."""
        last = len(self.found) == len(self.paths) - 1
        self.found[path] = output if last else output.clone()
        if last:
            raise StopForward

    def outputs(self, x):
        """What each layer gives."""
        self.found.clear()
        try:
            self.net(x)
        except StopForward:
            outputs = [self.found[path] for path in self.paths]
            self.found.clear()
            return outputs
        raise RuntimeError("a layer did not run")

    @torch.no_grad()
    def find_layouts(self, normalize, size, orders=(), known=False):
        """Find how the outputs for size×size images become maps; (C, H, W) of each layer.

        normalize: of images in [0, 1]. known: their shapes tell, as those of the study's layers do. Where a
        small map shows nothing, since each position sees the whole image, one of an image twice as large may.
        Raises UserError for a layer that gives no feature maps.
        """
        outputs = self.outputs(normalize(moving_spot(size)[: 1 if known else None]))
        if known:
            found = [layouts_of(output.shape, 1)[0] for output in outputs]
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
