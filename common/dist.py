"""Several processes. `python dpo.py` is one; `torchrun --nproc_per_node=8 dpo.py` starts eight, one per GPU.

All of them run the same page. Each takes its share of every batch, and their gradients are added up
before the optimizer step, so they hold the same weights throughout. With only one process, everything
here does nothing.
"""
import atexit
import gc
import logging
import os
import sys
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

BUCKET = 2**25  # numbers (or a few more) in one all-reduce of gradients


def process():
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def n_processes():
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main():
    """Whether this is the one process that prints and writes files."""
    return process() == 0


def print0(*text):
    """Prints in the main process only."""
    if is_main():
        if sys.stdout.isatty():
            print("\033[K", end="")  # a line of progress may stand there (common/log.py)
        print(*text, flush=True)


class Console(logging.Handler):
    """Prints what data/ and engine/ log."""

    def emit(self, record):
        print0(record.getMessage())


def print_utf8():
    """Prints as UTF-8, whatever the platform's code page is: a model may write any character."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's or a test's stream may have no encoding
            stream.reconfigure(encoding="utf-8")


@cache
def log_to_console():
    """Lets data/ and engine/, which know nothing about processes, print in the main process, as UTF-8."""
    print_utf8()
    for package in ("data", "engine"):
        logger = logging.getLogger(package)
        logger.setLevel(logging.INFO)
        logger.addHandler(Console())


# --------------------------------------------------------------------------------------------------- together

def join_processes(device):
    """Connects to the other processes that torchrun started."""
    if n_processes() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        atexit.register(leave_processes, device)


def leave_processes(device):
    """Closes the connection before the interpreter ends, which might abort otherwise.

    First, whatever still holds the process group has to let go of it: sharded models, and the mesh that torch
    keeps in a cache.
    """
    gc.collect()
    if device_mesh.cache_info().currsize:
        vars(device_mesh(device)).get("_pg_registry", {}).clear()
    dist.destroy_process_group()


@cache
def device_mesh(device):
    """The devices of all processes, in a row, over which models are sharded."""
    return init_device_mesh(torch.device(device).type, (n_processes(),))


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """Adds up a tensor over the processes (or combines it with another `op`), in place, and returns it."""
    if n_processes() > 1:
        dist.all_reduce(tensor, op)
    return tensor


def process_share(batch):
    """This process's part of a batch: with n processes, one of n pieces of the same length."""
    if len(batch) % n_processes():
        raise SystemExit(f"--batch_size={len(batch)}: {n_processes()} processes cannot share it evenly")
    size = len(batch) // n_processes()
    return batch[process() * size:(process() + 1) * size]


def gather_shares(share):
    """The whole list, of which each process holds the share that process_share gives it."""
    if n_processes() == 1:
        return share
    shares = [None] * n_processes()
    dist.all_gather_object(shares, share)
    whole = []
    for piece in shares:
        whole += piece
    return whole


def is_sharded(model):
    """Whether --fsdp has spread this model over the processes: FSDP2 then gives it a method `reshard`."""
    return hasattr(model, "reshard")


def sync_gradients(model):
    """Adds up the gradients of all processes.

    Each process divides its losses by the size of the whole batch, so the sum is the gradient of the batch.
    A sharded model has already added them up in its backward pass.
    """
    if n_processes() == 1 or is_sharded(model):
        return
    bucket = []
    for parameter in model.parameters():
        bucket.append(parameter.grad)
        if sum(grad.numel() for grad in bucket) >= BUCKET:
            all_reduce_together(bucket)
            bucket = []
    if bucket:
        all_reduce_together(bucket)


def all_reduce_together(tensors):
    """Adds up several tensors over the processes in one exchange, in place."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(total.view_as(tensor))
