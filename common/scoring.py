"""A reward model's scores of many responses, and how often scores are right."""
import torch

from common.batches import local_micro_batches
from engine.packing import pack


@torch.no_grad()
def score_groups(reward_model, groups, micro_tokens=16384):
    """The reward model's score of every response of every group, in their order: (S,) on the CPU."""
    if not groups:
        return torch.zeros(0)
    scores = [None] * len(groups)
    for rows in local_micro_batches(groups, micro_tokens, reward_model):
        batch = pack([groups[i] for i in rows]).to(reward_model.device)
        sizes = [len(groups[i][1]) for i in rows]
        for i, score in zip(rows, reward_model.score(batch).cpu().split(sizes)):
            scores[i] = score
    return torch.cat(scores)


def pair_accuracy(chosen, rejected):
    """1 where the chosen response has the higher score, one half where the two are equal, else 0: (B,)"""
    return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
