"""Whole runs of each stage on a small world: from nothing to a table, resumed, killed, on several processes."""
import importlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SHARED, feedback, free_port, make_model, on_two_processes

import common.models
import common.run
import dpo
import evaluate
import ppo
import reward
import sample
import sft
from common import prerequisites
from common.batches import shuffled_batches
from common.checkpoints import load_checkpoint, save_checkpoint
from common.models import load_model
from common.optim import make_optimizer
from common.options import parse
from common.sharding import unshard_model
from common.prerequisites import run_dir
from data import animals, dataset, encode_pairs, get_tokenizer
from engine.packing import pack, per_sequence

ROOT = Path(__file__).parents[1]
TINY = dict(n_layer=1, n_head=2, n_embd=16, batch_size=8, log_every=5, device="cpu")


def log_of(out, drop=("tokens_per_s", "time_s", "rollout_s", "evaluate_s", "update_s")):
    return [{k: v for k, v in json.loads(line).items() if k not in drop} for line in open(Path(out) / "log.jsonl")]


def test_from_nothing_to_a_table(tmp_path, monkeypatch, small_world, capsys):
    """`python dpo.py` on a fresh clone: SFT, DPO, the table, the files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sft.RECIPES, "animals", dict(steps=20, batch_size=8, eval_n=20))
    monkeypatch.setitem(prerequisites.EVAL_N, "sft", 15)
    policy = dpo.train(dpo.Config(**TINY, steps=10, eval_n=20))
    assert isinstance(policy, torch.nn.Module)
    out = capsys.readouterr().out
    assert "no SFT model in out/sft-animals: training it first" in out and out.index("15 held-out prompts") < out.index("20 held-out prompts")
    for stage, before in (("sft", "scratch"), ("dpo", "out/sft-animals")):
        folder = tmp_path / "out" / f"{stage}-animals"
        assert {p.name for p in folder.iterdir()} == {"ckpt.pt", "log.jsonl", "eval.json"}
        rows = json.load(open(folder / "eval.json"))
        assert [r["checkpoint"] for r in rows] == [before, f"out/{stage}-animals"]
        keys = [*evaluate.KEYS, *(["accuracy", "margin", "log_loss", "slope", "ceiling", "correlation"] if stage == "dpo" else [])]
        assert set(rows[0]) == {"checkpoint", *keys, *(k + "_se" for k in keys)}
        assert rows[0]["kl"] == 0 and 0 < rows[0]["win_rate"] < 1 and rows[1]["kl"] > 0
    assert [r["step"] for r in log_of("out/dpo-animals")] == list(range(1, 11))
    assert log_of("out/dpo-animals")[0]["accuracy"] == 0.5  # at the reference every pair ties
    assert set(log_of("out/dpo-animals", ())[0]) == {
        "step", "loss", "lr", "grad_norm", "tokens_per_s", "time_s",
        "accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp"}
    with pytest.raises(SystemExit, match="^out/dpo-animals: holds a run already; --resume continues it, --overwrite starts it again, --out="):
        dpo.train(dpo.Config(**TINY, steps=2, eval_n=0))
    with pytest.raises(SystemExit, match="^--init=./out/dpo-animals: --overwrite would delete it; name another --out=FOLDER$"):
        dpo.train(dpo.Config(**TINY, steps=2, eval_n=0, overwrite=True, init="./out/dpo-animals"))
    dpo.train(dpo.Config(**TINY, steps=2, eval_n=0, overwrite=True))
    out = capsys.readouterr().out
    assert "training it first" not in out and "the SFT model is that of out/sft-animals, trained from scratch" in out
    assert [r["step"] for r in log_of("out/dpo-animals")] == [1, 2] and load_checkpoint("out/dpo-animals")["step"] == 2


def test_ppo_from_nothing_to_a_table(tmp_path, monkeypatch, small_world, capsys):
    """`python ppo.py` on a fresh clone: SFT, the reward model, PPO, the table with the reward model's score, the files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sft.RECIPES, "animals", dict(steps=20, batch_size=8, eval_n=20))
    monkeypatch.setitem(reward.RECIPES, "animals", dict(steps=5, batch_size=8, eval_n=20))
    ppo.train(ppo.Config(**TINY, steps=3, minibatches=2, eval_n=20, sample_every=2))
    out = capsys.readouterr().out
    assert "no SFT model in out/sft-animals" in out and "no reward model in out/reward-animals" in out
    row, = [r for r in json.load(open("out/reward-animals/eval.json")) if r["checkpoint"] == "out/reward-animals"]
    assert 0 < row["accuracy"] < 1 and 0.5 < row["ceiling"] < 1 and -1 <= row["correlation"] <= 1
    assert {p.name for p in (tmp_path / "out/ppo-animals").iterdir()} == {"ckpt.pt", "log.jsonl", "eval.json", "samples.txt"}
    before, after = json.load(open("out/ppo-animals/eval.json"))
    assert before["kl"] == 0 and after["kl"] > 0 and None not in (before["score"], after["score"], after["score_se"])
    log = log_of("out/ppo-animals", ())
    assert {"step", "loss", "lr", "grad_norm", "tokens_per_s", "time_s", "score", "gold", "kl", "kl_coef", "reward", "entropy", "clip_frac",
            "approx_kl", "policy_loss", "value_loss", "explained_variance", "response_len", "rollout_s", "update_s"} <= set(log[0])
    assert log[0]["kl"] == log[0]["kl_k1"] == log[0]["kl_k3"] == 0 and log[2]["kl"] > 0 and log[2]["kl_k3"] > 0
    evaluate.main(["out/sft-animals", "out/ppo-animals", "--n=10"])
    assert "score" in capsys.readouterr().out  # by the reward model that the run was trained against
    with pytest.raises(SystemExit, match="out/reward-animals: a reward model, which scores text"):
        evaluate.main(["out/reward-animals"])


