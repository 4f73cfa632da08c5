"""On CUDA: a convolution and the ReLU behind it by one kernel of cuDNN, in the frozen encoder."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


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
