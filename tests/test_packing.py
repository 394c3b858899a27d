"""The packed batch: layout, and that no number depends on how sequences share rows."""
import functools
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, random_groups
from torch._dynamo.testing import CompileCounter

from common import configure
from data import batch_order, group_length, micro_batches, pack, packing, per_sequence
from data.packing import GroupMask
from model import attention


def alone(model, groups):
    """The reference: one sequence a row, plain causal attention, full logits -> list of (len(response),) log-probs."""
    result = []
    for prompt, responses in groups:
        for response in responses:
            tokens = torch.tensor([prompt + response])
            logits = model.logits(model.hidden(tokens, torch.arange(tokens.size(1))))[0]
            logp = logits.log_softmax(-1)[len(prompt) - 1:-1]
            result.append(logp.gather(1, torch.tensor(response)[:, None])[:, 0])
    return result


def test_layout_by_hand():
    batch = pack([([1, 2, 3, 4], [[5, 6, 7], [8, 9]]), ([1], [[2]])], 9)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 0, 0, 0, 0, 0, 0, 0]]
    assert batch.segment.tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 2], [0, 1, 0, 0, 0, 0, 0, 0, 0]]
    assert batch.position.tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5], [0, 1, 0, 0, 0, 0, 0, 0, 0]]
    assert batch.group.tolist() == [[0] * 9, [1, 1] + [-1] * 7]
    assert batch.source.tolist() == [3, 4, 5, 3, 7, 9]
    assert batch.at.tolist() == [4, 5, 6, 7, 8, 10]
    assert batch.sequence.tolist() == [0, 0, 0, 1, 1, 2]
    assert batch.sequence_group.tolist() == [0, 0, 1]
    assert batch.target.tolist() == [5, 6, 7, 8, 9, 2]
    assert batch.n_tokens == 11
    assert per_sequence(torch.tensor([1., 2, 3, 4, 5, 6]), batch).tolist() == [6, 9, 6]


@pytest.fixture(params=["dense", "groups"])
def kind(request, monkeypatch):
    """Either mask, whatever the batch."""
    monkeypatch.setattr(packing, "CALL", 10**9 if request.param == "dense" else -10**9)
    return request.param


def test_mask_by_hand():
    batch = pack([([1, 2], [[3, 4], [5]]), ([6], [[7]])], 6)
    mask = [[1, 0, 0, 0, 0],   # the prompt, causally
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],   # the first response
            [1, 1, 1, 1, 0],
            [1, 1, 0, 0, 1]]   # the second sees the prompt and itself
    assert batch.mask("dense")[0, 0].int().tolist() == mask
    groups = batch.mask("groups")
    assert groups.lengths == [5, 2, 3]  # the last is padding
    assert groups.visible[0].int().tolist() == mask and groups.visible[1:] == [None, None]


def test_groups_attend_one_by_one_where_that_is_less_work():
    """Two groups of 400 tokens and eight of 50, in three rows: 2·400² + 8·50² pairs of tokens in 10 calls, against 3·400²."""
    long, short = ([1] * 200, [[2] * 200]), ([1] * 25, [[2] * 25])
    assert isinstance(pack([long] * 2 + [short] * 8).mask(), GroupMask)
    assert torch.is_tensor(pack([long] * 3).mask()) and torch.is_tensor(pack([short] * 20).mask())


def test_rows_are_filled_and_the_order_is_the_callers():
    groups = random_groups(n=30)
    batch = pack(groups, 60)
    assert batch.tokens.size(0) <= -(-sum(map(group_length, groups)) // 60) + 1
    assert batch.target.tolist() == [t for _, responses in groups for r in responses for t in r]


def test_rows_are_as_long_as_leaves_the_least_padding():
    """Groups of 6, 5, 5 and 4 tokens: a row each at the longest's length is 24 places, two rows of 10 are full."""
    groups = [([1, 2], [[3] * n]) for n in (4, 3, 3, 2)]
    assert pack(groups, 6).tokens.shape == (4, 6)
    batch = pack(groups)
    assert batch.tokens.shape == (2, 10) and batch.n_tokens == 20
    assert [{i for i in row.tolist()} for row in batch.group] == [{0, 3}, {1, 2}]


@pytest.mark.parametrize("max_tokens", [40, 64, 200, None])
def test_packed_equals_one_sequence_a_row(model, max_tokens, kind):
    groups = random_groups()
    packed = model.logprobs(pack(groups, max_tokens))
    torch.testing.assert_close(packed, torch.cat(alone(model, groups)), atol=1e-5, rtol=0)


def test_gradients_packed_equal_one_sequence_a_row(kind):
    groups, a, b = random_groups(), make_model(), make_model()
    weight = torch.randn(sum(len(r) for _, responses in groups for r in responses))
    (a.logprobs(pack(groups, 64)) * weight).sum().backward()
    (torch.cat(alone(b, groups)) * weight).sum().backward()
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-4, msg=lambda m: f"{name}: {m}")


def test_flex_attention_equals_sdpa_under_the_packed_mask(kind):
    batch = pack(random_groups(), 64)
    rows, T = batch.tokens.shape
    q, k, v = torch.randn(3, rows, 2, T, 16).unbind(0)
    real = batch.group[:, None, :, None] >= 0
    flex = attention(q, k, v, batch.mask("flex")) * real
    torch.testing.assert_close(flex, attention(q, k, v, batch.mask(kind)) * real, atol=1e-5, rtol=1e-5)


