"""The device that a run computes on, and a model on it."""
import ctypes
import os
import re
import sys

import torch

from common.dist import is_sharded, n_processes
from common.sharding import compile_blocks, shard_model
from engine import devices

SMALLEST_COMPILED = 10_000_000  # parameters of the smallest model that is compiled by default


def choose_device(device):
    """Picks the device to run on ("cpu", "cuda", "cuda:1", "mps") and sets torch up for it.

    Exits with one line if there is no such device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise SystemExit(f"--device={device}: expected cpu, cuda, or one of several as cuda:1, or mps")
    if device == "mps" and not torch.backends.mps.is_available():
        raise SystemExit("--device=mps: torch sees no Apple GPU here")
    if device == "mps" and n_processes() > 1:
        raise SystemExit("--device=mps: one process only; several need CUDA or CPUs")
    if device == "cuda" and n_processes() > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if device.startswith("cuda"):
        index = torch.device(device).index or 0
        count = torch.cuda.device_count()
        if index >= count:
            raise SystemExit(f"--device={device}: torch sees {count or 'no'} CUDA devices here")
        torch.cuda.set_device(index)  # CUDA graphs are recorded on the current device
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        # cuDNN's attention makes a new plan for each shape, and each batch of prompts has another shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
    else:
        # By default MKL may use fewer threads than torch asks for, and the number of threads changes how sums
        # are rounded. Setting the number, even to what it is, switches that off.
        torch.set_num_threads(torch.get_num_threads())
        if sys.platform == "linux":
            keep_freed_memory()
    return device


def keep_freed_memory():
    """Tells glibc's malloc to keep freed memory instead of returning it to the kernel.

    Tensors of 100 MB come and go, and the kernel would zero the memory of each one again.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)          # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-2, 2**28)      # M_TOP_PAD


def prepare_model(model, cfg, device):
    """Moves a model to the device; --fsdp spreads it over the processes, and --compile compiles it."""
    on_cuda = devices.device_type(device) == "cuda"
    compile = wants_compile(model, cfg, device)
    n_head = model.config.n_head
    head_size = model.config.n_embd // n_head
    if compile and on_cuda and head_size < 16:
        raise SystemExit(f"--n_head={n_head}: flex_attention on CUDA needs heads of 16 dimensions "
                         f"or more, these have {head_size}; --compile=False runs without it")
    if n_processes() == 1 or not cfg.fsdp:
        model.to(device)
        model.prepare(compile, cfg.checkpoint_blocks)
    elif not is_sharded(model):
        shard_model(model, device)
        model.prepare(False, cfg.checkpoint_blocks)
        if compile:
            model.mask_kind = "flex" if on_cuda else "dense"
            compile_blocks(model)
    return model


def wants_compile(model, cfg, device):
    """Whether to compile: --compile; by default on CUDA, unless the model is small.

    Compiling takes half a minute or more; without it, SFT or DPO in the animals world takes less than that.
    """
    if cfg.compile is None:
        return devices.device_type(device) == "cuda" and n_parameters(model) >= SMALLEST_COMPILED
    return cfg.compile


def n_parameters(model):
    return sum(p.numel() for p in model.parameters())


def describe_device(model, cfg, device, tokens_per_step):
    """One line: the device, the dtype of products, compile on or off, parameters, tokens a step."""
    name = device
    if devices.device_type(device) == "cuda":
        name += f" ({torch.cuda.get_device_name()})"
    dtype = str(model.product_dtype()).removeprefix("torch.")
    compile = "on" if wants_compile(model, cfg, device) else "off"
    return (f"{name}, {dtype}, compile {compile}, {n_parameters(model) / 1e6:.1f}M parameters, "
            f"about {tokens_per_step:,.0f} tokens a step")
