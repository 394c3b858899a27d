"""The SFT and DPO losses: hand-worked cases, gradients, limits, and the closed form."""
import math
from itertools import combinations, product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, random_groups

import dpo
from common.models import load_model
from common.scoring import logp_of_responses, pair_accuracy, precompute_logp, response_logp
from data import encode_groups, get_tokenizer
from dpo import dpo_loss
from engine.packing import pack, per_sequence
from sft import sft_loss
from test_stages import here, log_of

# β = 0.5; log-ratios: chosen 2 and −1, rejected −1 and 3; so h = 3 and −4, βh = 1.5 and −2
CHOSEN, REJECTED = torch.tensor([-3.0, -6.0]), torch.tensor([-8.0, -4.0])
REF_CHOSEN, REF_REJECTED = torch.tensor([-5.0, -5.0]), torch.tensor([-7.0, -7.0])
LOGSIGMOID = {x: -math.log(1 + math.exp(-x)) for x in (1.5, -1.5, 2.0, -2.0)}


@pytest.mark.parametrize("options, expected", [
    (dict(), [-LOGSIGMOID[1.5], -LOGSIGMOID[-2.0]]),
    (dict(label_smoothing=0.1),
     [-0.9 * LOGSIGMOID[1.5] - 0.1 * LOGSIGMOID[-1.5], -0.9 * LOGSIGMOID[-2.0] - 0.1 * LOGSIGMOID[2.0]]),
    (dict(loss_type="ipo"), [(3 - 1) ** 2, (-4 - 1) ** 2]),
    (dict(loss_type="hinge"), [0, 3]),
    (dict(loss_type="robust", label_smoothing=0.1),
     [(-0.9 * LOGSIGMOID[1.5] + 0.1 * LOGSIGMOID[-1.5]) / 0.8,
      (-0.9 * LOGSIGMOID[-2.0] + 0.1 * LOGSIGMOID[2.0]) / 0.8]),
])
def test_dpo_by_hand(options, expected):
    losses, chosen_reward, rejected_reward = dpo_loss(
        CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, 0.5, **options)
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)
    assert chosen_reward.tolist() == [1.0, -0.5] and rejected_reward.tolist() == [-0.5, 1.5]


@pytest.mark.parametrize("loss_type", ["ipo", "hinge"])
def test_a_loss_without_label_smoothing_refuses_it(loss_type):
    with pytest.raises(SystemExit, match=f"^--label_smoothing=0.1 has no effect with --loss_type={loss_type}; only sigmoid and robust use it$"):
        dpo.train(dpo.Config(loss_type=loss_type, label_smoothing=0.1))


def test_a_tie_is_half_right():
    chosen, rejected = torch.tensor([1.0, 0.0, 2.0, 0.0]), torch.tensor([0.0, 1.0, 2.0, 0.0])
    assert pair_accuracy(chosen, rejected).tolist() == [1, 0, 0.5, 0.5]
    assert torch.equal(pair_accuracy(chosen, rejected), 1 - pair_accuracy(rejected, chosen))


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_dpo_is_log_2_at_the_reference(beta, label_smoothing):
    losses, chosen_reward, rejected_reward = dpo_loss(
        CHOSEN, REJECTED, CHOSEN, REJECTED, beta, label_smoothing)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-6)
    assert not chosen_reward.any() and not rejected_reward.any()


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge", "robust"])
def test_dpo_gradient_raises_the_chosen_and_lowers_the_rejected(loss_type):
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    loss, chosen_reward, _ = dpo_loss(chosen, rejected, CHOSEN, REJECTED, 0.1, loss_type=loss_type)
    loss.sum().backward()
    assert (chosen.grad < 0).all() and torch.equal(chosen.grad, -rejected.grad)
    assert not chosen_reward.requires_grad


def test_dpo_gradient_is_the_papers():
    """∂L/∂ log π(y_w) = −β σ(−βh) (the gradient under eq. 7)."""
    chosen = CHOSEN.clone().requires_grad_()
    dpo_loss(chosen, REJECTED, REF_CHOSEN, REF_REJECTED, 0.5)[0].sum().backward()
    torch.testing.assert_close(chosen.grad, -0.5 * torch.sigmoid(-torch.tensor([1.5, -2.0])))


def test_ipo_is_smallest_at_its_margin():
    h = torch.tensor([5.0])
    assert dpo_loss(h, 0 * h, 0 * h, 0 * h, beta=0.1, loss_type="ipo")[0].item() == 0


def test_robust_is_unbiased_under_flips():
    """E over labels flipped with chance ε of the robust loss = the clean sigmoid loss."""
    args, eps = (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED), 0.2
    kept = dpo_loss(*args, 0.5, eps, "robust")[0]
    flipped = dpo_loss(REJECTED, CHOSEN, REF_REJECTED, REF_CHOSEN, 0.5, eps, "robust")[0]
    torch.testing.assert_close((1 - eps) * kept + eps * flipped, dpo_loss(*args, 0.5)[0])


def test_unknown_loss_type():
    with pytest.raises(ValueError, match="loss_type 'kto'"):
        dpo_loss(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, 0.1, loss_type="kto")


