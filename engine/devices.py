"""What differs between devices. Everything that runs on CUDA alone asks `device_type` first."""
import torch


def device_type(device):
    """"cpu", "cuda" or "mps" (Apple), of a torch.device or its name."""
    return torch.device(device).type


def float64_device(device):
    """Where to compute with a device's tensors in float64: there, or on the CPU for mps, which has none."""
    return torch.device("cpu") if device_type(device) == "mps" else torch.device(device)
