"""Muon, an optimiser for weights that are matrices, with Adam for the rest."""

import torch

MOMENTUM = 0.95
BETAS = (0.9, 0.999)  # Adam's
QUINTIC = (3.4445, -4.775, 2.0315)  # Jordan's: all singular values between 0.7 and 1.2 after five iterations


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) over `params`, at rate `lr`.

    A weight's gradient is large in a few directions and small in most; Muon takes steps of about the same
    length in all: the nearest orthogonal matrix to the gradients' running mean (out, all else). Elements
    change by 0.2 times the rate, about as by Adam (Liu et al. 2025, arXiv 2502.16982); biases and gains get
    Adam's step. In float32: many CPUs have no bfloat16, which torch's and timm's Muon compute in. A step is
    `orthogonalize_grads`, which needs no learning rate, so that a CUDA graph can hold it, and `step`.
    """

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def orthogonalize_grads(self):
        """Replace the gradient of each matrix with the direction that `step` takes."""
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None and is_matrix(parameter):
                parameter.grad = muon_step(parameter.grad, self.state[parameter])

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                update = parameter.grad
                if not is_matrix(parameter):
                    update = adam_step(update, self.state[parameter])
                parameter.sub_(update, alpha=self.param_groups[0]["lr"])


def is_matrix(parameter):
    """Whether `parameter`, with its first dimension as rows, is a matrix: a gain (C, 1, 1) is none."""
    return parameter.ndim > 1 and min(parameter.flatten(1).shape) > 1


def muon_step(gradient, state):
    """The update, at a learning rate of 1, of a weight with this gradient, (out, …), and optimizer state."""
    if not state:
        state["mean"] = torch.zeros_like(gradient)
    state["mean"].lerp_(gradient, 1 - MOMENTUM)
    matrix = orthogonal(gradient.lerp(state["mean"], MOMENTUM).flatten(1))  # Nesterov's
    return matrix.view_as(gradient) * (0.2 * max(matrix.shape) ** 0.5)


def orthogonal(matrix):
    """About U Vᵀ of a matrix U S Vᵀ, by Newton and Schulz's iteration."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T).T
    x = matrix / (matrix.norm() + 1e-7)
    a, b, c = QUINTIC
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x


def adam_step(gradient, state):
    """The update, at a learning rate of 1, of a parameter that is no matrix (Kingma & Ba 2015)."""
    if not state:
        state |= {"step": 0, "mean": torch.zeros_like(gradient), "square": torch.zeros_like(gradient)}
    first, second = BETAS
    state["step"] += 1
    state["mean"].lerp_(gradient, 1 - first)
    state["square"].lerp_(gradient.square(), 1 - second)
    mean = state["mean"] / (1 - first ** state["step"])
    square = state["square"] / (1 - second ** state["step"])
    return mean / (square.sqrt() + 1e-8)
