"""One number for each of many responses: a reward model's score, or a log-prob."""
import torch

from common.batches import all_micro_batches, micro_batches
from common.dist import all_reduce
from engine.packing import pack, per_sequence


def scores_of_responses(reward_model, groups, micro_tokens=16384):
    """The reward model's score of every response of every group, in their order: (S,) on the CPU."""
    return one_number_per_response(reward_model, reward_model.score, groups, micro_tokens)


def logp_of_responses(policy, groups, micro_tokens=16384, average=False):
    """log π(y|x) of every response of every group, in their order: (S,) on the CPU.

    Summed over the response's tokens or, with `average`, averaged.
    """
    def logp(batch):
        return response_logp(policy, batch, average)

    return one_number_per_response(policy, logp, groups, micro_tokens)


def response_logp(policy, batch, average=False):
    """log π(y|x) of each response of a batch, summed over its tokens or averaged: (S,)."""
    logp = per_sequence(policy.logprobs(batch), batch)
    if average:
        logp = logp / batch.response_length
    return logp


@torch.no_grad()
def one_number_per_response(model, function, groups, micro_tokens):
    """function(batch) -> a number for each response of a batch, (S,); computed in pieces that fit."""
    if not groups:
        return torch.zeros(0)
    numbers = [None] * len(groups)
    for indices in all_micro_batches(groups, micro_tokens, model):
        batch = pack([groups[i] for i in indices]).to(model.device)
        sizes = [len(groups[i][1]) for i in indices]
        for i, number in zip(indices, function(batch).cpu().split(sizes)):
            numbers[i] = number
    return torch.cat(numbers)


@torch.no_grad()
def precompute_logp(policy, pairs, batches, micro_tokens, progress, average=False):
    """log π of both responses of every pair that training visits: (len(pairs), 2).

    Summed over tokens or, with `average`, averaged. pairs: (prompt_ids, [chosen_ids, rejected_ids]).
    batches: for each step of training its indices into pairs. Pairs in no batch keep 0.

    How a log-prob is rounded depends on the other rows in the same forward pass. So each pair is computed in
    the micro-batch in which training first meets it; on a CPU, a policy that is its own reference then equals
    it to the bit until the first update.
    """
    logp = torch.zeros(len(pairs), 2, device=policy.device)
    visited = set()
    for batch_indices in batches:
        # Each epoch drops its last, incomplete batch, so a later epoch can hold pairs not computed before.
        if visited.issuperset(batch_indices):
            continue
        # The whole batch, even if some of its pairs are known: these are the micro-batches of training. With
        # several processes, each computes its share of the batch and leaves the other pairs at 0. A pair is
        # written only once, in one process, because the sum over processes must count it once.
        for indices in micro_batches(batch_indices, pairs, micro_tokens):
            batch = pack([pairs[i] for i in indices]).to(policy.device)
            both = response_logp(policy, batch, average).view(-1, 2)  # chosen, rejected
            for i, chosen_and_rejected in zip(indices, both):
                if i not in visited:
                    logp[i] = chosen_and_rejected
        visited.update(batch_indices)
        progress.show(f"the reference's log-probs: {len(visited)} of {len(pairs)} pairs")
    return all_reduce(logp)  # the sum over the processes collects all shares


def pair_accuracy(chosen, rejected):
    """1 where the chosen response has the higher score, one half where the two are equal, else 0: (B,)"""
    return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
