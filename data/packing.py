"""The packed batch: a prompt and its K responses are one group in one row, and the prompt is stored, and computed, once.

    tokens    p p p p  a a a  b b    | next group, or padding
    segment   0 0 0 0  1 1 1  2 2    | a token sees the segment 0 of its own group, and its own segment, causally
    position  0 1 2 3  4 5 6  4 5    | positions go on from the prompt's end in each response
    group     0 0 0 0  0 0 0  0 0    | 1 …, padding -1

Three flat arrays over the N response tokens say where to read, responses in the order in which they were given:

    source    the place whose state predicts the token: the prompt's last for a response's first token, else the one before
    at        the place of the token itself
    sequence  its response, 0 … S-1
"""
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch.nn.attention.flex_attention import create_block_mask


CALL = 100**2  # pairs of tokens on which the CPU's attention spends as long as a call of it takes


@dataclass
class GroupMask:
    """Who sees whom in each group of the flattened rows, the padding between them being one too. No group sees another."""
    lengths: list  # of the groups, in tokens: their sum is rows·T
    visible: list  # of each, (n, n) boolean; None: causal


@dataclass
class Batch:
    tokens: torch.Tensor    # (rows, T) int64
    segment: torch.Tensor   # (rows, T)
    position: torch.Tensor  # (rows, T)
    group: torch.Tensor     # (rows, T)
    source: torch.Tensor    # (N,) index into rows·T
    at: torch.Tensor        # (N,) index into rows·T
    sequence: torch.Tensor  # (N,)
    sequence_group: torch.Tensor  # (S,) the group that each response belongs to

    @property
    def target(self):
        """(N,) the response tokens themselves."""
        return self.tokens.flatten()[self.at]

    @property
    def last(self):
        """(S,) the place, in rows·T, of each response's last token."""
        return self.at[torch.bincount(self.sequence).cumsum(0) - 1]

    @property
    def n_tokens(self):
        """Tokens that are not padding, a prompt counted once."""
        return int((self.group >= 0).sum())

    def to(self, device):
        move = (lambda x: x.pin_memory().to(device, non_blocking=True)) if torch.device(device).type == "cuda" else (lambda x: x.to(device))
        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})

    def mask(self, kind=None):
        """Who sees whom, padding sees padding: "flex", a BlockMask for flex_attention; "dense", (rows, 1, T, T) boolean; "groups", a GroupMask.

        None: flex on CUDA; elsewhere groups where that saves more than their calls cost, else dense.
        """
        group, segment, (rows, T) = self.group, self.segment, self.group.shape
        if kind == "flex" or kind is None and group.is_cuda:
            def visible(b, h, q, k):
                return (q >= k) & (group[b, q] == group[b, k]) & ((segment[b, k] == 0) | (segment[b, q] == segment[b, k]))
            return create_block_mask(visible, rows, None, T, T, device=group.device)
        lengths = torch.unique_consecutive(group, return_counts=True)[1].tolist()
        if kind == "groups" or kind is None and sum(n**2 + CALL for n in lengths) < rows * T**2:
            return GroupMask(lengths, [sees(s) if s.max() > 1 else None for s in segment.flatten().split(lengths)])
        return (sees(segment) & (group[:, :, None] == group[:, None, :]))[:, None]


def sees(segment):
    """(…, T) -> (…, T, T) boolean: each place sees its group's segment 0 and its own segment, causally."""
    return ((segment[..., None, :] == 0) | (segment[..., :, None] == segment[..., None, :])).tril()


def group_length(group):
    prompt, responses = group
    return len(prompt) + sum(map(len, responses))


def first_fit(lengths, max_tokens):
    """Groups of these lengths into rows of at most max_tokens, first fit decreasing.

    -> [(row, where in it the group begins), …], the number of rows, the length of the longest.
    """
    place, free = [None] * len(lengths), []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, room in enumerate(free) if room >= lengths[i]), len(free))
        if row == len(free):
            free.append(max_tokens)
        place[i] = row, max_tokens - free[row]
        free[row] -= lengths[i]
    return place, len(free), max_tokens - min(free)


def pack(groups, max_tokens=None):
    """groups: list of (prompt_ids, [response_ids, …]) -> Batch, its rows at most max_tokens long; None: as long as leaves the least padding.

    Raises ValueError where a prompt or a response is empty or a group does not fit a row.
    """
    assert groups, "nothing to pack"
    lengths = list(map(group_length, groups))
    longest = max(lengths)
    if max_tokens and longest > max_tokens:
        raise ValueError(f"pack: group {lengths.index(longest)} has {longest} tokens, a row holds {max_tokens}")
    limits = [max_tokens] if max_tokens else [longest * i // 16 for i in range(16, 33)]
    place, rows, T = min((first_fit(lengths, limit) for limit in limits), key=lambda fit: fit[1] * fit[2])  # rows · T

    tokens, segment, position = np.zeros((3, rows, T), dtype=np.int64)
    group = np.full((rows, T), -1, dtype=np.int64)
    source, at, sequence, sequence_group = [], [], [], []
    for i, (prompt, responses) in enumerate(groups):
        (row, begin), P = place[i], len(prompt)
        if not P or not all(map(len, responses)):
            raise ValueError(f"pack: group {i} has an empty prompt or response")
        group[row, begin:begin + lengths[i]] = i
        tokens[row, begin:begin + P], position[row, begin:begin + P] = prompt, np.arange(P)
        end = begin + P
        for k, response in enumerate(responses, 1):
            here = slice(end, end + len(response))
            tokens[row, here], segment[row, here], position[row, here] = response, k, np.arange(P, P + len(response))
            own = row * T + np.arange(end, end + len(response))
            at.append(own)
            source.append(np.concatenate([[row * T + begin + P - 1], own[:-1]]))
            sequence.append(np.full(len(response), len(sequence)))
            sequence_group.append(i)
            end += len(response)
    arrays = (tokens, segment, position, group, *map(np.concatenate, (source, at, sequence)), np.array(sequence_group))
    return Batch(*map(torch.from_numpy, arrays))


def per_sequence(x, batch):
    """Sums x (N,), one number a response token, over each response -> (S,)."""
    return x.new_zeros(len(batch.sequence_group)).index_add(0, batch.sequence, x)


def micro_batches(indices, lengths, max_tokens):
    """A batch of indices, shortest group first, cut into lists of at most max_tokens tokens each (one group at least)."""
    pieces, size = [], 0
    for i in sorted(indices, key=lambda i: lengths[i]):
        size += lengths[i]
        if not pieces or size > max_tokens:
            pieces.append([])
            size = lengths[i]
        pieces[-1].append(i)
    return pieces


def batch_order(n, batch_size, steps, seed):
    """Which of n examples each step trains on: a list of `steps` lists of batch_size indices, shuffled anew each epoch.

    What fills no batch at an epoch's end waits for the next shuffle. Batches are random whatever the examples' lengths: with
    batches of like length, a mean over a batch's tokens would weigh the tokens of short responses more, and teach brevity.
    Depends on its arguments alone: a resumed run finds its place by the number of the step.
    """
    if n < batch_size:
        raise SystemExit(f"--batch_size={batch_size}: there are only {n} examples to train on")
    rng, order = np.random.default_rng(seed), []
    while len(order) < steps:
        shuffled = rng.permutation(n)
        order += [shuffled[i:i + batch_size].tolist() for i in range(0, n - batch_size + 1, batch_size)]
    return order[:steps]
