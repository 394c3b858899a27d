"""Runs interrupted, disks full, checkpoints damaged, losses that cannot fall: nothing is lost, nothing goes on in silence."""
import importlib
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import feedback
from test_stages import TINY, command, here, log_of, two_processes

import common.run
import common.stop
import dpo
import evaluate
import finegrained
import ppo
import reward
import segment_reward
import sft
from common.checkpoints import checkpoint_files, load_checkpoint
from common.log import SampleFile
from common.models import load_model
from common.optim import PATIENCE
from common.options import parse
from common.run import Run
from common.scoring import scores_of_responses
from data import check_pairs, dataset, encode_groups, get_tokenizer

STAGES = ["sft", "reward", "ppo", "dpo", "simpo", "finegrained"]


def settings(start, out, **options):
    return dpo.Config(**TINY | dict(data=str(start / "mine.jsonl"), init=str(start / "start"), out=str(start / out), steps=20, ckpt_every=5, eval_n=0) | options)


def lines(log):
    return log.read_text().count("\n") if log.exists() else 0


def wait_for(log, n, process):
    """Until the log has n lines."""
    while lines(log) < n:
        time.sleep(0.005)
        assert (process.poll() if isinstance(process, subprocess.Popen) else process.exitcode) is None


# ------------------------------------------------------------------------------------------------ signals

def quietly(*args):
    sys.stdout = open(os.devnull, "w")
    here(*args)


def begin(server, *args):
    process = server.Process(target=quietly, args=args)
    process.start()
    return process


def end(process, number):
    os.kill(process.pid, number)
    process.join()
    return process.exitcode


def equal(x, y):
    """Of checkpoints and what they hold: to the bit."""
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(equal(x[key], y[key]) for key in x)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(equal, x, y))
    return torch.equal(x, y) if torch.is_tensor(x) else x == y


