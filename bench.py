"""Speed and memory of each hot path, beside what the machine could do: one table, a row per path.

    python bench.py                                  gpt2 on CUDA; on a CPU, 6 layers of 384
    python bench.py --model=gpt2-medium --json=FILE
    python bench.py --against=naive                  beside the textbook version of the same work

Weights and tokens are random. Prompts and responses have about the lengths of Anthropic's HH-RLHF (124 and
46 tokens on average, exponential), so padding costs what it would cost there. The columns are medians of
--repeat runs, after one that warms up:

    tokens/s     without padding, a prompt counted once for all of its responses; for decode and rollout, only
                 new tokens
    seconds      of one step; for decode, of all --new_tokens tokens of all rows without the prompts' own pass
    memory       the largest allocation on CUDA; on a Linux CPU, the process's largest resident size during
                 that row
    limit        the share of the machine that was used. Training, scoring, prefill: the FLOPs that the
                 tokens need, over those of one large matrix product (4096³ on CUDA, 1024³ on a CPU) in the
                 same time. Decode: the bytes that must be read at least (every weight, and each row's keys
                 and values, once per step), over those that a copy of 256 MB moves in the same time
    vs naive     seconds of the textbook version over ours: a padded row per sequence, logits at every
                 position, the reference run at each step, generation without a cache (run once in the same
                 process, without warming up)

FLOPs of a forward pass: 24 C² per block and token, 4 C per block for each position that a token looks at,
2 VC per token whose log-prob is computed. A training step counts as three forward passes.
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

import dpo
import ppo
import reward
import simpo
from common import grids
from common.batches import micro_batches
from common.device import choose_device
from common.files import write_atomically
from common.optim import make_optimizer, optimizer_step
from common.tables import aligned
from engine.packing import group_length, pack
from engine.weights import PRETRAINED
from model import GPT, GPTConfig

LR = 1e-6
GRAD_CLIP = 1.0


# --------------------------------------------------------------------------------------------------- the work

def random_lengths(rng, shape, mean, most):
    return np.clip(rng.exponential(mean, shape), 4, most).astype(int)


def make_groups(n, k, block_size, vocab_size, seed=0):
    """n random groups of a prompt and k responses."""
    rng = np.random.default_rng(seed)
    prompt_lengths = random_lengths(rng, n, 124, block_size // 2)
    response_lengths = random_lengths(rng, (n, k), 46, block_size // 4)
    groups = []
    for P, lengths in zip(prompt_lengths, response_lengths):
        prompt = rng.integers(0, vocab_size, P).tolist()
        groups.append((prompt, [rng.integers(0, vocab_size, R).tolist() for R in lengths]))
    return groups


def forward_flops(config, groups, head=True):
    """The FLOPs of a forward pass over groups, without padding. head: count the vocabulary's product too."""
    flops = 0
    for prompt, responses in groups:
        P = len(prompt)
        n = sum(map(len, responses))
        pairs = P * (P + 1) / 2  # of positions that look at each other
        for response in responses:
            R = len(response)
            pairs += P * R + R * (R + 1) / 2
        flops += config.n_layer * (24 * config.n_embd**2 * (P + n) + 4 * config.n_embd * pairs)
        if head:
            flops += 2 * config.vocab_size * config.n_embd * n
    return flops


def decode_bytes(model, prompts, new_tokens):
    """The bytes that the steps after the prompts must read at least.

    Each step reads all weights but the position table, and each row's keys and values.
    """
    config = model.config
    n_steps = new_tokens - 1  # the prompts' own pass gives the first token
    n_weights = sum(p.numel() for name, p in model.named_parameters() if name != "wpe.weight")
    n_positions = 0
    for prompt in prompts:
        for t in range(1, n_steps + 1):
            n_positions += len(prompt) + t
    numbers = n_weights * n_steps + 2 * config.n_layer * config.n_embd * n_positions
    return numbers * model.wte.weight.element_size()


# -------------------------------------------------------------------------------------------------- the clock

@dataclass
class Clock:
    device: str
    repeat: int

    def synchronize(self):
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def once(self, work):
        """The seconds that work() takes."""
        self.synchronize()
        begin = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - begin

    def __call__(self, work):
        """The median seconds of `repeat` runs after a first one, and the peak memory in bytes."""
        self.once(work)
        reset_peak_memory(self.device)
        seconds = statistics.median(self.once(work) for _ in range(self.repeat))
        return seconds, peak_memory(self.device)


def reset_peak_memory(device):
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # resets VmHWM
    except OSError:
        pass


