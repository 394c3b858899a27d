"""Faster matrix products for sampling on an x86 CPU.

Definition: Linear is nn.Linear.

A decoding step multiplies a few rows by every matrix of the model. oneDNN does that up to twice as fast as
MKL once the matrix is copied into its own layout. The copies exist only inside `onednn_weights(model)`.
"""
from contextlib import contextmanager

import torch
import torch.nn as nn

from engine import devices

SMALLEST = 2**17  # entries; for a smaller matrix the copy does not pay


class Linear(nn.Linear):
    """nn.Linear, computed by oneDNN inside `onednn_weights(model)`."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.onednn_copy = None

    def forward(self, x):
        if self.onednn_copy is None:
            return super().forward(x)
        return onednn_linear(x, self.onednn_copy, self.bias)


def onednn_linear(x, weight_copy, bias=None):
    """x Wᵀ + b for a weight in oneDNN's layout, without gradients."""
    return torch.ops.mkldnn._linear_pointwise(x, weight_copy, bias, "none", [], "")


def copy_for_onednn(weight):
    """Copies a float32 matrix (out, in) into oneDNN's layout, or returns None where that gains nothing.

    It gains nothing on a GPU, for a small matrix or another dtype, or in a build of torch without MKL.
    """
    is_float_on_cpu = devices.device_type(weight.device) == "cpu" and weight.dtype == torch.float32
    if is_float_on_cpu and weight.numel() >= SMALLEST and torch.backends.mkl.is_available():
        return torch.ops.mkldnn._reorder_linear_weight(weight)
    return None


@contextmanager
def onednn_weights(model):
    """While this context is open, every Linear of the model uses a oneDNN copy of its weight.

    Yields a copy of the vocabulary matrix, or None (see copy_for_onednn).
    """
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    try:
        for linear in linears:
            linear.onednn_copy = copy_for_onednn(linear.weight)
        yield copy_for_onednn(model.wte.weight)
    finally:
        for linear in linears:
            linear.onednn_copy = None
