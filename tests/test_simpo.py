"""SimPO's loss: hand-worked cases, limits, the gradient, what it does not depend on; one model is enough."""
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, random_groups

import simpo
from engine.packing import pack, per_sequence
from simpo import length_statistics, pair_logp, simpo_loss

# β = 2: rewards 2/4 · −8 = −4 and 2/2 · −3 = −3; 2/8 · −20 = −5 and 2/1 · −2 = −4;
# so the differences are 1 and 1 with γ to come off
CHOSEN, REJECTED = torch.tensor([-8.0, -3.0]), torch.tensor([-20.0, -2.0])
CHOSEN_LEN, REJECTED_LEN = torch.tensor([4, 2]), torch.tensor([8, 1])


def nll(x):
    return math.log(1 + math.exp(-x))


@pytest.mark.parametrize("gamma, smoothing, expected", [
    (0.0, 0.0, nll(1)), (0.4, 0.0, nll(0.6)), (1.5, 0.0, nll(-0.5)),
    (0.4, 0.1, 0.9 * nll(0.6) + 0.1 * nll(-0.6))])
def test_simpo_by_hand(gamma, smoothing, expected):
    losses, chosen_reward, rejected_reward = simpo_loss(
        CHOSEN, REJECTED, CHOSEN_LEN, REJECTED_LEN, 2.0, gamma, smoothing)
    assert losses.tolist() == pytest.approx([expected] * 2, abs=1e-6)
    assert chosen_reward.tolist() == [-4, -3] and rejected_reward.tolist() == [-5, -4]
    assert not chosen_reward.requires_grad


def test_simpo_is_equation_6():
    g = torch.Generator().manual_seed(0)
    w = -30 * torch.rand(64, generator=g, dtype=torch.float64)
    l = -30 * torch.rand(64, generator=g, dtype=torch.float64)
    nw, nl = torch.randint(1, 40, (64,), generator=g), torch.randint(1, 40, (64,), generator=g)
    direct = -torch.log(torch.sigmoid(10 / nw * w - 10 / nl * l - 3))
    torch.testing.assert_close(simpo_loss(w, l, nw, nl, 10.0, 3.0)[0], direct, atol=1e-6, rtol=0)


def test_limits():
    """An equal pair costs −log σ(−γ); at γ = 0, log 2. With β → 0 nothing is left of the texts."""
    same = CHOSEN, CHOSEN, CHOSEN_LEN, CHOSEN_LEN
    assert simpo_loss(*same, 2.0, 0.0)[0].tolist() == pytest.approx([math.log(2)] * 2)
    assert simpo_loss(*same, 2.0, 3.0)[0].tolist() == pytest.approx([nll(-3)] * 2)
    different = CHOSEN, REJECTED, CHOSEN_LEN, REJECTED_LEN
    assert simpo_loss(*different, 1e-9, 0.0)[0].tolist() == pytest.approx([math.log(2)] * 2)


def test_the_gradient_is_the_papers_and_weighs_a_token_of_a_short_response_more():
    """∂L/∂ log π(y_w) = −β/|y_w| σ(−h), and +β/|y_l| σ(−h) for y_l (the gradient of App. F).

    So it goes by length, where DPO's is β for both.
    """
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    simpo_loss(chosen, rejected, CHOSEN_LEN, REJECTED_LEN, 2.0, 0.4)[0].sum().backward()
    sigma = 1 / (1 + math.exp(0.6))
    torch.testing.assert_close(chosen.grad, -2.0 / CHOSEN_LEN * sigma)
    torch.testing.assert_close(rejected.grad, 2.0 / REJECTED_LEN * sigma)


def test_repeating_every_token_changes_nothing():
    """Length normalisation: a text twice as long of the same likelihood a token has the same reward."""
    once = simpo_loss(CHOSEN, REJECTED, CHOSEN_LEN, REJECTED_LEN, 2.0, 0.4)
    twice = simpo_loss(2 * CHOSEN, REJECTED, 2 * CHOSEN_LEN, REJECTED_LEN, 2.0, 0.4)
    assert all(torch.equal(a, b) for a, b in zip(once, twice))


def test_packed_pairs_give_the_mean_logprob_of_each_response_alone():
    model = make_model()
    pairs = random_groups(responses=(2, 3))
    with torch.no_grad():
        chosen_logp, rejected_logp, chosen_len, rejected_len = pair_logp(model, pairs)
        for i, (prompt, responses) in enumerate(pairs):
            logps, lengths = (chosen_logp[i], rejected_logp[i]), (chosen_len[i], rejected_len[i])
            for logp, length, response in zip(logps, lengths, responses):
                batch = pack([(prompt, [response])], 64)
                alone = per_sequence(model.logprobs(batch), batch)[0]
                assert length == len(response)
                torch.testing.assert_close(logp, alone, atol=1e-5, rtol=0)


def test_the_order_of_pairs_changes_nothing():
    model, pairs = make_model(), random_groups(responses=(2, 3))

    def loss(pairs):
        return simpo_loss(*pair_logp(model, pairs), 10.0, 3.0)[0].mean()
    torch.testing.assert_close(loss(pairs), loss(pairs[::-1]), atol=1e-5, rtol=0)


def test_smoothing_at_one_half_prefers_neither():
    h = torch.tensor([2.0])
    one = simpo_loss(h, -h, torch.ones(1), torch.ones(1), 1.0, 0.0, 0.5)[0]
    other = simpo_loss(-h, h, torch.ones(1), torch.ones(1), 1.0, 0.0, 0.5)[0]
    assert one == other == 0.5 * (-F.logsigmoid(torch.tensor(4.0)) - F.logsigmoid(torch.tensor(-4.0)))


def test_lengths_by_hand():
    lengths = length_statistics([[5, 6, 0], [0], [5, 6, 7, 8]], eos=0)
    assert lengths == {"response_len": 8 / 3, "empty": 1 / 3, "unfinished": 1 / 3}


def test_one_model_is_in_memory(start, small_world, monkeypatch):
    """While it trains, no second set of weights exists: neither loaded nor copied before the table."""
    import gc

    from model import GPT
    alive = []
    real = simpo.simpo_loss

    def count(*args):
        alive.append(sum(isinstance(o, GPT) for o in gc.get_objects()))
        return real(*args)
    gc.collect()
    before = sum(isinstance(o, GPT) for o in gc.get_objects())
    monkeypatch.setattr(simpo, "simpo_loss", count)
    simpo.train(simpo.Config(n_layer=1, n_head=2, n_embd=16, batch_size=8, device="cpu", steps=2, eval_n=0,
                             init=str(start / "start"), out=str(start / "a")))
    assert set(alive) == {before + 1}