def peak_memory(device):
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    try:
        with open("/proc/self/status") as f:
            for line in f:
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_machine(clock, dtype):
    """FLOP/s of a large matrix product, and bytes/s of a large copy, reads and writes counted."""
    n = 4096 if clock.device.startswith("cuda") else 1024
    a = torch.randn(n, n, device=clock.device, dtype=dtype)
    b = torch.randn(n, n, device=clock.device, dtype=dtype)
    x = torch.randn(2**26, device=clock.device)
    y = torch.empty_like(x)
    product_seconds, _ = clock(lambda: a @ b)
    copy_seconds, _ = clock(lambda: y.copy_(x))
    return 2 * n**3 / product_seconds, 2 * x.numel() * 4 / copy_seconds


# -------------------------------------------------------------------------------------- the textbook versions

def pad(sequences, device):
    """Lists of ids as one tensor, padded on the right."""
    length = max(map(len, sequences))
    return torch.tensor([sequence + [0] * (length - len(sequence)) for sequence in sequences], device=device)


def naive_logp(model, groups):
    """Summed log-probs of every response, each in a padded row of its own: (S,)"""
    rows = [(prompt, response) for prompt, responses in groups for response in responses]
    tokens = pad([prompt + response for prompt, response in rows], model.device)
    mask = torch.zeros(tokens.shape, device=model.device)
    for i, (prompt, response) in enumerate(rows):
        mask[i, len(prompt):len(prompt) + len(response)] = 1
    with model.autocast():
        logprobs = model.naive_logprobs(tokens)
    return (logprobs * mask[:, 1:]).sum(1)


def naive_scores(model, groups):
    """A scalar head at the last token of every response, each in a padded row of its own: (S,)"""
    rows = [prompt + response for prompt, responses in groups for response in responses]
    tokens = pad(rows, model.device)
    with model.autocast():
        hidden = model.hidden(tokens, torch.arange(tokens.size(1), device=model.device))
    last = [len(row) - 1 for row in rows]
    return model.scalars(hidden)[range(len(rows)), last, 0]


@torch.no_grad()
def naive_generate(model, prompts, new_tokens):
    """model.naive_generate for a padded batch: every token from the whole text before it."""
    rows = [list(prompt) for prompt in prompts]
    for _ in range(new_tokens):
        logits = model(pad(rows, model.device))
        last = [len(row) - 1 for row in rows]
        tokens = logits[range(len(rows)), last].softmax(-1).multinomial(1)[:, 0]
        for row, token in zip(rows, tokens.tolist()):
            row.append(token)
    return [row[len(prompt):] for row, prompt in zip(rows, prompts)]


# --------------------------------------------------------------------------------------------------- the rows

def make_row(path, seconds, tokens, memory, limit):
    return {"path": path, "tokens_per_s": tokens / seconds, "seconds": seconds, "memory_gb": memory / 1e9,
            "limit": limit, "vs_naive": None}


def training_rows(args, model, clock, rate):
    """The rows of a DPO, a SimPO and a reward-model step. rate: the machine's FLOP/s."""
    config = model.config
    device = model.device
    groups = make_groups(args.batch_size, 2, config.block_size, config.vocab_size)
    ref_policy = copy.deepcopy(model).requires_grad_(False)
    scorer = copy.deepcopy(model)
    scorer.set_scalar_heads(1)
    for m in (model, scorer):
        m.prepare(args.compile, args.checkpoint_blocks)
    with torch.no_grad():
        ref_logp = dpo.pair_logp(model, groups)
    group = torch.arange(len(groups), device=device).repeat_interleave(2)
    rank = torch.tensor([0, 1], device=device).repeat(len(groups))
    lengths = pack(groups).to(device).response_length
    optimizers = {m: make_optimizer(m, LR) for m in (model, scorer)}

    def step(m, loss):
        def work():
            loss().backward()
            optimizer_step(m, optimizers[m], LR, GRAD_CLIP)
        return work

    def dpo_step():
        return dpo.dpo_loss(*dpo.pair_logp(model, groups), *ref_logp, 0.1)[0].mean()

    def simpo_step():
        return simpo.simpo_loss(*simpo.pair_logp(model, groups), 2.0, 1.0)[0].mean()

    def reward_step():
        scores = scorer.score(pack(groups).to(device))
        return reward.ranking_loss(scores, group, rank)[0]

    def naive_dpo():
        logp = naive_logp(model, groups)
        with torch.no_grad():
            ref = naive_logp(ref_policy, groups)
        return dpo.dpo_loss(logp[0::2], logp[1::2], ref[0::2], ref[1::2], 0.1)[0].mean()

    def naive_simpo():
        logp = naive_logp(model, groups)
        return simpo.simpo_loss(logp[0::2], logp[1::2], lengths[0::2], lengths[1::2], 2.0, 1.0)[0].mean()

    def naive_reward():
        return reward.ranking_loss(naive_scores(scorer, groups), group, rank)[0]

    tokens = sum(map(group_length, groups))
    with_head = 3 * forward_flops(config, groups)
    without_head = 3 * forward_flops(config, groups, head=False)
    paths = [("DPO step", model, dpo_step, naive_dpo, with_head),
             ("SimPO step", model, simpo_step, naive_simpo, with_head),
             ("reward step", scorer, reward_step, naive_reward, without_head)]
    for path, m, ours, naive, flops in paths:
        seconds, memory = clock(step(m, ours))
        row = make_row(path, seconds, tokens, memory, flops / seconds / rate)
        if args.against:
            row["vs_naive"] = clock.once(step(m, naive)) / seconds
        yield row


