"""How well rewards order held-out comparisons: accuracy, margin, log-loss and calibration.

The rewards are a reward model's scores, or the implicit rewards of DPO and SimPO: one number per response.
Under Bradley and Terry's model, P(y_w ≻ y_l | x) = σ(r_w − r_l).
"""
import torch
import torch.nn.functional as F

from common.log import printable
from common.scoring import pair_accuracy
from common.standard_errors import clusters_of, mean_se


def preference_row(name, rewards, comparisons, data):
    """A row of numbers about the rewards (S,) of the responses of some comparisons, in their order.

    accuracy   the share of pairs with r_w > r_l, where equal rewards count one half
    margin     the mean of r_w − r_l
    log_loss   the mean of −log σ(r_w − r_l), in nats; log 2 = 0.693 if all rewards are equal
    slope      the factor by which all rewards should be scaled for the smallest log-loss: 1 if they are
               calibrated, above 1 if they lie too close together

    and, where the true reward is known,

    ceiling      its accuracy on these noisy labels, which no model can beat in expectation
    correlation  of the rewards with the true rewards

    The first three are means over comparisons of the mean over their pairs; ties in rank are no pairs.
    """
    clusters = clusters_of(data, [comparison.prompt for comparison in comparisons])
    pairs = differences(rewards, comparisons)  # r_w − r_l
    row = {"checkpoint": name}
    row["accuracy"], row["accuracy_se"] = mean_of_means(pairs, accuracy, clusters)
    row["margin"], row["margin_se"] = mean_of_means(pairs, lambda d: d, clusters)
    row["log_loss"], row["log_loss_se"] = mean_of_means(pairs, lambda d: -F.logsigmoid(d), clusters)
    row["slope"] = calibration_slope(pairs)
    row["slope_se"] = None  # `table` shows the keys that have an error, be it None
    if hasattr(data, "gold"):
        gold = []
        for comparison in comparisons:
            gold += [data.gold(comparison.prompt, response) for response in comparison.responses]
        gold = torch.tensor(gold)
        row["ceiling"], row["ceiling_se"] = mean_of_means(differences(gold, comparisons), accuracy, clusters)
        row["correlation"] = None
        if rewards.std() > 0:
            row["correlation"] = torch.corrcoef(torch.stack([rewards, gold]))[0, 1].item()
        row["correlation_se"] = None
    return row


def differences(rewards, comparisons):
    """r_w − r_l of every pair that does not tie: a tensor for each comparison."""
    result = []
    sizes = [len(comparison.responses) for comparison in comparisons]
    for comparison, r in zip(comparisons, rewards.split(sizes)):
        rank = torch.tensor(comparison.ranks)
        winner, loser = (rank[:, None] < rank[None, :]).nonzero(as_tuple=True)
        result.append(r[winner] - r[loser])
    return result


def accuracy(difference):
    return pair_accuracy(difference, torch.zeros_like(difference))


def mean_of_means(pairs, function, clusters):
    """The mean over comparisons of the mean of function(r_w − r_l) over their pairs, and its error."""
    means = [function(d).mean().item() if len(d) else None for d in pairs]
    return mean_se(means, clusters)


def calibration_slope(pairs):
    """The s for which the mean of −log σ(s (r_w − r_l)) is smallest.

    None if there is no such number: if all rewards are equal, or if every pair, or none, is ordered right.
    """
    d = torch.cat(pairs).double()
    weights = [torch.full((len(p),), 1 / len(p), dtype=torch.float64) for p in pairs if len(p)]
    if not ((d > 0).any() and (d < 0).any()):
        return None
    weight = torch.cat(weights)  # every comparison counts the same
    # The derivative −Σ d σ(−s d) grows with s: halve an interval that holds its zero.
    low = -1000 / d.std().item()
    high = 1000 / d.std().item()
    for _ in range(60):
        middle = (low + high) / 2
        derivative = -(weight * d * torch.sigmoid(-middle * d)).sum()
        if derivative > 0:
            high = middle
        else:
            low = middle
    return middle


def comparison_samples(scores, comparisons, data, n=3):
    """The first n comparisons as text, a line per response: score, true reward, response."""
    lines = []
    scores = iter(scores.tolist())
    for comparison in comparisons[:n]:
        lines.append("\n" + printable(comparison.prompt))
        for response in comparison.responses:
            gold = ""
            if hasattr(data, "gold"):
                gold = f"   gold {data.gold(comparison.prompt, response):5.2f}"
            lines.append(f"  score {next(scores):6.3f}{gold} | {printable(response)}")
    return "\n".join(lines)
