"""Sampling with a key-value cache.

Definition: GPT.naive_generate, which runs the whole text again for each new token. Given the same noise,
`generate` returns the same tokens.

Prompts are sorted by length and run in a few passes, each over prompts of similar length ("prefill"); a
prompt with several responses is run once. From then on, each step runs one token per row. Every row writes
its key and value at its own position, so rows of different lengths share a step.
"""
from functools import partial

import torch
import torch.nn.functional as F

from engine import devices
from engine.attention import hidden_at
from engine.kvcache import CUDAGraph, KVCache, slices
from engine.logprobs import vocab_product
from engine.onednn import onednn_linear, onednn_weights


def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=None, eos=None, noise=None,
             return_logprobs=False):
    """GPT.generate, whose docstring describes the arguments."""
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths) == 0:
        raise ValueError("generate: a prompt is empty; begin it with the EOS token")
    if max(lengths) + max_new_tokens > model.config.block_size:
        raise ValueError(f"generate: a prompt of {max(lengths)} tokens and {max_new_tokens} new ones "
                         f"do not fit the model's context of {model.config.block_size}")
    if noise is None:
        noise = uniform_noise(len(prompts), max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda i: lengths[i])
    sorted_prompts = [prompts[i] for i in order]
    sorted_noise = noise[order].to(devices.float64_device(model.device))
    eos_id = -1 if eos is None else eos  # no token is -1

    tokens, logprobs = decode(model, sorted_prompts, sorted_noise, temperature, top_k, eos_id)
    responses = [None] * len(prompts)
    response_logprobs = [None] * len(prompts)
    for i, row, row_logprobs in zip(order, tokens.tolist(), logprobs.tolist()):
        n = row.index(eos) + 1 if eos in row else len(row)
        responses[i] = row[:n]
        response_logprobs[i] = row_logprobs[:n]
    if return_logprobs:
        return responses, response_logprobs
    return responses


def uniform_noise(n_rows, n_tokens, generator=None):
    """Numbers to sample with, uniform on [0, 1): (n_rows, n_tokens) float64.

    Drawn on the CPU, so that a seed gives the same numbers on every device; generator: a torch.Generator, or
    torch's own. In float64, because torch.rand's float32 has 24 random bits: most tokens of a probability far
    below 2^-24 could then never be drawn.
    """
    return torch.rand(n_rows, n_tokens, dtype=torch.float64, generator=generator)


@torch.no_grad()
def decode(model, prompts, noise, temperature, top_k, eos):
    """Samples responses to prompts that are sorted by length. noise: (B, max_new_tokens), uniform on [0, 1).

    Tokens are drawn where the noise is, which is the model's device, except for one without float64 (mps).
    Returns tokens (B, T) and their log-probs (B, T) under the sampling distribution. It stops once every
    row has sampled `eos`, or up to three steps later; what follows a row's `eos` means nothing.
    """
    device = model.device
    B, max_new_tokens = noise.shape
    cache = KVCache(model.config, list(map(len, prompts)), max_new_tokens, model.wte.weight)
    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(B, max_new_tokens, device=device)
    done = torch.zeros(B, dtype=torch.bool, device=device)
    t = torch.zeros(1, dtype=torch.long, device=device)

    with onednn_weights(model) as vocabulary:

        def choose(state):
            """Samples token t of each row from its newest hidden state (B, C)."""
            logits = next_logits(model, state, vocabulary).to(noise.device)
            u = noise.index_select(1, t.to(noise.device))[:, 0]
            token, logprob = sample(logits, u, temperature, top_k)
            token = token.to(device)
            tokens.index_copy_(1, t, token[:, None])
            logprobs.index_copy_(1, t, logprob.to(device)[:, None])
            done.logical_or_(token == eos)

        def step(n_columns):
            """Runs each row's newest token and samples the next, in place, without waiting for the device."""
            newest = tokens.index_select(1, t)
            attend = partial(cache.append, n_columns, cache.mask())
            state = hidden_at(model, newest, cache.length[:, None], attend)
            cache.length.add_(1)
            t.add_(1)
            choose(state[:, 0])

        choose(prefill(model, cache, prompts))
        if model.compiled and devices.device_type(device) == "cuda":
            step = CUDAGraph(step)
        for i in range(1, max_new_tokens):
            # Every fourth step asks whether all rows are done: to ask a GPU is to wait for it.
            if i % 4 == 0 and done.all():
                return tokens[:, :i], logprobs[:, :i]
            step(cache.columns_in_use(i))
    return tokens, logprobs


