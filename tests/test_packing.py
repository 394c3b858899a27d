"""The packed batch: layout, and that no number depends on how sequences share rows."""
import copy
import functools
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, random_groups
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask

from common.batches import cut_by_tokens, shuffled_batches
from engine import attention as attention_module
from engine.attention import BLOCK, GroupMask, attention, group_attention, packed_mask
from engine.packing import first_fit, group_length, pack, per_sequence


def alone(model, groups):
    """The reference: one sequence a row, plain causal attention, full logits.

    Returns a list of (len(response),) log-probs.
    """
    result = []
    for prompt, responses in groups:
        for response in responses:
            tokens = torch.tensor([prompt + response])
            logp = model(tokens)[0].log_softmax(-1)[len(prompt) - 1:-1]
            result.append(logp.gather(1, torch.tensor(response)[:, None])[:, 0])
    return result


def test_layout_by_hand():
    batch = pack([([1, 2, 3, 4], [[5, 6, 7], [8, 9]]), ([1], [[2]])], 9)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 0, 0, 0, 0, 0, 0, 0]]
    assert batch.segment.tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 2], [0, 1, 0, 0, 0, 0, 0, 0, 0]]
    assert batch.position.tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5], [0, 1, 0, 0, 0, 0, 0, 0, 0]]
    assert batch.group.tolist() == [[0] * 9, [1, 1] + [-1] * 7]
    assert batch.state_index.tolist() == [3, 4, 5, 3, 7, 9]
    assert batch.token_index.tolist() == [4, 5, 6, 7, 8, 10]
    assert batch.sequence.tolist() == [0, 0, 0, 1, 1, 2]
    assert batch.sequence_group.tolist() == [0, 0, 1]
    assert batch.target.tolist() == [5, 6, 7, 8, 9, 2]
    assert (batch.group >= 0).sum() == 11
    assert per_sequence(torch.tensor([1., 2, 3, 4, 5, 6]), batch).tolist() == [6, 9, 6]


@pytest.fixture(params=["dense", "groups"])
def kind(request, monkeypatch):
    """Either mask, whatever the batch."""
    monkeypatch.setattr(attention_module, "CALL_COST", 10**9 if request.param == "dense" else -10**9)
    return request.param


def test_mask_by_hand():
    batch = pack([([1, 2], [[3, 4], [5]]), ([6], [[7]])], 6)
    mask = [[1, 0, 0, 0, 0],   # the prompt, causally
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],   # the first response
            [1, 1, 1, 1, 0],
            [1, 1, 0, 0, 1]]   # the second sees the prompt and itself
    assert packed_mask(batch, "dense")[0, 0].int().tolist() == mask
    groups = packed_mask(batch, "groups")
    assert groups.lengths == [5, 2, 3]  # the last is padding
    assert groups.allowed[0].int().tolist() == mask and groups.allowed[1:] == [None, None]


def test_groups_attend_one_by_one_where_that_is_less_work():
    """Two groups of 400 tokens and eight of 50, in three rows.

    That is 2·400² + 8·50² pairs of tokens in 10 calls, against 3·400².
    """
    long, short = ([1] * 200, [[2] * 200]), ([1] * 25, [[2] * 25])
    assert isinstance(packed_mask(pack([long] * 2 + [short] * 8)), GroupMask)
    assert torch.is_tensor(packed_mask(pack([long] * 3))) and torch.is_tensor(packed_mask(pack([short] * 20)))


