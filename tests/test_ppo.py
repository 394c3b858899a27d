"""PPO's arithmetic by hand on ragged grids, its invariances, and the closed form."""
import copy
import math
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model

import ppo
from common import batches
from common.grids import (check_reward, group_by_prompt, length_mask, on_last_token, repeat_each,
                          to_grid)
from data import get_tokenizer
from engine.packing import pack, per_sequence
from evaluate import exact_kl
from ppo import (AdaptiveKL, Episodes, Models, compute_gae, dense_reward, group_advantages, grpo_advantages,
                 k1_k3, policy_loss, rloo_advantages, value_loss, whiten)

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()


def grid(seed=0):
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))


def test_length_mask_and_last_token():
    mask = length_mask([[7, 7, 7, 7], [7, 7], [7]])
    assert torch.equal(mask, MASK)
    on_last = on_last_token(torch.tensor([1.0, 2.0, 3.0]), mask)
    assert on_last.tolist() == [[0, 0, 0, 1], [0, 2, 0, 0], [3, 0, 0, 0]]


def test_the_numbers_of_a_packed_batch_come_to_lie_on_the_grid():
    flat = torch.arange(1.0, 8)
    on_grid = to_grid(flat, MASK)
    assert on_grid.tolist() == [[1, 2, 3, 4], [5, 6, 0, 0], [7, 0, 0, 0]]
    assert torch.equal(on_grid[MASK], flat)


# ----------------------------------------------------------------------------------------------- advantages

@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0)])
def test_gae_is_the_direct_sum(gamma, lam):
    rewards, values = grid(0) * MASK, grid(1)
    advantages, returns = compute_gae(rewards, values, MASK, gamma, lam)
    for b, T in enumerate(MASK.sum(1).tolist()):
        value = [*values[b, :T].tolist(), 0.0]
        delta = [rewards[b, t].item() + gamma * value[t + 1] - value[t] for t in range(T)]
        for t in range(T):
            direct = sum((gamma * lam) ** i * delta[t + i] for i in range(T - t))
            assert advantages[b, t].item() == pytest.approx(direct, abs=1e-6)
            assert returns[b, t].item() == pytest.approx(direct + value[t], abs=1e-6)
        assert not advantages[b, T:].any() and not returns[b, T:].any()


def test_gae_by_hand():
    """γ = 1, λ = ½; rewards 0, 1; values ½, ¼: δ = (0 + ¼ − ½, 1 − ¼), Â = (−¼ + ½·¾, ¾)."""
    rewards, values = torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[0.5, 0.25, 7.0]])
    advantages, returns = compute_gae(rewards, values, torch.tensor([[True, True, False]]), 1.0, 0.5)
    assert advantages.tolist() == [[0.125, 0.75, 0]] and returns.tolist() == [[0.625, 1.0, 0]]


def test_with_lambda_1_the_return_is_the_sum_of_the_rewards_to_come():
    rewards = grid() * MASK
    _, returns = compute_gae(rewards, grid(1), MASK, 1.0, 1.0)
    torch.testing.assert_close(returns, rewards.flip(1).cumsum(1).flip(1) * MASK)


def test_a_reward_on_any_token_reaches_exactly_the_advantages_up_to_it():
    rewards, values = grid(0) * MASK, grid(1)
    before, _ = compute_gae(rewards, values, MASK, 0.9, 0.8)
    for b, t in MASK.nonzero().tolist():
        changed = rewards.clone()
        changed[b, t] += 1
        difference = compute_gae(changed, values, MASK, 0.9, 0.8)[0] - before
        reached = torch.zeros_like(MASK)
        reached[b, :t + 1] = True
        assert torch.equal(difference != 0, reached)
        assert difference[b, 0].item() == pytest.approx(0.72 ** t, abs=1e-5)


