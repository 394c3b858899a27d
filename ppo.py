"""Proximal Policy Optimization from a reward: the third stage of InstructGPT (Ouyang et al. 2022, arXiv:2203.02155 §3.5).

It maximises, with π_ref the SFT model,

    E[ r(x, y) − β log π_θ(y|x)/π_ref(y|x) ]  + γ E_demonstrations[ log π_θ(y|x) ]                                 (eq. 2)

whose optimum, at γ = 0, is π*(y|x) ∝ π_ref(y|x) exp(r(x, y)/β). Each iteration, in the order of this page:

    rollout            one response a prompt is sampled from the policy
    score_rollout      log π, log π_ref, V and the exact KL at each token
    dense_reward       the reward, each token's minus its share of the KL penalty (Ziegler et al. 2019, arXiv:1909.08593 eq. 2)
    compute_gae        advantages and returns (Schulman et al. 2015, arXiv:1506.02438 eq. 16)
    policy_loss        epochs over shuffled minibatches, with the clipped ratio (Schulman et al. 2017, arXiv:1707.06347 eq. 7)
    value_loss         of the value model, clipped alike
    AdaptiveKL         moves β towards a target KL, where one is set

Every quantity is a (B, R) grid of response tokens: column t speaks of the action y_t taken in the state (x, y_<t). `mask` says
which tokens there are; the EOS is an action and in it. grid[mask] is the flat array of a packed batch, in the same order.

    python ppo.py                                            the animals world, from nothing, with the SFT and reward models before it
    python ppo.py --reward=gold                              against the true reward: a programmatic verifier
    python ppo.py hh --init=out/sft-hh                       Anthropic's HH-RLHF, GPT-2
    python ppo.py tldr                                       summaries of Reddit posts; imdb: data/imdb.py has the commands

Or train(cfg, reward_fn), where reward_fn(prompts, responses), two lists of lists of token ids, returns the reward of each response
token: (B, R) numbers, R the longest response's length, 0 after a response's end.

Left out: several responses a prompt (GRPO, RLOO), an entropy bonus, generation that runs beside training, and the pretraining text of
eq. 2's second term, for which demonstrations stand, as a mean over their response tokens: its γ cannot be read as the paper's 27.8.
"""
import copy
import os
import re
import time
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

import evaluate
from common import (RANK, WORLD, Log, all_reduce, clip_and_step, configure, due, fit, known, lr_schedule, level, load_checkpoint,
                    load_model, make_optimizer, open_run, parse, require, restore, resume, run_dir, save_checkpoint, say, score_groups,
                    setup, shard, share, sum_over_ranks, whole, writing)
from data import batch_order, dataset, encode_groups, encode_prompts, get_tokenizer, group_length, micro_batches, pack
from model import CHUNK