def test_rows_are_filled_and_the_order_is_the_callers():
    groups = random_groups(n=30)
    batch = pack(groups, 60)
    assert batch.tokens.size(0) <= -(-sum(map(group_length, groups)) // 60) + 1
    assert batch.target.tolist() == [t for _, responses in groups for r in responses for t in r]


def test_each_group_is_placed_in_the_first_row_with_room():
    """What first_fit says, the longest group first, by searching all rows for each group."""
    rng = random.Random(0)
    for longest in (3, 20, 300):
        lengths = [rng.randrange(1, longest + 1) for _ in range(200)]
        most = rng.randrange(longest, 3 * longest)
        places, free = {}, []
        for i in sorted(range(200), key=lambda i: -lengths[i]):
            row = min([row for row, room in enumerate(free) if room >= lengths[i]], default=len(free))
            if row == len(free):
                free.append(most)
            places[i] = (row, most - free[row])
            free[row] -= lengths[i]
        layout = first_fit(lengths, most)
        assert layout.places == [places[i] for i in range(200)] and layout.rows == len(free)
        assert layout.length == most - min(free)


def test_rows_are_as_long_as_leaves_the_least_padding():
    """Groups of 6, 5, 5 and 4 tokens: four rows of 6 are 24 places; two rows of 10 are full."""
    groups = [([1, 2], [[3] * n]) for n in (4, 3, 3, 2)]
    assert pack(groups, 6).tokens.shape == (4, 6)
    batch = pack(groups)
    assert batch.tokens.shape == (2, 10) and (batch.group >= 0).all()
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


def queries_keys_values(rows, T, n_head=2, size=16):
    return torch.randn(3, rows, n_head, T, size, generator=torch.Generator().manual_seed(0)).unbind(0)


def textbook_attention(q, k, v, allowed):
    """softmax(q kᵀ/√d + mask) v, the mask 0 where allowed and −∞ elsewhere. allowed: (B, T, T) boolean."""
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
    scores = q @ k.transpose(2, 3) / q.size(3) ** 0.5 + mask[:, None]
    return scores.softmax(-1) @ v


def may_look(batch):
    """Who may look at whom, pair by pair: the prompt of one's own group and one's own segment, causally."""
    rows, T = batch.tokens.shape
    allowed = torch.zeros(rows, T, T, dtype=torch.bool)
    for row in range(rows):
        group, segment = batch.group[row].tolist(), batch.segment[row].tolist()
        for i in range(T):
            for j in range(i + 1):
                allowed[row, i, j] = group[i] == group[j] and segment[j] in (0, segment[i])
    return allowed


@pytest.mark.parametrize("mask_kind", ["dense", "groups", "flex"])
def test_attention_under_each_mask_is_the_textbooks(mask_kind):
    batch = pack(random_groups(), 40)
    if mask_kind == "flex":
        batch = batch.in_one_row(BLOCK)
        # There, each stretch of padding is a group of its own.
        batch.group = torch.unique_consecutive(batch.group[0], return_inverse=True)[1][None]
    q, k, v = queries_keys_values(*batch.tokens.shape)
    expected = textbook_attention(q, k, v, may_look(batch))
    torch.testing.assert_close(attention(q, k, v, packed_mask(batch, mask_kind)), expected, atol=1e-5, rtol=0)


def test_attention_without_a_mask_is_causal_and_a_mask_of_numbers_is_added():
    q, k, v = queries_keys_values(3, 20)
    causal = torch.ones(3, 20, 20, dtype=torch.bool).tril()
    torch.testing.assert_close(attention(q, k, v), textbook_attention(q, k, v, causal), atol=1e-5, rtol=0)
    numbers = torch.randn(3, 1, 20, 20)
    expected = (q @ k.transpose(2, 3) / 4 + numbers).softmax(-1) @ v
    torch.testing.assert_close(attention(q, k, v, numbers), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("max_tokens", [40, 64, None])
def test_attention_group_by_group_equals_dense_attention(max_tokens):
    batch = pack(random_groups(n=20), max_tokens)
    q, k, v = queries_keys_values(*batch.tokens.shape)
    by_group = group_attention(q, k, v, packed_mask(batch, "groups"))
    torch.testing.assert_close(by_group, attention(q, k, v, packed_mask(batch, "dense")), atol=1e-5, rtol=0)


def test_flex_attention_equals_sdpa_under_the_packed_mask(kind):
    batch = pack(random_groups(), 64)
    q, k, v = queries_keys_values(*batch.tokens.shape)
    mask = packed_mask(batch)
    assert isinstance(mask, GroupMask) == (kind == "groups")
    one_row = batch.in_one_row(BLOCK)
    padding = one_row.tokens.numel() - batch.tokens.numel()
    q_row, k_row, v_row = (F.pad(x.transpose(1, 2).flatten(0, 1), (0, 0, 0, 0, 0, padding)).transpose(0, 1)[None] for x in (q, k, v))
    flex = attention(q_row, k_row, v_row, packed_mask(one_row, "flex"))[0].transpose(0, 1)  # (places, H, D)
    expected = attention(q, k, v, mask).transpose(1, 2).flatten(0, 1)
    real = batch.group.flatten() >= 0
    torch.testing.assert_close(flex[:len(real)][real], expected[real], atol=1e-5, rtol=1e-5)


def test_one_row_holds_what_stood_at_each_place_and_then_padding():
    batch = pack(random_groups(), 40)
    one_row = batch.in_one_row(16)
    n = batch.tokens.numel()
    assert one_row.tokens.shape == (1, -(-n // 16) * 16) and n % 16
    for name in ("tokens", "segment", "position", "group"):
        assert getattr(one_row, name)[0, :n].equal(getattr(batch, name).flatten())
    assert (one_row.group[0, n:] == -1).all()
    assert one_row.target.equal(batch.target) and one_row.last.equal(batch.last)
    assert pack([([1, 2], [[3]])]).in_one_row(16).tokens.shape == (1, 32)  # never a single block


@pytest.mark.parametrize("longest, n, k", [(9, 60, 2), (150, 12, 3), (600, 3, 2), (300, 4, 8), (1, 1, 1)])
def test_the_blocks_of_flex_attention_are_those_that_create_block_mask_finds(longest, n, k):
    """Every block with a pair that may look, and few others."""
    rng = random.Random(longest)
    groups = [([1] * rng.randint(1, longest), [[2] * rng.randint(1, longest) for _ in range(k)]) for _ in range(n)]
    batch = pack(groups).in_one_row(BLOCK)
    mask = packed_mask(batch, "flex")
    found = create_block_mask(mask.mask_mod, 1, None, *mask.seq_lengths, device="cpu")
    assert mask.shape == found.shape
    assert (mask.to_dense() >= found.to_dense()).all()
    assert mask.to_dense().sum() <= 1.1 * found.to_dense().sum() + 1
    assert mask.to_dense().tril().equal(mask.to_dense())
    # Each block looks no further back than to the block where its first token's group begins.
    group = batch.group[0].tolist()
    for i, looks_at in enumerate(mask.to_dense()[0, 0].tolist()):
        first = i * BLOCK
        while first and group[first - 1] == group[first]:
            first -= 1
        assert looks_at.index(1) == first // BLOCK


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


@pytest.mark.parametrize("mask_kind, n_kinds", [("dense", 2), ("flex", 1)])
def test_compiled_blocks_are_the_plain_ones_and_compile_once_for_each_kind_of_batch(monkeypatch, mask_kind, n_kinds):
    """Dense: one row or several. Flex: always one row. A kind compiles a block and the last block, whatever the depth."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    model = make_model(n_layer=4)
    plain = copy.deepcopy(model)
    model.prepare(compile=True, checkpoint_blocks=False)
    assert model.mask_kind == "dense"  # here; on CUDA flex
    model.mask_kind = plain.mask_kind = mask_kind
    compiled_copy = copy.deepcopy(model)
    for p in compiled_copy.parameters():
        p.data.zero_()  # a copy has weights of its own
    for seed in range(8):
        batch = pack(random_groups(seed, n=1 + 3 * seed), 40 + 3 * seed)
        with torch.no_grad():
            assert torch.equal(model.states(batch), plain.states(batch))
            assert not compiled_copy.states(batch).any()
    assert counter.frame_count == 2 * n_kinds
    model.generate([[1, 2], [3]], 5)
    assert counter.frame_count == 2 * n_kinds  # sampling runs plain blocks


def test_a_compiled_model_with_wide_layers_samples_on_a_cpu():
    """Its oneDNN copies are for plain blocks."""
    model = make_model(n_layer=2, n_embd=256)
    before = model.generate([[1, 2], [3]], 5, noise=torch.full((2, 5), 0.5).double())
    model.prepare(compile=True, checkpoint_blocks=False)
    assert model.generate([[1, 2], [3]], 5, noise=torch.full((2, 5), 0.5).double()) == before


def test_a_siblings_tokens_change_nothing_to_the_bit(model, kind):
    groups = random_groups(responses=(2, 4))
    changed = [(p, [rs[0]] + [[(t + 1) % 100 for t in r] for r in rs[1:]]) for p, rs in groups]
    one, other = pack(groups, 64), pack(changed, 64)
    group = one.sequence_group.tolist()
    firsts = [s for s in range(len(group)) if s == 0 or group[s] != group[s - 1]]  # of each group
    first = torch.isin(one.sequence, torch.tensor(firsts))
    assert torch.equal(model.logprobs(one)[first], model.logprobs(other)[first])
    assert not torch.equal(model.logprobs(one), model.logprobs(other))


def test_padding_and_neighbours_change_nothing_to_the_bit(model, kind):
    batch = pack(random_groups(), 64)
    before = model.logprobs(batch)
    batch.tokens[batch.group < 0] = 7
    assert torch.equal(model.logprobs(batch), before)
    mine = batch.group.flatten()[batch.token_index] == 0
    batch.tokens[batch.group > 0] = 3
    assert torch.equal(model.logprobs(batch)[mine], before[mine])


def test_the_order_of_groups_changes_nothing(model, kind):
    groups = random_groups()
    forward, backward = pack(groups, 64), pack(groups[::-1], 64)
    a = [x.tolist() for x in model.logprobs(forward).split(forward.sequence.bincount().tolist())]
    b = [x.tolist() for x in model.logprobs(backward).split(backward.sequence.bincount().tolist())]

    def per_group(x, batch):
        group = batch.sequence_group.tolist()
        return [[s for s, g in zip(x, group) if g == i] for i in range(len(groups))]
    for x, y in zip(per_group(a, forward), per_group(b, backward)[::-1]):
        assert [len(s) for s in x] == [len(s) for s in y]
        torch.testing.assert_close(torch.tensor(sum(x, [])), torch.tensor(sum(y, [])), atol=1e-5, rtol=0)


def test_the_gradient_of_a_shared_state_is_added_in_one_order():
    """Responses share the state that predicts their first token.

    Whichever thread comes first, the sum is the same to the bit.
    """
    torch.manual_seed(0)
    block, places = make_model(n_embd=128).h[-1], pack([([1], [[2]] * 500)], 501).state_index
    x, gradient = torch.randn(1, 501, 128, requires_grad=True), torch.randn(500, 128)
    results = [torch.autograd.grad(block.forward_at(x, attention, places), x, gradient)[0] for _ in range(50)]
    assert len(set(places.tolist())) == 1 and all(torch.equal(result, results[0]) for result in results)


def test_a_block_at_some_places_is_the_block_there(model):
    block, x = model.h[-1], torch.randn(3, 10, 32)
    places = torch.tensor([7, 0, 29, 7, 14])
    with torch.no_grad():
        everywhere = block(x, attention).flatten(0, 1)
        there = block.forward_at(x, attention, places)
    torch.testing.assert_close(there, everywhere[places], atol=1e-5, rtol=0)


def test_errors():
    with pytest.raises(ValueError, match="group 1 has 4 tokens, a row holds 3"):
        pack([([1], [[2]]), ([1, 2], [[3, 4]])], 3)
    with pytest.raises(ValueError, match="group 0 has an empty"):
        pack([([], [[2]])], 3)
    with pytest.raises(ValueError, match="group 0 has an empty"):
        pack([([1], [[2], []])], 3)


def test_micro_batches_keep_every_index_and_the_bound():
    groups = [([1], [[2] * (n - 1)]) for n in (5, 9, 2, 20, 7, 7)]
    pieces = cut_by_tokens(range(6), groups, 14)
    assert pieces == [[2, 0, 4], [5], [1], [3]]
    assert cut_by_tokens(range(6), groups, 1000) == [[2, 0, 4, 5, 1, 3]]


def test_shuffled_batches_visit_every_example_once_an_epoch():
    batches = shuffled_batches(10, 3, 7, seed=1)
    assert len(batches) == 7 and all(len(b) == 3 for b in batches)
    for epoch in (batches[:3], batches[3:6]):
        assert len(set(sum(epoch, []))) == 9
    assert batches == shuffled_batches(10, 3, 9, seed=1)[:7] != shuffled_batches(10, 3, 7, seed=2)
