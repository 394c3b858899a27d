"""Runs that are interrupted, checkpoints that are damaged, gradients that are not finite: nothing is lost, nothing goes on in silence."""
import json
import os
import random
import signal
import subprocess
import time

import pytest
import torch
from test_stages import TINY, command, log_of

import common
import dpo
from common import checkpoint_files, load_checkpoint


def settings(start, out, **options):
    return dpo.Config(**TINY | dict(data=str(start / "mine.jsonl"), init=str(start / "start"), out=str(start / out), steps=20, ckpt_every=5, eval_n=0) | options)


def wait_for(log, lines, process):
    while not log.exists() or log.read_text().count("\n") < lines:
        time.sleep(0.01)
        assert process.poll() is None


@pytest.mark.parametrize("stage, number", [("dpo", signal.SIGINT), ("ppo", signal.SIGTERM)])
def test_a_signal_saves_and_says_how_to_go_on(stage, number, start):
    process = subprocess.Popen(command(stage, start, "b", "--ckpt_every=1000"), stdout=subprocess.PIPE, text=True)
    wait_for(start / "b" / "log.jsonl", 5, process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    step = load_checkpoint(str(start / "b"))["step"]
    assert step == len(log_of(start / "b")) and 5 <= step < 80  # no step lost
    last = out.splitlines()[-1]
    assert last.startswith(f"stopped after step {step}; go on with: python ") and last.endswith(" --resume")
    done = log_of(start / "b")
    again = subprocess.run(command(stage, start, "b", "--ckpt_every=1000", "--resume"), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    log = log_of(start / "b")
    assert log[:step] == done and [r["step"] for r in log] == list(range(1, 81))


def test_a_second_signal_ends_at_once(start):
    process = subprocess.Popen(command("dpo", start, "b"), stdout=subprocess.DEVNULL)
    wait_for(start / "b" / "log.jsonl", 5, process)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) in (128 + signal.SIGTERM, -signal.SIGTERM)


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
    real = dpo.save_checkpoint

    def save_and_die(out, step, *args, **more):
        real(out, step, *args, **more)
        if step == 15:
            raise KeyboardInterrupt
    monkeypatch.setattr(dpo, "save_checkpoint", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        dpo.train(settings(start, "b"))
    monkeypatch.setattr(dpo, "save_checkpoint", real)
    assert sorted(p.name for p in (start / "b").glob("*.pt*")) == ["ckpt-previous.pt", "ckpt.pt"]  # the last two, no more
    damage(start / "b" / "ckpt.pt", how, random.Random(0))
    assert load_checkpoint(str(start / "b"))["step"] == 10
    capsys.readouterr()
    resumed = dpo.train(settings(start, "b", resume=True))
    if how != "gone":
        out = capsys.readouterr().out
        assert "b/ckpt.pt: not a checkpoint of this repository, or damaged" in out and "taking the one before it" in out
    assert log_of(start / "a") == log_of(start / "b")
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), resumed.parameters()))


def test_two_damaged_checkpoints_are_an_error(start):
    dpo.train(settings(start, "a"))
    for path in checkpoint_files(str(start / "a")):
        os.truncate(path, 100)
    with pytest.raises(SystemExit, match="a/ckpt-previous.pt: not a checkpoint of this repository, or damaged") as error:
        dpo.train(settings(start, "a", resume=True))
    assert "\n" not in str(error.value)


def test_a_disk_that_is_full_leaves_the_last_checkpoint(start, monkeypatch):
    real, calls = torch.save, []

    def save(record, f):
        calls.append(1)
        if len(calls) == 2:
            f.write(b"half of it")
            raise OSError(28, "No space left on device")
        real(record, f)
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space left"):
        dpo.train(settings(start, "a"))
    assert load_checkpoint(str(start / "a"))["step"] == 5
    dpo.train(settings(start, "a", resume=True))
    dpo.train(settings(start, "b"))
    assert log_of(start / "a") == log_of(start / "b")


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
    with pytest.raises(SystemExit, match=f"{common.PATIENCE} gradients in a row were not finite: lower --lr .now"):
        dpo.train(settings(start, "a", steps=30))
    assert len(calls) == 11 + common.PATIENCE
