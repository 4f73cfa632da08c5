"""Muon, an optimiser for weights that are matrices, with Adam for the rest."""

import torch

MOMENTUM = 0.95
BETAS = (0.9, 0.999)  # Adam's
QUINTIC = (3.4445, -4.775, 2.0315)  # Jordan's: all singular values between 0.7 and 1.2 after five iterations


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) over `params`, at the rate `lr`.

    The gradient of a weight is large in a few directions and small in most. Muon makes a step of about the
    same length in all: of the gradients' running mean, as a matrix (out, all else), it takes the nearest
    orthogonal one. Its elements change by 0.2 times the rate, about as by Adam (Liu et al. 2025,
    arXiv 2502.16982), so rates are of the same order. What is no matrix, such as a bias, gets Adam's step.
    In float32: torch's and timm's compute in bfloat16, which many CPUs have no arithmetic for.

    A step is `orthogonalize_grads`, then `step`: the former is the same at any learning rate, so that a CUDA
    graph can hold it (train.py).
    """

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def orthogonalize_grads(self):
        """Give each matrix, instead of its gradient, the direction that `step` takes."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and is_matrix(parameter):
                    parameter.grad = muon_step(parameter.grad, self.state[parameter])

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    change = parameter.grad
                    if not is_matrix(parameter):
                        change = adam_step(change, self.state[parameter])
                    parameter.sub_(change, alpha=group["lr"])


def is_matrix(parameter):
    """Whether `parameter`, with its first dimension as rows, is a matrix: a gain (C, 1, 1) is none."""
    return parameter.ndim > 1 and min(parameter.flatten(1).shape) > 1


def muon_step(gradient, state):
    """What to subtract at a rate of 1 from a weight with this gradient, (out, …); state: of that weight."""
    if not state:
        state["mean"] = torch.zeros_like(gradient)
    state["mean"].lerp_(gradient, 1 - MOMENTUM)
    ahead = gradient.lerp(state["mean"], MOMENTUM)  # Nesterov's
    matrix = orthogonal(ahead.flatten(1))
    return matrix.view_as(gradient) * (0.2 * max(matrix.shape) ** 0.5)


def orthogonal(matrix):
    """About U Vᵀ of a matrix U S Vᵀ, by Newton and Schulz's iteration."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        a, b, c = QUINTIC
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide is matrix else x.T


def adam_step(gradient, state):
    """What to subtract at a rate of 1 from a parameter that is no matrix (Kingma & Ba 2015)."""
    if not state:
        state |= {"step": 0, "mean": torch.zeros_like(gradient), "square": torch.zeros_like(gradient)}
    first, second = BETAS
    state["step"] += 1
    state["mean"].lerp_(gradient, 1 - first)
    state["square"].lerp_(gradient.square(), 1 - second)
    mean = state["mean"] / (1 - first ** state["step"])
    square = state["square"] / (1 - second ** state["step"])
    return mean / (square.sqrt() + 1e-8)
