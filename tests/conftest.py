"""Fixtures of more than one test file.

Public data and the GPT-2 encoding are used where they lie beside the checkout.
"""
import json
import multiprocessing.forkserver
import os
import socket
import sys
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).parents[2] / "shared" / "data"
if (SHARED / "tiktoken").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken"))

import reward  # noqa: E402
import sft  # noqa: E402
from common.checkpoints import save_checkpoint  # noqa: E402
from common.dist import log_to_console  # noqa: E402
from common.optim import make_optimizer  # noqa: E402
from data import animals, get_tokenizer  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

log_to_console()  # what data/ and engine/ log is printed, as in a run, and tests read it with capsys


def make_model(seed=0, vocab_size=100, block_size=64, n_layer=2, n_head=2, n_embd=32, scale=3.0, n_scalars=0):
    """A small random GPT whose distributions are far from uniform."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size, block_size, n_layer, n_head, n_embd, n_scalars))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "scalar_head" not in name:
                parameter.mul_((n_embd / 768) ** 0.5)  # from init_weights' std to GPT-2's own, 0.02, at this width too
            parameter.add_(torch.randn_like(parameter) * 0.02).mul_(scale if parameter.dim() > 1 else 1)
    return model


@pytest.fixture
def model():
    return make_model()


@pytest.fixture(scope="session")
def server():
    """Starts processes in which torch is imported already: forks of one that has computed nothing yet."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])]))
        context.set_forkserver_preload(["test_stages", "finegrained", "simpo", "torch.distributed.fsdp"])
        multiprocessing.forkserver.ensure_running()
    return context


def as_process(rank, port, errors, function, *args):
    """What torchrun tells each process that it starts; then function(*args)."""
    os.environ |= dict(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.stdout = open(os.devnull, "w")
    sys.stderr = open(errors, "w")
    torch.set_num_threads(1)
    function(*args)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def on_two_processes(server, tmp_path, function, *args):
    """Runs function(*args) in two processes that share their work, as those of torchrun do."""
    port = free_port()
    errors = [tmp_path / f"errors-{rank}" for rank in (0, 1)]
    processes = [server.Process(target=as_process, args=(rank, port, errors[rank], function, *args)) for rank in (0, 1)]
    try:
        for process in processes:
            process.start()
        for process, error in zip(processes, errors):
            process.join(timeout=120)
            assert process.exitcode == 0, error.read_text()
    finally:  # where one failed, the other waits for it
        for process in processes:
            process.kill()


@pytest.fixture
def small_world(monkeypatch):
    """The animals world with few examples, for runs that only need to run."""
    monkeypatch.setattr(animals, "SIZES", {"train": 200, "validation": 40, "test": 40})


@pytest.fixture
def start(tmp_path):
    """A folder with a checkpoint of the animals tokenizer to start from, and a small file of comparisons."""
    model = make_model(vocab_size=get_tokenizer("animals").n_vocab, n_layer=1, n_embd=16)
    os.makedirs(tmp_path / "start")
    save_checkpoint(str(tmp_path / "start"), 1, model, make_optimizer(model, 1e-3), sft.Config(), "animals")
    model.set_scalar_heads(1)
    os.makedirs(tmp_path / "reward")
    optimizer = make_optimizer(model, 1e-3)
    save_checkpoint(str(tmp_path / "reward"), 1, model, optimizer, reward.Config(), "animals", score_std=2.0)
    with open(tmp_path / "mine.jsonl", "w") as f:
        for i in range(60):
            chosen, rejected = f" {i + 1}." + " yes" * (i % 5), " no" * (1 + i % 3)
            f.write(json.dumps({"prompt": f"{i}:", "chosen": chosen, "rejected": rejected}) + "\n")
    return tmp_path


def random_groups(seed=0, n=7, vocab_size=100, responses=(1, 4)):
    g = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=g))

    def ids(low, high):
        return torch.randint(vocab_size, (number(low, high),), generator=g).tolist()
    return [(ids(1, 12), [ids(1, 9) for _ in range(number(*responses))]) for _ in range(n)]


def feedback(**changes):
    """A record of QA-Feedback, with other fields or other errors."""
    r = {"question": "Who?", "passages": [["Title", "One.", "Two."]], "gold": "He.",
         "prediction 1": "It was him. Or not.", "prediction 2": "B.", "prediction 3": "C.",
         "prediction 4": "D.", "preference": [1, 1, 1, 0, 2, 2],
         "feedback": {"errors": [{"error type": "Irrelevant", "explanation": "", "start": 12, "end": 19}],
                      "missing-info": [{"error type": "Missing-Answer", "passage_id": 1, "sentence_id": [1]}],
                      "corrected-prediction": "It was him, so it was."}}
    errors = changes.pop("errors", None)
    r |= changes
    return r if errors is None else r | {"feedback": r["feedback"] | {"errors": errors}}
