"""Muon against torch's own, and what it is for: matrices turned, the rest left to Adam."""

import pytest
import torch

from extras.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(64, 576), (576, 64), (32, 32)])
def test_directions_stay_and_become_as_long(shape):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator) * torch.logspace(0, -1, shape[1])
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = left.T @ orthogonal(matrix) @ right.T
    lengths = found.diagonal()
    assert 0.6 < lengths.min() and lengths.max() < 1.25
    assert (found - lengths.diag()).abs().max() < 1e-3


def moved(optimizer, shapes, steps=3, **options):
    """What weights of these shapes, the same each time, become in some steps."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    rule = optimizer(weights, 0.01, **options)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.numel(), generator=generator).view_as(weight)
        if optimizer is Muon:
            rule.orthogonalize_grads()
        rule.step()
    return weights


def test_what_is_no_matrix_is_adams():
    shapes = [(7,), (3, 1, 1), (1, 5)]
    torch.testing.assert_close(moved(Muon, shapes), moved(torch.optim.Adam, shapes), atol=1e-6, rtol=1e-5)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
def test_matrices_are_as_torchs_muon_has_them():
    shapes = [(16, 48), (40, 8)]
    theirs = moved(torch.optim.Muon, shapes, adjust_lr_fn="match_rms_adamw", weight_decay=0)
    for a, b, start in zip(moved(Muon, shapes), theirs, moved(Muon, shapes, steps=0), strict=True):
        assert (a - b).norm() < 0.02 * (a - start).norm()  # theirs is in bfloat16


def test_kernels_are_matrices_of_outputs_and_rate_is_as_adams():
    """(out, in, 3, 3) as (out, 9 in), whose elements change by 0.2 times the rate, as a mean square."""
    (kernel,), (matrix,) = (moved(Muon, [shape], steps=1) for shape in ((8, 4, 3, 3), (8, 36)))
    assert torch.equal(kernel.flatten(1), matrix)
    (before,) = moved(Muon, [(8, 36)], steps=0)
    assert (matrix - before).square().mean().sqrt() == pytest.approx(0.2 * 0.01, rel=0.2)
