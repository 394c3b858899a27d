"""The packed batch: a prompt and its K responses are one group in one row, so the prompt is computed once.

    tokens    p p p p  a a a  b b    | the next group, or padding
    segment   0 0 0 0  1 1 1  2 2    | a token sees segment 0 (the prompt) and its own segment, causally
    position  0 1 2 3  4 5 6  4 5    | in each response, positions go on from the end of the prompt
    group     0 0 0 0  0 0 0  0 0    | 1 …, and -1 for padding

Definition: a packed batch gives the same numbers as one row per response, with nothing in it but the prompt
and that response.

Three flat arrays describe the N response tokens, response after response, in the order they were given in:

    state_index   the place whose hidden state predicts the token: the prompt's last place for a response's
                  first token, otherwise the place just before the token
    token_index   the place of the token itself
    sequence      which response the token belongs to, 0 … S-1

A place is an index into rows·T, the row-major order of `tokens`.
"""
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F

from engine import devices


@dataclass
class Batch:
    tokens: torch.Tensor          # (rows, T) int64
    segment: torch.Tensor         # (rows, T)
    position: torch.Tensor        # (rows, T)
    group: torch.Tensor           # (rows, T)
    state_index: torch.Tensor     # (N,) places
    token_index: torch.Tensor     # (N,) places
    sequence: torch.Tensor        # (N,)
    sequence_group: torch.Tensor  # (S,) the group that each response belongs to

    @property
    def target(self):
        """(N,) the response tokens themselves."""
        return self.tokens.flatten()[self.token_index]

    @property
    def response_length(self):
        """(S,) the number of tokens in each response, its EOS included; never 0."""
        return per_sequence(torch.ones_like(self.sequence), self)

    @property
    def last(self):
        """(S,) the place of each response's last token."""
        ends = self.response_length.cumsum(0)  # where in N each response ends
        return self.token_index[ends - 1]

    def in_one_row(self, multiple):
        """The same batch with its rows end to end in one, which leaves all places as they are.

        The row is padded to a multiple of `multiple` tokens, at least 2 · `multiple`.

        torch.compile makes special code for a size of 1. So a batch of one row and one of several rows, or of
        one block and of several blocks, would each be compiled anew; in this form, all batches are alike.
        """
        n_places = self.tokens.numel()
        length = max(-(-n_places // multiple), 2) * multiple

        def one_row(x, padding=0):
            return F.pad(x.flatten(), (0, length - n_places), value=padding)[None]

        return replace(self, tokens=one_row(self.tokens), segment=one_row(self.segment),
                       position=one_row(self.position), group=one_row(self.group, -1))

    def to(self, device):
        """The batch on `device`; copies to a GPU overlap with its computation."""
        moved = {}
        for field in fields(self):
            tensor = getattr(self, field.name)
            if devices.device_type(device) == "cuda":
                moved[field.name] = tensor.pin_memory().to(device, non_blocking=True)
            else:
                moved[field.name] = tensor.to(device)
        return replace(self, **moved)


def group_length(group):
    """The number of tokens in a group (prompt_ids, [response_ids, …]), the prompt counted once."""
    prompt, responses = group
    return len(prompt) + sum(map(len, responses))


def per_sequence(x, batch):
    """Sums x (N,), one number per response token, over each response -> (S,)."""
    return x.new_zeros(len(batch.sequence_group)).index_add(0, batch.sequence, x)


def pack(groups, max_tokens=None):
    """Packs a list of groups (prompt_ids, [response_ids, …]) into a Batch.

    Rows are at most max_tokens long; None chooses the length that leaves the least padding.
    Raises ValueError if a prompt or a response is empty, or if a group does not fit into a row.
    """
    assert groups, "nothing to pack"
    lengths = list(map(group_length, groups))
    longest = max(lengths)
    if max_tokens and longest > max_tokens:
        i = lengths.index(longest)
        raise ValueError(f"pack: group {i} has {longest} tokens, a row holds {max_tokens}")
    layout = place_in_rows(lengths, max_tokens)
    rows, T = layout.rows, layout.length

    tokens = np.zeros((rows, T), dtype=np.int64)
    segment = np.zeros((rows, T), dtype=np.int64)
    position = np.zeros((rows, T), dtype=np.int64)
    group = np.full((rows, T), -1, dtype=np.int64)
    state_index, token_index, sequence, sequence_group = [], [], [], []

    for i, (prompt, responses) in enumerate(groups):
        if not len(prompt) or not all(map(len, responses)):
            raise ValueError(f"pack: group {i} has an empty prompt or response")
        row, begin = layout.places[i]
        P = len(prompt)
        end = begin + P
        group[row, begin:begin + lengths[i]] = i
        tokens[row, begin:end] = prompt
        position[row, begin:end] = np.arange(P)
        last_of_prompt = row * T + end - 1

        for k, response in enumerate(responses, 1):
            begin, end = end, end + len(response)
            tokens[row, begin:end] = response
            segment[row, begin:end] = k
            position[row, begin:end] = np.arange(P, P + len(response))
            places = row * T + np.arange(begin, end)
            token_index.append(places)
            state_index.append(np.concatenate([[last_of_prompt], places[:-1]]))
            index = len(sequence_group)  # of this response, among those of all groups
            sequence.append(np.full(len(response), index))
            sequence_group.append(i)

    return Batch(
        tokens=torch.from_numpy(tokens),
        segment=torch.from_numpy(segment),
        position=torch.from_numpy(position),
        group=torch.from_numpy(group),
        state_index=torch.from_numpy(np.concatenate(state_index)),
        token_index=torch.from_numpy(np.concatenate(token_index)),
        sequence=torch.from_numpy(np.concatenate(sequence)),
        sequence_group=torch.from_numpy(np.array(sequence_group)))


@dataclass
class Layout:
    places: list  # for each group: (its row, where in the row it begins)
    rows: int
    length: int   # of the longest row


def place_in_rows(lengths, max_tokens=None):
    """Lays out groups of these lengths in rows, and returns a Layout.

    Without max_tokens, it tries 17 row lengths, from the longest group to twice that, and keeps the layout
    with the least padding.
    """
    if max_tokens:
        return first_fit(lengths, max_tokens)
    longest = max(lengths)
    layouts = [first_fit(lengths, longest * i // 16) for i in range(16, 33)]
    return min(layouts, key=lambda layout: layout.rows * layout.length)


def first_fit(lengths, max_tokens):
    """First fit decreasing: the longest group first, each into the first row that still has room for it."""
    places = [None] * len(lengths)
    free = []  # room left in each row
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    previous_length = None
    for i in longest_first:
        # Rows that had no room for the group before have none for another one of its length.
        if lengths[i] != previous_length:
            row = 0
            previous_length = lengths[i]
        while row < len(free) and free[row] < lengths[i]:
            row += 1
        if row == len(free):  # no row has room: begin a new one
            free.append(max_tokens)
        places[i] = (row, max_tokens - free[row])
        free[row] -= lengths[i]
    return Layout(places, len(free), max_tokens - min(free))