def test_whitening_by_hand():
    """Values 1, 2, 3, 6 under the mask: mean 3, variance 3.5. What lies outside is not read."""
    x = torch.tensor([[1.0, 2.0, 99.0], [3.0, 6.0, -99.0]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    expected = torch.tensor([[-2.0, -1.0, 0.0], [0.0, 3.0, 0.0]]) / 3.5 ** 0.5
    torch.testing.assert_close(whiten(x, mask), expected)
    torch.testing.assert_close(whiten(x, mask, shift_mean=False), (expected + 3) * mask)


# ------------------------------------------------------------------------- advantages without a value model

GROUP_ESTIMATORS = [rloo_advantages, grpo_advantages]


def test_rloo_by_hand():
    """Of the rewards 1, 2 and 6 the others' means are 4, 3½ and 1½; a group is on its own."""
    advantages = rloo_advantages(torch.tensor([[1.0, 2.0, 6.0], [-3.0, 0.0, 0.0]]))
    assert advantages.tolist() == [[-3.0, -1.5, 4.5], [-3.0, 1.5, 1.5]]


def test_rloo_of_two_responses_is_the_difference():
    """A_1 = R_1 − R_2 and A_2 = −A_1."""
    assert rloo_advantages(torch.tensor([[0.75, 0.5], [-1.0, 2.0]])).tolist() == [[0.25, -0.25], [-3.0, 3.0]]


def test_grpo_by_hand():
    """Rewards 1, 2 and 6: mean 3, variance (4 + 1 + 9)/2 = 7."""
    advantages = grpo_advantages(torch.tensor([[1.0, 2.0, 6.0]]))
    torch.testing.assert_close(advantages, torch.tensor([[-2.0, -1.0, 3.0]]) / 7 ** 0.5, atol=2e-4, rtol=0)


def test_without_its_std_grpo_is_rloo_times_a_constant():
    scores = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    unscaled = grpo_advantages(scores) * (scores.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(unscaled, rloo_advantages(scores) * 7 / 8)


@pytest.mark.parametrize("estimator", GROUP_ESTIMATORS)
def test_what_a_group_baseline_does_not_see(estimator):
    scores = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    advantages = estimator(scores)
    torch.testing.assert_close(advantages.sum(1), torch.zeros(5), atol=1e-5, rtol=0)
    # a constant of its own, added to the rewards of each group
    constants = torch.tensor([[5.0], [-3.0], [0.0], [1.0], [100.0]])
    torch.testing.assert_close(estimator(scores + constants), advantages, atol=1e-4, rtol=1e-4)
    # the order within the group
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    torch.testing.assert_close(estimator(scores[:, order]), advantages[:, order])
    # the other groups
    torch.testing.assert_close(estimator(scores[2:3]), advantages[2:3])


@pytest.mark.parametrize("estimator", GROUP_ESTIMATORS)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -0.7])
def test_equal_rewards_give_no_gradient(estimator, reward):
    mask = length_mask([[7] * n for n in (3, 1, 2)])
    advantages = group_advantages(on_last_token(torch.full((3,), reward), mask), mask, estimator, 3)
    assert advantages.abs().max() < 2e-3 * abs(reward) + 1e-12  # rounding alone, and 0 of a reward of 0
    logprobs = torch.zeros(mask.shape).requires_grad_()
    loss, _, _ = policy_loss(logprobs, torch.zeros(mask.shape), advantages, mask, 0.2)
    loss.backward()
    assert logprobs.grad.abs().max() < 2e-3 * abs(reward) + 1e-12


def test_every_token_of_a_response_has_the_advantage_of_the_whole_response():
    """Two groups of two. The rewards, KL penalties included, add up to 1 and 3, then to −1 and −1."""
    mask = length_mask([[7] * n for n in (3, 1, 2, 3)])
    rewards = torch.tensor([[0.5, -0.5, 1.0], [3.0, 0.0, 0.0], [-1.5, 0.5, 0.0], [0.0, 0.0, -1.0]])
    advantages = group_advantages(rewards, mask, rloo_advantages, 2)
    assert advantages.tolist() == [[-2.0, -2.0, -2.0], [2.0, 0.0, 0.0], [0.0] * 3, [0.0] * 3]


def test_the_rows_of_a_group_are_neighbours():
    prompts = repeat_each([[1], [2, 2]], 3)
    responses = [[i] for i in range(6)]
    assert prompts == [[1], [1], [1], [2, 2], [2, 2], [2, 2]]
    groups = group_by_prompt(prompts, responses, 3)
    assert groups == [([1], [[0], [1], [2]]), ([2, 2], [[3], [4], [5]])]
    episodes = ppo.Episodes(prompts, responses, ended=None, mask=None, rewards=None, sampler_logprobs=None, k=3)
    assert episodes.rows([1, 0]) == [3, 4, 5, 0, 1, 2]


# -------------------------------------------------------------------------------------------- reward and KL

def test_dense_reward_by_hand():
    """β = 0.1; the second response did not end and pays 1; the third's reward of −9 is clipped to −5."""
    rewards = on_last_token(torch.tensor([2.0, 1.0, -9.0]), MASK)
    logprobs, ref_logprobs = torch.full((3, 4), -1.0), torch.full((3, 4), -2.0)
    ended = torch.tensor([True, False, True])
    total = dense_reward(rewards, logprobs, ref_logprobs, ended, MASK, 0.1, reward_clip=5.0, missing_eos_penalty=1.0)
    expected = torch.tensor([[-0.1, -0.1, -0.1, 1.9], [-0.1, -0.1, 0, 0], [-5.1, 0, 0, 0]])
    torch.testing.assert_close(total, expected)


def test_k1_and_k3_by_hand():
    logprobs = torch.tensor([[-1.0, -1.0], [-2.0, 5.0]])
    ref_logprobs = torch.tensor([[-1.5, -1.0], [-1.0, -5.0]])
    k1, k3 = k1_k3(logprobs, ref_logprobs, torch.tensor([[True, True], [True, False]]))
    assert k1.item() == pytest.approx((0.5 - 1.0) / 2)
    assert k3.item() == pytest.approx((math.exp(-0.5) - 1 + 0.5 + math.e - 1 - 1) / 2)


def test_k3_varies_less_than_k1_near_the_reference_but_not_always_far_from_it():
    """π = (0.99, 0.01) beside π_ref = (½, ½): both average to the KL, but k3 varies by 20 and k1 by 0.2."""
    def mean_and_variance(p, ref=(0.5, 0.5)):
        p, ref = torch.tensor(p, dtype=torch.float64), torch.tensor(ref, dtype=torch.float64)
        estimates = [k1_k3(a[None, None].log(), b[None, None].log(), torch.tensor([[True]])) for a, b in zip(p, ref)]
        estimates = torch.tensor(estimates, dtype=torch.float64)  # a row for each action
        mean = p @ estimates
        assert mean.tolist() == pytest.approx([(p * (p / ref).log()).sum().item()] * 2)
        return p @ (estimates - mean) ** 2
    k1, k3 = mean_and_variance([0.99, 0.01])
    assert k3 == pytest.approx(20, abs=0.5) and k1 == pytest.approx(0.2, abs=0.02)
    k1, k3 = mean_and_variance([0.55, 0.45])
    assert k3 < k1 / 10
    k1, k3 = mean_and_variance([0.5, 0.5], ref=(0.999, 0.001))  # π_ref/π is at most 2 here
    assert k3 < k1


def test_the_adaptive_controller_follows_a_worked_sequence():
    controller = AdaptiveKL(0.1, target=2.0, horizon=1000)
    controller.update(2.2, 100)      # error 0.1: a factor of 1.01
    assert controller.coef == pytest.approx(0.101)
    controller.update(40.0, 100)     # clipped to 0.2
    assert controller.coef == pytest.approx(0.101 * 1.02)
    controller.update(-1.0, 100)     # clipped to -0.2
    assert controller.coef == pytest.approx(0.101 * 1.02 * 0.98)
    controller.update(2.0, 100)      # on target
    assert controller.coef == pytest.approx(0.101 * 1.02 * 0.98)
    fixed = AdaptiveKL(0.1, None, 1000)
    fixed.update(1e9, 100)
    assert fixed.coef == 0.1


# --------------------------------------------------------------------------------------------------- losses

def test_policy_loss_by_hand():
    """ε = 0.2; ratios 1.5, 1.5, 0.5, 0.5 with advantages 1, −1, 1, −1.

    So min(ρÂ, clip(ρ)Â) = 1.2, −1.5, 0.5, −0.8.
    """
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 9.0]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0]])
    mask = torch.tensor([[True] * 4 + [False]])
    loss, clip_frac, approx_kl = policy_loss(ratio.log(), torch.zeros(1, 5), advantages, mask, 0.2)
    assert loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8) / 4)
    assert clip_frac.item() == 0.5
    assert approx_kl.item() == pytest.approx((0.5 - math.log(1.5)) / 2 + (-0.5 - math.log(0.5)) / 2)


