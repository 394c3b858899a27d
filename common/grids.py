"""PPO's grid: (B, R) numbers, a row per response and a column per response token.

mask is True where there is a token. grid[mask] is the flat array (N,) of a packed batch, in the same order.
"""
import torch

from common.dist import gather_shares
from common.log import printable


def length_mask(responses):
    """mask (B, R): True on the tokens of each response; R is the length of the longest."""
    length = torch.tensor([len(response) for response in responses])
    return torch.arange(length.max()) < length[:, None]


def to_grid(flat, mask):
    """(N,) numbers, one per True of the mask -> (B, R), 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


def gather_grid(my_rows, mask):
    """This process's rows of a grid, as lists of numbers of unequal length -> the whole grid (B, R)."""
    rows = dist.gather_shares(my_rows)
    return to_grid(torch.tensor([x for row in rows for x in row]), mask)


def on_last_token(x, mask):
    """x (B,), a number per response -> (B, R), all of it on the response's last token."""
    last = mask.sum(1, keepdim=True) - 1
    return torch.zeros(mask.shape).scatter(1, last, x[:, None])


def check_reward(rewards, responses, tokenizer):
    """What a reward_fn returned, as (B, R) float32. Raises ValueError if it has another shape or is not a number."""
    try:
        rewards = torch.as_tensor(rewards, dtype=torch.float32, device="cpu")
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"reward_fn must return a (B, R) array of numbers, 0 after a response's end ({error})")
    mask = length_mask(responses)
    if rewards.shape != mask.shape:
        raise ValueError(f"reward_fn returned the shape {tuple(rewards.shape)}, expected {tuple(mask.shape)}: a number "
                         f"for each token of {mask.size(0)} responses, the longest of {mask.size(1)} tokens")
    not_finite = ~rewards.isfinite()
    after_the_end = (rewards != 0) & ~mask
    for wrong, what in ((not_finite, "is not finite"), (after_the_end, "lies after the response's end")):
        if wrong.any():
            i, t = wrong.nonzero()[0].tolist()
            text = printable(tokenizer.decode(responses[i]))
            raise ValueError(f"reward_fn: the reward {rewards[i, t].item()} of response {i} at token {t} {what}: {text!r}")
    return rewards
