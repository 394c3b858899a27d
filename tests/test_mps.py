"""--device=mps runs the plain path and asks for nothing that Apple's MPS lacks. There is none here: a pretended one stands in.

A PretendMPS tensor computes on the CPU, calls its device "mps", and refuses what the real one refuses: float64, complex numbers,
and an operation between its memory and the CPU's.
"""
import json
from contextlib import contextmanager

import pytest
import torch
from conftest import make_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import common.run
import dpo
import ppo
import reward
import sft
import simpo
from common.device import choose_device

LACKING = (torch.float64, torch.complex64, torch.complex128)
MPS = torch.device("mps")
INDEXING = ("aten.index.Tensor", "aten.index_put_.default", "aten.index_put.default")  # take an index from the CPU's memory too
COPIES = ("aten.copy_.default",)
operations = set()  # what the pretended device was asked for


class PretendMPS(torch.Tensor):
    @staticmethod
    def __new__(cls, memory):
        if memory.dtype in LACKING:
            raise TypeError(f"MPS has no {memory.dtype}")
        tensor = torch.Tensor._make_wrapper_subclass(cls, memory.size(), strides=memory.stride(), dtype=memory.dtype, device="cpu",
                                                     storage_offset=memory.storage_offset())
        tensor.memory = memory
        return tensor

    device = property(lambda self: MPS)

    def __repr__(self):
        return f"PretendMPS({self.memory})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def compute(function, args, kwargs):
    """One operation of ATen. If a PretendMPS tensor takes part, so do no CPU tensors but numbers, and the result is on it too."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    on_mps = [x for x in tensors if isinstance(x, PretendMPS)]
    result = function(*tree_map(memory_of, args), **tree_map(memory_of, kwargs))
    if not on_mps:
        return result
    name = str(function)
    operations.add(name)
    on_cpu = [x for x in tensors if not isinstance(x, PretendMPS) and x.dim() > 0]
    if on_cpu and name not in INDEXING + COPIES:
        raise RuntimeError(f"{name}: tensors on two devices")
    if name == "aten._local_scalar_dense.default":
        return result
    return tree_map(lambda x: PretendMPS(x) if type(x) is torch.Tensor else x, result)


def memory_of(x):
    return x.memory if isinstance(x, PretendMPS) else x


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class Functions(TorchFunctionMode):
    """What moves tensors between the devices, or makes them on one."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        devices = [x for x in [*args, kwargs.get("device")] if isinstance(x, (str, torch.device)) and is_device(x)]
        target = torch.device(devices[0]).type if devices else None
        if function is torch.Tensor.tolist and isinstance(args[0], PretendMPS):
            return args[0].memory.tolist()
        if function is torch.Tensor.cpu or (function is torch.Tensor.to and target):
            return move(args[0], target or "cpu")
        if target == "mps" and "device" in kwargs:
            return PretendMPS(function(*args, **kwargs | {"device": "cpu"}))
        return function(*args, **kwargs)


def is_device(x):
    return isinstance(x, torch.device) or x.split(":")[0] in ("cpu", "mps")


def move(x, target):
    if target == "mps":
        return x if isinstance(x, PretendMPS) else PretendMPS(x.detach().clone())
    return x.detach().memory.clone() if isinstance(x, PretendMPS) else x


@contextmanager
def pretended_mps():
    operations.clear()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # model.to makes new parameters
    try:
        with Functions(), Dispatch():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def test_the_pretended_device_refuses_what_mps_lacks():
    with pretended_mps():
        x = torch.ones(3).to("mps")
        assert (x.device, (x + 1).device, torch.zeros(2, device="mps").device, x.new_zeros(2).device) == (MPS,) * 4
        assert x.cpu().device == torch.device("cpu") and (2 * x).tolist() == [2, 2, 2] and x.sum().item() == 3
        for wrong in (lambda: x.double(), lambda: torch.zeros(2, dtype=torch.float64, device="mps"), lambda: x.cumsum(0, dtype=torch.float64),
                      lambda: torch.rand(2, dtype=torch.float64).to("mps"), lambda: torch.complex(x, x)):
            with pytest.raises(TypeError, match="MPS has no torch"):
                wrong()
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(3)


def test_sampling_draws_the_tokens_of_the_cpu():
    model = make_model()
    prompts, noise = [[1, 2, 3], [4], list(range(30)), [4]], torch.rand(4, 20, dtype=torch.float64)
    for options in (dict(), dict(temperature=0.7, top_k=5, eos=3), dict(temperature=0)):
        expected, expected_logprobs = model.generate(prompts, 20, noise=noise, return_logprobs=True, **options)
        with pretended_mps():
            found, logprobs = make_model().to("mps").generate(prompts, 20, noise=noise, return_logprobs=True, **options)
        assert found == expected
        for ours, theirs in zip(logprobs, expected_logprobs):
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-5, rtol=0)
    assert not any("searchsorted" in name for name in operations)


STAGES = {
    "sft": (sft, {}), "reward": (reward, {}), "dpo": (dpo, {}), "simpo": (simpo, {}),
    "ppo": (ppo, dict(batch_size=8, epochs=2, minibatches=2, max_new_tokens=6, ptx_coef=0.1)),
    "rloo": (ppo, dict(batch_size=8, epochs=1, minibatches=2, max_new_tokens=6, advantage="rloo", k=2)),
}


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_runs_there_and_logs_what_the_cpu_logs(name, small_world, start, monkeypatch, capsys):
    """In float32, with a dense mask, and with its final table."""
    stage, settings = STAGES[name]
    settings = dict(init=str(start / "start"), steps=2, batch_size=4, warmup=0, eval_n=4, max_len=64) | settings
    if stage is ppo:
        settings["reward_model"] = str(start / "reward")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(common.run, "save_checkpoint", lambda *args, **more: None)  # a pretended tensor cannot be pickled
    logs = []
    for device in ("cpu", "mps"):
        out = start / f"{name}-{device}"
        cfg = stage.Config(**settings, device=device, out=str(out))
        if device == "cpu":
            stage.train(cfg)
        else:
            with pretended_mps():
                stage.train(cfg)
        logs.append([json.loads(line) for line in open(out / "log.jsonl")])
    assert "mps, float32, compile off, 0.0M parameters, about " in capsys.readouterr().out
    for on_cpu, on_mps in zip(*logs):
        for key in on_cpu:
            if on_cpu[key] is None:
                assert on_mps[key] is None, key
            elif not key.endswith("_s"):
                rounding = 0.05 if "accuracy" in key else 1e-4  # two scores that tie on the CPU may not tie there
                assert on_mps[key] == pytest.approx(on_cpu[key], rel=1e-3, abs=rounding), key
    assert not any(kind in operation for operation in operations for kind in ("searchsorted", "unique_consecutive", "mkldnn"))


def test_there_is_none_here(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device=mps: torch sees no Apple GPU here"):
        choose_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("mps") == "mps"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="--device=mps: one process only"):
        choose_device("mps")
