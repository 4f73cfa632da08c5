"""On CUDA: a convolution and its ReLU in one cuDNN kernel, in the frozen encoder."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


class ConvReLU(nn.Conv2d):
    """A convolution and a ReLU; one kernel saves two passes over the map, for the bias and the ReLU."""

    def forward(self, x):
        amp = torch.is_autocast_enabled("cuda")
        fused = x.is_cuda and torch.version.cuda  # not AMD's GPUs
        fused = fused and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if not fused or amp and torch.cuda.get_device_capability(x.device) < (8, 0):  # no bfloat16
            return F.relu(super().forward(x), inplace=True)
        tensors = x, self.weight, self.bias
        if amp:
            tensors = (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in tensors)
        return torch.cudnn_convolution_relu(*tensors, self.stride, self.padding, self.dilation, self.groups)


def fuse(net, wanted):
    """Make each convolution of `net` that a ReLU follows a ConvReLU, except at the paths `wanted`."""
    for around, row in net.named_modules():
        children = list(row.named_children()) if type(row) is nn.Sequential else []
        for (name, conv), (behind, relu) in pairwise(children):
            plain = type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and conv.bias is not None
            path = f"{around}.{name}".removeprefix(".")
            if plain and type(relu) is nn.ReLU and type(conv.padding) is tuple and path not in wanted:
                conv.__class__ = ConvReLU
                setattr(row, behind, nn.Sequential())  # the identity
