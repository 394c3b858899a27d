"""How the time of a training step grows with the batch, the prompt and K, beside what its FLOPs predict.

    python docs/scale.py

A model of 4 layers of 64 and the vocabulary of the animals world, as in the default runs, takes steps of
DPO's work: log-probs of every response, backward, no optimizer. Lengths are exponential around their means.
One of three numbers at a time is changed from the same work: 64 prompts of about 50 tokens, 2 responses of 15
to each. The predicted time is that of this work, times the ratio of the FLOPs that the tokens need, padding
not counted. `packing` is the share of the step that laying out the batch takes.
"""
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import forward_flops  # noqa: E402
from common.batches import cut_by_tokens  # noqa: E402
from common.tables import aligned  # noqa: E402
from engine.packing import group_length, pack  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

CONFIG = GPTConfig(vocab_size=437, block_size=4096, n_layer=4, n_head=4, n_embd=64)
MICRO_TOKENS = 16384
REPEAT = 5
SCALES = {"n": [8, 64, 256, 1024], "prompt_tokens": [50, 200, 450, 900], "k": [2, 4, 8, 16]}


def make_groups(n, prompt_tokens, k, response_tokens=15, seed=0):
    """n random groups: prompts of about prompt_tokens tokens, each with k responses."""
    rng = np.random.default_rng(seed)

    def ids(mean):
        length = int(np.clip(rng.exponential(mean), mean // 4 + 1, 3 * mean))
        return rng.integers(0, CONFIG.vocab_size, length)

    return [(ids(prompt_tokens), [ids(response_tokens) for _ in range(k)]) for _ in range(n)]


def step_time(model, groups):
    """The median seconds of a step, and those that packing takes of it."""
    times, packing_times = [], []
    for _ in range(REPEAT + 1):
        packing = 0.0
        begin = time.perf_counter()
        for indices in cut_by_tokens(range(len(groups)), groups, MICRO_TOKENS):
            before = time.perf_counter()
            batch = pack([groups[i] for i in indices])
            packing += time.perf_counter() - before
            model.logprobs(batch).sum().backward()
        times.append(time.perf_counter() - begin)
        packing_times.append(packing)
        model.zero_grad()
    return statistics.median(times[1:]), statistics.median(packing_times[1:])


def main():
    torch.manual_seed(0)
    model = GPT(CONFIG)
    base = dict(n=64, prompt_tokens=50, k=2)
    base_groups = make_groups(**base)
    base_seconds, _ = step_time(model, base_groups)
    seconds_per_flop = base_seconds / forward_flops(CONFIG, base_groups)
    rows = [["", "tokens", "seconds", "predicted", "ratio", "packing"]]
    for name, values in SCALES.items():
        for value in values:
            groups = make_groups(**base | {name: value})
            n_tokens = sum(map(group_length, groups))
            seconds, packing = step_time(model, groups)
            predicted = seconds_per_flop * forward_flops(CONFIG, groups)
            rows.append([f"{name}={value}", f"{n_tokens}", f"{seconds:.3f}", f"{predicted:.3f}",
                         f"{seconds / predicted:.2f}", f"{packing / seconds:.1%}"])
    print(aligned(rows))


if __name__ == "__main__":
    main()
