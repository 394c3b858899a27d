"""PPO's grid: (B, R) numbers, a row per response and a column per response token.

With K responses to each prompt, K neighbouring rows belong to one prompt.

mask is True where there is a token. grid[mask] is a flat array (N,) like those of a packed batch, in
the same order.
"""
import torch

from common.dist import gather_shares
from common.log import printable


def length_mask(responses):
    """mask (B, R): True on the tokens of each response, where R is the length of the longest one."""
    length = torch.tensor([len(response) for response in responses])
    return torch.arange(length.max()) < length[:, None]


def repeat_each(prompts, k):
    """Each prompt k times, one after the other: the prompts of the rows of a grid."""
    repeated = []
    for prompt in prompts:
        repeated += [prompt] * k
    return repeated


def group_by_prompt(prompts, responses, k):
    """The reverse, for packing: [(prompt, [k responses]), …]."""
    return [(prompts[i], responses[i:i + k]) for i in range(0, len(prompts), k)]


def to_grid(flat, mask):
    """Spreads N numbers over the True entries of a mask: (N,) -> (B, R), 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


def gather_grid(my_rows, mask):
    """Gathers a whole grid (B, R) from the rows of each process, which are lists of unequal length."""
    numbers = []
    for row in gather_shares(my_rows):
        numbers += row
    return to_grid(torch.tensor(numbers), mask)


def on_last_token(x, mask):
    """Puts a number per response on the response's last token: (B,) -> (B, R), 0 elsewhere."""
    last = mask.sum(1, keepdim=True) - 1
    return torch.zeros(mask.shape).scatter(1, last, x[:, None])


def check_reward(rewards, responses, tokenizer):
    """Returns what a reward_fn returned, as (B, R) float32 on the CPU.

    Raises ValueError if it has another shape, if a number is not finite, or if one other than 0 lies after a
    response's end.
    """
    try:
        rewards = torch.as_tensor(rewards, dtype=torch.float32, device="cpu")
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError("reward_fn must return a (B, R) array of numbers, "
                         f"0 after a response's end ({error})")
    mask = length_mask(responses)
    B, R = mask.shape
    if rewards.shape != mask.shape:
        raise ValueError(f"reward_fn returned the shape {tuple(rewards.shape)}, expected {(B, R)}: a number "
                         f"for each token of {B} responses, the longest of {R} tokens")
    not_finite = ~rewards.isfinite()
    after_the_end = (rewards != 0) & ~mask
    for wrong, what in ((not_finite, "is not finite"), (after_the_end, "lies after the response's end")):
        if wrong.any():
            i, t = wrong.nonzero()[0].tolist()
            text = printable(tokenizer.decode(responses[i]))
            raise ValueError(f"reward_fn: the reward {rewards[i, t].item()} of response {i} at token {t} "
                             f"{what}: {text!r}")
    return rewards