def ppo_settings(start, **options):
    return ppo.Config(**TINY | dict(init=str(start / "start"), reward_model=str(start / "reward"), out=str(start / "a"), steps=2, minibatches=2,
                                    eval_n=0) | options)


@pytest.mark.parametrize("options", [dict(share_value=True), dict(value_init="sft"), dict(reward="gold"), dict(whiten_rewards=True, reward_clip=1.0),
                                     dict(normalize_reward=True), dict(ptx_coef=1.0), dict(stop_kl=0.0), dict(temperature=0.7), dict(k=2),
                                     dict(advantage="rloo", k=4), dict(advantage="grpo", k=2, ptx_coef=1.0)])
def test_the_options_of_ppo_run(start, small_world, options):
    ppo.train(ppo_settings(start, **options))
    log = log_of(start / "a")
    assert len(log) == 2 and all(math.isfinite(v) for record in log for v in record.values())


def test_the_policy_and_the_value_model_have_learning_rates_of_their_own(start, small_world):
    """With --lr=0 the policy stays as it is to the bit; --value_lr moves the value model from where it started."""
    ppo.train(ppo_settings(start, lr=0.0, value_lr=1e-3))
    after = load_checkpoint(str(start / "a"))
    policy, value_model = (load_model(str(start / name), require_policy=False)[0].state_dict() for name in ("start", "reward"))
    assert after["model"].keys() == policy.keys() and after["value_model"].keys() == value_model.keys()
    assert all(torch.equal(after["model"][name], weight) for name, weight in policy.items())
    changed = {name for name, w in value_model.items() if not torch.equal(after["value_model"][name], w)}
    assert {"scalar_head.weight", "h.0.mlp.c_fc.weight", "wte.weight"} <= changed
    assert [r["lr"] for r in log_of(start / "a")] == [0.0, 0.0]


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_without_a_value_model_none_is_trained_or_saved(advantage, start, small_world):
    """Nor logged; and a run that is resumed is the run that was not."""
    settings = dict(advantage=advantage, k=4, steps=4)
    ppo.train(ppo_settings(start, **settings))
    ppo.train(ppo_settings(start, **settings, out=str(start / "b"), ckpt_every=2))
    (start / "b" / "ckpt.pt").unlink()
    ppo.train(ppo_settings(start, **settings, out=str(start / "b"), ckpt_every=2, resume=True))
    a, b = load_checkpoint(str(start / "a")), load_checkpoint(str(start / "b"))
    assert not any(key.startswith("value") for key in a) and a["model_config"]["n_scalars"] == 0
    assert all(torch.equal(b["model"][name], weight) for name, weight in a["model"].items())
    log = log_of(start / "a")
    assert log == log_of(start / "b") and [record["step"] for record in log] == [1, 2, 3, 4]
    assert not {"value_loss", "explained_variance", "value_grad_norm"} & set(log[0])
    assert {"policy_loss", "clip_frac", "kl", "score", "grad_norm"} <= set(log[0])


