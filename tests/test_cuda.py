"""CUDA: which pieces each setting of --compile and --dtype uses, seen on a CPU, and what a GPU has to show.

    python -m pytest tests/test_cuda.py        on a machine with an NVIDIA GPU, this comes first (docs/first-gpu-run.md)

What needs a GPU is skipped where there is none. Its tests run on the CPU too, where they hold what the CPU has of it: there the
compiler's "eager" backend compiles, and nothing is recorded as a graph.
"""
import functools
import json
import random
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import make_model
from torch.nn.attention.flex_attention import create_mask

import common.device
import dpo
import model as model_module
import ppo
import reward
import segment_reward
import sft
import simpo
from common import grids
from common.checkpoints import save_checkpoint
from common.dist import device_mesh
from common.optim import make_optimizer, optimizer_step
from common.options import RunConfig, parse
from common.sharding import gather_state, sampling_copy, shard_model, unshard_model
from data import get_tokenizer
from engine import attention, decode, devices
from engine.packing import pack, per_sequence
from segment_reward import Mark

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
DTYPES = [torch.float32, torch.bfloat16]


# ------------------------------------------------------------ on a CPU: what each setting of --compile and --dtype uses

@pytest.fixture
def pretended_cuda(monkeypatch):
    """The CPU passes for CUDA. The pieces that run on CUDA alone are replaced by what equals them on a CPU, and counted."""
    used = Counter()

    def count(what, function):
        def counted(*args, **kwargs):
            used[what(*args, **kwargs) if callable(what) else what] += 1
            return function(*args, **kwargs)
        return counted

    def flex_attention(q, k, v, block_mask):
        T = q.size(2)
        dense = create_mask(block_mask.mask_mod, 1, 1, T, T, device=q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=dense)

    def packed_mask(batch, kind):
        mask = attention.packed_mask(batch, kind)
        used["dense mask"] += torch.is_tensor(mask)
        return mask

    def autocast_name(device, dtype=None, enabled=True):
        return f"autocast {dtype}" if enabled else "no autocast"

    class Cache(decode.KVCache):
        def __init__(self, config, lengths, new_tokens, like):
            used[f"sampler in {like.dtype}"] += 1
            super().__init__(config, lengths, new_tokens, like)

    monkeypatch.setattr(devices, "device_type", lambda device: "cuda")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU")
    monkeypatch.setattr(attention, "flex_attention", count("flex_attention", flex_attention))
    monkeypatch.setattr(model_module, "packed_mask", packed_mask)
    monkeypatch.setattr(model_module, "compiled", count("torch.compile", lambda function: function))
    monkeypatch.setattr(torch, "autocast", count(autocast_name, torch.autocast))
    monkeypatch.setattr(decode, "CUDAGraph", count("CUDA graph", lambda step: step))
    monkeypatch.setattr(decode, "KVCache", Cache)
    return used


@pytest.fixture
def wide_heads(tmp_path, small_world):
    """Checkpoints of a policy and a reward model with heads of 16 dimensions, which flex_attention needs on CUDA."""
    for name, n_scalars, more in (("policy", 0, {}), ("reward", 1, {"score_std": 1.0})):
        (tmp_path / name).mkdir()
        model = make_model(vocab_size=get_tokenizer("animals").n_vocab, n_layer=2, n_embd=32, scale=1.0, n_scalars=n_scalars)
        save_checkpoint(str(tmp_path / name), 1, model, make_optimizer(model, 1e-3), RunConfig(), "animals", **more)
    return tmp_path


def run_ppo(folder, name, **settings):
    """Two iterations with everything in them -> the lines of the log."""
    ppo.train(ppo.Config(init=str(folder / "policy"), reward_model=str(folder / "reward"), out=str(folder / name), steps=2, batch_size=8, epochs=2,
                         minibatches=2, max_new_tokens=6, eval_n=0, device="cpu", **settings))
    return [json.loads(line) for line in open(folder / name / "log.jsonl")]


COMPILED = {"torch.compile", "flex_attention", "CUDA graph"}
BFLOAT16 = {"autocast torch.bfloat16", "sampler in torch.bfloat16"}
FLOAT32 = {"sampler in torch.float32"}


@pytest.mark.parametrize("settings, pieces, line", [
    ({}, COMPILED | BFLOAT16, "bfloat16, compile on"),
    ({"compile": False}, {"dense mask"} | BFLOAT16, "bfloat16, compile off"),
    ({"dtype": "float32"}, COMPILED | FLOAT32, "float32, compile on"),
    ({"compile": False, "dtype": "float32"}, {"dense mask"} | FLOAT32, "float32, compile off")])
