"""Sharded models (FSDP2, arXiv:2304.11277): each process holds its part of every tensor.

A block's weights are gathered while it runs. What lies outside the blocks (the embeddings with the tied
head, ln_f, the scalar heads) is gathered by `states` and stays so until a backward pass. Nobody with one
GPU needs this file. So FSDP is imported where it is used: that takes about half as long as importing torch.
"""
import torch

from common.dist import device_mesh, is_main, is_sharded
from engine.attention import compiled
from model import GPT


def shard_model(model, device):
    """Spreads a model over the processes, in place."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    for module in [*model.h, model]:
        fully_shard(module, mesh=device_mesh(device))
        # Gradients are summed, not averaged, because losses are divided by the size of the whole batch.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
    register_fsdp_forward_method(model, "states")
    register_fsdp_forward_method(model.h[-1], "forward_at")


def compile_blocks(model):
    """Compiles each block by itself, since a compiled graph ends where weights are gathered."""
    for block in model.h:
        block.forward = compiled(block.forward)
    model.h[-1].forward_at = compiled(model.h[-1].forward_at)


def is_dtensor(x):
    """Whether x is a DTensor: a tensor of which each process holds a part."""
    return hasattr(x, "full_tensor")


def full_tensor(x):
    """A tensor, gathered if it is sharded. All processes must call this."""
    return x.full_tensor() if is_dtensor(x) else x


def unshard_model(model, dtype=torch.float32):
    """The whole model in this dtype: the model itself if it is that already, otherwise a copy.

    All processes must call this, and each gets the whole model.
    """
    if not is_sharded(model) and model.wte.weight.dtype == dtype:
        return model
    with torch.device("meta"):
        copy = GPT(model.config)
    weights = {name: full_tensor(weight.to(dtype)) for name, weight in model.state_dict().items()}
    copy.load_state_dict(weights, assign=True)
    copy.compiled = model.compiled
    copy.dtype = model.dtype
    return copy


def sampling_copy(model):
    """The model to sample with: the model itself in float32; in bfloat16, the default on CUDA, a copy.

    Decoding on CUDA waits for memory, and bfloat16 halves what is read.
    """
    return unshard_model(model, model.product_dtype())


def gather_state(state):
    """Gathers the sharded tensors of a state dict on the main process's CPU, one at a time.

    In the other processes they become None. All processes must call this.
    """
    if isinstance(state, dict):
        return {key: gather_state(value) for key, value in state.items()}
    if not is_dtensor(state):
        return state
    whole = state.full_tensor()
    return whole.cpu() if is_main() else None


def shard_like(x, parameter):
    """Shards a whole tensor in the way `parameter` is sharded, if it is."""
    if not is_dtensor(parameter) or x.shape != parameter.shape:
        return x
    from torch.distributed.tensor import distribute_tensor
    part = distribute_tensor(x, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return part.clone()  # `part` may be a view, which would keep the whole tensor alive
