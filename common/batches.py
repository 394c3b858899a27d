"""Which examples a step trains on, and the micro-batches that its gradient is accumulated over."""
import numpy as np
import torch
import torch.distributed as dist

from common.dist import all_reduce, n_processes, process
from common.sharding import is_sharded
from engine.packing import group_length


def shuffled_batches(n, batch_size, steps, seed):
    """Which of n examples each step trains on: a list of `steps` lists of batch_size indices, shuffled anew each epoch.

    What does not fill a batch at the end of an epoch waits for the next shuffle. Batches are random whatever the
    lengths of the examples: with batches of like length, a mean over a batch's tokens would give the tokens of short
    responses more weight, and teach brevity. Depends on its arguments only, so a resumed run finds its place.
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


def process_share(batch):
    """This process's part of a batch: every n-th element."""
    if len(batch) % n_processes():
        raise SystemExit(f"--batch_size={len(batch)}: {n_processes()} processes cannot share it evenly")
    return batch[process()::n_processes()]


def micro_batches(batch, groups, max_tokens):
    """This process's share of a batch, as lists of at most max_tokens tokens. batch: indices into `groups`.

    Every process gets the same number of lists, because a sharded model runs on all processes at once. Each process
    computes the shares of all of them, so this takes no communication.
    """
    process_share(batch)  # complains if the processes cannot share the batch evenly
    n = n_processes()
    cuts = [cut_by_tokens(batch[i::n], groups, max_tokens) for i in range(n)]
    return halve_until(cuts[process()], max(map(len, cuts)))


def local_micro_batches(groups, max_tokens, model):
    """All of `groups`, which may be different ones in each process, as lists of indices of at most max_tokens tokens.

    The processes agree on the number of lists if the model is sharded.
    """
    pieces = cut_by_tokens(range(len(groups)), groups, max_tokens)
    if is_sharded(model):
        most = all_reduce(torch.tensor(len(pieces), device=model.device), dist.ReduceOp.MAX)
        pieces = halve_until(pieces, most.item())
    return pieces


def cut_by_tokens(indices, groups, max_tokens):
    """Indices into `groups`, shortest group first, cut into lists of at most max_tokens tokens, or of one group."""
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
    """Halves the list with the most indices until there are n lists."""
    while len(pieces) < n:
        largest = max(range(len(pieces)), key=lambda i: len(pieces[i]))
        piece = pieces[largest]
        half = len(piece) // 2
        pieces[largest:largest + 1] = [piece[:half], piece[half:]]
    return pieces
