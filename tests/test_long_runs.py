"""Two thousand iterations: memory does not grow; files grow by a line a step and some samples."""
import gc
import json
import os
import sys

import pytest
import torch
from conftest import make_model

import ppo
import sft
from common.checkpoints import save_checkpoint
from common.optim import make_optimizer
from data import get_tokenizer


def memory():
    """Bytes that this process has in memory, and how many tensors live in it."""
    gc.collect()
    with open("/proc/self/statm") as f:
        pages = int(f.read().split()[1])
    tensors = sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
    return pages * os.sysconf("SC_PAGE_SIZE"), tensors


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_thousand_iterations_of_ppo(tmp_path):
    start, out, found, calls = str(tmp_path / "start"), tmp_path / "a", {}, []
    model = make_model(vocab_size=get_tokenizer("animals").n_vocab, n_layer=1, n_embd=8, n_head=1)
    save_checkpoint(start, 1, model, make_optimizer(model, 1e-3), sft.Config(), "animals")
    with open(tmp_path / "mine.jsonl", "w") as f:
        f.writelines(json.dumps({"prompt": f"{i}:", "completion": " yes"}) + "\n" for i in range(40))

    def reward_fn(prompts, responses):
        calls.append(1)
        if len(calls) in (200, 1000, 2000):
            found[len(calls)] = memory()
        return torch.zeros(len(responses), max(map(len, responses)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # nothing here is worth sharing
    try:
        cfg = ppo.Config(data=str(tmp_path / "mine.jsonl"), init=start, out=str(out), device="cpu",
                         value_init="sft", eval_n=0, steps=2000, batch_size=2, epochs=1, minibatches=1,
                         max_new_tokens=4, max_len=16, sample_every=100, ckpt_every=100, log_every=1000)
        ppo.train(cfg, reward_fn)
    finally:
        torch.set_num_threads(threads)
    bytes_, tensors = zip(*found.values())
    assert len(set(tensors)) == 1, tensors
    # most of what comes, comes once
    assert bytes_[2] - bytes_[0] < 8 * 2**20 and bytes_[2] - bytes_[1] < 2**20, bytes_
    log = (out / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(1, 2001))
    # a line a step, and none longer for what came before it
    assert sum(map(len, log[-200:])) < 1.1 * sum(map(len, log[:200]))
    assert (out / "samples.txt").read_text().count("step ") == 21  # the first, and each hundredth
    files = sorted(path.name for path in out.iterdir())
    assert files == ["ckpt-previous.pt", "ckpt.pt", "log.jsonl", "samples.txt"]