def test_checkpointed_blocks_give_the_same_gradient_and_keep_less(model, kind):
    def run():
        batch, kept = pack(random_groups(20), 64), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = model.logprobs(batch).sum()
        model.zero_grad(set_to_none=True)
        loss.backward()
        return loss, [p.grad for p in model.parameters()], sum(kept)
    loss, grads, kept = run()
    model.checkpoint_blocks = True
    again, recomputed, less = run()
    assert torch.equal(loss, again) and all(map(torch.equal, grads, recomputed)) and less < kept / 3


@pytest.mark.parametrize("compilable", ["dense", "flex"])
def test_compiled_passes_compile_no_more_after_the_second_shape(model, monkeypatch, compilable):
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    configure(model, SimpleNamespace(compile=True, checkpoint_blocks=False))
    assert model.packed_mask == "dense"  # here; on CUDA flex
    for seed in range(8):
        batch = pack(random_groups(seed, n=1 + 3 * seed), 40 + 3 * seed)
        with torch.no_grad():
            arguments = batch.tokens, batch.position, batch.mask(compilable)
            assert torch.equal(model.packed_hidden(*arguments, at=batch.source), model.hidden(*arguments, at=batch.source))
        assert counter.frame_count <= 2


def test_a_siblings_tokens_change_nothing_to_the_bit(model, kind):
    groups = random_groups(responses=(2, 4))
    changed = [(p, [rs[0]] + [[(t + 1) % 100 for t in r] for r in rs[1:]]) for p, rs in groups]
    one, other = pack(groups, 64), pack(changed, 64)
    first = torch.cat([(one.sequence == s) for s in range(len(one.sequence_group))
                       if s == 0 or one.sequence_group[s] != one.sequence_group[s - 1]]).view(-1, len(one.sequence)).any(0)
    assert torch.equal(model.logprobs(one)[first], model.logprobs(other)[first])
    assert not torch.equal(model.logprobs(one), model.logprobs(other))


def test_padding_and_neighbours_change_nothing_to_the_bit(model, kind):
    batch = pack(random_groups(), 64)
    before = model.logprobs(batch)
    batch.tokens[batch.group < 0] = 7
    assert torch.equal(model.logprobs(batch), before)
    mine = batch.group.flatten()[batch.at] == 0
    batch.tokens[batch.group > 0] = 3
    assert torch.equal(model.logprobs(batch)[mine], before[mine])


def test_the_order_of_groups_changes_nothing(model, kind):
    groups = random_groups()
    forward, backward = pack(groups, 64), pack(groups[::-1], 64)
    a = [x.tolist() for x in model.logprobs(forward).split(forward.sequence.bincount().tolist())]
    b = [x.tolist() for x in model.logprobs(backward).split(backward.sequence.bincount().tolist())]
    per_group = lambda x, batch: [[s for s, g in zip(x, batch.sequence_group.tolist()) if g == i] for i in range(len(groups))]  # noqa: E731
    for x, y in zip(per_group(a, forward), per_group(b, backward)[::-1]):
        assert [len(s) for s in x] == [len(s) for s in y]
        torch.testing.assert_close(torch.tensor(sum(x, [])), torch.tensor(sum(y, [])), atol=1e-5, rtol=0)


def test_the_gradient_of_a_shared_state_is_added_in_one_order():
    """Responses share the state that predicts their first token; whichever thread comes first, the sum is the same to the bit."""
    torch.manual_seed(0)
    block, source = make_model(n_embd=128).h[-1], pack([([1], [[2]] * 500)], 501).source
    x, gradient = torch.randn(1, 501, 128, requires_grad=True), torch.randn(500, 128)
    results = [torch.autograd.grad(block(x, lambda q, k, v: attention(q, k, v, None), source), x, gradient)[0] for _ in range(50)]
    assert len(set(source.tolist())) == 1 and all(torch.equal(result, results[0]) for result in results)


def test_errors():
    with pytest.raises(ValueError, match="group 1 has 4 tokens, a row holds 3"):
        pack([([1], [[2]]), ([1, 2], [[3, 4]])], 3)
    with pytest.raises(ValueError, match="group 0 has an empty"):
        pack([([], [[2]])], 3)
    with pytest.raises(ValueError, match="group 0 has an empty"):
        pack([([1], [[2], []])], 3)


def test_micro_batches_keep_every_index_and_the_bound():
    lengths = [5, 9, 2, 20, 7, 7]
    pieces = micro_batches(range(6), lengths, 14)
    assert pieces == [[2, 0, 4], [5], [1], [3]]
    assert micro_batches(range(6), lengths, 1000) == [[2, 0, 4, 5, 1, 3]]


def test_batch_order_visits_every_example_once_an_epoch():
    order = batch_order(10, 3, 7, seed=1)
    assert len(order) == 7 and all(len(b) == 3 for b in order)
    for epoch in (order[:3], order[3:6]):
        assert len(set(sum(epoch, []))) == 9
    assert order == batch_order(10, 3, 9, seed=1)[:7] != batch_order(10, 3, 7, seed=2)
