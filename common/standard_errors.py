"""Means over prompts, and standard errors that know which prompts belong together."""
import math

import torch


def clusters_of(data, prompts):
    """For each prompt the cluster it belongs to: data.cluster(prompt), or else the prompt itself."""
    if hasattr(data, "cluster"):
        return [data.cluster(prompt) for prompt in prompts]
    return prompts


def mean_se(x, clusters=None):
    """The mean of some numbers, those that are None left out, and its standard error.

    Numbers of one cluster may depend on each other, numbers of different clusters do not. With e_c the sum
    of the deviations from the mean in cluster c, G clusters and n numbers,

        se² = G/(G−1) Σ_c e_c² / n²               (arXiv:2411.00640, with G/(G−1) for small G)

    which is s²/n where each number is a cluster of its own: without `clusters`, and also where all numbers
    are of one cluster, as draws from it. Returns (None, None) for nothing, and no error for one number.
    """
    numbers = [number for number in x or [] if number is not None]
    if not numbers:
        return None, None
    n = len(numbers)
    clusters = clusters or range(len(x))
    clusters = [cluster for cluster, number in zip(clusters, x) if number is not None]
    if len(set(clusters)) == 1:
        clusters = range(n)
    index_of = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    index = torch.tensor([index_of[cluster] for cluster in clusters])

    numbers = torch.tensor(numbers, dtype=torch.float64)
    mean = numbers.mean().item()
    G = len(index_of)
    if G == 1:
        return mean, None
    e = torch.zeros(G, dtype=torch.float64).index_add_(0, index, numbers - mean)
    return mean, math.sqrt(G / (G - 1) * (e**2).sum().item()) / n