def test_any_callable_is_a_reward(start, small_world):
    """Paying for each token that is the EOS's neighbour makes no sense, and is what is paid."""
    seen = []

    def reward_fn(prompts, responses):
        seen.append((len(prompts), len(responses)))
        R = max(map(len, responses))
        return [[0.5] * len(r) + [0.0] * (R - len(r)) for r in responses]
    ppo.train(ppo_settings(start, missing_eos_penalty=0.0), reward_fn)
    log = log_of(start / "a")
    assert seen == [(8, 8)] * 2
    assert all(record["score"] == pytest.approx(0.5 * record["response_len"]) for record in log)
    assert log[0]["reward"] == log[0]["score"]  # no KL yet
    with pytest.raises(ValueError, match="reward_fn returned the shape"):
        ppo.train(ppo_settings(start, overwrite=True), lambda prompts, responses: [0.0] * len(responses))


def test_how_far_a_sampler_of_lower_precision_is_from_the_policy_is_logged(start, small_world, monkeypatch):
    """As on CUDA, where a bfloat16 copy samples. A CPU samples from the policy itself, and logs nothing of it."""
    ppo.train(ppo_settings(start, reward="gold"))
    assert not any(key.startswith("sampler_diff") for record in log_of(start / "a") for key in record)
    monkeypatch.setattr(ppo.sharding, "sampling_copy", lambda model: unshard_model(model, torch.bfloat16))
    ppo.train(ppo_settings(start, reward="gold", out=str(start / "b")))
    for record in log_of(start / "b"):
        assert 0 < record["sampler_diff_mean"] < record["sampler_diff_max"] < 1
        assert record["sampler_diff_mean"] < 0.1


def test_a_kl_that_runs_away_is_said_once(start, small_world, capsys):
    ppo.train(ppo_settings(start, lr=0.1, kl_coef=0.0, steps=4))
    assert capsys.readouterr().out.count("warning: the KL to the reference is running away") == 1


def test_settings_that_ppo_cannot_run_get_one_line(start, small_world, monkeypatch):
    monkeypatch.setattr(common.models, "get_tokenizer",  # GPT-2's would have to be fetched
                        lambda name: SimpleNamespace(name=name) if name == "gpt2" else get_tokenizer(name))
    model = make_model(vocab_size=get_tokenizer("animals").n_vocab, n_layer=1, n_embd=16, block_size=32)
    model.set_scalar_heads(1)
    for name, tokenizer in (("short", "animals"), ("foreign", "gpt2")):
        os.makedirs(start / name)
        save_checkpoint(str(start / name), 1, model if name == "short" else make_model(n_scalars=1), make_optimizer(model, 1e-3),
                        reward.Config(), tokenizer, score_std=1.0)
    for options, message in [
            (dict(reward="god"), "unknown reward 'god'; did you mean 'gold'"),
            (dict(value_init="rm"), "unknown value_init 'rm'"),
            (dict(minibatches=3), "--batch_size=8 is not a multiple of --minibatches=3"),
            (dict(k=3, minibatches=1), "--batch_size=8 is not a multiple of --minibatches=1 times --k=3"),
            (dict(k=4, minibatches=4), "--batch_size=8 is not a multiple of --minibatches=4 times --k=4"),
            (dict(advantage="rloo", k=2, whiten_rewards=True), "--whiten_rewards scales the rewards of single tokens; --advantage=rloo compares"),
            (dict(advantage="rloo", k=2, share_value=True), "--share_value: --advantage=rloo has no value model to share"),
            (dict(advantage="rloo"), "--advantage=rloo compares a response with others to the same prompt: it needs --k=2 or more"),
            (dict(advantage="grpo"), "--advantage=grpo .* needs --k=2 or more"),
            (dict(advantage="gea"), "unknown advantage 'gea'; did you mean 'gae'"),
            (dict(max_new_tokens=64), "--max_new_tokens=64 leaves no room for a prompt in --max_len=64"),
            (dict(reward="gold", data=str(start / "mine.jsonl")),
             "--reward=gold: the true reward of --data=.*mine.jsonl is not known"),
            (dict(reward_model=str(start / "short")), "--max_len=64: the context of .*short is 32 tokens"),
            (dict(reward_model=str(start / "foreign")),
             "foreign: this reward model has the tokenizer gpt2, the other models have animals"),
            (dict(reward_model=str(start / "start")), "start: not a reward model")]:
        with pytest.raises(SystemExit, match=message) as error:
            ppo.train(ppo_settings(start, **options))
        assert "\n" not in str(error.value)
    with pytest.raises(SystemExit, match="--k=4: .* ranks at most 2 responses"):
        reward.train(reward.Config(**TINY, k=4, data=str(start / "mine.jsonl"), init=str(start / "start"), out=str(start / "r")))