def test_policy_loss_gradient_is_the_policy_gradient_where_the_clip_does_not_bind():
    logprobs, old = torch.zeros(1, 3).requires_grad_(), torch.tensor([[0.0, -1.0, 1.0]])
    loss, _, _ = policy_loss(logprobs, old, torch.tensor([[2.0, 1.0, 1.0]]), torch.ones(1, 3).bool(), 0.2)
    loss.backward()
    # ρ = e is clipped, ρ = 1/e is not
    torch.testing.assert_close(logprobs.grad, -torch.tensor([[2.0, 0.0, math.exp(-1)]]) / 3)


def test_value_loss_by_hand():
    """ε = 0.2, V_old = 0, return 1.

    V = 0.5: unclipped (0.5)², clipped to 0.2 (0.8)². V = −1: 2² beats (1.2)². V = 0.1: (0.9)² both.
    """
    values, mask = torch.tensor([[0.5, -1.0, 0.1, 9.0]]), torch.tensor([[True, True, True, False]])
    loss = value_loss(values, torch.zeros(1, 4), torch.ones(1, 4) * mask, mask, 0.2)
    assert loss.item() == pytest.approx(0.5 * (0.64 + 4 + 0.81) / 3)


def test_what_lies_outside_the_mask_changes_no_loss():
    a, b = grid(2), torch.where(MASK, grid(2), torch.tensor(5.0))
    rest = grid(3), grid(4), MASK, 0.2
    for one, other in zip(policy_loss(a, *rest), policy_loss(b, *rest)):
        assert torch.equal(one, other)
    assert torch.equal(value_loss(a, *rest), value_loss(b, *rest))