def same_run(a, b):
    """Logs, samples and all that the last checkpoints hold: weights, optimizers, random state, controller."""
    assert log_of(a) == log_of(b)
    a_state, b_state = (load_checkpoint(str(out)) | {"config": None} for out in (a, b))
    assert equal(a_state, b_state)
    samples = [(out / "samples.txt").read_text() if (out / "samples.txt").exists() else None for out in (a, b)]
    assert samples[0] == samples[1]


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_is_killed_again_and_again_is_the_run_that_was_not(stage, start, server):
    """kill -9 at three random moments, whatever the run is doing then, and a SIGTERM, after which no step is lost."""
    rng, a, b = random.Random(stage), start / "a", start / "b"
    steps = 24 if stage in ("ppo", "finegrained") else 100  # the others' are short
    more = [f"--steps={steps}", "--ckpt_every=3", *(["--reward_steps=120"] if stage == "finegrained" else [])]
    (start / "small_feedback.json").write_text(json.dumps([feedback(question=f"{i}?") for i in range(40)]))
    here(stage, start, "a", *more)

    def go_on():
        return begin(server, stage, start, "b", *more, *["--resume"] * bool(checkpoint_files(str(b))))
    if stage == "finegrained":  # the reward models come first; their checkpoint at step 100 is what they go on from
        process = go_on()
        wait_for(start / "b-rewards" / "log.jsonl", rng.randrange(101, 106), process)
        assert end(process, signal.SIGKILL) == -signal.SIGKILL and load_checkpoint(str(start / "b-rewards"))["step"] >= 100
    for n in sorted(rng.sample(range(3 * steps // 4), 3)):
        process = go_on()
        wait_for(b / "log.jsonl", n, process)
        time.sleep(0.05 * rng.random())
        assert end(process, signal.SIGKILL) == -signal.SIGKILL
    before, process = lines(b / "log.jsonl"), go_on()
    wait_for(b / "log.jsonl", before + 2, process)  # from the end of a run's first step on, it listens
    assert end(process, signal.SIGTERM) == 128 + signal.SIGTERM
    assert before < load_checkpoint(str(b))["step"] == lines(b / "log.jsonl") < steps
    last = go_on()
    last.join()
    assert last.exitcode == 0 and lines(b / "log.jsonl") == steps
    same_run(a, b)
    if stage == "finegrained":
        same_run(start / "a-rewards", start / "b-rewards")


def test_a_reward_model_is_centred_once(start):
    """A run that ended between its last checkpoint and its table goes on with the table alone."""
    here("reward", start, "a", "--steps=3")
    before = load_checkpoint(str(start / "a"))
    (start / "a" / "eval.json").unlink()
    here("reward", start, "a", "--steps=3", "--resume")
    assert equal(before, load_checkpoint(str(start / "a"))) and (start / "a" / "eval.json").exists()


def test_two_processes_stop_at_one_step_and_speak_with_one_voice(start):
    """One of the two gets the signal."""
    argv = command("dpo", start, "b", "--steps=2000", "--ckpt_every=5000", "--max_len=8")
    processes = two_processes(argv)
    wait_for(start / "b" / "log.jsonl", 5, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    out, nothing = (process.communicate(timeout=60)[0] for process in processes)
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2
    step = load_checkpoint(str(start / "b"))["step"]
    assert 5 <= step == lines(start / "b" / "log.jsonl") < 2000 and checkpoint_files(str(start / "b")) == [str(start / "b" / "ckpt.pt")]
    assert nothing == "" and out.count("cut to max_len=8") == 1
    assert f"stopped after step {step}; continue with: torchrun --nproc_per_node=2 {argv[1]} " in out


def test_a_signal_that_comes_while_the_processes_ask_each_other_counts_at_the_next_step(start, monkeypatch):
    """Or this process would stop alone, or never."""
    run = Run("dpo", settings(start, "a", steps=9, ckpt_every=100))
    run.tokenizer = get_tokenizer("animals")
    saved = []
    monkeypatch.setattr(common.run, "save_checkpoint", lambda out, step, *args, **more: saved.append(step))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(common.stop.dist, "get_backend", lambda: "gloo")

    def signal_meanwhile(tensor):
        run.stop_signal.received = signal.SIGTERM
        return tensor
    monkeypatch.setattr(common.stop, "all_reduce", signal_meanwhile)
    run.save_if_due(1, None, None)
    assert saved == [] and run.stop_signal.agreed is None
    listens = run.stop_signal.on_signal
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == listens
    monkeypatch.setattr(common.stop, "all_reduce", lambda tensor: tensor)
    with pytest.raises(SystemExit) as error:
        run.save_if_due(2, None, None)
    assert saved == [2] and error.value.code == 128 + signal.SIGTERM
    assert run.stop_signal.agreed == signal.SIGTERM
    run.stop_signal.received = None
    run.save_if_due(9, None, None)  # the last step; signals mean what they mean again
    assert saved == [2, 9] and run.stop_signal.agreed is None
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_signal_saves_and_says_how_to_go_on(start):
    stage, number = "dpo", signal.SIGINT  # as Ctrl-C
    process = subprocess.Popen(command(stage, start, "b", "--ckpt_every=1000"), stdout=subprocess.PIPE, text=True)
    wait_for(start / "b" / "log.jsonl", 5, process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    step = load_checkpoint(str(start / "b"))["step"]
    assert step == len(log_of(start / "b")) and 5 <= step < 80  # no step lost
    last = out.splitlines()[-1]
    assert last.startswith(f"stopped after step {step}; continue with: python ")
    assert last.endswith(" --resume")
    done = log_of(start / "b")
    here(stage, start, "b", "--ckpt_every=1000", "--resume")
    log = log_of(start / "b")
    assert log[:step] == done and [r["step"] for r in log] == list(range(1, 81))


def test_a_second_signal_ends_at_once(start, server):
    process = begin(server, "dpo", start, "b")
    wait_for(start / "b" / "log.jsonl", 5, process)
    os.kill(process.pid, signal.SIGTERM)
    assert end(process, signal.SIGTERM) in (128 + signal.SIGTERM, -signal.SIGTERM)


# ------------------------------------------------------------------------------------------------ checkpoints that are damaged

def damage(path, how, rng):
    whole = path.read_bytes()
    if how == "cut short":
        path.write_bytes(whole[:rng.randrange(len(whole))])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flipped":
        flipped = bytearray(whole)
        for i in rng.sample(range(len(whole)), max(1, len(whole) // 100)):
            flipped[i] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
    else:
        os.remove(path)


@pytest.mark.parametrize("how", ["cut short", "empty", "flipped", "gone"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(how, start, monkeypatch, capsys):
    policy = dpo.train(settings(start, "a"))
    real = common.run.save_checkpoint

    def save_and_die(out, step, *args, **more):
        real(out, step, *args, **more)
        if step == 15:
            raise KeyboardInterrupt
    monkeypatch.setattr(common.run, "save_checkpoint", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        dpo.train(settings(start, "b"))
    monkeypatch.setattr(common.run, "save_checkpoint", real)
    assert sorted(p.name for p in (start / "b").glob("*.pt*")) == ["ckpt-previous.pt", "ckpt.pt"]  # the last two, no more
    damage(start / "b" / "ckpt.pt", how, random.Random(0))
    assert load_checkpoint(str(start / "b"))["step"] == 10
    capsys.readouterr()
    resumed = dpo.train(settings(start, "b", resume=True))
    if how != "gone":
        out = capsys.readouterr().out
        assert "b/ckpt.pt: not a checkpoint of this repository, or damaged" in out
        assert "using the one before it" in out
    assert log_of(start / "a") == log_of(start / "b")
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), resumed.parameters()))


def test_two_damaged_checkpoints_are_an_error(start):
    dpo.train(settings(start, "a"))
    for path in checkpoint_files(str(start / "a")):
        os.truncate(path, 100)
    with pytest.raises(SystemExit, match="a/ckpt-previous.pt: not a checkpoint of this repository, or damaged") as error:
        dpo.train(settings(start, "a", resume=True))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ disks that are full

@pytest.fixture
def disk(capsys):
    """disk(n): no file of this process can grow beyond n bytes. (capsys: else what is printed goes to a file as well.)"""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n=before[0]: resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refused(path, run, *args):
    """run(*args) ends with one line about `path`."""
    with pytest.raises(SystemExit) as error:
        run(*args)
    assert str(error.value).startswith(f"{path}: cannot be written (") and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name, module, call, n, room, step", [
    ("ckpt.pt", Run, "save_if_due", 10, 20_000, 5), ("ckpt.pt", Run, "save_if_due", 15, 100, 10),
    ("log.jsonl", common.run, "lr_schedule", 13, None, 10), ("eval.json", evaluate, "compare", 1, 64, 20),
    ("samples.txt", SampleFile, "show", 3, None, 15)])
def test_a_full_disk_leaves_what_was_whole_and_the_run_goes_on_from_there(name, module, call, n, room, step, start, disk, monkeypatch):
    """The disk is full from the n-th call of module.call on: `room` is the most a file can have; None: half a line more."""
    stage, a = ("ppo" if module is SampleFile else "dpo"), start / "a"
    more = ["--steps=20", "--ckpt_every=5", "--eval_n=3"] + ["--sample_every=8"] * (stage == "ppo")
    real, calls = getattr(module, call), []

    def fill(*args, **kw):
        calls.append(1)
        if len(calls) == n:
            disk(room or (a / name).stat().st_size + 50)
        return real(*args, **kw)
    monkeypatch.setattr(module, call, fill)
    assert "File too large" in refused(a / name, here, stage, start, "a", *more)
    disk()
    assert load_checkpoint(str(a))["step"] == step and not list(a.glob("*.tmp"))
    assert all(path.read_text().endswith("\n") for path in (a / "log.jsonl", a / "samples.txt") if path.exists())  # no half lines
    here(stage, start, "a", *more, "--resume")
    here(stage, start, "b", *more)
    same_run(a, start / "b")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_no_space_left_on_the_device(start):
    (start / "a").mkdir()
    os.symlink("/dev/full", start / "a" / "ckpt.pt.tmp")
    message = refused(start / "a" / "ckpt.pt", here, "dpo", start, "a", "--steps=5")
    assert "([Errno 28] No space left on device); what was there before is untouched. " \
           "Make room or name another place; a run continues with --resume" in message
    assert os.listdir(start / "a") == ["log.jsonl"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_that_cannot_be_written_is_named_before_any_work(stage, start, monkeypatch):
    """In place of the folder a file, a file above it, a folder in place of the log, a file system that takes no files."""
    monkeypatch.chdir(start)
    (start / "taken" / "log.jsonl").mkdir(parents=True)
    module = importlib.import_module(stage)
    for out in ("mine.jsonl", "mine.jsonl/below", "taken", "/proc/none"):
        refused(f"{out}/log.jsonl", module.train, module.Config(**TINY, out=out))
    assert not (start / "out").exists()  # where the models that come before it would be trained


# ------------------------------------------------------------------------------------------------ losses that cannot fall

def test_a_gradient_that_is_not_finite_is_skipped_counted_and_said(start, monkeypatch, capsys):
    real, calls = dpo.dpo_loss, []

    def loss(*args):
        calls.append(1)
        value, *rewards = real(*args)
        return (value * float("nan") if bad(len(calls)) else value), *rewards
    monkeypatch.setattr(dpo, "dpo_loss", loss)
    bad = {3, 4, 9}.__contains__
    policy = dpo.train(settings(start, "a", steps=30))
    out = capsys.readouterr().out
    assert out.count("skipped a step: its gradient is not finite (1 in a row)") == 2 and out.count("(2 in a row)") == 1
    assert all(p.isfinite().all() for p in policy.parameters())
    log = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in open(start / "a" / "log.jsonl")]
    assert [r["step"] for r in log if r["grad_norm"] is None] == [3, 4, 9] and [r["step"] for r in log if r["loss"] is None] == [3, 4, 9]
    calls.clear()
    bad = (12).__le__
    with pytest.raises(SystemExit, match=f"{PATIENCE} gradients in a row were not finite: lower --lr .now"):
        dpo.train(settings(start, "a", steps=30, overwrite=True))
    assert len(calls) == 11 + PATIENCE


def pairs(path, same, n=60):
    """A file of comparisons; those that are identical are among the 54 of the training split."""
    records = [{"prompt": f"{i}:", "chosen": " yes", "rejected": " yes" if i in same else " no"} for i in range(n)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize("stage", ["dpo", "simpo", "reward"])
def test_identical_pairs_are_counted_and_said_once(stage, start, capsys):
    pairs(start / "mine.jsonl", range(2, 14))
    here(stage, start, "a", "--steps=1")
    assert capsys.readouterr().out.count("12 of 54 pairs are identical, as cut to max_len=64: no loss can order them\n") == 1
    pairs(start / "mine.jsonl", range(60))
    with pytest.raises(SystemExit, match="mine.jsonl: all 54 pairs are identical, as cut to --max_len=64: there is nothing to learn"):
        here(stage, start, "a", "--steps=1", "--overwrite")


def test_pairs_that_are_cut_to_the_same_and_ranks_that_all_tie(start):
    text = "".join(json.dumps({"prompt": "?", "chosen": " no" * 9 + end, "rejected": " no" * 9}) + "\n" for end in [" yes"] * 60)
    (start / "mine.jsonl").write_text(text)
    with pytest.raises(SystemExit, match="all 54 pairs are identical, as cut to --max_len=8"):
        here("dpo", start, "a", "--max_len=8")
    groups = [(torch.tensor([1]).numpy(), [torch.tensor([i]).numpy() for i in (2, 2, 3)])]
    check_pairs(groups, [[0, 0, 1]], 64, "animals")
    with pytest.raises(SystemExit, match="--data=animals: all responses tie: there is nothing to learn from them"):
        check_pairs(groups, [[0, 0, 0]], 64, "animals")


def test_feedback_without_a_mark_or_with_nothing_else_is_said(start, capsys):
    whole = [{"error type": "Irrelevant", "start": 0, "end": 19}]
    for errors, said in (
            ([], ["no segment of {} is flagged as Irrelevant or Redundant or Incoherent: the", "no segment of {} is flagged as Wrong-Grounding"]),
            (whole, ["every segment of {} is flagged as Irrelevant", "no segment of {} is flagged as Wrong-Grounding or Unverifiable"])):
        path = start / "small_feedback.json"
        path.write_text(json.dumps([feedback(question=f"{i}?", errors=errors) for i in range(40)]))
        cfg = reward.Config(**TINY | dict(data=str(path), out=str(start / f"r{len(errors)}"), steps=1))
        segment_reward.train_rewards(cfg, str(start / "start"), list(segment_reward.AXES))
        out = capsys.readouterr().out
        assert all(out.count(line.format(path)) == 1 for line in said), out
    r = feedback()
    r["feedback"]["corrected-prediction"] = r["prediction 1"]
    path.write_text(json.dumps([r] * 40))
    with pytest.raises(SystemExit, match="all 32 pairs are identical"):
        segment_reward.train_rewards(replace(cfg, overwrite=True), str(start / "start"), list(segment_reward.AXES))


def test_a_learning_rate_of_0_is_said_and_changes_nothing(start, capsys):
    argv = command("ppo", start, "a", "--steps=2", "--lr=0")[2:]
    policy = ppo.train(parse(ppo.Config, ppo.RECIPES, argv))
    assert capsys.readouterr().out.count("--lr=0: the weights that it applies to will not change\n") == 1
    before, after = load_model(str(start / "start"))[0].state_dict(), policy.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


# ------------------------------------------------------------------------------------------------ more steps

def test_dpo_with_more_steps_knows_the_reference_of_every_pair(start, monkeypatch):
    """Twenty steps visit pairs that four have not; a resumed run has a policy that is not the reference."""
    real = Run.precompute_logp
    found = []

    def precompute_logp(*args):
        found.append(real(*args))
        return found[-1]

    monkeypatch.setattr(Run, "precompute_logp", precompute_logp)
    here("dpo", start, "a", "--steps=4")
    here("dpo", start, "a", "--steps=20", "--resume")
    here("dpo", start, "b", "--steps=20")
    few, resumed, straight = found
    assert torch.equal(resumed, straight) and few.count_nonzero() < straight.count_nonzero()
    assert load_checkpoint(str(start / "a"))["step"] == lines(start / "a" / "log.jsonl") == 20


def test_a_reward_model_with_more_steps_is_centered_again(start):
    here("reward", start, "a", "--steps=3", "--eval_n=20")
    here("reward", start, "a", "--steps=9", "--eval_n=20", "--resume")
    checkpoint = load_checkpoint(str(start / "a"))
    assert checkpoint["step"] == 9 and lines(start / "a" / "log.jsonl") == 9
    model, tokenizer = load_model(str(start / "a"), require_policy=False)
    demonstrations = dataset(str(start / "mine.jsonl")).demonstrations("train")
    groups = encode_groups(tokenizer, [(prompt, [response]) for prompt, response in demonstrations], 64)
    scores = scores_of_responses(model, groups)
    assert scores.mean().abs() < 1e-5 and math.isclose(checkpoint["score_std"], scores.std().item(), rel_tol=1e-4)


@pytest.mark.parametrize("stage", ["sft", "dpo", "simpo", "ppo"])
def test_no_policy_starts_from_a_reward_model(stage, start):
    with pytest.raises(SystemExit, match="a reward model, which scores text and cannot write it"):
        here(stage, start, "a", f"--init={start}/reward")


def test_settings_are_compared_before_a_prerequisite_is_trained(start, monkeypatch):
    monkeypatch.chdir(start)
    here("dpo", start, "a", "--steps=2")
    with pytest.raises(SystemExit, match="was started with --init=.*, not None"):
        dpo.train(parse(dpo.Config, dpo.RECIPES, [f"--out={start}/a", "--resume", "--init=None"]))
    assert not (start / "out").exists()


@pytest.mark.parametrize("page", [ppo, finegrained])
def test_a_run_that_found_its_models_by_itself_goes_on_without_naming_them(page, tmp_path, monkeypatch, small_world):
    """As the command that a stopped run prints: --resume, and nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sft.RECIPES, "animals", dict(steps=20, batch_size=8, eval_n=0))
    monkeypatch.setitem(reward.RECIPES, "animals", dict(steps=5, batch_size=8, eval_n=4))
    options = TINY | dict(minibatches=2, eval_n=0) | (dict(reward_steps=3, reward_batch_size=8) if page is finegrained else {})
    page.train(page.Config(**options, steps=2))
    page.train(page.Config(**options, steps=3, resume=True))
    out, = Path("out").glob(f"{page.__name__}-animals")
    assert load_checkpoint(str(out))["step"] == 3 == lines(out / "log.jsonl")
    if page is ppo:  # another reward model than it found is refused
        with pytest.raises(SystemExit, match="was started with --reward_model=out/reward-animals, not other"):
            shutil.copytree("out/reward-animals", "other")
            page.train(page.Config(**options, steps=4, resume=True, reward_model="other"))