def prefill(model, cache, prompts):
    """Runs the prompts and fills the cache. Returns the hidden state at the last token of each, (B, C).

    A prompt that stands in several neighbouring rows, as for several responses, is run once for all of them.
    """
    distinct = []  # each prompt once
    copies = []    # how many neighbouring rows it has
    for prompt in prompts:
        if not distinct or prompt != distinct[-1]:
            distinct.append(prompt)
            copies.append(0)
        copies[-1] += 1
    states = []
    for some in slices(len(distinct), 8):
        begin = sum(copies[:some.start])
        rows = slice(begin, begin + sum(copies[some]))
        states.append(prefill_rows(model, cache, rows, distinct[some], copies[some]))
    return torch.cat(states)


def prefill_rows(model, cache, rows, prompts, copies):
    """Runs n prompts, right-padded, and fills `rows` of the cache with as many copies of each.

    Returns the hidden state at the last token of each row's prompt.
    """
    P = max(map(len, prompts))
    tokens = torch.tensor([prompt + [0] * (P - len(prompt)) for prompt in prompts], device=model.device)
    last = torch.tensor([i * P + len(prompt) - 1 for i, prompt in enumerate(prompts)], device=model.device)
    position = torch.arange(P, device=model.device)
    source = torch.repeat_interleave(torch.tensor(copies)).to(model.device)  # the prompt of each row
    return hidden_at(model, tokens, position, partial(cache.prefill, rows, source), last)[source]


def next_logits(model, state, vocabulary=None):
    """The logits of the next token, in blocks of 64: (B, C) -> (B, V/64, 64) float32.

    V is the size of the padded vocabulary, and the padding gets −∞.
    vocabulary: the oneDNN copy of the vocabulary matrix, where there is one.
    """
    if vocabulary is None:
        logits = vocab_product(state, model.wte.weight)
    else:
        logits = onednn_linear(state, vocabulary)
    logits[:, model.config.vocab_size:] = -torch.inf
    return logits.unflatten(1, (-1, 64))


def sample(logits, noise, temperature=1.0, top_k=None):
    """Draws token ~ softmax(logits/τ), restricted to the top_k largest, by inverting the CDF at `noise`.

    logits (B, K, n): the vocabulary in K blocks of n tokens; overwritten. noise (B,): uniform on [0, 1).
    Returns the tokens (B,) and their log-probs (B,). Temperature 0 takes the largest logit, with log-prob 0.

    Definition: the first token at which the CDF exceeds the noise, (cdf <= noise).sum(). Searching the CDF of
    GPT-2's whole vocabulary would take longer than all the rest, so a first search finds the block, and a
    second one the token within it.
    """
    if temperature == 0:
        token = logits.flatten(1).argmax(-1)
        return token, torch.zeros_like(noise, dtype=torch.float32)
    if top_k is not None:
        flat = logits.flatten(1)
        smallest = flat.topk(min(top_k, flat.size(1))).values[:, -1:, None]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    largest = logits.amax((1, 2), keepdim=True)
    p = logits.sub_(largest).div_(temperature).exp_()  # softmax(logits/τ) times a constant

    # The block: the first one whose end lies above the noise, so never one of probability 0.
    # edges (B, K + 1) is the CDF where the blocks begin and end.
    edges = F.pad(p.sum(2).cumsum(1, dtype=torch.float64), (1, 0))
    total = edges[:, -1:]
    u = noise[:, None].double() * total
    block = torch.searchsorted(edges[:, 1:].contiguous(), u, right=True)  # (B, 1)

    # The token: the same search within the block, with the noise rescaled to it.
    begin = edges.gather(1, block)
    end = edges.gather(1, block + 1)
    p_block = p.take_along_dim(block[..., None], 1)[:, 0]  # (B, n)
    cdf = p_block.cumsum(1, dtype=torch.float64)
    u_within = (u - begin) / (end - begin) * cdf[:, -1:]
    within = torch.searchsorted(cdf, u_within, right=True)
    token = (block * p.size(2) + within)[:, 0]
    logprob = (p_block.gather(1, within) / total).log()[:, 0]
    return token, logprob.float()
