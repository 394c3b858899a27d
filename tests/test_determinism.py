"""One seed, one run: on the CPU each stage gives the same log and the same weights, to the bit, whenever and wherever it is run."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import feedback, make_model, random_groups
from test_stages import ROOT, here, log_of

from common.checkpoints import load_checkpoint
from engine.packing import pack

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
def test_the_number_of_threads_changes_the_last_bits_alone(stage, start):
    """The forward pass is the same to the bit. One sum of the backward pass is not: torch adds up the gradient of a LayerNorm's
    weight and bias thread by thread, so from the first optimizer step on, two runs differ in their last bits."""
    threads = torch.get_num_threads()
    try:
        for n, out in ((1, "a"), (2, "b")):
            torch.set_num_threads(n)
            run(stage, start, out)
    finally:
        torch.set_num_threads(threads)
    a, b = log_of(start / "a"), log_of(start / "b")
    before_the_step = "entropy" if stage in ("ppo", "finegrained") else "loss"
    assert a[0][before_the_step] == b[0][before_the_step]
    for x, y in zip(a, b, strict=True):
        assert all(x[k] == y[k] or abs(x[k] - y[k]) < 1e-5 * max(1, abs(x[k])) for k in x), (x, y)


def test_the_one_sum_whose_order_the_threads_change():
    """All of a block's gradients but those of its LayerNorms are the same to the bit with one thread and with two."""
    model, batch, grads = make_model(), pack(random_groups(0, n=20), 64), []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            model.zero_grad()
            logprobs = model.logprobs(batch)
            logprobs.sum().backward()
            grads.append({"logprobs": logprobs.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()})
    finally:
        torch.set_num_threads(threads)
    differ = {name for name in grads[0] if not torch.equal(grads[0][name], grads[1][name])}
    assert all(".ln_" in name or name.startswith("ln_f") for name in differ), differ


def test_a_run_takes_the_number_of_threads_from_mkl():
    """MKL may use fewer threads than torch asks for, as it likes, unless the number was set; then sums round in another way."""
    code = ("import ctypes, os, torch; from common.device import choose_device\n"
            "mkl = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), 'lib/libtorch_cpu.so'))\n"
            "before = mkl.mkl_serv_get_dynamic(); n = torch.get_num_threads(); choose_device('cpu')\n"
            "print(before, mkl.mkl_serv_get_dynamic(), n == torch.get_num_threads())")
    if not torch.backends.mkl.is_available():
        pytest.skip("a build of torch without MKL")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.split() == ["1", "0", "True"], result.stderr