def sampling_rows(args, model, clock, rate, bandwidth):
    """The rows of prefill and decode. Decode is a whole generation less the prefill."""
    config = model.config
    n = args.new_tokens
    dtype = torch.bfloat16 if clock.device.startswith("cuda") else torch.float32
    sampler = copy.deepcopy(model).to(dtype)
    groups = make_groups(args.rows, 1, config.block_size, config.vocab_size, seed=1)
    prompts = [prompt[:config.block_size - n] for prompt, _ in groups]

    prefill_seconds, memory = clock(lambda: sampler.generate(prompts, 1))
    # As if each prompt's last token were its response: one log-prob per prompt.
    flops = forward_flops(config, [(prompt[:-1], [prompt[-1:]]) for prompt in prompts])
    yield make_row("prefill", prefill_seconds, sum(map(len, prompts)), memory, flops / prefill_seconds / rate)

    seconds, memory = clock(lambda: sampler.generate(prompts, n))
    decode_seconds = seconds - prefill_seconds
    limit = decode_bytes(sampler, prompts, n) / decode_seconds / bandwidth
    row = make_row("decode", decode_seconds, args.rows * (n - 1), memory, limit)
    if args.against:
        row["vs_naive"] = clock.once(lambda: naive_generate(sampler, prompts, n)) / seconds
    yield row


def ppo_rows(args, model, clock, rate):
    """The rows of a PPO iteration and its three parts: rollout, scoring, and four epochs of updates."""
    cfg = ppo.Config(batch_size=args.ppo_prompts, max_new_tokens=args.ppo_tokens, minibatches=1,
                     lr=LR, value_lr=LR)
    config = model.config
    device = str(model.device)
    run = SimpleNamespace(cfg=cfg, device=device,
                          micro_batches=lambda rows, groups: micro_batches(rows, groups, cfg.micro_tokens))
    value_model = copy.deepcopy(model)
    value_model.set_scalar_heads(1)
    models = ppo.Models(copy.deepcopy(model), copy.deepcopy(model).requires_grad_(False), value_model, None)
    for m in (models.policy, models.ref_policy, models.value_model):
        m.prepare(args.compile, args.checkpoint_blocks)
    optimizers = {"policy": make_optimizer(models.policy, LR),
                  "value": make_optimizer(models.value_model, LR)}
    lrs = {"policy": LR, "value": LR}
    tokenizer = SimpleNamespace(eot_token=None)  # responses never end
    groups = make_groups(cfg.batch_size, 1, config.block_size, config.vocab_size, seed=2)
    prompts = [prompt[:config.block_size - cfg.max_new_tokens] for prompt, _ in groups]
    minibatch = list(range(len(prompts)))
    epochs = [[list(minibatch)] for _ in range(cfg.epochs)]  # one minibatch, of all prompts, in each epoch
    state = SimpleNamespace(episodes=None)

    def reward_fn(prompts, responses):
        return grids.on_last_token(torch.ones(len(responses)), grids.length_mask(responses))

    def rollout():
        state.episodes = ppo.rollout(models.policy, prompts, reward_fn, tokenizer, cfg)

    def scoring():
        pieces = run.micro_batches(minibatch, state.episodes.groups)
        ppo.evaluate_tokens(state.episodes, models, pieces, cfg)

    def update():
        episodes = state.episodes
        advantages, episodes.returns = ppo.compute_gae(
            episodes.rewards, episodes.values, episodes.mask, cfg.gamma, cfg.lam)
        episodes.advantages = ppo.whiten(advantages, episodes.mask)
        ppo.update(run, models, optimizers, episodes, epochs, lrs)

    new_tokens = len(prompts) * cfg.max_new_tokens
    all_tokens = sum(map(len, prompts)) + new_tokens
    groups = [(prompt, [[0] * cfg.max_new_tokens]) for prompt in prompts]
    with_head = forward_flops(config, groups)
    without_head = forward_flops(config, groups, head=False)
    scoring_flops = 2 * with_head + without_head  # policy and reference; value model
    update_flops = 3 * cfg.epochs * (with_head + without_head)
    paths = [("PPO rollout", rollout, new_tokens, None),
             ("PPO scoring", scoring, all_tokens, scoring_flops),
             ("PPO update", update, all_tokens * cfg.epochs, update_flops)]
    total_seconds = 0.0
    most_memory = 0
    for path, work, tokens, flops in paths:
        seconds, memory = clock(work)
        total_seconds += seconds
        most_memory = max(most_memory, memory)
        limit = None
        if flops is not None:
            limit = flops / seconds / rate
        yield make_row(path, seconds, tokens, memory, limit)
    row = make_row("PPO iteration", total_seconds, all_tokens, most_memory, None)
    if args.against:
        row["vs_naive"] = clock.once(lambda: naive_ppo(models, optimizers, prompts, cfg)) / total_seconds
    yield row