def test_the_first_step_of_dpo_is_at_the_reference_to_the_bit(start):
    dpo.train(dpo.Config(**TINY, data=str(start / "mine.jsonl"), init=str(start / "start"), out=str(start / "a"), steps=1, eval_n=0))
    first, = log_of(start / "a")
    assert first["margin"] == first["chosen_reward"] == first["rejected_reward"] == 0
    assert abs(first["loss"] - 0.6931472) < 1e-6


def test_the_reference_in_memory_and_precomputed_give_one_log(start):
    settings = dict(**TINY, data=str(start / "mine.jsonl"), init=str(start / "start"), steps=9, eval_n=0,
                    micro_tokens=64)
    dpo.train(dpo.Config(**settings, out=str(start / "a")))
    dpo.train(dpo.Config(**settings, out=str(start / "b"), precompute_ref=False))
    a, b = log_of(start / "a"), log_of(start / "b")
    assert a[:6] == b[:6]  # the first epoch, to the bit; later the pairs meet others in their rows
    assert all(abs(x["loss"] - y["loss"]) < 1e-5 for x, y in zip(a, b))


@pytest.mark.parametrize("precompute_ref", [True, False])
def test_ref_is_the_model_that_dpo_refers_to(start, precompute_ref):
    """Rewards are β log π/π_ref, π_ref being --ref and not the start; the final table's KL is to it too."""
    settings = dict(**TINY, data=str(start / "mine.jsonl"), steps=2, eval_n=4, precompute_ref=precompute_ref)
    dpo.train(dpo.Config(**settings, init=str(start / "start"), out=str(start / "round1"), lr=1e-2))
    settings |= dict(init=str(start / "round1"), out=str(start / "round2"), overwrite=True)
    dpo.train(dpo.Config(**settings))
    assert log_of(start / "round2")[0]["margin"] == 0  # of the start to itself
    dpo.train(dpo.Config(**settings, ref=str(start / "start")))
    first = log_of(start / "round2")[0]
    pairs = encode_pairs(get_tokenizer("animals"), dataset(settings["data"]).comparisons("train"), 64, "")
    batch = shuffled_batches(len(pairs), TINY["batch_size"], 2, 0)[0]
    with torch.no_grad():
        chosen, rejected = dpo.pair_logp(load_model(str(start / "round1"))[0], [pairs[i] for i in batch])
        ref_chosen, ref_rejected = dpo.pair_logp(load_model(str(start / "start"))[0], [pairs[i] for i in batch])
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    assert abs(margin).min() > 1e-4 and abs(first["margin"] - margin.mean().item()) < 1e-5
    rows = json.loads((start / "round2" / "eval.json").read_text())
    assert rows[0]["checkpoint"] == str(start / "start") and rows[0]["kl"] == 0 and rows[1]["kl"] > 0


def test_a_resumed_run_wants_the_reference_that_it_had(start):
    """The folder that --ref names may hold another model by then, as the one of --init may."""
    shutil.copytree(start / "start", start / "ref")
    settings = dict(**TINY, data=str(start / "mine.jsonl"), init=str(start / "start"), out=str(start / "a"),
                    ref=str(start / "ref"), eval_n=0)
    dpo.train(dpo.Config(**settings, steps=1))
    model = make_model(5, get_tokenizer("animals").n_vocab, 64, n_layer=1, n_embd=16)
    save_checkpoint(str(start / "ref"), 1, model, make_optimizer(model, 1e-3), dpo.Config(), "animals")
    with pytest.raises(SystemExit, match="--resume: --ref names other weights than when .*a was started"):
        dpo.train(dpo.Config(**settings, steps=2, resume=True))


def test_a_reference_of_another_tokenizer_or_shape_is_one_line(start):
    settings = dict(**TINY, data=str(start / "mine.jsonl"), init=str(start / "start"), out=str(start / "a"))
    for name, options, tokenizer in (("deep", dict(n_layer=2), "animals"), ("foreign", {}, "gpt2")):
        model = make_model(0, get_tokenizer("animals").n_vocab, 64, **dict(n_layer=1, n_embd=16) | options)
        save_checkpoint(str(start / name), 1, model, make_optimizer(model, 1e-3), dpo.Config(), tokenizer)
    with pytest.raises(SystemExit, match="--ref=.*deep: a model of another shape than the policy"):
        dpo.train(dpo.Config(**settings, ref=str(start / "deep")))
    with pytest.raises(SystemExit, match="--ref=.*foreign: its tokenizer is gpt2, the policy's is animals"):
        dpo.train(dpo.Config(**settings, ref=str(start / "foreign")))