@dataclass
class Config:
    recipe: str = "animals"         # the positional argument
    data: str = "animals"           # animals, hh, hh/SUBSET, qa_feedback, tldr, imdb, a .jsonl[.gz] or a _feedback.json file
    data_dir: str = "data/files"    # where published files are looked for before they are fetched
    init: str | None = None         # the policy and its reference: a run's folder, gpt2[-medium|-large|-xl], a Hugging Face folder, scratch; None: the SFT model, trained first if missing
    out: str | None = None          # the run's folder; None: out/ppo-RECIPE, or out/ppo-FILE
    reward: str = "rm"              # rm: the reward model; gold: the true reward of the data, where it has one
    reward_model: str | None = None  # a run's folder of reward.py; None: out/reward-…, trained first if missing
    normalize_reward: bool = False  # divide scores by their standard deviation on demonstrations
    reward_clip: float | None = None  # largest absolute reward of a token, before the KL penalty
    missing_eos_penalty: float = 1.0  # off the last token's reward of a response that did not end by itself
    value_init: str = "reward"      # what the value model starts from: reward, sft
    share_value: bool = False       # a value head on the policy in place of a value model
    kl_coef: float = 0.05           # β: the price of a nat of KL; where kl_target is set, its first value
    kl_target: float | None = None  # nats a response that the adaptive controller aims for; None: kl_coef is fixed
    kl_horizon: float = 10000.0     # episodes over which the adaptive controller corrects (arXiv:1909.08593 §2.2)
    target_kl: float | None = None  # an iteration's epochs end when a minibatch's approx_kl exceeds this
    temperature: float = 1.0        # τ, of sampling and of every log-prob
    max_new_tokens: int = 40        # the longest response
    gamma: float = 1.0              # γ, the discount (arXiv:1506.02438)
    lam: float = 0.95               # λ of GAE
    clip: float = 0.2               # ε, of the ratio
    value_clip: float = 0.2         # of the change of a value
    vf_coef: float = 0.1            # weight of the value loss, which matters with --share_value=True
    ptx_coef: float = 0.0           # γ of eq. 2: weight of the language-model loss on demonstrations
    whiten_rewards: bool = False    # rewards to unit variance, their mean kept
    whiten_advantages: bool = True  # advantages to mean 0 and unit variance
    steps: int = 80                 # iterations: a rollout and its epochs
    batch_size: int = 128           # prompts an iteration, over all processes
    epochs: int = 4                 # times that an iteration's rollout is gone through
    minibatches: int = 4            # optimizer steps an epoch
    micro_tokens: int = 16384       # tokens a forward pass at most; a larger minibatch is accumulated
    max_len: int = 64               # prompt and response together, in tokens
    lr: float = 3e-4                # peak learning rate of the policy
    value_lr: float = 1e-3          # peak learning rate of the value model
    warmup: int = 0                 # iterations of linear warm-up, before the cosine to 0
    weight_decay: float = 0.0       # on matrices
    grad_clip: float = 1.0          # largest norm of the gradient
    n_layer: int = 4                # with --init=scratch
    n_head: int = 4                 # with --init=scratch
    n_embd: int = 64                # with --init=scratch
    seed: int = 0                   # of weights, prompt order and sampling
    device: str | None = None       # cpu, cuda, cuda:1 …; None: cuda where there is one
    compile: bool | None = None     # torch.compile; None: on CUDA
    checkpoint_blocks: bool = False  # recompute each block in the backward pass: a third more work, the activations of one block at a time
    fsdp: bool = False              # shard the model's weights, gradients and optimizer over the processes (torchrun)
    log_every: int = 1              # iterations between lines on the console
    sample_every: int = 20          # iterations between samples, on the console and in samples.txt
    ckpt_every: int = 20            # iterations between checkpoints
    wandb: str | None = None        # the project of Weights & Biases that gets the log too
    tensorboard: bool = False       # the log also for TensorBoard, in OUT/tensorboard
    eval_n: int = 500               # prompts in the closing table; 0: no table
    resume: bool = False            # go on from the run's last checkpoint


RECIPES = {
    "hh": dict(data="hh", normalize_reward=True, kl_coef=0.05, max_new_tokens=128, steps=500, max_len=512, lr=3e-6, value_lr=1e-5,
               warmup=10, ckpt_every=50, eval_n=64),
    # arXiv:2009.01325 B.1, its 1.3B model: a million episodes in batches of 512, β 0.05, 1.5e-5, summaries of up to 48 tokens
    "tldr": dict(data="tldr", kl_coef=0.05, max_new_tokens=48, steps=1950, batch_size=512, max_len=640, lr=1.5e-5, value_lr=1.5e-5,
                 ckpt_every=100, eval_n=64),
    # arXiv:2305.18290 §6.1, C.1: batches of 1024, scores normalised, a target KL of 3, 6, 9 or 12; kl_coef as in TRL. A review need not end
    "imdb": dict(data="imdb", normalize_reward=True, missing_eos_penalty=0.0, kl_coef=0.2, kl_target=6.0, max_new_tokens=128, steps=100,
                 batch_size=1024, max_len=136, lr=1e-5, value_lr=1e-5, warmup=5, ckpt_every=20, eval_n=64),
}


CONSOLE = ["score", "gold", "kl", "kl_coef", "entropy", "clip_frac", "approx_kl", "policy_loss", "value_loss", "explained_variance",
           "response_len"]  # what of the log the console shows