def naive_ppo(models, optimizers, prompts, cfg):
    """The passes of a PPO iteration, each over padded rows and with the logits of every position."""
    responses = naive_generate(models.policy, prompts, cfg.max_new_tokens)
    groups = [(prompt, [response]) for prompt, response in zip(prompts, responses)]
    with torch.no_grad():
        old = naive_logp(models.policy, groups)
        naive_logp(models.ref_policy, groups)
        naive_scores(models.value_model, groups)
    for _ in range(cfg.epochs):
        ratio = (naive_logp(models.policy, groups) - old).exp()
        values = naive_scores(models.value_model, groups)
        (-ratio.mean() + 0.1 * (values**2).mean()).backward()
        optimizer_step(models.policy, optimizers["policy"], LR, cfg.grad_clip)
        optimizer_step(models.value_model, optimizers["value"], LR, cfg.grad_clip)


def table(rows):
    lines = [["", "tokens/s", "seconds", "memory", "limit", "vs naive"]]
    for row in rows:
        limit = "" if row["limit"] is None else f"{row['limit']:.0%}"
        vs_naive = "" if row["vs_naive"] is None else f"{row['vs_naive']:.1f}x"
        lines.append([row["path"], f"{row['tokens_per_s']:,.0f}", f"{row['seconds']:.3f}",
                      f"{row['memory_gb']:.2f} GB", limit, vs_naive])
    return aligned(lines)


def arguments(argv):
    """The command line, as at the top of this page."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--model", help="gpt2 … gpt2-xl, or LAYERSxHEADSxWIDTH; default gpt2 on CUDA, 6x6x384 on a CPU")
    add("--device", help="default: cuda if there is one")
    add("--compile", type=lambda text: text == "True", help="True or False; default: True on CUDA")
    add("--checkpoint_blocks", action="store_true", help="recompute each block in the backward pass")
    add("--block_size", type=int, default=1024, help="the model's context (default 1024)")
    add("--batch_size", type=int, default=8, help="pairs per training step (default 8)")
    add("--rows", type=int, default=32, help="prompts of prefill and decode (default 32)")
    add("--new_tokens", type=int, default=64, help="tokens that decode writes per row (default 64)")
    add("--ppo_prompts", type=int, default=16, help="prompts of a PPO iteration (default 16)")
    add("--ppo_tokens", type=int, default=48, help="new tokens per response of a PPO iteration (default 48)")
    add("--repeat", type=int, default=5, help="runs whose median is taken (default 5)")
    add("--against", choices=["naive"], help="naive: the textbook version beside ours")
    add("--json", metavar="FILE", help="write the rows there")
    return parser.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    device = choose_device(args.device)
    on_cuda = device.startswith("cuda")
    if args.compile is None:
        args.compile = on_cuda
    shape = args.model or ("gpt2" if on_cuda else "6x6x384")
    try:
        n_layer, n_head, n_embd = PRETRAINED.get(shape) or map(int, shape.split("x"))
    except ValueError:
        names = ", ".join(PRETRAINED)
        raise SystemExit(f"--model={shape}: one of {names}, or LAYERSxHEADSxWIDTH as in 6x6x384")
    torch.manual_seed(0)
    model = GPT(GPTConfig(50257, args.block_size, n_layer, n_head, n_embd)).to(device)
    clock = Clock(device, args.repeat)
    rate, bandwidth = measure_machine(clock, torch.bfloat16 if on_cuda else torch.float32)
    name = torch.cuda.get_device_name() if on_cuda else f"{torch.get_num_threads()} CPU threads"
    print(f"{shape} on {name}, torch {torch.__version__}: {rate / 1e12:.3g} TFLOP/s in a matrix product, "
          f"{bandwidth / 1e9:.3g} GB/s in a copy\n")

    rows = [*training_rows(args, model, clock, rate), *sampling_rows(args, model, clock, rate, bandwidth),
            *ppo_rows(args, model, clock, rate)]
    print(table(rows))
    if args.json:
        result = {"model": shape, "device": name, "torch": torch.__version__, "flops": rate,
                  "bandwidth": bandwidth, "rows": rows}
        with write_atomically(args.json) as f:
            json.dump(result, f, indent=2)


if __name__ == "__main__":
    main()
