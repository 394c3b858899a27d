"""Attention: who may look at whom in a packed batch, and how that is computed.

Definition, where allowed[q, k] says whether position q may look at position k:

    attention(q, k, v) = softmax(q kᵀ/√d + (0 where allowed, −∞ elsewhere)) v

A mask comes in one of three forms, chosen by `packed_mask`:

    "dense"    a (rows, 1, T, T) boolean tensor for scaled_dot_product_attention; runs everywhere
    "groups"   one small mask per group: attention runs group by group and skips all other pairs (CPU)
    "flex"     a BlockMask for flex_attention: one CUDA kernel that skips every block without an allowed pair
"""
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from engine import devices

CALL_COST = 100**2  # what one more call of attention costs on a CPU, in pairs of tokens
BLOCK = 128         # flex_attention works on blocks of BLOCK by BLOCK pairs of tokens


# ------------------------------------------------------------------------------------------------------ masks

@dataclass
class GroupMask:
    """One mask per group of the flattened rows; no group sees another.

    The padding at the end of a row counts as one more group.
    """
    lengths: list  # tokens of each group; they add up to rows·T
    allowed: list  # for each group an (n, n) boolean tensor, or None where it is plainly causal


def packed_mask(batch, kind=None):
    """Builds the mask of a packed batch: who may look at whom.

    kind: "dense", "groups" or "flex". None means "dense", or on a CPU "groups" where that is faster.
    For "flex", the batch must be in one row (see `Batch.in_one_row`).
    """
    group = batch.group
    segment = batch.segment
    rows, T = group.shape
    if kind == "flex":
        assert rows == 1 and T % BLOCK == 0
        return block_mask(group[0], segment[0])

    if kind == "groups" or (kind is None and devices.device_type(group.device) == "cpu"):
        _, counts = torch.unique_consecutive(group, return_counts=True)
        lengths = counts.tolist()
        cost_of_groups = sum(n**2 + CALL_COST for n in lengths)
        if kind == "groups" or cost_of_groups < rows * T**2:
            masks = []
            for s in segment.flatten().split(lengths):
                has_several_responses = s.max() > 1
                masks.append(within_group(s) if has_several_responses else None)
            return GroupMask(lengths, masks)

    same_group = group[:, :, None] == group[:, None, :]
    return (within_group(segment) & same_group)[:, None]


def block_mask(group, segment):
    """The BlockMask of a single row: group, segment (T,), T a multiple of BLOCK.

    A group's tokens stand side by side, first its prompt, then response by response. So a block of queries
    looks at two ranges of blocks: those of the prompt, if its first token is in a response; and those from
    where that token's segment begins to itself. (create_block_mask finds the blocks by asking `allowed` about
    all T² pairs, which takes much longer.)
    """
    T = len(group)
    n_blocks = T // BLOCK
    place = torch.arange(T, device=group.device)

    def begins(x):  # where x differs from the place before: (T,) boolean
        differs = torch.ones_like(x, dtype=torch.bool)
        differs[1:] = x[1:] != x[:-1]
        return differs

    def latest(flags):  # for each place, the last one up to it that is flagged: (T,)
        return torch.where(flags, place, 0).cummax(0).values

    begins_segment = begins(group) | begins(segment)
    group_begin = latest(begins(group))
    segment_begin = latest(begins_segment)
    responses_begin = latest(begins_segment & (segment == 1))  # the place behind a group's prompt

    # For the first token of each block of queries, the blocks in which its group begins, its segment begins,
    # and its prompt ends: (n_blocks,) each. (prompt_end means nothing if the token is in a prompt.)
    group_block = group_begin[::BLOCK] // BLOCK
    segment_block = segment_begin[::BLOCK] // BLOCK
    prompt_end = (responses_begin[::BLOCK] - 1) // BLOCK

    # How many blocks the first range has (none if the token is in a prompt), and both ranges together
    n_prompt = (torch.minimum(prompt_end + 1, segment_block) - group_block).clamp(min=0)
    block = torch.arange(n_blocks, device=group.device)
    counts = n_prompt + (block - segment_block + 1)

    # Row i lists the blocks that block i looks at, one range after the other. Only its first counts[i]
    # entries are read.
    in_prompt = group_block[:, None] + block
    in_segment = segment_block[:, None] + block - n_prompt[:, None]
    indices = torch.where(block < n_prompt[:, None], in_prompt, in_segment).clamp(max=n_blocks - 1)

    def allowed(b, h, q, k):
        same_group = (group_begin[q] <= k) & (k <= q)
        prompt_or_own = (segment[k] == 0) | (segment[q] == segment[k])
        return same_group & prompt_or_own

    return BlockMask.from_kv_blocks(counts[None, None].int(), indices[None, None].int(), BLOCK_SIZE=BLOCK,
                                    mask_mod=allowed, seq_lengths=(T, T))