RUNAWAY = 1.0  # nats a token: the policy has left its reference


# ------------------------------------------------------------------------------------------------ rollout

def rollout(policy, prompts, eos, cfg, noise):
    """Samples a response to each prompt (lists of ids) at temperature τ -> responses, lists of ids, with the EOS where it was met."""
    policy = whole(policy, torch.bfloat16 if policy.device.type == "cuda" else torch.float32)
    return policy.generate(prompts, cfg.max_new_tokens, cfg.temperature, eos=eos, noise=noise)


def length_mask(responses):
    """mask (B, R): True on the tokens of each response, R the longest response's length."""
    length = torch.tensor(list(map(len, responses)))
    return torch.arange(length.max()) < length[:, None]


def last_token(x, mask):
    """x (B,), a number a response -> (B, R), all of it on the response's last token."""
    return torch.zeros(mask.shape).scatter(1, mask.sum(1, keepdim=True) - 1, x[:, None])


def forward(policy, value_model, batch, temperature):
    """log π(y_t|s_t) and V(s_t) of the N response tokens of a packed batch, both (N,) float32. A shared trunk is run once."""
    states = policy.states(batch)
    values = policy.scalars(states)[:, 0] if value_model is policy else value_model.values(batch)
    return policy.token_logprobs(states, batch.target, temperature), values


@torch.no_grad()
def score_batch(policy, ref_policy, value_model, batch, temperature):
    """For the N response tokens of a packed batch: logprobs, ref_logprobs, values, KL(π(·|s_t) ‖ π_ref(·|s_t)), entropy -> (5, N)"""
    states, ref_states = policy.states(batch), ref_policy.states(batch)
    values = policy.scalars(states)[:, 0] if value_model is policy else value_model.values(batch)
    chunks = []
    for s, ref_s, v, y in zip(*(x.split(CHUNK) for x in (states, ref_states, values, batch.target[:, None]))):
        logp, ref_logp = policy.log_softmax(s, temperature), ref_policy.log_softmax(ref_s, temperature)  # (n, V)
        p = logp.exp()
        chunks.append(torch.stack([logp.gather(1, y)[:, 0], ref_logp.gather(1, y)[:, 0], v,
                                   (p * (logp - ref_logp)).sum(-1), -(p * logp).sum(-1)]))
    return torch.cat(chunks, 1)


def score_rollout(models, groups, mask, micros, cfg, device, amp):
    """score_batch of a whole rollout -> logprobs, ref_logprobs, values, kl, entropy, (B, R) each on the CPU, 0 outside the mask.

    Runs in `micros`, the micro-batches of the first epoch, so that there the ratio π/π_old is 1 to the bit until the first step.
    """
    grids = torch.zeros(5, *mask.shape)
    for micro in micros:
        batch = pack([groups[i] for i in micro]).to(device)
        with amp:
            flat = score_batch(*models, batch, cfg.temperature).cpu()
        rows = mask[micro]
        grids[:, micro] = torch.zeros(5, *rows.shape).masked_scatter(rows, flat)
    return all_reduce(grids.to(device)).cpu().unbind(0)


# ------------------------------------------------------------------------------------------------ reward

def check_reward(rewards, responses, tokenizer):
    """The answer of a reward function as a (B, R) float32 tensor; ValueError where it is of another shape or no number."""
    try:
        rewards = torch.as_tensor(rewards, dtype=torch.float32, device="cpu")
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"reward_fn must return a (B, R) array of numbers, 0 after a response's end ({error})")
    mask = length_mask(responses)
    if rewards.shape != mask.shape:
        raise ValueError(f"reward_fn returned the shape {tuple(rewards.shape)}, expected {tuple(mask.shape)}: a number for each token of "
                         f"{mask.size(0)} responses, the longest of {mask.size(1)} tokens")
    for wrong, what in ((~rewards.isfinite(), "gave"), ((rewards != 0) & ~mask, "rewarded, after its end,")):
        if wrong.any():
            i, t = wrong.nonzero()[0].tolist()
            raise ValueError(f"reward_fn {what} response {i} {rewards[i, t].item()} at token {t}: {evaluate.printable(tokenizer.decode(responses[i]))!r}")
    return rewards