def test_each_setting_uses_its_pieces_and_no_others(settings, pieces, line, wide_heads, pretended_cuda, monkeypatch, capsys):
    monkeypatch.setattr(common.device, "SMALLEST_COMPILED", 0)
    log = run_ppo(wide_heads, "cuda", **settings)
    used = {what for what, n in pretended_cuda.items() if n} - {"no autocast"}
    assert used == pieces
    assert f"cpu (no GPU), {line}, 0.0M parameters, about " in capsys.readouterr().out
    assert [set(record) >= {"sampler_diff_max"} for record in log] == [settings.get("dtype") != "float32"] * 2


def test_plain_float32_is_the_run_that_the_cpu_makes(wide_heads, request):
    """Only a dense mask in place of one per group, and a cache that is read in blocks, differ from the CPU's own run."""
    expected = run_ppo(wide_heads, "cpu")
    request.getfixturevalue("pretended_cuda")
    for settings in ({"compile": False}, {"compile": True}):
        found = run_ppo(wide_heads, f"cuda-{settings.get('compile')}", dtype="float32", **settings)
        for ours, theirs in zip(found, expected):
            for key in theirs.keys() - {"time_s", "tokens_per_s", "rollout_s", "evaluate_s", "update_s"}:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key


def test_bfloat16_on_a_cpu_is_near_float32(wide_heads, capsys):
    logs = [run_ppo(wide_heads, dtype, dtype=dtype)[0] for dtype in ("float32", "bfloat16")]
    assert "tokens a step" not in capsys.readouterr().out  # that line is for GPUs
    assert logs[0]["kl"] == logs[1]["kl"] == 0 and logs[1]["sampler_diff_mean"] < 0.02
    assert logs[1]["entropy"] == pytest.approx(logs[0]["entropy"], rel=0.01) and logs[1]["entropy"] != logs[0]["entropy"]


def test_models_that_are_trained_first_and_those_of_the_closing_table_have_the_dtype_too(wide_heads, monkeypatch):
    monkeypatch.chdir(wide_heads)
    seen = set()
    for name in ("states", "generate"):
        def watched(model, *args, real=getattr(model_module.GPT, name), **kwargs):
            seen.add(model.product_dtype())
            return real(model, *args, **kwargs)
        monkeypatch.setattr(model_module.GPT, name, watched)
    settings = dict(steps=2, batch_size=4, warmup=0, n_layer=1, n_embd=16, n_head=1, max_len=48, dtype="bfloat16", eval_n=0, device="cpu")
    sft.train(sft.Config(**settings))
    monkeypatch.setitem(reward.RECIPES, "animals", dict(steps=2, batch_size=4, warmup=0, eval_n=2))
    ppo.train(ppo.Config(**settings | dict(batch_size=8, minibatches=2, max_new_tokens=4, eval_n=2)))
    assert seen == {torch.bfloat16}


def test_dtype_is_one_of_two():
    assert parse(ppo.Config, ppo.RECIPES, ["--dtype=float32"]).dtype == "float32" and ppo.Config().dtype is None
    with pytest.raises(SystemExit, match="unknown dtype 'float16'; did you mean 'float32'|'bfloat16'"):
        parse(ppo.Config, ppo.RECIPES, ["--dtype=float16"])


# ------------------------------------------------------------------------------ the same tests on a CPU and on a GPU

@pytest.fixture(autouse=True)
def exact_products_and_a_quick_compiler(request, monkeypatch):
    """No tf32, so that float32 is float32. On a CPU the compiler does no more than cut and check its graphs."""
    if "device" in request.fixturenames and request.getfixturevalue("device") == "cpu":
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def some_groups(seed, n, longest=40, responses=2):
    """n groups (prompt_ids, [response_ids, …]) of random lengths."""
    rng = random.Random(seed)

    def ids():
        return [rng.randrange(100) for _ in range(rng.randint(1, longest))]
    return [(ids(), [ids() for _ in range(responses)]) for _ in range(n)]


def prepared(device, compile, dtype=None, n_scalars=0):
    model = make_model(n_embd=64, block_size=512, scale=1.5, n_scalars=n_scalars).to(device)
    model.dtype = dtype
    model.prepare(compile, checkpoint_blocks=False)
    return model


def sft_loss(model, groups):
    logprobs = model.logprobs(pack(groups).to(model.device))
    return sft.sft_loss(logprobs, len(logprobs))