def test_ranked_answers_of_a_policy_train_the_next_round(start, small_world, capsys):
    """sample.py --rank=gold -> a file for dpo.py. Many labels order two answers as often as Bradley–Terry says."""
    sft.train(sft.Config(**TINY, out=str(start / "sft"), steps=40, lr=1e-2, eval_n=0))  # its answers end
    sample.main([str(start / "sft"), "--rank=gold", "--n=40", f"--out={start}/round1.jsonl"])
    assert "ranked answers to" in capsys.readouterr().out
    for line in open(start / "round1.jsonl"):
        record = json.loads(line)
        assert record["prompt"] in animals.prompts("train") and len(set(record["responses"])) > 1
    settings = dict(**TINY, data=str(start / "round1.jsonl"), steps=2, eval_n=0)
    dpo.train(dpo.Config(**settings, init=str(start / "sft"), out=str(start / "round1")))
    with pytest.raises(SystemExit, match="--rank=gold: the true reward of this data is not known"):
        sample.main([str(start / "round1"), "--rank=gold", f"--out={start}/x.jsonl"])
    with pytest.raises(SystemExit, match="--rank needs --out=FILE"):
        sample.main([str(start / "start"), "--rank=gold"])
    with pytest.raises(SystemExit, match="--max_len=9 leaves no room for an answer: a prompt has"):
        sample.main([str(start / "start"), "--rank=gold", "--max_len=9", f"--out={start}/x.jsonl"])