def holistic_reward(reward_model, cfg, amp):
    """A reward_fn: the reward model's score of a response, on its last token."""
    def reward_fn(prompts, responses):
        return last_token(score_groups(reward_model, [(p, [r]) for p, r in zip(prompts, responses)], cfg.micro_tokens, amp), length_mask(responses))
    return reward_fn


def gold_reward(data, tokenizer):
    """A reward_fn: the true reward of a response, on its last token. A verifier is nothing else."""
    def reward_fn(prompts, responses):
        texts = [tokenizer.decode([t for t in r if t != tokenizer.eot_token]) for r in responses]
        gold = [data.gold(tokenizer.decode(p), t) for p, t in zip(prompts, texts)]
        return last_token(torch.tensor(gold), length_mask(responses))
    return reward_fn


def gold_of(data, prompts, responses, tokenizer):
    """The mean true reward, where the data has one."""
    return gold_reward(data, tokenizer)(prompts, responses).sum(1).mean() if hasattr(data, "gold") else None


def dense_reward(rewards, logprobs, ref_logprobs, ended, mask, kl_coef, clip=None, missing_eos_penalty=0.0):
    """The reward that PPO sees: r_t − β (log π − log π_ref)(y_t|s_t), arXiv:1909.08593 eq. 2 with the k1 estimator. All (B, R).

    rewards are clipped to ±clip, and a response that has not `ended` (B,) pays missing_eos_penalty at its last token.
    """
    if clip is not None:
        rewards = rewards.clamp(-clip, clip)
    rewards = rewards - last_token(missing_eos_penalty * (~ended).float(), mask)
    return (rewards - kl_coef * (logprobs - ref_logprobs)) * mask


def k1_k3(logprobs, ref_logprobs, mask):
    """Two unbiased estimates of KL(π‖π_ref) from samples of π, nats a response: k1 = log π/π_ref and, never negative and of
    smaller variance, k3 = π_ref/π − 1 + log π/π_ref (Schulman 2020, http://joschu.net/blog/kl-approx.html). Scalars."""
    logratio = (logprobs - ref_logprobs) * mask
    return logratio.sum(1).mean(), ((torch.exp(-logratio) - 1 + logratio) * mask).sum(1).mean()


# ------------------------------------------------------------------------------------------------ advantages

def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def masked_var(x, mask):
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def whiten(x, mask, shift=True):
    """To unit variance over the mask, and to mean 0, or with shift=False keeping the mean. (B, R) -> (B, R), 0 outside the mask."""
    mean = masked_mean(x, mask)
    white = (x - mean) * torch.rsqrt(masked_var(x, mask) + 1e-8)
    return (white if shift else white + mean) * mask


def compute_gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation, arXiv:1506.02438 eq. 16: Â_t = Σ_l (γλ)^l δ_{t+l}. All (B, R); mask True, then False.

    What follows a response's last token is worth 0. Returns advantages and returns = advantages + values (its footnote 2, not the
    Monte Carlo return of eq. 28, which they are at λ = 1), 0 outside the mask.
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]                          # δ_t
        advantages[:, t] = (delta + gamma * lam * next_advantage) * mask[:, t]              # Â_t = δ_t + γλ Â_{t+1}
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages, advantages + values


# ------------------------------------------------------------------------------------------------ losses

def policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """The clipped surrogate, arXiv:1707.06347 eq. 7: −E min(ρ Â, clip(ρ, 1−ε, 1+ε) Â), with ρ = π/π_old. All (B, R).

    Returns the loss, the share of tokens where the clip binds (ρ on the far side of it in Â's direction), and approx_kl, the k3
    estimate of KL(π_old‖π) a token, without gradient: scalars, means over the mask.
    """
    logratio = (logprobs - old_logprobs) * mask
    ratio = logratio.exp()
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = masked_mean(-torch.min(unclipped, clipped), mask)
    with torch.no_grad():
        return loss, masked_mean((clipped < unclipped).float(), mask), masked_mean(ratio - 1 - logratio, mask)


