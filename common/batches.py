"""Which examples a step trains on, and the micro-batches over which it accumulates its gradient."""
import numpy as np
import torch
import torch.distributed as dist

from common.dist import all_reduce, n_processes, process, process_share
from common.sharding import is_sharded
from data import encode_groups
from engine.packing import group_length


def shuffled_batches(n, batch_size, steps, seed):
    """Which of n examples each step trains on: `steps` lists of batch_size indices, shuffled anew each epoch.

    Examples that do not fill a batch at the end of an epoch are left out of that epoch. Batches ignore the
    lengths of the examples: with batches of similar length, a mean over a batch's tokens would give the
    tokens of short responses more weight, and so teach brevity. The result depends on the arguments only,
    so a resumed run finds its place.
    """
    if n < batch_size:
        raise SystemExit(f"--batch_size={batch_size}: there are only {n} examples to train on")
    rng = np.random.default_rng(seed)
    batches = []
    while len(batches) < steps:
        order = rng.permutation(n).tolist()
        for i in range(0, n - batch_size + 1, batch_size):
            batches.append(order[i:i + batch_size])
    return batches[:steps]


def micro_batches(batch, groups, max_tokens):
    """This process's share of a batch, as lists of at most max_tokens tokens. batch: indices into `groups`.

    Every process gets the same number of lists, because a sharded model runs on all processes at once. Each
    process computes the shares of all of them, so this takes no communication.
    """
    process_share(batch)  # exits with one line if the processes cannot share the batch evenly
    n = n_processes()
    pieces_of_each = [cut_by_tokens(batch[i::n], groups, max_tokens) for i in range(n)]
    most = max(map(len, pieces_of_each))
    return halve_until(pieces_of_each[process()], most)


def all_micro_batches(groups, max_tokens, model):
    """All groups of this process, as lists of indices into `groups`, of at most max_tokens tokens each.

    Other processes may have other groups. If the model is sharded, they agree on the number of lists.
    """
    pieces = cut_by_tokens(range(len(groups)), groups, max_tokens)
    if is_sharded(model):
        most = all_reduce(torch.tensor(len(pieces), device=model.device), dist.ReduceOp.MAX)
        pieces = halve_until(pieces, most.item())
    return pieces


def cut_by_tokens(indices, groups, max_tokens):
    """Cuts indices into `groups` into lists of at most max_tokens tokens, shortest groups first.

    A group of more than max_tokens tokens gets a list of its own.
    """
    pieces = []
    size = 0
    lengths = {i: group_length(groups[i]) for i in indices}
    for i in sorted(indices, key=lengths.get):
        size += lengths[i]
        if not pieces or size > max_tokens:
            pieces.append([])
            size = lengths[i]
        pieces[-1].append(i)
    return pieces


def halve_until(pieces, n):
    """Halves the list with the most indices, again and again, until there are n lists."""
    while len(pieces) < n:
        largest = max(range(len(pieces)), key=lambda i: len(pieces[i]))
        piece = pieces[largest]
        half = len(piece) // 2
        pieces[largest:largest + 1] = [piece[:half], piece[half:]]
    return pieces


class DemonstrationBatches:
    """The demonstrations of InstructGPT's eq. 2: for each optimizer step of PPO as many as it has episodes."""

    def __init__(self, run, tokenizer):
        cfg = run.cfg
        examples = [(prompt, [response]) for prompt, response in run.data.demonstrations("train")]
        self.groups = encode_groups(tokenizer, examples, cfg.max_len)
        self.steps_per_iteration = cfg.epochs * cfg.minibatches
        minibatch_size = cfg.batch_size // cfg.minibatches
        n_steps = cfg.steps * self.steps_per_iteration
        self.order = run.shuffled_batches(self.groups, minibatch_size, n_steps, cfg.seed + 1)

    def of_iteration(self, step):
        """Yields a list of groups for each optimizer step of an iteration."""
        first = step * self.steps_per_iteration
        for indices in self.order[first:first + self.steps_per_iteration]:
            yield [self.groups[i] for i in indices]