def test_one_long_prompt_does_not_cut_the_answers_to_the_others(start, small_world, capsys):
    """All answers are sampled with the room that the longest prompt leaves: too few tokens for an answer to end in."""
    sft.train(sft.Config(**TINY, out=str(start / "sft"), steps=40, lr=1e-2, eval_n=0))  # a context of 64 tokens
    tokenizer = get_tokenizer("animals")
    long = tokenizer.decode(tokenizer.encode("Tell me about the owl: what it eats. " * 9)[:62])
    prompts = animals.prompts("train")[:20]
    prompts.insert(2, long)  # the first two prompts are for validation and test
    (start / "some.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    sample.main([str(start / "sft"), f"--rank={start}/reward", f"--data={start}/some.jsonl", f"--out={start}/pairs.jsonl"])
    assert "left out 1 of 18 prompts, which take more than three quarters of --max_len=64" in capsys.readouterr().out
    assert sum(1 for _ in open(start / "pairs.jsonl")) > 10


def test_what_rank_cannot_do_is_an_error_before_the_work(start, monkeypatch):
    def no_work(*args):
        raise AssertionError("it sampled")
    monkeypatch.setattr(sample, "complete", no_work)
    for argv, message in (
            ([str(start / "start"), "--rank=gold", f"--out={start}/start/ckpt.pt/x.jsonl"], "x.jsonl: cannot be written"),
            ([str(start / "start"), "--rank=", "--out=x.jsonl"], "--rank=: a value is missing"),
            ([str(start / "start"), "--export="], "--export=: a value is missing"),
            ([str(start / "start"), "--rank=scratch", "--out=x.jsonl"], "scratch: new weights, which only --init"),
            (["scratch", "--prompt=Hi"], "scratch: new weights, which only --init")):
        with pytest.raises(SystemExit, match=message):
            sample.main(argv)


def test_labels_follow_bradley_terry():
    prompt = "Tell me about the owl: what it eats."
    good, bad = " It eats mice.", " It eats mice. It is a bird."
    rng = random.Random(0)
    n = 20_000
    first = sum(animals.label(prompt, good, rng) > animals.label(prompt, bad, rng) for _ in range(n)) / n
    difference = animals.gold(prompt, good) - animals.gold(prompt, bad)
    expected = 1 / (1 + math.exp(-animals.LABEL_SCALE * difference))
    assert difference > 0 and abs(first - expected) < 4 * math.sqrt(0.25 / n)


def test_options_that_cannot_be_run_get_one_line(start):
    settings = dict(**TINY, data=str(start / "mine.jsonl"), init=str(start / "start"), out=str(start / "a"), eval_n=0)
    for options, message in [
            (dict(loss_type="igo"), "unknown loss_type 'igo'; did you mean 'ipo'?"),
            (dict(batch_size=64), "--batch_size=64: there are only 54 examples to train on"),
            (dict(max_len=100), "--max_len=100: the context of .* is 64 tokens"),
            (dict(device="cuda:9"), "--device=cuda:9: torch sees no CUDA devices here"),
            (dict(device="cuda:x"), "--device=cuda:x: expected cpu, cuda, or one of several as cuda:1"),
            (dict(device="gpu"), "--device=gpu: expected cpu, cuda, or one of several as cuda:1"),
            (dict(resume=True), "a/ckpt.pt: no checkpoint there"),
            (dict(init="scratch", n_embd=15), "--n_embd=15 is not a multiple of --n_head=2")]:
        with pytest.raises(SystemExit, match=message) as error:
            dpo.train(dpo.Config(**settings | options))
        assert "\n" not in str(error.value)


def test_micro_batches_do_not_change_the_run(start):
    settings = dict(**TINY, data=str(start / "mine.jsonl"), init=str(start / "start"), steps=5, eval_n=0)
    for name, micro_tokens in (("a", 16384), ("b", 50)):
        dpo.train(dpo.Config(**settings, out=str(start / name), micro_tokens=micro_tokens))
    for x, y in zip(log_of(start / "a"), log_of(start / "b")):
        assert all(abs(x[k] - y[k]) < 1e-4 * max(1, abs(x[k])) for k in x)


@pytest.mark.parametrize("change", ["append", "exchange", "weights"])
def test_a_run_is_not_resumed_on_other_data_or_from_other_weights(change, start):
    """Whatever the names say: more lines, the same lines in another order, other weights in the folder of --init."""
    settings = dict(**TINY, data=str(start / "mine.jsonl"), init=str(start / "start"), out=str(start / "a"), eval_n=0, steps=4)
    dpo.train(dpo.Config(**settings))
    lines = (start / "mine.jsonl").read_text().splitlines(keepends=True)
    message = f"--resume: --data={start}/mine.jsonl holds other data than when {start}/a was started"
    if change == "append":
        (start / "mine.jsonl").write_text("".join(lines + [line.replace("{", '{"id": 1, ', 1) for line in lines[:40]]))
    elif change == "exchange":
        (start / "mine.jsonl").write_text("".join(lines[::-1]))
    else:
        model, message = make_model(1, get_tokenizer("animals").n_vocab), f"--resume: --init names other weights than when {start}/a was started"
        save_checkpoint(str(start / "start"), 0, model, make_optimizer(model, 1e-3), sft.Config(), "animals")
    with pytest.raises(SystemExit) as error:
        dpo.train(dpo.Config(**settings, resume=True))
    assert str(error.value) == message


def test_a_model_trained_on_turns_is_asked_in_turns(start, monkeypatch, capsys):
    """By sample.py, by PPO on a file of plain prompts, and in the final table; --raw turns it off."""
    monkeypatch.chdir(start)
    shape = dict(n_layer=1, n_head=2, n_embd=16, device="cpu", steps=1, batch_size=4, init=str(start / "start"))
    records = [{"id": i, "messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "Yes."}]} for i in range(40)]
    (start / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (start / "plain.jsonl").write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(40)))
    sft.train(sft.Config(**shape, data="chat.jsonl", eval_n=0))
    assert load_checkpoint("out/sft-chat")["template"] == "turns"
    assert "chat.jsonl: fields that are not used: 'id'\n" in capsys.readouterr().out

    seen, t = [], get_tokenizer("animals")
    respond = evaluate.respond
    monkeypatch.setattr(evaluate, "respond", lambda model, ids, *rest, **more: seen.extend(map(t.decode, ids)) or respond(model, ids, *rest, **more))
    sample.main(["out/sft-chat", "--prompt=Hi"])
    sample.main(["out/sft-chat", "--prompt=Hi", "--raw"])
    sample.main([str(start / "start"), "--prompt=Hi"])
    assert seen == ["\n\nHuman: Hi\n\nAssistant:", "Hi", "Hi"]
    seen.clear()
    ppo.train(ppo.Config(**shape | dict(init="out/sft-chat"), data="plain.jsonl", eval_n=2, minibatches=1, max_new_tokens=4, ckpt_every=1),
              lambda prompts, responses: seen.extend(map(t.decode, prompts)) or [[0.0] * max(map(len, responses))] * len(responses))
    assert len(seen) == 8 and all(prompt.startswith("\n\nHuman: ") and prompt.endswith("?\n\nAssistant:") for prompt in seen)
    assert load_checkpoint("out/ppo-plain")["template"] == "turns"
    sample.main(["out/sft-chat", "--export=exported"])
    assert "its prompts are turns, such as '\\n\\nHuman: Hi\\n\\nAssistant:'" in capsys.readouterr().out


def test_an_sft_model_of_other_data_is_not_taken(start, monkeypatch):
    """Two files of one name; a file whose content changed; two subsets of one recipe."""
    monkeypatch.chdir(start)
    text = (start / "mine.jsonl").read_text()
    for folder, content in (("fish", text), ("birds", text.replace("0", "1"))):
        (start / folder).mkdir()
        (start / folder / "train.jsonl").write_text(content)
    shape = dict(n_layer=1, n_head=2, n_embd=16, device="cpu")
    monkeypatch.setattr(common.models, "dataset", lambda *args: animals)  # whose tokenizer need not be fetched
    sft.train(sft.Config(**shape, data="birds/train.jsonl", steps=1, batch_size=4, eval_n=0))
    with pytest.raises(SystemExit, match="^out/sft-train: this model was trained on another file than fish/train.jsonl is now; to use it all the same, "
                                         "name it with --init=out/sft-train; or train another: python sft.py --out=FOLDER …$"):
        dpo.train(dpo.Config(**shape, data="fish/train.jsonl", steps=1, batch_size=4, eval_n=0))
    dpo.train(dpo.Config(**shape, data="fish/train.jsonl", init="out/sft-train", steps=1, batch_size=4, eval_n=0))
    dpo.train(dpo.Config(**shape, data="birds/train.jsonl", out="out/b", steps=1, batch_size=4, eval_n=0))  # its own
    assert [run_dir("sft", sft.Config(recipe=recipe, data=data)) for recipe, data in
            (("hh", "hh"), ("hh", "hh/helpful-base"), ("animals", "animals"), ("animals", "tldr"))] == [
        "out/sft-hh", "out/sft-hh-helpful-base", "out/sft-animals", "out/sft-tldr"]


OPTIONS = {"finegrained": ["--data={start}/small_feedback.json", "--minibatches=2", "--max_new_tokens=8", "--soft"], "reward": ["--eval_n=20", "--k=2"], "simpo": ["--sft_weight=0.5", "--gamma_beta_ratio=0.3", "--sample_every=10", "--sample_n=2"], "ppo": ["--epochs=2", "--minibatches=2", "--max_new_tokens=8", "--kl_target=1", "--ptx_coef=0.1",
                                              "--stop_kl=0.05", "--sample_every=30"]}


def command(stage, start, out, *more):
    return [sys.executable, str(ROOT / f"{stage}.py"), f"--data={start}/mine.jsonl", f"--init={start}/start", f"--out={start}/{out}",
            *(f"--{k}={v}" for k, v in TINY.items()), "--max_len=64", "--warmup=2", "--steps=80", "--ckpt_every=7", "--eval_n=0", *(option.format(start=start) for option in OPTIONS.get(stage, [])),
            *([f"--reward_model={start}/reward"] if stage == "ppo" else []),
            *([f"--reward_models={start}/{out}-rewards", "--reward_steps=3", "--reward_batch_size=8"] if stage == "finegrained" else []), *more]


def here(stage, start, out, *more):
    """The same command in this process, which has torch imported already."""
    module = importlib.import_module(stage)
    module.train(parse(module.Config, module.RECIPES, command(stage, start, out, *more)[2:]))


def test_an_sft_run_that_was_cut_off_is_finished_before_it_is_used(tmp_path, monkeypatch, small_world, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sft.RECIPES, "animals", dict(steps=10, batch_size=8, eval_n=0, ckpt_every=5))
    real, stop = common.run.save_checkpoint, []

    def save_and_die(out, step, *args, **more):
        real(out, step, *args, **more)
        if not stop:
            stop.append(step)
            raise KeyboardInterrupt
    monkeypatch.setattr(common.run, "save_checkpoint", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        dpo.train(dpo.Config(**TINY, steps=2, eval_n=0))
    dpo.train(dpo.Config(**TINY, steps=2, eval_n=0))
    assert stop == [5] and [r["step"] for r in log_of("out/sft-animals")] == list(range(1, 11))


def two_processes(command):
    """Started as torchrun starts them, which would hide the exit code of each, and takes seconds to start itself."""
    env = os.environ | dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), OMP_NUM_THREADS="1")
    return [subprocess.Popen(command, env=env | dict(RANK=str(i), LOCAL_RANK=str(i)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for i in (0, 1)]


def under_torchrun(command):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.run(torchrun + command[1:], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def assert_one_run(a, b):
    """The logs of two runs and the weights they end with, within 1e-5."""
    logs = log_of(a), log_of(b)
    assert len(logs[0]) == len(logs[1]) == 6
    for x, y in zip(*logs):
        assert all(x[k] == y[k] or abs(x[k] - y[k]) < 1e-5 * max(1, abs(x[k])) for k in x), (x, y)
    a, b = (load_checkpoint(str(out)) for out in (a, b))
    for model in {"model", "value_model"} & set(a):
        for name, weight in a[model].items():
            if name.endswith("c_attn.bias"):  # no softmax sees a key's bias: its gradient is rounding alone, of which Adam makes a step
                weight, b[model][name] = (w[[*range(16), *range(32, 48)]] for w in (weight, b[model][name]))
            torch.testing.assert_close(weight, b[model][name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_sample_whole_groups(fsdp, start, server):
    """A prompt's responses are in one process's share, and the run is that of one process."""
    options = ["--steps=6", "--lr=1e-3", "--micro_tokens=60", "--advantage=rloo", "--k=2", "--minibatches=2"]
    here("ppo", start, "a", *options)
    on_two_processes(server, start, here, "ppo", start, "b", *options, f"--fsdp={fsdp}")
    assert_one_run(start / "a", start / "b")


@pytest.mark.parametrize("stage, fsdp", [("sft", False), ("dpo", False), ("ppo", False), ("sft", True), ("reward", True), ("ppo", True),
                                         ("dpo", True), ("simpo", True), ("finegrained", True)])
def test_two_processes_give_the_run_of_one(stage, fsdp, start, server):
    """Whole or sharded; and each goes on from the other's checkpoint."""
    (start / "small_feedback.json").write_text(json.dumps([feedback(question=f"{i}?") for i in range(40)]))
    options = ["--steps=6", "--ckpt_every=4", "--lr=1e-3", f"--micro_tokens={20 if stage == 'ppo' else 50}"]
    here(stage, start, "a", *options)
    if stage == "sft":  # a command like a user's, from its first import to its exit
        under_torchrun(command(stage, start, "b", *options, f"--fsdp={fsdp}"))
    else:
        on_two_processes(server, start, here, stage, start, "b", *options, f"--fsdp={fsdp}")
    assert_one_run(start / "a", start / "b")
    if fsdp:
        os.remove(start / "b/ckpt.pt")
        here(stage, start, "b", *options, "--resume")
        assert_one_run(start / "a", start / "b")
    if fsdp and stage in ("reward", "ppo"):  # the one sets its bias at the end, the other has two optimizers
        shutil.copytree(start / "a", start / "c")
        os.remove(start / "c/ckpt.pt")
        on_two_processes(server, start, here, stage, start, "c", *options, "--fsdp=True", "--resume")
        assert_one_run(start / "a", start / "c")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public files are not beside the checkout")
def test_dpo_on_real_comparisons(tmp_path):
    path = SHARED / "hh-rlhf/harmless-base/test.jsonl.gz"
    dpo.train(dpo.Config(**TINY | {"batch_size": 4}, data=str(path), init="scratch", out=str(tmp_path), max_len=256, steps=3, eval_n=2))
    assert len(log_of(tmp_path)) == 3
    rows = json.load(open(tmp_path / "eval.json"))
    assert rows[0]["gold"] is None and rows[1]["kl"] > 0


# ------------------------------------------------------------------------------------------------ evaluate.py

def test_evaluate_command_line(start, small_world, capsys):
    folder = str(start / "start")
    evaluate.main([folder, folder, "--n=12", f"--json={start}/rows.json"])
    assert "12 held-out prompts" in capsys.readouterr().out
    rows = json.load(open(start / "rows.json"))
    assert len(rows) == 2 and rows[0] == rows[1]
    evaluate.main([folder, folder, folder, "--n=12", "--mean", f"--json={start}/rows.json"])
    *_, row, mean = json.load(open(start / "rows.json"))
    assert mean["checkpoint"] == "mean of 2" and mean["gold"] == pytest.approx(row["gold"]) and mean["gold_se"] == pytest.approx(0)
    capsys.readouterr()
    sample.main([folder, "--prompt=Tell me about the owl: what it eats and how it moves."])
    assert capsys.readouterr().out.startswith(folder + ": ")


def test_exact_kl_by_enumeration():
    """KL per position summed over sampled responses averages to Σ_y π(y|x) log π/π_ref (y|x) over all 9 responses."""
    policy, ref_policy = (make_model(seed, vocab_size=3, block_size=3, n_layer=1, scale=8.0) for seed in (0, 1))
    responses = [list(r) for r in product(range(3), repeat=2)]
    batch = pack([([0], responses)], 19)
    with torch.no_grad():
        logp, ref_logp = per_sequence(policy.logprobs(batch), batch), per_sequence(ref_policy.logprobs(batch), batch)
        kl = evaluate.exact_kl(policy, ref_policy, [[0]] * 9, responses)
    torch.testing.assert_close((logp.exp() * kl).sum(), (logp.exp() * (logp - ref_logp)).sum())
    assert (evaluate.exact_kl(policy, policy, [[0]] * 9, responses) == 0).all()