def value_loss(values, old_values, returns, mask, clip):
    """½ E max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²): (V − R)² of arXiv:1707.06347 eq. 9, halved and clipped as in its code.

    All (B, R) -> scalar, mean over the mask.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask)


class AdaptiveKL:
    """Ziegler's controller, arXiv:1909.08593 §2.2: β follows the KL, in nats a response, towards its target.

    e = clip(KL / target − 1, ±0.2);  β ← β (1 + K e), K = n / horizon for n episodes (0.1 in the paper). target None: β is fixed.
    """

    def __init__(self, coef, target, horizon):
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl, n):
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * n / self.horizon


# ------------------------------------------------------------------------------------------------ the update

def loss_of(policy, value_model, groups, rows, grids, n_tokens, cfg, device, amp):
    """The losses of some rows of a minibatch of n_tokens response tokens, scaled so that those of all its rows add up to means.

    grids: mask, old_logprobs, old_values, advantages, returns, (B, R) each. -> loss, and a dict of its parts, without gradient.
    """
    batch = pack([groups[i] for i in rows]).to(device)
    mask, old_logprobs, old_values, advantages, returns = (grid[rows].to(device) for grid in grids)
    with amp:
        flat = forward(policy, value_model, batch, cfg.temperature)
    logprobs, values = (torch.zeros(mask.shape, device=device).masked_scatter(mask, x) for x in flat)  # (N,) -> (rows, R)
    pg_loss, clip_frac, approx_kl = policy_loss(logprobs, old_logprobs, advantages, mask, cfg.clip)
    vf_loss = value_loss(values, old_values, returns, mask, cfg.value_clip)
    weight = mask.sum() / n_tokens
    parts = {"policy_loss": pg_loss, "value_loss": vf_loss, "clip_frac": clip_frac, "approx_kl": approx_kl}
    return (pg_loss + cfg.vf_coef * vf_loss) * weight, {k: x.detach() * weight for k, x in parts.items()}


def ptx_loss(policy, demonstrations, rows, n_tokens, cfg, device, amp):
    """The second term of arXiv:2203.02155 eq. 2: −Σ log π(y_t | x, y_<t) of some demonstrations over n_tokens."""
    with amp:
        return -policy.logprobs(pack([demonstrations[i] for i in rows]).to(device), cfg.temperature).sum() / n_tokens


def update(policy, value_model, optimizers, groups, grids, epochs, ptx, cfg, device, amp):
    """An iteration's optimizer steps. epochs: a list of lists of minibatches, lists of rows; ptx: demonstrations and an iterator
    over the rows of them that each step takes, or None. -> a dict of means over the steps taken, and their number."""
    lengths = [len(p) + len(r) for p, (r,) in groups]
    totals, steps = {}, 0
    for minibatch in (minibatch for minibatches in epochs for minibatch in minibatches):
        n_tokens = grids[0][minibatch].sum().to(device)
        stats = dict.fromkeys(["policy_loss", "value_loss", "clip_frac", "approx_kl", "ptx_loss"], 0.0)
        for micro in level(micro_batches(share(minibatch), lengths, cfg.micro_tokens), policy):
            loss, parts = loss_of(policy, value_model, groups, micro, grids, n_tokens, cfg, device, amp)
            loss.backward()
            for key, value in parts.items():
                stats[key] += value
        if ptx:
            demonstrations, order = ptx
            rows, demo_lengths = next(order), [len(p) + len(r) for p, (r,) in demonstrations]
            demo_tokens = sum(len(demonstrations[i][1][0]) for i in rows)
            for micro in level(micro_batches(share(rows), demo_lengths, cfg.micro_tokens), policy):
                loss = ptx_loss(policy, demonstrations, micro, demo_tokens, cfg, device, amp)
                (cfg.ptx_coef * loss).backward()  # on top of PPO's gradient
                stats["ptx_loss"] += loss.detach()
        stats = sum_over_ranks(policy, stats)
        for model in {policy, value_model} - {policy}:
            sum_over_ranks(model, {"": 0.0})
        if cfg.target_kl is not None and stats["approx_kl"] > cfg.target_kl:
            for _, optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            break
        for model, optimizer in optimizers:
            stats["value_grad_norm" if model is not policy else "grad_norm"] = clip_and_step(model, optimizer, cfg)
        steps += 1
        totals = {key: totals.get(key, 0.0) + value for key, value in stats.items()}
    means = {key: value / max(steps, 1) for key, value in totals.items()}
    if steps:
        means["loss"] = means["policy_loss"] + cfg.vf_coef * means["value_loss"] + cfg.ptx_coef * means["ptx_loss"]
    return means | {"optimizer_steps": steps}


# ------------------------------------------------------------------------------------------------ the run

def load_models(cfg, init, reward_fn):
    """-> policy, ref_policy, value_model (the policy itself with --share_value=True), reward_model or None, the tokenizer's name."""
    policy, tokenizer = load_model(init, cfg)
    policy.set_scalar_heads(0)
    ref_policy = copy.deepcopy(policy).requires_grad_(False)
    value_model, reward_model = copy.deepcopy(policy), None
    value_model.set_scalar_heads(1)
    if reward_fn is None and cfg.reward == "rm":
        reward_model, its_tokenizer = load_model(cfg.reward_model, cfg)
        if reward_model.config.n_scalars != 1:
            raise SystemExit(f"{cfg.reward_model}: not a reward model (reward.py makes one)")
        if its_tokenizer != tokenizer:
            raise SystemExit(f"{cfg.reward_model}: this reward model reads the tokenizer {its_tokenizer}, the policy {init} writes {tokenizer}")
        if cfg.normalize_reward:  # the mean on demonstrations is 0 already
            score_std = load_checkpoint(cfg.reward_model)["score_std"]
            with torch.no_grad():
                reward_model.scalar_head.weight /= score_std
                reward_model.scalar_head.bias /= score_std
        reward_model.requires_grad_(False)
        if cfg.value_init == "reward":
            value_model = copy.deepcopy(reward_model).requires_grad_(True)
    if cfg.share_value:
        policy.set_scalar_heads(1)
        value_model = policy
    return policy, ref_policy, value_model, reward_model, tokenizer


