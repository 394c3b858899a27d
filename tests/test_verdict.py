"""Was a run good? Held-out preferences before and after, scores and win rates, and folders that say what is in them."""
import importlib
import io
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from test_datasets import needs_gpt2
from test_stages import ROOT, here

import dpo
import evaluate
import ppo
import reward
import simpo
from common.checkpoints import load_checkpoint
from common.models import load_model
from common.options import RunConfig, parse
from common.preferences import calibration_slope, differences, preference_row
from common.run import Run
from common.scoring import logp_of_responses
from data import check_contract, dataset, encode_groups, get_tokenizer
from data.schema import Comparison

PLAIN = SimpleNamespace()  # data whose true reward is not known


def test_the_row_by_hand():
    comparisons = [Comparison("a", ["x", "y"], [0, 1]), Comparison("b", ["x", "y", "z"], [1, 0, 1]), Comparison("c", ["x", "y"], [0, 0])]
    rewards = torch.tensor([2.0, 1.0, 0.5, 1.0, 1.0, 7.0, 9.0])  # r_w − r_l: 1; 0.5 and 0; a tie in rank is no pair
    row = preference_row("m", rewards, comparisons, PLAIN)
    nll = [-math.log(1 / (1 + math.exp(-d))) for d in (1.0, 0.5, 0.0)]
    assert row["accuracy"] == pytest.approx((1 + (1 + 0.5) / 2) / 2)
    assert row["margin"] == pytest.approx((1 + 0.25) / 2)
    assert row["log_loss"] == pytest.approx((nll[0] + (nll[1] + nll[2]) / 2) / 2)
    assert row["margin_se"] == pytest.approx(abs(1 - 0.25) / 2) and row["slope"] is None and "ceiling" not in row


def test_the_slope_is_where_the_log_loss_is_smallest():
    """Rewards of the right scale have slope 1, half of them slope 2, and their negatives slope −1."""
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(40_000, generator=generator, dtype=torch.float64)
    is_first = torch.rand(40_000, generator=generator, dtype=torch.float64) < d.sigmoid()
    d = torch.where(is_first, d, -d)
    s = calibration_slope([d])
    assert s == pytest.approx(1.0, abs=0.04)
    at = [-F.logsigmoid(d * factor).mean().item() for factor in (s - 0.02, s, s + 0.02)]
    assert at[1] < at[0] and at[1] < at[2]
    assert calibration_slope([d / 2]) == pytest.approx(2 * s) and calibration_slope([-d]) == pytest.approx(-s)
    assert calibration_slope([d.abs()]) is None and calibration_slope([d * 0]) is None


def test_differences_follow_the_ranks():
    comparisons = [Comparison("a", ["x", "y", "z"], [2, 0, 1])]
    (d,) = differences(torch.tensor([1.0, 5.0, 2.0]), comparisons)
    assert sorted(d.tolist()) == [1.0, 3.0, 4.0]


@pytest.mark.parametrize("stage", ["dpo", "simpo", "reward"])
def test_a_stage_ends_with_a_verdict(stage, start, capsys):
    here(stage, start, "a", "--steps=20", "--lr=3e-3", "--eval_n=40")
    out = capsys.readouterr().out
    assert "held-out comparisons" in out and "accuracy" in out and "margin" in out and "log_loss" in out
    before, after = json.load(open(start / "a/eval.json"))
    for key in ("accuracy", "margin", "log_loss"):
        assert before[key + "_se"] is not None and after[key + "_se"] is not None
    if stage == "dpo":  # its rewards are all 0 before
        assert (before["accuracy"], before["margin"], before["log_loss"]) == pytest.approx((0.5, 0.0, math.log(2)))
    assert after["log_loss"] < before["log_loss"] and after["margin"] > before["margin"]


def test_the_verdict_of_dpo_and_simpo_is_about_their_rewards(start):
    """By hand from the two checkpoints, and the same after a resume with nothing left to do."""
    data, tokenizer = dataset(str(start / "mine.jsonl")), get_tokenizer("animals")
    held_out = data.comparisons("validation")
    groups = encode_groups(tokenizer, [(c.prompt, c.responses) for c in held_out], 64)
    reference = load_model(str(start / "start"))[0]
    for stage, cfg in (("dpo", dpo.Config()), ("simpo", simpo.Config())):
        here(stage, start, stage, "--steps=12", "--lr=3e-3", "--eval_n=40")
        rows = json.load(open(start / stage / "eval.json"))
        here(stage, start, stage, "--steps=12", "--lr=3e-3", "--eval_n=40", "--resume")
        again = json.load(open(start / stage / "eval.json"))
        config = load_checkpoint(str(start / stage))["config"]
        policy = load_model(str(start / stage))[0]
        logp, ref_logp = logp_of_responses(policy, groups), logp_of_responses(reference, groups)
        lengths = torch.tensor([len(response) for _, responses in groups for response in responses])
        rewards = config["beta"] * (logp - ref_logp if stage == "dpo" else logp / lengths)
        expected = preference_row(str(start / stage), rewards, held_out, data)
        for row in (rows[1], again[1]):
            assert all(row[key] == pytest.approx(value, rel=1e-4, abs=1e-6) for key, value in expected.items() if isinstance(value, float))
        assert rows[0]["margin"] == again[0]["margin"]


@pytest.mark.parametrize("stage", ["dpo", "simpo"])
def test_with_a_reward_model_there_are_scores_and_win_rates(stage, start):
    here(stage, start, "a", "--steps=2", "--eval_n=20", f"--reward_model={start}/reward")
    for row in json.load(open(start / "a/eval.json")):
        assert row["gold"] is None and row["score"] is not None and 0 <= row["win_rate"] <= 1 and row["win_rate_se"] is not None
    here(stage, start, "b", "--steps=2", "--eval_n=20")
    assert all(row["win_rate"] is None and row["score"] is None for row in json.load(open(start / "b/eval.json")))


