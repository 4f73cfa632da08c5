"""--encoder A+B --layer a+b: several encoders, or several layers of one, as one encoder."""

import torch
from torch import nn

from encoders import Encoder
from layers import resize
from utils import UserError, encoders_of, weights_of_each


class JointEncoder(nn.Module):
    """Several encoders, or layers of one: their maps, resized to the largest and concatenated: (B, C, h, w).

    encoder, layer: as `vgg16+alexnet` and `block3+conv2`; weights: one word for all, or as many. shapes: of
    each map, in the order of concatenation. A network that is named several times runs once.
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
        """Features of images that are normalised already."""
        return self.join([encoder.trunk(images) for encoder in self.encoders])

    def join(self, found):
        """The maps of all encoders, one or a list each, as one."""
        maps = [x for part in found for x in (part if isinstance(part, list) else [part])]
        size = torch.Size(max(x.shape[side] for x in maps) for side in (2, 3))
        return torch.cat([resize(x, size) for x in maps], 1)
