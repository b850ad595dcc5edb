"""Comparison of a loss with its formula, written out plainly in a test: value and gradients in float64."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def random_norm(norm: nn.Module) -> nn.Module:
    """Give a batch norm random scales and shifts."""
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm.double()


def assert_equal_with_gradients(
    loss: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor] = (),
    constant: Sequence[Tensor] = (),
) -> None:
    """Compare value and gradients of both for the same inputs.

    Args:
        loss: The function under test.
        formula: The restated formula, of the same arguments.
        inputs: Tensors with gradient.
        parameters: Further tensors with gradient, which both use without being given them.
        constant: Tensors after the inputs, without gradient.
    """
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    found, expected = loss(*leaves, *constant), formula(*leaves, *constant)
    assert found.dtype == torch.float64
    assert found.shape == ()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    wanted = [*leaves, *parameters]
    for ours, theirs in zip(
        torch.autograd.grad(found, wanted, allow_unused=True),
        torch.autograd.grad(expected, wanted, allow_unused=True),
        strict=True,
    ):
        assert ours is not None
        assert theirs is not None
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10 * float(theirs.abs().max()))
