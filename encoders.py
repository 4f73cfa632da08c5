"""Frozen encoders: any network of torchvision or timm, or one's own, up to any of its layers."""

import hashlib
from contextlib import nullcontext

import torch
from torch import nn

from decoders import resize
from flags import check_layer, encoders_of, weights_of_each
from networks import NoInitialisation, build_network, load_network, own_input, programs_of, resampled
from study import DOCUMENTED, ENCODERS, IMAGENET_MEAN, IMAGENET_STD, LAYERS
from trunk import Trunk, fuse, leave_out, token_orders, unused_modules
from utils import UserError, digest
from weights import imagenet_weights, weights_from_file


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
        name = ENCODERS.get(encoder, encoder)
        paths = [path_of(encoder, part, protocol) for part in layer.split("+")]
        own = own_input(name)
        self.input_size = input_size or own["input_size"]
        self.weights_sha256 = None
        with torch.random.fork_rng(devices=[]):
            unused = unused_modules(name, paths, self.input_size)
            torch.manual_seed(seed)
            if weights == "imagenet" and ".py:" in name:
                weights = "own"
            loaded = weights not in ("random", "own")
            with NoInitialisation() if loaded else nullcontext():
                net = build_network(name, self.input_size).eval()
        orders = token_orders(net)
        leave_out(net, unused)
        if weights == "imagenet":
            state = imagenet_weights(name.removeprefix("torchvision/"), net.state_dict())
        elif loaded:
            state = weights_from_file(weights, net.state_dict())
            self.weights_sha256 = digest(weights)
        if loaded:
            load_network(net, resampled(net, state), f"--weights {weights}")
        if ".py:" not in name:  # torchvision's and timm's run their rows as a whole
            fuse(net, paths)
        self.trunk = Trunk(net, paths).to(memory_format=torch.channels_last)
        if not protocol.own_normalization:
            own = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        self.register_buffer("mean", torch.tensor(mean or own["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std or own["std"]).view(3, 1, 1))
        self.requires_grad_(False)
        self.eval()
        known = encoder in LAYERS
        self.shapes = self.trunk.find_layouts(self.normalize, self.input_size, orders, known)
        self.programs = programs_of(name)  # by now it has run, and imported what it needs

    def train(self, mode=True):
        return super().train(False)

    def normalize(self, images):
        return (images - self.mean) / self.std

    def forward(self, images):
        return self.trunk(self.normalize(images))


class JointEncoder(nn.Module):
    """Several encoders at once, or layers of one: their maps, resized to the largest, joined: (B, C, h, w).

    encoder, layer: as `vgg16+alexnet` and `block3+conv2`; weights: one word for all, or as many. shapes: of
    each map, as they are joined: those of a network that is named several times, which runs once, together.
    """

    def __init__(self, encoder, layer, weights="imagenet", *options, **more):
        super().__init__()
        names, layers = encoders_of(encoder), layer.split("+")
        if len(names) != len(layers):
            counts = f"{len(names)} encoders, {len(layers)} layers"
            raise UserError(f"--encoder {encoder} --layer {layer}: {counts}; give as many of each")
        sources = weights_of_each(len(names), weights)
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
        self.programs = {file: found for part in self.encoders for file, found in part.programs.items()}
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
        maps = [x for part in found for x in (part if isinstance(part, list) else [part])]
        size = torch.Size(max(x.shape[side] for x in maps) for side in (2, 3))
        return torch.cat([resize(x, size) for x in maps], 1)


def weights_key(encoder, programs=None):
    """The SHA-256 of an encoder's tensors and of a user's own files; programs: theirs that alone count."""
    found = hashlib.sha256("".join(encoder.programs.values() if programs is None else programs).encode())
    for tensor in encoder.state_dict().values():
        found.update(tensor.cpu().contiguous().numpy())
    return found.hexdigest()


def build_encoder(encoder, layer, *options, **more):
    """An Encoder, or of names with `+` between them a JointEncoder."""
    kind = JointEncoder if len(encoders_of(encoder)) > 1 or "+" in layer else Encoder
    return kind(encoder, layer, *options, **more)


def path_of(encoder, layer, protocol):
    """The path in the network of the module that `layer` names, by a short name or by its path."""
    check_layer(encoder, layer)
    path = LAYERS.get(encoder, {}).get(layer, layer)
    if encoder == "vit_small" and protocol.vit_shift:
        paths = list(LAYERS[encoder].values())
        path = paths[(paths.index(path) + protocol.vit_shift) % len(paths)]
    return path
