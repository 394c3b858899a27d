"""AdamW, the learning-rate schedule, and the optimizer step."""
import math

import torch

from common.dist import print0
from common.sharding import full_tensor, is_sharded

PATIENCE = 10  # the run ends after this many gradients in a row that are not finite


def make_optimizer(model, lr, weight_decay=0.0, betas=(0.9, 0.95)):
    """AdamW (arXiv:1711.05101), which decays matrices but neither biases nor LayerNorms."""
    if is_sharded(model):
        model.reshard()  # after a forward pass without a backward pass, some parameters are still gathered
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    param_groups = [{"params": matrices, "weight_decay": weight_decay},
                    {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(param_groups, lr=lr, betas=betas, fused=True)


def lr_schedule(step, cfg):
    """The learning rate at a step as a fraction of its peak: linear warm-up, then half a cosine down to 0.

    The warm-up takes cfg.warmup steps, and the cosine the rest of cfg.steps. `step` counts from 0.
    """
    if step < cfg.warmup:
        return (step + 1) / cfg.warmup
    progress = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def optimizer_step(model, optimizer, lr, grad_clip):
    """Clips the gradient's norm to grad_clip, takes a step with learning rate lr, and clears the gradient.

    Returns the norm before clipping. If it is not finite, prints that and skips the step; after PATIENCE
    such steps in a row, the program exits.
    """
    for param_group in optimizer.param_groups:
        param_group["lr"] = lr
    grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)).item()
    if math.isfinite(grad_norm):
        optimizer.step()
        optimizer.skipped = 0
    else:
        optimizer.skipped = getattr(optimizer, "skipped", 0) + 1
        print0(f"skipped a step: its gradient is not finite ({optimizer.skipped} in a row)")
        if optimizer.skipped == PATIENCE:
            raise SystemExit(f"{PATIENCE} gradients in a row were not finite: "
                             f"lower --lr (now {lr:.3g}) or --grad_clip (now {grad_clip}); "
                             "the last checkpoint is intact, but --resume would only do the same again")
    optimizer.zero_grad(set_to_none=True)
    return grad_norm