def test_a_reward_model_that_is_missing_is_missed_before_any_step(start):
    with pytest.raises(SystemExit, match="nowhere/ckpt.pt: no checkpoint there|nowhere: no checkpoint there"):
        here("dpo", start, "a", f"--reward_model={start}/nowhere")
    assert not (start / "a").exists()


# ------------------------------------------------------------------------------------------- folders, contract

@pytest.mark.parametrize("options, has_reward_fn, name", [
    ({}, False, "ppo"), (dict(reward="gold"), False, "ppo-gold"), (dict(advantage="rloo", k=8), False, "rloo"),
    (dict(advantage="grpo", k=8, reward="gold"), False, "grpo-gold"), (dict(reward="gold"), True, "ppo")])
def test_runs_with_unlike_settings_have_folders_of_their_own(options, has_reward_fn, name):
    assert ppo.stage_name(ppo.Config(**options), print if has_reward_fn else None) == name


def test_the_true_reward_has_a_folder_of_its_own(start, small_world, monkeypatch):
    monkeypatch.chdir(start)
    cfg = ppo.Config(init=str(start / "start"), reward="gold", steps=1, batch_size=4, minibatches=1, max_new_tokens=4, eval_n=0, device="cpu")
    ppo.train(cfg)
    assert (start / "out/ppo-gold-animals/ckpt.pt").exists() and not (start / "out/ppo-animals").exists()


def test_a_dataset_of_ones_own_needs_no_more_than_the_contract_says(start, small_world):
    """A true reward without axes or grammar makes a table; what a stage needs is missed when it starts."""
    animals = dataset("animals")
    data = SimpleNamespace(prompts=animals.prompts, gold=animals.gold, tokenizer=animals.tokenizer)
    model = load_model(str(start / "start"))[0]
    rows, _, _, _ = evaluate.compare([("a", model)], data, animals.tokenizer(), 5)
    assert rows[0]["gold"] is not None and rows[0]["win_rate"] is not None and rows[0]["relevance"] is rows[0]["grammar"] is None
    check_contract(data, "ppo", "mine")
    for stage, missing in (("sft", "demonstrations"), ("dpo", "comparisons"), ("reward", "comparisons")):
        with pytest.raises(SystemExit, match=f"--data=mine: {stage} needs its function {missing}"):
            check_contract(data, stage, "mine")
    with pytest.raises(SystemExit, match="--data=mine: ppo needs its function tokenizer"):
        check_contract(SimpleNamespace(prompts=animals.prompts), "ppo", "mine")


def test_a_stage_that_the_data_cannot_serve_makes_no_folder(start, monkeypatch):
    import common.run
    monkeypatch.setattr(common.run, "dataset", lambda name, data_dir: SimpleNamespace(prompts=print, tokenizer=print))
    with pytest.raises(SystemExit, match="--data=animals: dpo needs its function comparisons"):
        Run("dpo", RunConfig(out=str(start / "a")))
    assert not (start / "a").exists() and reward.RECIPES["hh"]["k"] == 2


# --------------------------------------------------------------------------------- the practitioner's path of docs/data.md

def commands_of_the_docs():
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    section = text[text.index("## From a file to a verdict"):]
    return [line.strip() for line in section.split("\n") if line.startswith("    python ")]


def some_records(kind):
    for i in range(200):
        good, bad = f"It is {i + 1}.", "I do not know" + " at all" * (i % 3)
        question = f"What comes after {i}?"
        if kind == "plain":
            yield {"prompt": question, "chosen": " " + good, "rejected": " " + bad}
        elif kind == "ranked":
            yield {"prompt": question, "responses": [" " + good, " It is.", " " + bad], "ranks": [0, 1, 1]}
        else:
            user = {"role": "user", "content": question}
            yield {"prompt": question, "chosen": [user, {"role": "assistant", "content": good}], "rejected": [user, {"role": "assistant", "content": bad}]}


@needs_gpt2
@pytest.mark.parametrize("kind", ["plain", "chat", "ranked"])
def test_from_a_file_to_a_verdict(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_model(vocab_size=50257, block_size=64, n_layer=1, n_head=2, n_embd=16).save_pretrained("small-gpt2")
    with open("mine.jsonl", "w") as f:
        f.writelines(json.dumps(record) + "\n" for record in some_records(kind))
    monkeypatch.setattr("sys.stdin", io.StringIO("What comes after 7?\nAnd then?\n"))
    commands = commands_of_the_docs()
    assert len(commands) == 6
    for command in commands:
        script, *argv = command.replace("=gpt2", "=small-gpt2").removeprefix("python ").split()
        module = importlib.import_module(script.removesuffix(".py"))
        if script in ("evaluate.py", "sample.py"):
            module.main(argv)
        else:
            argv += ["--max_len=32", "--steps=20", "--batch_size=16", "--lr=1e-2", "--warmup=2", "--eval_n=10"]
            module.train(parse(module.Config, module.RECIPES, argv))
    out = capsys.readouterr().out
    assert out.count("the first example") == 3 and "warning:" not in out
    rows = json.load(open("out/dpo-mine/eval.json"))
    assert rows[1]["accuracy"] > rows[0]["accuracy"] == 0.5 and None not in (rows[1]["score"], rows[1]["win_rate"])
    assert load_checkpoint("out/dpo-mine")["template"] == ("turns" if kind == "chat" else "plain")
    assert out.count("out/sft-mine: ") == 2 == out.count("out/dpo-mine: ") and (tmp_path / "mine-for-transformers/config.json").exists()
