"""Speed and memory of each hot path, beside what the machine could do: one table, a row a path.

    python bench.py                                  gpt2 on CUDA; on the CPU, 6 layers of 384
    python bench.py --model=gpt2-medium --json=FILE
    python bench.py --against=naive                  beside the textbook version of the same work, in the same run

Weights are random and so are the tokens; prompts and responses have about the lengths of Anthropic's HH-RLHF (124 and 46 tokens on
average, exponential), so that padding costs what it would cost there. Columns, medians of --repeat runs after one that warms up:

    tokens/s     useful ones: no padding, a prompt once for all of its responses; for decode and rollout, new tokens
    seconds      one step; for decode, all --new_tokens tokens of all rows without the prompts' own pass
    memory       the largest allocation on CUDA; on Linux' CPU, the largest resident size of the process in that row
    limit        how much of the machine was used. Training, scoring, prefill: FLOPs that the useful tokens need, over those that one large
                 matrix product (4096³ on CUDA, 1024³ on the CPU) makes in the same time. Decode: bytes that must be read at least, each weight
                 and each key and value of the context once a step, over those that a copy of 256 MB moves in the same time
    vs naive     seconds of the textbook version over ours: a row a sequence, padded, logits of every position, the reference run at
                 each step, generation without a cache (run once, without warming up)

FLOPs of a forward pass: 24 C² a block and token, 4 C a block for each position that a token sees, 2 VC a token whose log-prob is
asked for; a training step is three of them.
"""
import argparse
import copy
import json
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

import evaluate
import ppo
from common import clip_and_step, configure, make_optimizer, setup, writing
from data import group_length, micro_batches, pack
from dpo import dpo_loss
from dpo import pair_logp as dpo_pair_logp
from model import GPT, GPTConfig, PRETRAINED
from reward import ranking_loss, ranks
from simpo import pair_logp as simpo_pair_logp
from simpo import simpo_loss


# ------------------------------------------------------------------------------------------------ the work

def lengths(rng, n, mean, most):
    return np.clip(rng.exponential(mean, n), 4, most).astype(int)


