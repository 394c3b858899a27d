"""bench.py: its counts by hand, its naive side against the packed one, and its table."""
import json

import pytest
import torch
from conftest import make_model, random_groups

import bench
from engine.packing import pack, per_sequence


def test_flops_by_hand():
    """One layer of 2, a vocabulary of 100: prompt of 2, responses of 1 and 2. Token by token they see 1 2, 3, 3 4 positions."""
    config = make_model(vocab_size=100, n_layer=1, n_embd=2).config
    assert bench.forward_flops(config, [([0, 0], [[0], [0, 0]])]) == 24 * 4 * 5 + 4 * 2 * (1 + 2 + 3 + 3 + 4) + 2 * 100 * 2 * 3
    assert bench.forward_flops(config, [([0, 0], [[0], [0, 0]])], head=False) == 24 * 4 * 5 + 4 * 2 * 13


def test_decode_bytes_by_hand():
    """Two steps after the prompts' own: all weights twice, and contexts of 4, 5 and 2, 3 tokens."""
    model = make_model(vocab_size=100, n_layer=3, n_embd=8)
    weights = sum(p.numel() for p in model.parameters()) - model.wpe.weight.numel()
    assert bench.decode_bytes(model, [[0] * 3, [0]], 3) == 4 * (2 * weights + 2 * 3 * 8 * (4 + 5 + 2 + 3))


def test_the_naive_side_does_the_same_work():
    model, groups = make_model(n_scalars=1), random_groups(4)
    batch = pack(groups, 64)
    with torch.no_grad():
        logp, scores = per_sequence(model.logprobs(batch), batch), model.score(batch)
        torch.testing.assert_close(bench.naive_logp(model, groups), logp, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(bench.naive_scores(model, groups), scores, rtol=1e-4, atol=1e-4)
    assert [len(r) for r in bench.naive_generate(model, [[1, 2], [3]], 3)] == [3, 3]


def test_the_table_has_a_row_for_each_hot_path(tmp_path, capsys):
    small = ["--model=1x2x16", "--device=cpu", "--block_size=64", "--batch_size=2", "--rows=2", "--new_tokens=4", "--ppo_prompts=2", "--ppo_tokens=4", "--repeat=1"]
    bench.main([*small, "--against=naive", f"--json={tmp_path}/rows.json"])
    result = json.load(open(tmp_path / "rows.json"))
    assert [row["path"] for row in result["rows"]] == ["DPO step", "SimPO step", "reward step", "prefill", "decode", "PPO rollout", "PPO scoring",
                                                       "PPO update", "PPO iteration"]
    assert all(row["tokens_per_s"] > 0 and row["memory_gb"] > 0 for row in result["rows"])
    assert "vs naive" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--model=tiny: one of gpt2"):
        bench.main(["--model=tiny"])
