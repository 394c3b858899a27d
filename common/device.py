"""The device that a run computes on."""
import ctypes
import os
import re
import sys

import torch

from common.dist import n_processes


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
