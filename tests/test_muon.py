"""Muon against torch's own, and what it is for: matrices turned, the rest left to Adam."""

import pytest
import torch

from muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(64, 576), (576, 64), (32, 32)])
def test_directions_stay_and_become_as_long(shape):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator) * torch.logspace(0, -1, shape[1])
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    assert values[0] > 2.5 * values[-1]
    found = left.T @ orthogonal(matrix) @ right.T
    lengths = found.diagonal()
    assert 0.6 < lengths.min() and lengths.max() < 1.25
    assert (found - lengths.diag()).abs().max() < 1e-3


def steps(optimizer, weights, gradients):
    """What `weights`, tensors, become by a step for each of `gradients`, lists of as many."""
    for step in gradients:
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient.clone()
        if isinstance(optimizer, Muon):
            optimizer.turn()
        optimizer.step()
    return weights


def made_up(*shapes):
    """Weights of these shapes, twice, and three steps' gradients."""
    generator = torch.Generator().manual_seed(1)
    first = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3)]
    return first, [weight.clone() for weight in first], gradients


def test_what_is_no_matrix_is_adams():
    ours, theirs, gradients = made_up((7,), (3, 1, 1), (1, 5))
    steps(Muon(ours, 0.01), ours, gradients)
    steps(torch.optim.Adam(theirs, 0.01), theirs, gradients)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


def test_matrices_are_as_torchs_muon_has_them():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has Muon from 2.9 on")
    ours, theirs, gradients = made_up((16, 48), (40, 8))
    before = [weight.clone() for weight in ours]
    steps(Muon(ours, 0.01), ours, gradients)
    scaled = {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0}
    steps(torch.optim.Muon(theirs, 0.01, **scaled), theirs, gradients)
    for a, b, start in zip(ours, theirs, before, strict=True):
        assert (a - b).norm() < 0.02 * (a - start).norm()  # theirs is in bfloat16


def test_kernels_are_matrices_of_outputs_and_rate_is_as_adams():
    """(out, in, 3, 3) as (out, 9 in), whose elements change by 0.2 times the rate, as a mean square."""
    ours, theirs, gradients = made_up((8, 4, 3, 3))
    flat = [theirs[0].flatten(1)]
    before = ours[0].clone()
    steps(Muon(ours, 0.01), ours, gradients[:1])
    steps(Muon(flat, 0.01), flat, [[gradients[0][0].flatten(1)]])
    assert torch.equal(ours[0].flatten(1), flat[0])
    assert (ours[0] - before).square().mean().sqrt() == pytest.approx(0.2 * 0.01, rel=0.2)
