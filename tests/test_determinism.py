"""One seed, one run: on the CPU each stage gives the same log and the same weights, to the bit, whenever and wherever it is run."""
import json

import pytest
import torch
from conftest import feedback
from test_stages import here, log_of

from common import load_checkpoint, load_model

STAGES = ["sft", "reward", "dpo", "simpo", "ppo", "finegrained"]


def weights_of(out):
    """All tensors of the run, the value model's too."""
    checkpoint = load_checkpoint(str(out))
    return {f"{part}.{name}": w for part in ("model", "value_model") for name, w in checkpoint.get(part, {}).items()}


def same(a, b):
    assert log_of(a) == log_of(b) and len(log_of(a)) == 4
    a, b = weights_of(a), weights_of(b)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def run(stage, start, out, *more):
    (start / "small_feedback.json").write_text(json.dumps([feedback(question=f"{i}?") for i in range(40)]))
    here(stage, start, out, "--steps=4", *more)
    return start / out


@pytest.mark.parametrize("stage", STAGES)
def test_one_seed_gives_one_run_also_from_another_folder(stage, start, tmp_path, monkeypatch):
    a = run(stage, start, "a")
    torch.manual_seed(123)  # whatever was drawn before
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    same(a, run(stage, start, "b"))
    c = run(stage, start, "c", "--seed=1")
    assert log_of(a) != log_of(c)


@pytest.mark.parametrize("stage", STAGES)
def test_the_number_of_threads(stage, start):
    """Matrices this small are summed by one thread however many there are; larger ones in an order that may differ in the last bits."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        a = run(stage, start, "a")
        torch.set_num_threads(2)
        same(a, run(stage, start, "b"))
    finally:
        torch.set_num_threads(threads)
