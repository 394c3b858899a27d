"""Faster matrix products for sampling on an x86 CPU.

A decoding step multiplies a few rows by every matrix of the model. For that, oneDNN is up to twice as fast as MKL if
the matrix is first copied into its own layout. The copies exist only inside `onednn_weights(model)`.
Definition: Linear is nn.Linear.
"""
from contextlib import contextmanager

import torch
import torch.nn as nn

SMALLEST = 2**17  # entries of a matrix from which on the copy pays


class Linear(nn.Linear):
    """nn.Linear, computed by oneDNN inside `onednn_weights(model)`."""
    onednn_copy = None

    def forward(self, x):
        if self.onednn_copy is None:
            return super().forward(x)
        return onednn_linear(x, self.onednn_copy, self.bias)


def onednn_linear(x, weight_copy, bias=None):
    """x Wᵀ + b for a weight in oneDNN's layout; has no gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight_copy, bias, "none", [], "")


def copy_for_onednn(weight):
    """The float32 matrix (out, in) in oneDNN's layout; None where that gains nothing: on a GPU, if small, without MKL."""
    is_float_on_cpu = not weight.is_cuda and weight.dtype == torch.float32
    if is_float_on_cpu and weight.numel() >= SMALLEST and torch.backends.mkl.is_available():
        return torch.ops.mkldnn._reorder_linear_weight(weight)
    return None


@contextmanager
def onednn_weights(model):
    """Inside, every Linear of the model uses a oneDNN copy of its weight. Yields the copy of the vocabulary matrix or None."""
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    try:
        for linear in linears:
            linear.onednn_copy = copy_for_onednn(linear.weight)
        yield copy_for_onednn(model.wte.weight)
    finally:
        for linear in linears:
            linear.onednn_copy = None
