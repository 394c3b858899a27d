"""The most reward at each KL: the optimum, best-of-n, and how far a policy lies below.

All of it is estimated from the rewards (P, n) of n samples of the reference π_ref for each of P prompts.
docs/measuring.md describes the estimators and their errors.
"""
import math

import torch

from common.standard_errors import mean_se

MIN_ESS = 24  # the fewest effective samples: what bias `extrapolate` then leaves is about 0.002 β


def extrapolate(statistic, rewards):
    """A statistic of samples without its bias of the orders 1/n and 1/n², where n is their number.

    rewards: (P, n) -> (…, P), as statistic(rewards) does. A bias of a/n + b/n² is 2a/n + 4b/n² in halves of
    the samples and 4a/n + 16b/n² in quarters, and the weights 8/3, −2 and 1/3 cancel both terms.
    """
    whole = statistic(rewards)
    halves = mean_over_parts(statistic, rewards, 2)
    quarters = mean_over_parts(statistic, rewards, 4)
    return (8 * whole - 6 * halves + quarters) / 3


def mean_over_parts(statistic, rewards, n_parts):
    parts = [statistic(part) for part in rewards.chunk(n_parts, dim=1)]
    return torch.stack(parts).mean(0)


# ------------------------------------------------------------------------------------------------ the optimum

def tilt(rewards, beta):
    """The optimum π* ∝ π_ref exp(r/β), as n samples of π_ref per prompt with weights w ∝ exp(r/β).

    rewards: (P, n). Returns four numbers per prompt, (P,) each: E_π*[r]; KL(π*‖π_ref) = E_π*[r]/β − log Z, in
    nats; β log Z = β log E_ref[exp(r/β)]; and the effective sample size 1/Σw². The first three are biased:
    log Z is too low by about ½ (1/ess − 1/n).
    """
    largest = rewards.amax(1, keepdim=True)  # taken off before exp, and added again
    below = rewards - largest
    w = (below / beta).exp()
    log_z = w.mean(1).log()
    w = w / w.sum(1, keepdim=True)
    mean_below = (w * below).sum(1)
    kl = mean_below / beta - log_z  # what was taken off cancels here
    reward = mean_below + largest[:, 0]
    beta_log_z = beta * log_z + largest[:, 0]
    ess = 1 / (w**2).sum(1)
    return reward, kl, beta_log_z, ess


def optimum_at(rewards, beta):
    """E_π*[r], KL(π*‖π_ref) and β log Z of `tilt`, without its bias: (3, P)."""
    def statistic(samples):
        reward, kl, beta_log_z, _ = tilt(samples, beta)
        return torch.stack([reward, kl, beta_log_z])

    return extrapolate(statistic, rewards)


# ------------------------------------------------------------------------------------------------- best-of-n

def best_of(rewards, k):
    """E[the largest of k samples], unbiased: the mean over all choices of k among n rewards, (P, n) -> (P,).

    See arXiv:2112.09332 App. I.
    """
    n = rewards.size(1)
    smaller = torch.arange(n, dtype=rewards.dtype)  # of sorted rewards: how many of the others lie below each
    # A sample is the largest in (smaller choose k−1) of the choices; this is its logarithm.
    log_choose = torch.lgamma(smaller + 1) - torch.lgamma((smaller - k + 2).clamp(min=1)) - math.lgamma(k)
    weight = torch.where(smaller >= k - 1, log_choose, -torch.inf).softmax(0)
    return rewards.sort(1).values @ weight


def best_of_kl(rewards, k):
    """KL of best-of-k to π_ref: Σ q log(q/p) over the levels of the reward (arXiv:2401.01879), in nats.

    p is the level's share of the samples, q = F^k − F₋^k its share of the best of k, with F the share of
    samples up to the level and F₋ the share below it. (P, n) -> (P,).
    """
    n = rewards.size(1)
    ordered = rewards.sort(1).values
    below = torch.searchsorted(ordered, ordered).double() / n              # F₋ of each sample's level
    up_to = torch.searchsorted(ordered, ordered, right=True).double() / n  # F
    p = up_to - below
    q = up_to**k - below**k
    # A level has n p samples, so a mean over samples is a sum over levels weighted by p.
    ratio = q / p
    return torch.special.xlogy(ratio, ratio).mean(1)


# ----------------------------------------------------------------------------------------------- the frontier

def frontier(rewards, key, clusters=None):
    """The rows of the optimum, the rows of best-of-n, and the dual. rewards: (P, n), of samples of π_ref.

    The optimum's rows go from small KL to large, and end where fewer than MIN_ESS samples count. The dual,
    {β: β log Z (P,)}, bounds every policy at every β: E[r] ≤ β log Z + β KL(π‖π_ref). Best-of-n goes up to a
    quarter of the samples. clusters: of the prompts, for the errors.
    """
    optimum = []
    dual = {}
    spread = rewards.std().item() or 1.0  # of rewards that are all equal, any β makes the same frontier
    betas = spread * torch.logspace(2, -2, 121, dtype=torch.float64)
    for beta in betas.tolist():
        _, _, _, ess = tilt(rewards, beta)
        ess = 1 / (1 / ess).mean().item()  # the harmonic mean, because the error of log Z goes with 1/ess
        if ess < MIN_ESS:
            break
        reward, kl, beta_log_z = optimum_at(rewards, beta)
        dual[beta] = beta_log_z
        optimum.append(frontier_row(f"optimum, beta {beta:.3g}", key, reward, kl, clusters, beta, ess))
    best = []
    for i in range(int(math.log2(rewards.size(1) // 4)) + 1):
        k = 2**i
        kl = extrapolate(lambda samples: best_of_kl(samples, k), rewards)
        best.append(frontier_row(f"best of {k}", key, best_of(rewards, k), kl, clusters))
    return optimum, best, dual


def frontier_row(name, key, reward, kl, clusters, beta=None, ess=None):
    row = {"checkpoint": name, "beta": beta, "beta_se": None, "ess": ess, "ess_se": None}
    row[key], row[key + "_se"] = mean_se(reward.tolist(), clusters)
    row["kl"], row["kl_se"] = mean_se(kl.tolist(), clusters)
    return row


def gap(dual, reward, kl, clusters=None, max_reward=None):
    """How much more reward π* has at this policy's KL: the mean, its standard error, and is it only a bound?

    reward, kl: lists with a number per prompt. The gap is the smallest, over β, of
    β log Z + β KL(π‖π_ref) − E[r] = β KL(π‖π*): 0 for the optimum, and negative for no policy. If the
    smallest is at the last β, where too few samples count, the KL lies beyond the frontier. Then the gap is
    at most that, and at most max_reward − E[r] where the reward has a largest value.
    """
    reward = torch.tensor(reward, dtype=torch.float64)
    kl = torch.tensor(kl, dtype=torch.float64)
    gaps = {}
    for beta, beta_log_z in dual.items():
        gaps[beta] = beta_log_z + beta * kl - reward
    best_beta = min(gaps, key=lambda beta: gaps[beta].mean())
    smallest = gaps[best_beta]
    is_bound = best_beta == min(gaps)
    if is_bound and max_reward is not None:
        smallest = min(smallest, max_reward - reward, key=torch.mean)
    mean, se = mean_se(smallest.tolist(), clusters)
    return mean, se, is_bound