def reward_loss(model, groups):
    scores = model.score(pack(groups).to(model.device))
    group = torch.arange(len(groups), device=model.device).repeat_interleave(2)
    rank = torch.tensor([0, 1] * len(groups), device=model.device)
    return reward.ranking_loss(scores, group, rank)[0]


def dpo_loss(model, groups):
    chosen_logp, rejected_logp = dpo.pair_logp(model, groups)
    zeros = torch.zeros_like(chosen_logp)
    return dpo.dpo_loss(chosen_logp, rejected_logp, zeros, zeros, 0.01)[0].mean()


def simpo_loss(model, groups):
    return simpo.simpo_loss(*simpo.pair_logp(model, groups), 2.0, 1.0)[0].mean()


def ppo_loss(model, groups):
    """The clipped surrogate and the value loss, with the value head on the policy."""
    batch = pack(groups).to(model.device)
    mask = grids.length_mask([response for _, responses in groups for response in responses]).to(model.device)
    states = model.states(batch)
    logprobs = grids.to_grid(model.token_logprobs(states, batch.target), mask)
    values = grids.to_grid(model.scalars(states)[:, 0], mask)
    advantages = torch.linspace(-1, 1, mask.numel(), device=model.device).view(mask.shape)
    policy_loss = ppo.policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2)[0]
    return policy_loss + ppo.value_loss(values, values.detach(), advantages, mask, 0.2)


def finegrained_loss(model, groups):
    """One head for segments, and one that compares the responses to a prompt."""
    axes = ["relevance", "completeness"]
    marks = []
    for _, responses in groups:
        first_end = len(responses[0]) - 1
        second_end = first_end + len(responses[1])
        marks.append([Mark("relevance", first_end, 1), Mark("relevance", second_end, 0),
                      Mark("completeness", first_end, 0), Mark("completeness", second_end, 1)])
    batch, packed_marks = segment_reward.pack_marks(groups, marks, axes, model.device)
    losses, _ = segment_reward.reward_losses(segment_reward.judge([model], batch, packed_marks), packed_marks, axes)
    return sum(losses.values())


STAGES = {"sft": (sft_loss, 0), "reward": (reward_loss, 1), "dpo": (dpo_loss, 0), "simpo": (simpo_loss, 0), "ppo": (ppo_loss, 1),
          "finegrained": (finegrained_loss, 2)}
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.03}  # of a norm; on a CPU, bfloat16 comes to 0.006 to 0.009


def loss_and_gradient(model, stage_loss):
    loss = stage_loss(model, some_groups(0, 12))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()]).double().cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", STAGES)
def test_compiled_loss_and_gradient_are_the_plain_ones(stage, dtype, device):
    """And in bfloat16 they are those of float32, within bfloat16's tolerance."""
    stage_loss, n_scalars = STAGES[stage]
    loss, gradient = loss_and_gradient(prepared(device, True, dtype, n_scalars), stage_loss)
    for other in (dtype, torch.float32):
        plain_loss, plain_gradient = loss_and_gradient(prepared(device, False, other, n_scalars), stage_loss)
        assert loss == pytest.approx(plain_loss, rel=TOLERANCE[dtype], abs=TOLERANCE[dtype] / 10)
        assert (gradient - plain_gradient).norm() < TOLERANCE[dtype] * plain_gradient.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_device_computes_what_the_cpu_computes_plainly(dtype, device):
    groups = some_groups(1, 9)
    expected = prepared("cpu", False).logprobs(pack(groups))
    found = prepared(device, False, dtype).logprobs(pack(groups).to(device)).cpu()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 if dtype == torch.float32 else 0.15)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [dict(), dict(temperature=0.7, top_k=20, eos=3), dict(temperature=0)])