def check(cfg, data, reward_fn):
    """One line for settings that cannot be run."""
    if reward_fn is None:
        known("reward", cfg.reward, ["rm", "gold"])
    known("value_init", cfg.value_init, ["reward", "sft"])
    if cfg.batch_size % cfg.minibatches:
        raise SystemExit(f"--batch_size={cfg.batch_size} is not a multiple of --minibatches={cfg.minibatches}")
    if cfg.max_new_tokens >= cfg.max_len:
        raise SystemExit(f"--max_new_tokens={cfg.max_new_tokens} leaves no room for a prompt in --max_len={cfg.max_len}")
    if reward_fn is None and cfg.reward == "gold" and not hasattr(data, "gold"):
        raise SystemExit(f"--reward=gold: nobody knows the true reward of --data={cfg.data}")


def gather(local):
    """The whole list of which each process holds its `share`."""
    if WORLD == 1:
        return local
    parts = [None] * WORLD
    dist.all_gather_object(parts, local)
    return [parts[i % WORLD][i // WORLD] for i in range(len(local) * WORLD)]


def experience(models, prompts, reward_fn, tokenizer, cfg):
    """Rollout and reward of a global batch of prompts -> responses, their dense rewards (B, R), seconds it took."""
    begin, noise = time.time(), torch.rand(len(prompts), cfg.max_new_tokens)  # every process draws all of it, and uses its share
    mine = share(prompts)
    responses = rollout(models[0], mine, tokenizer.eot_token, cfg, noise[RANK::WORLD])
    rewards = check_reward(reward_fn(mine, responses), responses, tokenizer)
    both = gather([(response, r[:len(response)]) for response, r in zip(responses, rewards)])
    responses = [response for response, _ in both]
    rewards = torch.nn.utils.rnn.pad_sequence([r for _, r in both], batch_first=True)
    return responses, rewards, time.time() - begin


def show_samples(out, step, prompts, responses, score, kl, tokenizer, n=3):
    """The first n episodes of an iteration, on the console and at the end of OUT/samples.txt."""
    lines = [f"step {step}"]
    for i in range(min(n, len(prompts))):
        lines.append(f"  {evaluate.printable(tokenizer.decode(prompts[i]))}\n    score {score[i]:7.3f}  kl {kl[i]:7.3f} | "
                     + evaluate.printable(tokenizer.decode(responses[i])))
    say("\n" + "\n".join(lines) + "\n")
    if RANK == 0:
        with writing(os.path.join(out, "samples.txt"), "a") as f:
            f.write("\n".join(lines) + "\n")


def cut_samples(out, start):
    """Drops from samples.txt what a resumed run writes again."""
    path = os.path.join(out, "samples.txt")
    if RANK == 0 and os.path.exists(path):
        with open(path) as f:
            blocks = re.split(r"^(?=step \d)", f.read(), flags=re.M)
        with writing(path) as f:
            f.writelines(b for b in blocks if b and int(b.split()[1]) <= start)


def train(cfg, reward_fn=None):
    """Runs the stage, building its SFT and reward models first where they are missing; returns the trained policy.

    reward_fn(prompts, responses) -> (B, R), if given, is the reward in place of cfg.reward.
    """
    data = dataset(cfg.data, cfg.data_dir)
    check(cfg, data, reward_fn)
    out = cfg.out or run_dir("ppo", cfg)
    open_run(out)
    init = require("sft", cfg, cfg.init)
    if reward_fn is None and cfg.reward == "rm":
        cfg = replace(cfg, reward_model=require("reward", cfg, cfg.reward_model))
    device, amp = setup(cfg)
    *models, tokenizer_name = load_models(cfg, init, reward_fn)
    policy, ref_policy, value_model, reward_model = models
    for model in dict.fromkeys(filter(None, models)):  # a shared one once
        shard(model, cfg, device)
    tokenizer = get_tokenizer(tokenizer_name)
    reward_fn = reward_fn or (holistic_reward(reward_model, cfg, amp) if reward_model else gold_reward(data, tokenizer))
    room = cfg.max_len - cfg.max_new_tokens
    prompts = [ids.tolist() for ids in encode_prompts(tokenizer, data.prompts("train"))]
    long = sum(len(ids) > room for ids in prompts)
    prompts = [ids[-room:] for ids in prompts]
    say(f"ppo: {len(prompts)} prompts of {cfg.data}, {init} -> {out} on {device}"
        + (f"; {long} prompts lost their beginning to leave room for {cfg.max_new_tokens} new tokens" if long else ""))
    order = batch_order(len(prompts), cfg.batch_size, cfg.steps, cfg.seed)
    if cfg.ptx_coef:
        demonstrations = encode_groups(tokenizer, [(p, [r]) for p, r in data.demonstrations("train")], cfg.max_len)
        ptx_order = batch_order(len(demonstrations), cfg.batch_size // cfg.minibatches, cfg.steps * cfg.epochs * cfg.minibatches, cfg.seed + 1)

    optimizers = [(policy, make_optimizer(policy, cfg.lr, cfg.weight_decay))]
    if not cfg.share_value:
        optimizers.append((value_model, make_optimizer(value_model, cfg.value_lr, cfg.weight_decay)))
    controller, start, warned = AdaptiveKL(cfg.kl_coef, cfg.kl_target, cfg.kl_horizon), 0, False
    if cfg.resume:
        checkpoint = resume(out, cfg, *optimizers[0])
        start, controller.coef = checkpoint["step"], checkpoint["kl_coef"]
        if not cfg.share_value:
            fit(value_model, checkpoint["value_model"], out)
            restore(optimizers[1][1], checkpoint["value_optimizer"])
    cut_samples(out, start)
    log = Log(out, cfg, start, console=CONSOLE)
    for model in filter(None, models):
        configure(model, cfg)

    for step in range(start, cfg.steps):
        batch_prompts = [prompts[i] for i in order[step]]
        responses, rewards, rollout_s = experience(models, batch_prompts, reward_fn, tokenizer, cfg)
        begin = time.time()
        groups, mask = [(p, [r]) for p, r in zip(batch_prompts, responses)], length_mask(responses)
        lengths = [len(p) + len(r) for p, (r,) in groups]
        ended = torch.tensor([r[-1] == tokenizer.eot_token for r in responses])
        epochs = [[rows.tolist() for rows in torch.randperm(cfg.batch_size).chunk(cfg.minibatches)] for _ in range(cfg.epochs)]
        first = [micro for minibatch in epochs[0] for micro in level(micro_batches(share(minibatch), lengths, cfg.micro_tokens), policy)]
        logprobs, ref_logprobs, values, kl, entropy = score_rollout((policy, ref_policy, value_model), groups, mask, first, cfg, device, amp)

        total = dense_reward(rewards, logprobs, ref_logprobs, ended, mask, controller.coef, cfg.reward_clip, cfg.missing_eos_penalty)
        advantages, returns = compute_gae(whiten(total, mask, shift=False) if cfg.whiten_rewards else total, values, mask, cfg.gamma, cfg.lam)
        grids = (mask, logprobs, values, whiten(advantages, mask) if cfg.whiten_advantages else advantages, returns)
        stats, k1_k3_kl = {}, k1_k3(logprobs, ref_logprobs, mask)
        stats |= {"score": rewards.sum(1).mean(), "gold": gold_of(data, batch_prompts, responses, tokenizer), "kl": kl.sum(1).mean(),
                  "kl_coef": controller.coef, "reward": total.sum(1).mean(), "entropy": masked_mean(entropy, mask),
                  "explained_variance": 1 - masked_var(returns - values, mask) / masked_var(returns, mask),
                  "response_len": mask.sum() / len(mask), "eos_rate": ended.float().mean(), "kl_k1": k1_k3_kl[0], "kl_k3": k1_k3_kl[1]}
        stats = {key: value.item() if torch.is_tensor(value) else value for key, value in stats.items()}

        learn = time.time()
        for (_, optimizer), peak in zip(optimizers, (cfg.lr, cfg.value_lr)):
            for param_group in optimizer.param_groups:
                param_group["lr"] = peak * lr_schedule(step, cfg)
        at = step * cfg.epochs * cfg.minibatches
        ptx = (demonstrations, iter(ptx_order[at:])) if cfg.ptx_coef else None
        losses = update(policy, value_model, optimizers, groups, grids, epochs, ptx, cfg, device, amp)
        controller.update(stats["kl"], cfg.batch_size)

        done = step + 1
        stats |= losses | {"lr": cfg.lr * lr_schedule(step, cfg), "rollout_s": rollout_s, "score_s": learn - begin, "update_s": time.time() - learn}
        log(done, sum(lengths), **stats)
        if stats["kl"] > RUNAWAY * stats["response_len"] and not warned:
            warned = True
            say(f"warning: the KL to the reference runs away ({stats['kl']:.1f} nats a response of {stats['response_len']:.0f} tokens): "
                f"lower --lr (now {cfg.lr}) or --epochs, or raise --kl_coef (now {controller.coef:.3g})")
        if done % cfg.sample_every == 0 or done == 1:
            show_samples(out, done, batch_prompts, responses, rewards.sum(1).tolist(), kl.sum(1).tolist(), tokenizer)
        if due(done, cfg):
            value = {} if cfg.share_value else dict(value_model=value_model.state_dict(), value_optimizer=optimizers[1][1].state_dict())
            save_checkpoint(out, done, policy, optimizers[0][1], cfg, tokenizer_name, kl_coef=controller.coef, **value)

    evaluate.report(out, cfg, [(init, ref_policy), (out, policy)], data, tokenizer, reward_model)
    return policy


if __name__ == "__main__":
    train(parse(Config, RECIPES))
