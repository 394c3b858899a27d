"""The reward model's loss by hand, its invariances, and the centring of its scores."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, random_groups

from common.scoring import scores_of_responses
from data.schema import Comparison
from engine.packing import pack
from reward import group_and_rank, ranked_pairs, ranking_loss, shift_bias


def nll(x):
    return math.log(1 + math.exp(-x))


def test_two_responses_are_bradley_terry():
    scores = torch.tensor([1.0, 3.0, 0.5, 0.0])
    group, rank = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    loss, accuracy = ranking_loss(scores, group, rank)
    assert loss.item() == pytest.approx((nll(-2) + nll(0.5)) / 2) and accuracy.item() == 0.5


def test_ragged_groups_and_ties_by_hand():
    """Group 7: three pairs. Group 3: ranks 0, 0, 1: the tie of the first two is left out.

    Group 5 is all ties: no pair, no weight.
    """
    scores = torch.tensor([2.0, 1.0, 0.0, 1.0, 0.0, 0.5, 4.0, 5.0])
    group, rank = torch.tensor([7, 7, 7, 3, 3, 3, 5, 5]), torch.tensor([0, 1, 2, 0, 0, 1, 0, 0])
    loss, accuracy = ranking_loss(scores, group, rank)
    assert loss.item() == pytest.approx(((nll(1) + nll(2) + nll(1)) / 3 + (nll(0.5) + nll(-0.5)) / 2) / 2)
    assert accuracy.item() == pytest.approx((1 + 0.5) / 2)


def test_margin_and_centring_by_hand():
    args = torch.tensor([1.5, 0.5]), torch.zeros(2), torch.tensor([0, 1])
    assert ranking_loss(*args, margin=0.25)[0].item() == pytest.approx(nll(0.75))
    assert ranking_loss(*args, center_coef=0.1)[0].item() == pytest.approx(nll(1) + 0.1 * 4)


def test_limits():
    group, rank = torch.zeros(4), torch.arange(4)
    loss, accuracy = ranking_loss(torch.zeros(4), group, rank)
    assert loss.item() == pytest.approx(math.log(2)) and accuracy.item() == 0.5  # equal scores count one half
    loss, _ = ranking_loss(torch.zeros(4, requires_grad=True), group, torch.zeros(4))
    loss.backward()  # ties alone: nothing to learn
    assert loss.item() == 0


def test_gradient_raises_winners_and_a_shift_changes_nothing():
    scores = torch.randn(6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    group, rank = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 2, 2, 0, 1])
    loss, _ = ranking_loss(scores, group, rank)
    loss.backward()
    assert scores.grad[0] < 0 < scores.grad[2] and scores.grad[4] < 0 < scores.grad[3]
    assert abs(scores.grad.view(2, 3).sum(1)).max() < 1e-6
    shifted = scores + torch.tensor([5.0] * 3 + [-2.0] * 3)
    torch.testing.assert_close(ranking_loss(shifted, group, rank)[0], loss)


def test_order_of_responses_and_groups_changes_nothing():
    g = torch.Generator().manual_seed(0)
    scores, group = torch.randn(12, generator=g), torch.arange(12) // 4
    rank = torch.randint(3, (12,), generator=g)
    order = torch.randperm(12, generator=g)
    shuffled = ranking_loss(scores[order], group[order], rank[order])
    for a, b in zip(ranking_loss(scores, group, rank), shuffled):
        torch.testing.assert_close(a, b)


def test_all_pairs_of_a_group_weigh_one():
    group, rank = torch.tensor([0] * 5 + [1] * 2), torch.tensor([0, 1, 2, 3, 4, 1, 0])
    scores = torch.randn(7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ranking_loss(scores, group, rank)[0].backward()

    def pull(i, j):
        return torch.autograd.grad(-F.logsigmoid(scores[i] - scores[j]), scores)[0]
    pulls = [pull(i, j) for i in range(5) for j in range(i + 1, 5)]
    expected = torch.stack(pulls).mean(0) / 2 + pull(6, 5) / 2
    torch.testing.assert_close(scores.grad, expected)
    r_w, r_l = ranked_pairs(torch.arange(5.0), rank[:5])
    assert len(r_w) == 10 and (r_w < r_l).all()  # here the score is the rank


def test_the_prompt_and_the_rank_of_every_response_by_hand():
    comparisons = [Comparison("a", ["b", "c", "d"], [0, 2, 1]), Comparison("e", ["f", "g"], [0, 0])]
    group, rank = group_and_rank(comparisons)
    assert group.tolist() == [0, 0, 0, 1, 1] and rank.tolist() == [0, 2, 1, 0, 0]


def test_loss_of_a_packed_group_is_that_of_its_pairs_one_by_one():
    """All at once, sharing the prompt = every pair alone, one response a row.

    Siblings and padding do not matter.
    """
    model = make_model()
    model.set_scalar_heads(1)
    groups = random_groups(responses=(3, 5))
    # In the order in which they stand, the best first.
    comparisons = [Comparison(prompt, responses, list(range(len(responses)))) for prompt, responses in groups]
    group, rank = group_and_rank(comparisons, "cpu")
    together, _ = ranking_loss(model.score(pack(groups, 64)), group, rank)

    def alone(prompt, response):
        return model.score(pack([(prompt, [response])], 64))[0]
    means = []
    for p, rs in groups:
        K = len(rs)
        pairs = [-F.logsigmoid(alone(p, rs[i]) - alone(p, rs[j])) for i in range(K) for j in range(i + 1, K)]
        means.append(torch.stack(pairs).mean())
    torch.testing.assert_close(together, torch.stack(means).mean(), atol=1e-5, rtol=0)


def test_a_shifted_bias_shifts_every_score():
    """The mean of demonstrations becomes 0; nothing else changes."""
    model = make_model()
    model.set_scalar_heads(1)
    groups = random_groups()
    before = scores_of_responses(model, groups)
    shift_bias(model, -scores_of_responses(model, groups, micro_tokens=40).mean().item())
    after = scores_of_responses(model, groups)
    assert abs(after.mean()) < 1e-5 and after.std().item() == pytest.approx(before.std().item(), abs=1e-5)
    torch.testing.assert_close(after, before - before.mean(), atol=1e-5, rtol=0)


def test_scores_come_in_the_order_of_the_groups():
    model = make_model()
    model.set_scalar_heads(1)
    groups = random_groups()
    expected = model.score(pack(groups, 64)).detach()
    torch.testing.assert_close(scores_of_responses(model, groups, micro_tokens=30), expected, atol=1e-5, rtol=0)


def test_centering_holds_the_mean_and_leaves_the_differences_alone():
    """A sum of (r_w + r_l)² over all pairs of K would be (K − 2) Σ r_i² + (Σ r_i)²: a ridge on the scores."""
    scores = torch.tensor([0.7, -0.2, 0.4, 1.5], requires_grad=True)
    group, rank = torch.zeros(4, dtype=torch.long), torch.arange(4)
    gradients = []
    for center_coef in (0.0, 0.3):
        loss, _ = ranking_loss(scores, group, rank, center_coef=center_coef)
        gradients.append(torch.autograd.grad(loss, scores)[0])
    added = gradients[1] - gradients[0]  # the same for all: d/dr_i of 0.3 (2 r̄)² = 0.3 · 8 r̄ / 4
    assert torch.allclose(added, torch.full((4,), 0.3 * 8 * 0.6 / 4), atol=1e-6)
    pair, two = torch.tensor([0.7, -0.2]), torch.arange(2)
    plain, _ = ranking_loss(pair, two * 0, two)
    centered, _ = ranking_loss(pair, two * 0, two, center_coef=0.3)
    assert (centered - plain).item() == pytest.approx(0.3 * 0.5**2)  # (r_w + r_l)² at K = 2


def test_a_reward_model_of_k_responses_learns_the_scale_of_the_labels():
    """Scores of a table, one for each of 6 kinds of response, from labels that are Bradley–Terry's with scale 2."""
    generator = torch.Generator().manual_seed(0)
    quality = torch.linspace(-1, 1, 6)
    table = torch.zeros(6, requires_grad=True)
    optimizer = torch.optim.Adam([table], lr=0.05)
    for _ in range(600):
        losses = []
        for _ in range(8):
            kinds = torch.randperm(6, generator=generator)[:4]
            gumbel = -torch.log(-torch.log(torch.rand(4, generator=generator)))  # sorting by 2 q + noise is Plackett–Luce
            rank = (2 * quality[kinds] + gumbel).argsort(descending=True).argsort()
            losses.append(ranking_loss(table[kinds], torch.zeros(4, dtype=torch.long), rank, center_coef=0.05)[0])
        torch.stack(losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    slope = ((table * quality).sum() / (quality**2).sum()).item()
    assert 1.7 < slope < 2.3, slope  # 1.2 with a ridge
    assert abs(table.mean().item()) < 0.05