def test_a_graph_samples_what_eager_steps_sample(options, device):
    """Token for token in float32, from the same noise; the cache grows over several numbers of columns, each a graph of its own."""
    prompts = [prompt for prompt, _ in some_groups(2, 32)]
    noise = torch.rand(32, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    samples = []
    for compile in (True, False):
        sampler = sampling_copy(prepared(device, compile, torch.float32))
        samples.append(sampler.generate(prompts, 200, noise=noise, return_logprobs=True, **options))
    (by_graph, graph_logprobs), (eagerly, logprobs) = samples
    assert by_graph == eagerly
    for ours, theirs in zip(graph_logprobs, logprobs):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_the_bfloat16_sampler_is_near_the_policy(device):
    """PPO logs this difference as sampler_diff_mean and sampler_diff_max."""
    policy = prepared(device, False, torch.bfloat16)
    prompts = [prompt for prompt, _ in some_groups(3, 32)]
    responses, found = sampling_copy(policy).generate(prompts, 50, return_logprobs=True)
    batch = pack([(prompt, [response]) for prompt, response in zip(prompts, responses)]).to(device)
    expected = policy.logprobs(batch).cpu()
    difference = (torch.cat([torch.tensor(x) for x in found]) - expected).abs()
    assert difference.mean() < 0.02 and difference.max() < 0.3


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_compiles_again_after_the_warm_up(device):
    """The warm-up: one batch, with gradients and without; on a CPU, where masks are dense, one of one row and one of several."""
    model = prepared(device, True)

    def both_passes(n, longest, seed):
        batch = pack(some_groups(seed, n, longest)).to(device)
        with torch.no_grad():
            model.logprobs(batch)
        model.logprobs(batch).sum().backward()
    both_passes(10, 60, seed=0)
    if model.mask_kind == "dense":
        both_passes(1, 60, seed=0)
    rng = random.Random(0)
    with torch._dynamo.config.patch(error_on_recompile=True):  # monkeypatch would leave the setting deleted
        model.generate([[1, 2], [3]], 5)
        for seed in range(50):
            both_passes(rng.choice([1, 3, 10, 30]), rng.choice([1, 20, 60, 150]), seed)


def expected_memory(model, n_tokens):
    """The arithmetic of docs/scaling.md, in bytes: 18 per trained parameter, 36 L C per token of a pass, 1.4 GB for the logits."""
    config = model.config
    n_parameters = sum(p.numel() for p in model.parameters())
    return 18 * n_parameters + 36 * config.n_layer * config.n_embd * n_tokens + 1.4e9


def training_steps(model, groups, n):
    optimizer = make_optimizer(model, 1e-4)
    for _ in range(n):
        sft_loss(model, groups).backward()
        optimizer_step(model, optimizer, 1e-4, 1.0)


def test_expected_memory_of_gpt2_by_hand():
    """The 9 GB of docs/scaling.md: GPT-2 with micro-batches of 16,384 tokens."""
    with torch.device("meta"):
        gpt2 = model_module.GPT(model_module.GPTConfig())
    assert round(expected_memory(gpt2, 16384) / 1e9) == 9


@needs_gpu
def test_peak_memory_is_within_the_arithmetic_of_the_docs():
    """Of a compiled step; 10% more are allowed, for what fragments and for the compiler's own buffers."""
    torch.manual_seed(0)
    model = model_module.GPT(model_module.GPTConfig(n_layer=6, n_head=8, n_embd=512)).to("cuda")
    model.prepare(True, checkpoint_blocks=False)
    groups = some_groups(4, 100, longest=80)
    torch.cuda.reset_peak_memory_stats()
    training_steps(model, groups, 3)
    peak, expected = torch.cuda.max_memory_allocated(), expected_memory(model, pack(groups).tokens.numel())
    assert peak < 1.1 * expected, f"{peak / 1e9:.2f} GB, the docs expect {expected / 1e9:.2f}"


def on_one_process(index, device, folder):
    """A sharded model beside the same model whole: log-probs, gradients, a step, its copy for sampling, its checkpoint."""
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=0, world_size=1)
    torch.backends.cuda.matmul.allow_tf32 = False
    number = torch.ones(3, device=device)
    dist.all_reduce(number)
    assert number.tolist() == [1, 1, 1]

    groups = some_groups(5, 8)
    batch = pack(groups).to(device)
    whole, sharded = (make_model(n_embd=64, block_size=512) for _ in range(2))
    whole.to(device)
    shard_model(sharded, device)
    losses = []
    for model in (whole, sharded):
        model.dtype = torch.float32
        optimizer = make_optimizer(model, 1e-3)
        logp = per_sequence(model.logprobs(batch), batch)
        logp.mean().backward()
        optimizer_step(model, optimizer, 1e-3, 1.0)
        losses.append(logp.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    copy = unshard_model(sharded).state_dict()
    saved = gather_state(sharded.state_dict())
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(copy[name], weight, rtol=1e-3, atol=1e-4)
        assert torch.equal(saved[name], copy[name].cpu())
    assert len(sampling_copy(sharded).generate([[1, 2], [3]], 4)) == 2
    device_mesh.cache_clear()
    dist.destroy_process_group()


@pytest.mark.parametrize("device", DEVICES)
def test_a_sharded_model_on_one_process_is_the_whole_model(device, tmp_path):
    """FSDP and its communication: NCCL on a GPU, gloo on a CPU."""
    torch.multiprocessing.spawn(on_one_process, (device, str(tmp_path)), nprocs=1)
