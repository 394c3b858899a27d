"""One number for each of many responses: a reward model's score, or a log-prob."""
import torch

from common.batches import all_micro_batches
from engine.packing import pack, per_sequence


def score_groups(reward_model, groups, micro_tokens=16384):
    """The reward model's score of every response of every group, in their order: (S,) on the CPU."""
    return number_each_response(reward_model, reward_model.score, groups, micro_tokens)


def logp_groups(policy, groups, micro_tokens=16384):
    """log π(y|x) of every response of every group, in their order, summed over tokens: (S,) on the CPU."""
    def logp(batch):
        return per_sequence(policy.logprobs(batch), batch)

    return number_each_response(policy, logp, groups, micro_tokens)


@torch.no_grad()
def number_each_response(model, function, groups, micro_tokens):
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


def pair_accuracy(chosen, rejected):
    """1 where the chosen response has the higher score, one half where the two are equal, else 0: (B,)"""
    return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
