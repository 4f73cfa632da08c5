"""A network of one's own, for tests: its modules run twice, give two tensors, never run, or fail."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8))
        self.again = nn.ReLU(inplace=True)
        self.both = Both()
        self.never = nn.Conv2d(8, 8, 1)
        self.last = Raising()

    def forward(self, x):
        x = self.again(self.again(self.first(x)))
        return self.last(self.both(x)[0])


class Both(nn.Module):
    def forward(self, x):
        return x, x


class Raising(nn.Module):
    def forward(self, x):
        if x.is_meta:
            return x
        raise ValueError("ran")


def build():
    torch.manual_seed(3)
    return Net()


def three():
    return 3