def within_group(segment):
    """Each place may look back at the prompt (segment 0) and its own segment: (…, T) -> (…, T, T) boolean."""
    prompt = segment[..., None, :] == 0
    own = segment[..., :, None] == segment[..., None, :]
    return (prompt | own).tril()


# -------------------------------------------------------------------------------------------------- attention

def attention(q, k, v, mask=None):
    """softmax(q kᵀ/√d) v under a mask. q, k, v: (B, H, T, D).

    mask: a BlockMask, a GroupMask, a boolean tensor (True = may look), a float tensor that is added to
    q kᵀ/√d, or None for plain causal attention.
    """
    if isinstance(mask, GroupMask):
        return group_attention(q, k, v, mask)
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def group_attention(q, k, v, mask):
    """attention(q, k, v) group by group, so that nothing is computed for pairs from different groups."""
    B, H, T, D = q.shape

    def split(x):  # (B, H, T, D) -> for each group (n, H, D)
        return x.transpose(1, 2).flatten(0, 1).split(mask.lengths)

    outputs = []
    for q_g, k_g, v_g, allowed in zip(split(q), split(k), split(v), mask.allowed):
        q_g, k_g, v_g = (x.transpose(0, 1)[None] for x in (q_g, k_g, v_g))  # (1, H, n, D)
        y = attention(q_g, k_g, v_g, allowed)
        outputs.append(y[0].transpose(0, 1))  # (n, H, D)
    return torch.cat(outputs).unflatten(0, (B, T)).transpose(1, 2)


# ------------------------------------------------------------------------------------------- the forward pass

def call_block(block, *args):
    """block(*args): what torch.compile compiles, so that all blocks share the compiled code."""
    return block(*args)


def hidden_at(model, tokens, position, attend, places=None, call=call_block):
    """model.hidden at some places only, where attend(layer, q, k, v) is the attention of a layer.

    tokens: (B, T). places: (N,) indices into B·T, for a result (N, C); None: all of them, (B, T, C).

    In the last block, only attention needs the other places; its projection and MLP run on `places`
    alone. call: `call_block`, plain or compiled. With model.checkpoint_blocks, a block's activations are
    recomputed in the backward pass.
    """
    x = model.wte(tokens) + model.wpe(position)
    *blocks, last = model.h
    for layer, block in enumerate(blocks):
        x = run_block(model, call, block, x, partial(attend, layer))
    attend_last = partial(attend, len(blocks))
    if places is None:
        x = run_block(model, call, last, x, attend_last)
    else:
        x = run_block(model, call, last.forward_at, x, attend_last, places)
    return model.ln_f(x)


def run_block(model, call, block, *args):
    """call(block, *args), recomputed in the backward pass if model.checkpoint_blocks."""
    if model.checkpoint_blocks and torch.is_grad_enabled():
        # Nothing in a block is random, so there is no random state to preserve.
        return checkpoint(call, block, *args, use_reentrant=False, preserve_rng_state=False)
    return call(block, *args)


def block_at(block, x, attend, places):
    """block(x, attend) at `places` (N,), indices into B·T: (B, T, C) -> (N, C)."""
    heads = block.attn.heads(block.ln_1(x), attend)
    # index_select, because the backward pass of x[places] adds in no fixed order.
    x = x.flatten(0, 1).index_select(0, places)
    heads = heads.flatten(0, 1).index_select(0, places)
    x = x + block.attn.c_proj(heads)
    x = x + block.mlp(block.ln_2(x))
    return x


def packed_forward(model, tokens, position, mask, places):
    """The hidden states of a packed batch at `places`, indices into B·T: (N, C).

    Its blocks are compiled if the model is. (Those of sampling are not: there, each layer and each number of
    columns would be compiled anew.)
    """
    def attend(layer, q, k, v):
        return attention(q, k, v, mask)

    return hidden_at(model, tokens, position, attend, places, model.call_block)


def compiled(function):
    """torch.compile for any shape: a kind of call compiles at its first shape, and seldom again."""
    # The kinds of calls: models of different sizes, frozen or not, with gradients or without, for one place
    # or several; and with dense masks, for one row or several.
    torch._dynamo.config.recompile_limit = 32
    return torch.compile(function, dynamic=True)
