"""--encoder A+B --layer a+b: several encoders, or layers of one, as one encoder."""

import torch
from torch import nn

from encoders import Encoder
from layers import resize
from utils import UserError, encoders_of, weights_of_each


class JointEncoder(nn.Module):
    """Images → the encoders' maps, resized to the largest and concatenated, (B, C, h, w).

    encoder, layer, weights: joined with +; one `weights` may be for all. shapes: (C, H, W) of each map, in
    the order of concatenation. An encoder with several layers runs once. Raises UserError.
    """

    def __init__(self, encoder, layer, weights="imagenet", *options, **more):
        super().__init__()
        names, layers = encoders_of(encoder), layer.split("+")
        if len(names) != len(layers):
            counts = f"{len(names)} encoders, {len(layers)} layers"
            raise UserError(f"--encoder {encoder} --layer {layer}: {counts}; give as many of each")
        sources = weights_of_each(len(names), weights)
        wanted = {}  # {(encoder, weights): its layers}
        for *pair, part in zip(names, sources, layers, strict=True):
            wanted.setdefault(tuple(pair), []).append(part)
        self.encoders = nn.ModuleList()
        for (name, source), parts in wanted.items():
            if len(set(parts)) < len(parts):
                raise UserError(f"--encoder {encoder} --layer {layer}: a layer of {name} twice")
            self.encoders.append(Encoder(name, "+".join(parts), source, *options, **more))
        self.input_size = self.encoders[0].input_size
        if any(other.input_size != self.input_size for other in self.encoders):
            raise UserError(f"--encoder {encoder}: they take images of different sizes; give an --input-size")
        self.programs = dict(pair for part in self.encoders for pair in part.programs.items())
        hashes = [part.weights_sha256 for part in self.encoders]
        self.weights_sha256 = hashes if any(hashes) else None
        self.shapes = [shape for part in self.encoders for shape in part.shapes]

    def forward(self, images):
        return self.join([encoder(images) for encoder in self.encoders])

    def trunk(self, images):
        """Features of normalised images."""
        return self.join([encoder.trunk(images) for encoder in self.encoders])

    def join(self, found):
        """Concatenate the encoders' maps; each has one map or a list."""
        maps = [x for part in found for x in (part if isinstance(part, list) else [part])]
        size = torch.Size(max(x.shape[side] for x in maps) for side in (2, 3))
        return torch.cat([resize(x, size) for x in maps], 1)