def make_groups(n, k, block_size, vocab_size, seed=0):
    """n random groups of a prompt and k responses."""
    rng = np.random.default_rng(seed)
    prompt, response = lengths(rng, n, 124, block_size // 2), lengths(rng, (n, k), 46, block_size // 4)
    return [(rng.integers(0, vocab_size, p).tolist(), [rng.integers(0, vocab_size, r).tolist() for r in rs]) for p, rs in zip(prompt, response)]


def forward_flops(config, groups, head=True):
    """Of one forward pass over the useful tokens of some groups."""
    flops = 0
    for prompt, responses in groups:
        P, n = len(prompt), sum(map(len, responses))
        seen = P * (P + 1) / 2 + sum(P * len(r) + len(r) * (len(r) + 1) / 2 for r in responses)
        flops += config.n_layer * (24 * config.n_embd**2 * (P + n) + 4 * config.n_embd * seen)
        flops += 2 * config.vocab_size * config.n_embd * n * head
    return flops


def decode_bytes(model, prompts, new_tokens):
    """What `new_tokens` steps must read at least: all weights but the position table, and the keys and values of each row's context."""
    c, size = model.config, model.wte.weight.element_size()
    weights = sum(p.numel() for name, p in model.named_parameters() if name != "wpe.weight")
    context = sum(len(p) + t for p in prompts for t in range(1, new_tokens))
    return size * (weights * (new_tokens - 1) + 2 * c.n_layer * c.n_embd * context)


# ------------------------------------------------------------------------------------------------ the measuring

@dataclass
class Clock:
    device: str
    repeat: int

    def sync(self):
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def once(self, work):
        self.sync()
        begin = time.perf_counter()
        work()
        self.sync()
        return time.perf_counter() - begin

    def __call__(self, work):
        """Median seconds of `repeat` runs after a first, and the peak memory in bytes."""
        self.once(work)
        reset_peak(self.device)
        seconds = statistics.median(self.once(work) for _ in range(self.repeat))
        return seconds, peak(self.device)


def reset_peak(device):
    if device.startswith("cuda"):
        return torch.cuda.reset_peak_memory_stats()
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # VmHWM starts anew
    except OSError:
        pass


def peak(device):
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    try:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine(clock, dtype):
    """FLOP/s of a large matrix product and bytes/s of a large copy, read and write counted."""
    n = 4096 if clock.device.startswith("cuda") else 1024
    a, b = (torch.randn(n, n, device=clock.device, dtype=dtype) for _ in range(2))
    x = torch.randn(2**26, device=clock.device)
    y = torch.empty_like(x)
    return 2 * n**3 / clock(lambda: a @ b)[0], 2 * x.numel() * 4 / clock(lambda: y.copy_(x))[0]


# ------------------------------------------------------------------------------------------------ the textbook

def padded(sequences, device):
    length = max(map(len, sequences))
    return torch.tensor([s + [0] * (length - len(s)) for s in sequences], device=device)


def naive_logprobs(model, groups, amp):
    """Summed log-probs of every response, each in a padded row of its own, from the logits of every position: (S,)"""
    rows = [(p, r) for p, rs in groups for r in rs]
    tokens = padded([p + r for p, r in rows], model.device)
    mask = torch.zeros(tokens.shape, device=model.device)
    for i, (p, r) in enumerate(rows):
        mask[i, len(p):len(p) + len(r)] = 1
    with amp:
        logits = model.logits(model.hidden(tokens, torch.arange(tokens.size(1), device=model.device)))
    logp = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    return (logp * mask[:, 1:]).sum(1)


def naive_scores(model, groups, amp):
    rows = [p + r for p, rs in groups for r in rs]
    tokens = padded(rows, model.device)
    with amp:
        hidden = model.hidden(tokens, torch.arange(tokens.size(1), device=model.device))
        return model.scalars(hidden)[range(len(rows)), [len(r) - 1 for r in rows], 0]


@torch.no_grad()
def naive_generate(model, prompts, new_tokens):
    """Every token from the whole text before it."""
    rows = [list(p) for p in prompts]
    for _ in range(new_tokens):
        tokens = padded(rows, model.device)
        logits = model.logits(model.hidden(tokens, torch.arange(tokens.size(1), device=model.device)))
        last = logits[range(len(rows)), [len(r) - 1 for r in rows]]
        for row, token in zip(rows, last.softmax(-1).multinomial(1)[:, 0].tolist()):
            row.append(token)
    return [row[len(p):] for row, p in zip(rows, prompts)]


# ------------------------------------------------------------------------------------------------ the rows

def training_rows(args, model, device, amp):
    """(name, work, useful tokens, FLOPs, naive work) of the DPO, SimPO and reward step."""
    c = model.config
    groups, ref_policy = make_groups(args.batch_size, 2, c.block_size, c.vocab_size), copy.deepcopy(model).requires_grad_(False)
    scorer = copy.deepcopy(model)
    scorer.set_scalar_heads(1)
    for m in (model, scorer):
        configure(m, args)
    optimizer, scorer_optimizer = make_optimizer(model, args.lr), make_optimizer(scorer, args.lr)
    with torch.no_grad():
        ref = [x.detach() for x in dpo_pair_logp(model, groups, device, amp)]
    tokens = sum(map(group_length, groups))
    group, rank = ranks(groups, device)
    n = torch.tensor([len(r) for _, rs in groups for r in rs], device=device)

    def step(m, optimizer, loss):
        def work():
            loss().mean().backward()
            clip_and_step(m, optimizer, args)
        return work

    def naive_dpo():
        logp = naive_logprobs(model, groups, amp)
        with torch.no_grad():
            ref_logp = naive_logprobs(ref_policy, groups, amp)
        return dpo_loss(logp[0::2], logp[1::2], ref_logp[0::2], ref_logp[1::2], 0.1)[0]

    def naive_simpo():
        logp = naive_logprobs(model, groups, amp)
        return simpo_loss(logp[0::2], logp[1::2], n[0::2], n[1::2], 2.0, 1.0)[0]

    def reward():
        batch = pack(groups).to(device)
        with amp:
            return ranking_loss(scorer.score(batch), group, rank)[0]

    flops = 3 * forward_flops(c, groups)
    yield ("DPO step", step(model, optimizer, lambda: dpo_loss(*dpo_pair_logp(model, groups, device, amp), *ref, 0.1)[0]), tokens, flops,
           step(model, optimizer, naive_dpo))
    yield ("SimPO step", step(model, optimizer, lambda: simpo_loss(*simpo_pair_logp(model, groups, device, amp), 2.0, 1.0)[0]), tokens, flops,
           step(model, optimizer, naive_simpo))
    yield ("reward step", step(scorer, scorer_optimizer, reward), tokens, 3 * forward_flops(c, groups, head=False),
           step(scorer, scorer_optimizer, lambda: ranking_loss(naive_scores(scorer, groups, amp), group, rank)[0]))


def sampling_rows(args, model, clock, rate, bandwidth):
    """The rows of prefill and decode, measured: the latter is a whole generation less the former."""
    sampler = copy.deepcopy(model).to(torch.bfloat16 if clock.device.startswith("cuda") else torch.float32)
    prompts = [p for p, _ in make_groups(args.rows, 1, model.config.block_size, model.config.vocab_size, seed=1)]
    most = model.config.block_size - args.new_tokens
    prompts, n = [p[:most] for p in prompts], args.new_tokens
    first, first_memory = clock(lambda: sampler.generate(prompts, 1))
    whole, memory = clock(lambda: sampler.generate(prompts, n))
    tokens = sum(map(len, prompts))
    flops = forward_flops(model.config, [(p[:-1], [p[-1:]]) for p in prompts])  # one log-prob a prompt
    yield row_of("prefill", first, tokens, first_memory, flops / first / rate)
    decode = whole - first
    row = row_of("decode", decode, args.rows * (n - 1), memory, decode_bytes(sampler, prompts, n) / decode / bandwidth)
    if args.against:
        row["vs_naive"] = clock.once(lambda: naive_generate(sampler, prompts, n)) / whole
    yield row


def ppo_rows(args, model, clock, rate, amp):
    """The rows of a PPO iteration and its three parts: rollout, scoring, four epochs of updates."""
    cfg = ppo.Config(batch_size=args.ppo_prompts, max_new_tokens=args.ppo_tokens, minibatches=1, lr=1e-6, value_lr=1e-6)
    c, device = model.config, clock.device
    policy, value_model = copy.deepcopy(model), copy.deepcopy(model)
    ref_policy = copy.deepcopy(model).requires_grad_(False)
    value_model.set_scalar_heads(1)
    for m in (policy, ref_policy, value_model):
        configure(m, args)
    optimizers = [(policy, make_optimizer(policy, 1e-6)), (value_model, make_optimizer(value_model, 1e-6))]
    prompts = [p[:c.block_size - cfg.max_new_tokens] for p, _ in make_groups(cfg.batch_size, 1, c.block_size, c.vocab_size, seed=2)]
    noise, kept = torch.rand(len(prompts), cfg.max_new_tokens), SimpleNamespace()

    def rollout():
        kept.responses = ppo.rollout(policy, prompts, None, cfg, noise)

    def scoring():
        kept.groups, kept.mask = [(p, [r]) for p, r in zip(prompts, kept.responses)], ppo.length_mask(kept.responses)
        kept.epochs = [[list(range(len(prompts)))] for _ in range(cfg.epochs)]
        whole_lengths = [len(p) + cfg.max_new_tokens for p in prompts]
        micros = micro_batches(kept.epochs[0][0], whole_lengths, cfg.micro_tokens)
        kept.logprobs, _, kept.values, _, _ = ppo.score_rollout((policy, ref_policy, value_model), kept.groups, kept.mask, micros, cfg, device, amp)

    def update():
        rewards = ppo.last_token(torch.ones(len(prompts)), kept.mask)
        advantages, returns = ppo.compute_gae(rewards, kept.values, kept.mask, cfg.gamma, cfg.lam)
        grids = (kept.mask, kept.logprobs, kept.values, ppo.whiten(advantages, kept.mask), returns)
        ppo.update(policy, value_model, optimizers, kept.groups, grids, kept.epochs, None, cfg, device, amp)

    new, seconds, memory = len(prompts) * cfg.max_new_tokens, 0.0, 0
    whole = sum(map(len, prompts)) + new
    groups = [(p, [[0] * cfg.max_new_tokens]) for p in prompts]
    with_head, without = forward_flops(c, groups), forward_flops(c, groups, head=False)
    for name, work, tokens, flops in (("rollout", rollout, new, None), ("scoring", scoring, whole, 2 * with_head + without),
                                      ("update", update, whole * cfg.epochs, 3 * cfg.epochs * (with_head + without))):
        took, most = clock(work)
        seconds, memory = seconds + took, max(memory, most)
        yield row_of("PPO " + name, took, tokens, most, flops and flops / took / rate)
    row = row_of("PPO iteration", seconds, whole, memory, None)
    if args.against:
        row["vs_naive"] = clock.once(lambda: naive_ppo(policy, ref_policy, value_model, optimizers, prompts, cfg, amp)) / seconds
    yield row


def naive_ppo(policy, ref_policy, value_model, optimizers, prompts, cfg, amp):
    """The same number of passes, each over padded rows with the logits of every position."""
    groups = [(p, [r]) for p, r in zip(prompts, naive_generate(policy, prompts, cfg.max_new_tokens))]
    with torch.no_grad():
        old, _, _ = naive_logprobs(policy, groups, amp), naive_logprobs(ref_policy, groups, amp), naive_scores(value_model, groups, amp)
    for _ in range(cfg.epochs):
        ratio = (naive_logprobs(policy, groups, amp) - old).exp()
        (-ratio.mean() + 0.1 * (naive_scores(value_model, groups, amp) ** 2).mean()).backward()
        for model, optimizer in optimizers:
            clip_and_step(model, optimizer, cfg)


def row_of(name, seconds, tokens, memory, limit, vs_naive=None):
    return {"path": name, "tokens_per_s": tokens / seconds, "seconds": seconds, "memory_gb": memory / 1e9, "limit": limit, "vs_naive": vs_naive}


def table(rows):
    head = ["", "tokens/s", "seconds", "memory", "limit", "vs naive"]
    cells = [head] + [[r["path"], f"{r['tokens_per_s']:,.0f}", f"{r['seconds']:.3f}", f"{r['memory_gb']:.2f} GB",
                       "" if r["limit"] is None else f"{r['limit']:.0%}", "" if r["vs_naive"] is None else f"{r['vs_naive']:.1f}x"] for r in rows]
    return evaluate.aligned(cells)


def main(argv=None):
    """The command line at the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="gpt2 … gpt2-xl, or LAYERSxHEADSxWIDTH; default gpt2 on CUDA, 6x6x384 on the CPU")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--compile", type=lambda s: s == "True", help="True or False; default: on CUDA")
    parser.add_argument("--checkpoint_blocks", action="store_true", help="recompute each block in the backward pass")
    parser.add_argument("--block_size", type=int, default=1024, help="the model's context (default 1024)")
    parser.add_argument("--batch_size", type=int, default=8, help="pairs a training step (default 8)")
    parser.add_argument("--rows", type=int, default=32, help="prompts of prefill and decode (default 32)")
    parser.add_argument("--new_tokens", type=int, default=64, help="tokens that decode writes a row (default 64)")
    parser.add_argument("--ppo_prompts", type=int, default=16, help="prompts of a PPO iteration (default 16)")
    parser.add_argument("--ppo_tokens", type=int, default=48, help="new tokens of a PPO iteration (default 48)")
    parser.add_argument("--repeat", type=int, default=5, help="runs that a median is of (default 5)")
    parser.add_argument("--against", choices=["naive"], help="naive: the textbook version beside ours")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    args = parser.parse_args(argv)
    args.seed, args.lr, args.grad_clip = 0, 1e-6, 1.0
    device, amp = setup(args)
    shape = args.model or ("gpt2" if device.startswith("cuda") else "6x6x384")
    try:
        n_layer, n_head, n_embd = PRETRAINED.get(shape) or map(int, shape.split("x"))
    except ValueError:
        raise SystemExit(f"--model={shape}: one of {', '.join(PRETRAINED)}, or LAYERSxHEADSxWIDTH as in 6x6x384")
    model = GPT(GPTConfig(50257, args.block_size, n_layer, n_head, n_embd)).to(device)
    clock = Clock(device, args.repeat)
    rate, bandwidth = machine(clock, torch.bfloat16 if device.startswith("cuda") else torch.float32)
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    print(f"{shape} on {name}, torch {torch.__version__}: {rate / 1e12:.3g} TFLOP/s in a matrix product, {bandwidth / 1e9:.3g} GB/s in a copy\n")
    rows = []
    for path, work, tokens, flops, naive in training_rows(args, model, device, amp):
        seconds, memory = clock(work)
        rows.append(row_of(path, seconds, tokens, memory, flops / seconds / rate, clock.once(naive) / seconds if args.against else None))
    rows += sampling_rows(args, model, clock, rate, bandwidth)
    rows += ppo_rows(args, model, clock, rate, amp)
    print(table(rows))
    if args.json:
        with writing(args.json) as f:
            json.dump({"model": shape, "device": name, "torch": torch.__version__, "flops": rate, "bandwidth": bandwidth, "rows": rows}, f, indent=2)


if __name__ == "__main__":
    main()