# --------------------------------------------------------------------------------------- scoring and update

def run_of(cfg):
    """What of a run `update` needs."""
    def micro_batches(rows, groups):
        return batches.micro_batches(rows, groups, cfg.micro_tokens)
    return SimpleNamespace(cfg=cfg, device="cpu", micro_batches=micro_batches)


def sampled(policy, n=12, seed=0, k=1):
    """The episodes of n random prompts with k responses each, without rewards."""
    torch.manual_seed(seed)
    prompts = [torch.randint(90, (int(length),)).tolist() for length in torch.randint(1, 9, (n,))]
    prompts = repeat_each(prompts, k)
    responses = policy.generate(prompts, 10, eos=3)
    mask = length_mask(responses)
    ended = torch.tensor([response[-1] == 3 for response in responses])
    return Episodes(prompts, responses, ended, mask, torch.zeros(mask.shape), None, k)


def grid_like(mask, seed=5):
    return torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed)) * mask


def value_head_on(model):
    model.set_scalar_heads(1)
    return model


def test_scores_are_the_models_numbers_and_kl_is_exact():
    policy, ref_policy, value_model = make_model(0), make_model(1), value_head_on(make_model(2))
    episodes, cfg = sampled(policy), ppo.Config(temperature=1.0)
    models, mask = Models(policy, ref_policy, value_model, None), episodes.mask
    ppo.evaluate_tokens(episodes, models, [[3, 0, 1], [2, *range(4, 12)]], cfg)
    batch = pack(episodes.groups, 20)
    with torch.no_grad():
        for found, expected in ((episodes.logprobs, policy.logprobs(batch)),
                                (episodes.ref_logprobs, ref_policy.logprobs(batch)),
                                (episodes.values, value_model.values(batch))):
            torch.testing.assert_close(found[mask], expected, atol=1e-5, rtol=1e-5)
            assert not found[~mask].any()
        kl = exact_kl(policy, ref_policy, episodes.prompts, episodes.responses)
        torch.testing.assert_close(episodes.kl.sum(1), kl, atol=1e-5, rtol=1e-5)
        logp = policy.log_softmax(policy.states(batch))
        entropy = -(logp.exp() * logp).sum(-1)
        torch.testing.assert_close(episodes.entropy[mask], entropy, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("share_value, temperature", [(False, 1.0), (True, 0.7)])
def test_at_the_first_minibatch_the_ratio_is_1_to_the_bit(share_value, temperature, monkeypatch):
    policy, ref_policy, value_model = make_model(0), make_model(1), value_head_on(make_model(2))
    if share_value:
        value_model = value_head_on(policy)
    models = Models(policy, ref_policy, value_model, None)
    cfg = ppo.Config(temperature=temperature, micro_tokens=40)
    run, episodes = run_of(cfg), sampled(policy)
    first = [[5, 2, 9, 0, 11, 7], [1, 3, 4, 6, 8, 10]]
    micro_batches = [micro for rows in first for micro in run.micro_batches(rows, episodes.groups)]
    ppo.evaluate_tokens(episodes, models, micro_batches, cfg)
    episodes.advantages = episodes.returns = grid_like(episodes.mask)
    seen, real = [], ppo.policy_loss

    def watched(logprobs, old_logprobs, advantages, mask, clip):
        seen.append((logprobs.detach(), old_logprobs, mask))
        return real(logprobs, old_logprobs, advantages, mask, clip)
    monkeypatch.setattr(ppo, "policy_loss", watched)
    optimizers = {"policy": torch.optim.SGD(policy.parameters(), lr=0.1)}
    if not share_value:
        optimizers["value"] = torch.optim.SGD(value_model.parameters(), lr=0.1)
    stats = ppo.update(run, models, optimizers, episodes, [first[:1]], dict.fromkeys(optimizers, 0.1))
    assert len(seen) > 1 and all(torch.equal(new[m], old[m]) for new, old, m in seen)
    assert stats["approx_kl"] == 0 and stats["clip_frac"] == 0 and stats["optimizer_steps"] == 1


def gradient(policy, episodes, cfg, ptx_batches=None, micro_tokens=16384):
    """The policy's gradient of one whole-batch step, taken from what SGD with lr 1 does to its weights."""
    models = Models(policy, policy, value_head_on(make_model(2)), None)
    everything = list(range(len(episodes.groups)))
    ppo.evaluate_tokens(episodes, models, [everything], cfg)
    episodes.advantages, episodes.returns = grid_like(episodes.mask), grid_like(episodes.mask, 6)
    before = [p.detach().clone() for p in policy.parameters()]
    run = run_of(replace(cfg, grad_clip=1e9, micro_tokens=micro_tokens))
    optimizers = {"policy": torch.optim.SGD(policy.parameters(), lr=1.0)}
    ppo.update(run, models, optimizers, episodes, [[everything]], {"policy": 1.0}, ptx_batches)
    result = [b - p.detach() for b, p in zip(before, policy.parameters())]
    with torch.no_grad():
        for p, b in zip(policy.parameters(), before):
            p.copy_(b)
    return result


def test_packed_in_groups_or_alone_the_gradient_is_the_same():
    """Of four prompts with three responses each: as four groups of three, and as twelve of one."""
    policy, cfg = make_model(0), ppo.Config()
    grouped = sampled(policy, n=4, k=3)
    alone = replace(grouped, k=1)
    assert [len(responses) for _, responses in grouped.groups] == [3] * 4 and len(alone.groups) == 12
    assert grouped.n_tokens == alone.n_tokens - 2 * sum(len(prompt) for prompt in grouped.prompts[::3])
    for a, b in zip(gradient(policy, grouped, cfg), gradient(policy, alone, cfg)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    for name in ("logprobs", "ref_logprobs", "values", "kl", "entropy"):
        torch.testing.assert_close(getattr(grouped, name), getattr(alone, name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("estimator", GROUP_ESTIMATORS)
def test_an_update_without_a_value_model_is_the_policy_gradient(estimator):
    """At π = π_old the gradient is −Σ_b A_b ∇log π(y_b|x_b) / n_tokens, and that of K equal rewards is 0."""
    policy, cfg = make_model(0), ppo.Config(k=3, micro_tokens=30, grad_clip=1e9)
    episodes = sampled(policy, n=4, k=3)
    models = Models(policy, make_model(1), None, None)
    minibatch = [2, 0, 3, 1]
    ppo.evaluate_tokens(episodes, models, [[2], [0, 3], [1]], cfg)
    assert episodes.values is None
    scores = torch.randn(12)
    scores[:3] = 0.0  # the first group's are equal
    weights = estimator(scores.view(4, 3)).flatten()
    batch = pack(episodes.groups)
    loss = -(weights * per_sequence(policy.logprobs(batch), batch)).sum() / episodes.mask.sum()
    expected = torch.autograd.grad(loss, list(policy.parameters()))
    without_first = pack(episodes.groups[1:])
    loss = -(weights[3:] * per_sequence(policy.logprobs(without_first), without_first)).sum()
    without_first = torch.autograd.grad(loss / episodes.mask.sum(), list(policy.parameters()))

    rewards = on_last_token(scores, episodes.mask)
    episodes.advantages = group_advantages(rewards, episodes.mask, estimator, 3)
    before = [p.detach().clone() for p in policy.parameters()]
    optimizers = {"policy": torch.optim.SGD(policy.parameters(), lr=1.0)}
    stats = ppo.update(run_of(cfg), models, optimizers, episodes, [[minibatch]], {"policy": 1.0})
    assert "value_loss" not in stats and stats["loss"] == stats["policy_loss"]
    for p, b, e, w in zip(policy.parameters(), before, expected, without_first):
        torch.testing.assert_close(b - p.detach(), e, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(e, w, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_ptx_gradient_is_the_sum_of_the_two(temperature):
    """Eq. 2's second term is about π itself, at temperature 1, whatever the rollout's."""
    policy, cfg = make_model(0), ppo.Config(ptx_coef=0.5, temperature=temperature)
    episodes, demonstrations = sampled(policy), sampled(make_model(1), n=4, seed=1).groups
    both = gradient(policy, episodes, cfg, iter([demonstrations]))
    alone = gradient(policy, episodes, cfg)
    loss = -policy.logprobs(pack(demonstrations, 20)).mean()
    language_model = torch.autograd.grad(loss, list(policy.parameters()))
    for g, a, b in zip(both, alone, language_model):
        torch.testing.assert_close(g, a + 0.5 * b, atol=1e-5, rtol=1e-4)


def test_micro_batches_add_up_to_the_minibatch():
    policy, cfg = make_model(0), ppo.Config()
    episodes = sampled(policy)
    for a, b in zip(gradient(policy, episodes, cfg), gradient(policy, episodes, cfg, micro_tokens=30)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_stop_kl_ends_the_epochs():
    policy, cfg = make_model(0), ppo.Config(stop_kl=1e-3)
    models, episodes = Models(policy, policy, value_head_on(make_model(2)), None), sampled(policy)
    rows = [list(range(12))]
    ppo.evaluate_tokens(episodes, models, rows, cfg)
    episodes.advantages = episodes.returns = grid_like(episodes.mask)
    optimizers = {"policy": torch.optim.SGD(policy.parameters(), lr=10.0)}
    stats = ppo.update(run_of(cfg), models, optimizers, episodes, [rows] * 5, {"policy": 10.0})
    assert stats["optimizer_steps"] == 1  # the first step is at approx_kl 0, the second sees what it did


# -------------------------------------------------------------------------------------------------- rollout

EOS_IS_3 = SimpleNamespace(eot_token=3)


def test_a_rollout_is_what_the_policy_generates_and_what_reward_fn_says_of_it():
    policy, prompts, asked = make_model(), [[1, 2, 3], [4], [5, 6], [7]], []

    def reward_fn(prompts, responses):
        asked.append((prompts, responses))
        return grid_like(length_mask(responses))
    torch.manual_seed(0)
    responses, noise = policy.generate(prompts, 12, 2.0, eos=3), torch.rand(2)
    torch.manual_seed(0)
    cfg = ppo.Config(max_new_tokens=12, temperature=2.0)
    episodes = ppo.rollout(policy, prompts, reward_fn, EOS_IS_3, cfg)
    assert torch.equal(torch.rand(2), noise)  # no more random numbers than that
    assert asked == [(prompts, responses)]
    assert episodes.prompts == prompts and episodes.responses == responses
    assert episodes.ended.tolist() == [response[-1] == 3 for response in responses]
    assert torch.equal(episodes.mask, length_mask(responses))
    assert torch.equal(episodes.rewards, grid_like(episodes.mask))
    assert episodes.sampler_logprobs is None  # on a CPU the policy itself has sampled


def test_a_rollout_samples_k_responses_to_each_prompt():
    """Whose prompt the model runs once; reward_fn gets it with every response."""
    policy, asked = make_model(), []

    def reward_fn(prompts, responses):
        asked.append((prompts, responses))
        return torch.zeros(length_mask(responses).shape)
    torch.manual_seed(0)
    episodes = ppo.rollout(policy, [[1, 2, 3], [4]], reward_fn, EOS_IS_3, ppo.Config(max_new_tokens=12, k=3))
    assert episodes.prompts == [[1, 2, 3]] * 3 + [[4]] * 3
    assert asked == [(episodes.prompts, episodes.responses)]
    assert len(set(map(tuple, episodes.responses))) > 2  # each has noise of its own
    assert [(prompt, len(responses)) for prompt, responses in episodes.groups] == [([1, 2, 3], 3), ([4], 3)]


def test_epochs_go_through_whole_groups():
    epochs = ppo.shuffled_epochs(ppo.Config(batch_size=24, k=3, minibatches=2, epochs=2))
    assert [[len(minibatch) for minibatch in epoch] for epoch in epochs] == [[4, 4], [4, 4]]
    assert all(sorted(epoch[0] + epoch[1]) == list(range(8)) for epoch in epochs)


def test_the_reward_model_scores_a_group_as_it_scores_its_responses_alone():
    reward_model, episodes = value_head_on(make_model(3)), sampled(make_model(), n=3, k=4)
    alone = ppo.reward_model_reward(reward_model, ppo.Config())(episodes.prompts, episodes.responses)
    grouped = ppo.reward_model_reward(reward_model, ppo.Config(k=4))(episodes.prompts, episodes.responses)
    torch.testing.assert_close(grouped, alone, atol=1e-5, rtol=1e-5)


def test_a_reward_fn_that_draws_random_numbers_does_not_move_those_of_the_run():
    policy, cfg = make_model(), ppo.Config(max_new_tokens=12)

    def without_drawing(prompts, responses):
        return torch.zeros(length_mask(responses).shape)

    def drawing(prompts, responses):
        torch.rand(1000)
        return without_drawing(prompts, responses)

    def seeding(prompts, responses):
        torch.manual_seed(5)
        return without_drawing(prompts, responses)

    def numbers(reward_fn):
        torch.manual_seed(0)
        prompts = [[1, 2, 3], [4]]
        responses = [ppo.rollout(policy, prompts, reward_fn, EOS_IS_3, cfg).responses for _ in range(2)]
        return responses, torch.rand(5).tolist()
    expected = numbers(without_drawing)
    assert expected[0][0] != expected[0][1]  # the second rollout has other noise
    assert numbers(drawing) == expected and numbers(seeding) == expected


# ----------------------------------------------------------------------------------------- reward functions

@pytest.mark.parametrize("rewards, message", [
    (torch.zeros(2, 3), r"returned the shape \(2, 3\), expected \(2, 2\)"),
    ([[0.0, 0.0], [0.0]], "reward_fn must return a .B, R. array of numbers"),
    (None, "reward_fn must return a .B, R. array of numbers"),
    ([[0.0, math.nan], [0.0, 0.0]], "the reward nan of response 0 at token 1 is not finite: 'It eats'"),
    ([[0.0, 0.0], [-math.inf, 0.0]], "the reward -inf of response 1 at token 0 is not finite"),
    ([[0.0, 0.0], [0.0, 1.0]], "the reward 1.0 of response 1 at token 1 lies after the response's end"),
])
def test_a_reward_function_that_answers_wrongly_is_named(rewards, message):
    tokenizer = get_tokenizer("animals")
    with pytest.raises(ValueError, match=message) as error:
        check_reward(rewards, [tokenizer.encode("It eats"), tokenizer.encode("It")], tokenizer)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------ the closed form

@pytest.mark.parametrize("advantage", ["gae", "rloo"])
@pytest.mark.parametrize("seed, beta", [(0, 1.0), (1, 0.5)])
def test_ppo_reaches_the_closed_form(seed, beta, advantage):
    """Sampled rollouts of two tokens of three: KL(π‖π*) falls below 0.02, π* ∝ π_ref exp(r/β)."""
    policy = make_model(seed, vocab_size=3, block_size=3, n_layer=1, n_head=2, n_embd=32, scale=8.0)
    every = pack([([0], [list(r) for r in product(range(3), repeat=2)])], 19)
    reward = torch.randn(9)
    ref_policy = copy.deepcopy(policy)
    models = Models(policy, ref_policy, None, None)
    optimizers = {"policy": torch.optim.Adam(policy.parameters(), lr=3e-3)}
    if advantage == "gae":
        models.value_model = value_head_on(copy.deepcopy(policy))
        optimizers["value"] = torch.optim.Adam(models.value_model.parameters(), lr=3e-3)
    with torch.no_grad():
        ref_logp = per_sequence(policy.logprobs(every), every)
    optimum = (ref_logp + reward / beta).log_softmax(0)

    def reward_fn(prompts, responses):
        return on_last_token(reward[torch.tensor([3 * a + b for a, b in responses])], length_mask(responses))
    B, steps, k = 256, 100, 1 if advantage == "gae" else 8
    cfg = ppo.Config(max_new_tokens=2, kl_coef=beta, clip=0.2, batch_size=B, epochs=2, minibatches=2, k=k)
    no_eos = SimpleNamespace(eot_token=None)  # every response is of two tokens
    for step in range(steps):
        episodes = ppo.rollout(policy, [[0]] * (B // k), reward_fn, no_eos, cfg)
        epochs = ppo.shuffled_epochs(cfg)
        ppo.evaluate_tokens(episodes, models, epochs[0], cfg)
        total = dense_reward(episodes.rewards, episodes.logprobs, episodes.ref_logprobs, torch.ones(B).bool(),
                             episodes.mask, beta)
        if advantage == "gae":
            advantages, episodes.returns = compute_gae(total, episodes.values, episodes.mask, 1.0, 0.95)
            episodes.advantages = whiten(advantages, episodes.mask)
        else:
            episodes.advantages = group_advantages(total, episodes.mask, rloo_advantages, k)
        lr = 3e-3 * (1 - step / steps)
        ppo.update(run_of(cfg), models, optimizers, episodes, epochs, dict.fromkeys(optimizers, lr))
    logp = per_sequence(policy.logprobs(every), every).detach()
    kl = (logp.exp() * (logp - optimum)).sum().item()
    assert kl < 0.02 < (ref_logp.exp() * (ref_logp - optimum)).sum().item(), kl