def test_dpo_loss_of_packed_pairs_does_not_depend_on_their_order(model):
    pairs = random_groups(responses=(2, 3))

    def loss(pairs):
        batch = pack(pairs, 64)
        logp = per_sequence(model.logprobs(batch), batch)
        return dpo_loss(logp[0::2], logp[1::2], torch.zeros(7), torch.zeros(7), 0.1)[0].mean()
    torch.testing.assert_close(loss(pairs), loss(pairs[::-1]), atol=1e-6, rtol=0)


def test_sft_loss_is_cross_entropy_of_the_response(model):
    prompt, response = [1, 2, 3], [4, 5, 6, 7]
    logits = model(torch.tensor([prompt + response]))[0]
    loss = sft_loss(model.logprobs(pack([(prompt, [response])], 7)), 4)
    torch.testing.assert_close(loss, F.cross_entropy(logits[2:-1], torch.tensor(response)))


def test_sft_loss_of_parts_adds_up_to_that_of_the_batch(model):
    groups = random_groups(responses=(1, 2))
    n = sum(len(r) for _, (r,) in groups)
    whole = sft_loss(model.logprobs(pack(groups, 64)), n)
    parts = sum(sft_loss(model.logprobs(pack([g], 64)), n) for g in groups)
    torch.testing.assert_close(whole, parts, atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------ the closed form

def tiny_problem(seed):
    """One prompt, 3 tokens, 2 steps: a packed batch of all 9 responses, a policy, and a reward for each."""
    policy = make_model(seed, vocab_size=3, block_size=3, n_layer=1, n_head=2, n_embd=32, scale=8.0)
    batch = pack([([0], [list(r) for r in product(range(3), repeat=2)])], 19)
    return policy, batch, torch.randn(9)


@pytest.mark.parametrize("seed, beta", [(0, 1.0), (1, 0.5), (2, 2.0)])
def test_dpo_reaches_the_closed_form(seed, beta):
    """On all pairs, weighted by their Bradley–Terry probabilities, DPO's minimum is π* ∝ π_ref exp(r/β)."""
    policy, batch, reward = tiny_problem(seed)
    with torch.no_grad():
        ref_logp = per_sequence(policy.logprobs(batch), batch)  # (9,)
    assert math.isclose(ref_logp.exp().sum(), 1, abs_tol=1e-5) and ref_logp.std() > 0.1
    optimum = (ref_logp + reward / beta).log_softmax(0)
    i, j = torch.tensor(list(combinations(range(9), 2))).unbind(1)
    flipped = torch.sigmoid(reward[j] - reward[i])  # P(y_j ≻ y_i)

    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        logp = per_sequence(policy.logprobs(batch), batch)
        loss, _, _ = dpo_loss(logp[i], logp[j], ref_logp[i], ref_logp[j], beta, label_smoothing=flipped)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        scheduler.step()

    logp = per_sequence(policy.logprobs(batch), batch).detach()
    kl = (logp.exp() * (logp - optimum)).sum().item()
    kl_before = (ref_logp.exp() * (ref_logp - optimum)).sum().item()
    assert kl < 1e-3 < 0.02 < kl_before


def test_ipo_may_average_over_tokens(start):
    """Its authors' advice: what a response of n tokens sums to, over n; in the loop, in the reference, and only with ipo."""
    tokenizer, policy = get_tokenizer("animals"), load_model(str(start / "start"))[0]
    pairs = encode_groups(tokenizer, [("a", [" It eats mice.", " It can fly and swim."]), ("b", [" Yes.", " No."])], 64)
    sums, means = dpo.pair_logp(policy, pairs), dpo.pair_logp(policy, pairs, average=True)
    for average, both in ((False, sums), (True, means)):  # the pages write out what common/scoring.py has
        assert torch.equal(response_logp(policy, pack(pairs), average).view(-1, 2), torch.stack(both, 1))
    for i in range(2):
        lengths = torch.tensor([len(responses[i]) for _, responses in pairs])
        torch.testing.assert_close(sums[i] / lengths, means[i])
    here("dpo", start, "a", "--loss_type=ipo", "--ipo_average", "--steps=1", "--beta=0.1")
    here("dpo", start, "b", "--loss_type=ipo", "--steps=1", "--beta=0.1")
    a, b = log_of(start / "a")[0], log_of(start / "b")[0]
    assert a["loss"] == b["loss"] == pytest.approx(25.0) and a["margin"] == b["margin"] == 0  # at the reference
    assert a["grad_norm"] < b["grad_norm"] / 2 and a["chosen_logp"] > b["chosen_logp"] / 2
    with pytest.raises(SystemExit, match="--ipo_average needs --loss_type=ipo, not sigmoid"):
        here("dpo", start, "c", "--ipo_average")


def test_held_out_responses_and_the_reference_average_as_the_loss_does():
    """Means over 2, 3, 1 and 2 tokens of -2 each: in what the final table takes, and in what is precomputed."""
    pairs = [([1], [[5, 6], [5, 6, 7]]), ([1], [[8], [5, 6]])]
    policy = SimpleNamespace(device="cpu", logprobs=lambda batch: torch.full((len(batch.sequence),), -2.0))
    progress = SimpleNamespace(show=lambda text: None)
    for average, expected in ((True, [-2.0, -2.0, -2.0, -2.0]), (False, [-4.0, -6.0, -2.0, -4.0])):
        assert logp_of_responses(policy, pairs, average=average).tolist() == expected
        precomputed = precompute_logp(policy, pairs, [[1, 0]], 100, progress, average)
        assert precomputed.flatten().tolist() == expected
