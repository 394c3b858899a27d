"""Proximal Policy Optimization from a reward: the third stage of InstructGPT (Ouyang et al. 2022,
arXiv:2203.02155 §3.5).

It maximizes, with π_ref the SFT model,

    E[ r(x, y) − β log π_θ(y|x)/π_ref(y|x) ] + ptx_coef E_demonstrations[ log π_θ(y|x) ]         (eq. 2)

where ptx_coef is the paper's γ. Without the second term its optimum is π*(y|x) ∝ π_ref(y|x) exp(r(x, y)/β).
An iteration has seven steps. Each has its own section below, and is marked with its number in `train`:

    1. rollout         sample K responses per prompt from the policy, by default one, and get their rewards
    2. evaluate_tokens log π, log π_ref, V and the exact KL at every token
    3. dense_reward    the reward minus each token's KL penalty: Ziegler et al. 2019, arXiv:1909.08593 eq. 2
    4. compute_gae     advantages and returns: Schulman et al. 2015, arXiv:1506.02438 eq. 16;
                       without a value model: rloo_advantages or grpo_advantages, which compare K responses
    5. update          epochs of clipped minibatch updates: Schulman et al. 2017, arXiv:1707.06347 eq. 7
    6. AdaptiveKL      adapts β so that the KL approaches a target, if one is set: arXiv:1909.08593 §2.2
    7. statistics      log, and save a checkpoint

Every per-token quantity is a (B, R) grid of response tokens: column t is about the action y_t, taken in the
state s_t = (x, y_<t). `mask` is True where there is a token; the EOS is an action and is in the mask. The
models work on packed batches instead: `pack` lays prompts and responses end to end without padding (a
response sees its prompt and itself, and its positions continue the prompt's), and `states(batch)` are the
model's hidden states at the s_t, (N, n_embd), which predict the batch's N response tokens, batch.target.
`grids.to_grid` turns a flat array (N,) into a grid, and grid[mask] turns it back.

    python ppo.py                         the animals world, from scratch: SFT and reward model first
    python ppo.py --reward=gold           the true reward, from a program: a verifier
    python ppo.py --advantage=rloo --k=8  without a value model: eight responses to each prompt
    python ppo.py hh --init=out/sft-hh    Anthropic's HH-RLHF, GPT-2
    python ppo.py tldr                    summaries of Reddit posts
    python ppo.py imdb                    positive film reviews

Or call train(cfg, reward_fn) with your own reward. If yours takes two texts, wrap it: text_reward(function,
tokenizer). In general, reward_fn(prompts, responses) takes two lists of B lists of token ids, and returns a
(B, R) tensor: the reward of each response token, and 0 after a response's end. R is the length of the longest
of these responses. With several processes, each calls it on its own share of the prompts, and B and R are
those of the share. PPO then clips these rewards, if --reward_clip is set, and subtracts missing_eos_penalty
at the last token of a response that did not end, and the KL penalty at every token.

Left out: an entropy bonus, GRPO's KL in the loss (here it is in the reward), and asynchronous generation.
The pretraining text of eq. 2 is replaced by demonstrations, with a mean over their tokens as the loss, so γ
is not comparable with the paper's 27.8.
"""
import copy
import time
from dataclasses import dataclass, fields
from typing import Literal

import torch

import evaluate
from common import dist, grids, scoring, sharding
from common.batches import DemonstrationBatches
from common.log import Metrics, SampleFile
from common.optim import make_optimizer, optimizer_step
from common.options import (NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, RunConfig,
                            UnitFloat, parse)
from common.run import Run
from engine.logprobs import CHUNK
from engine.packing import group_length, pack


@dataclass
class Config(RunConfig):  # data, init, max_len, micro_tokens, grad_clip, resume, …: see common/options.py
    reward: Literal["rm", "gold"] = "rm"  # rm: a reward model; gold: the data's true reward, if known
    reward_model: str | None = None     # a run of reward.py; None: out/reward-…, trained first if missing
    normalize_reward: bool = False      # divide scores by their standard deviation on demonstrations
    reward_clip: PositiveFloat | None = None  # the largest absolute reward of a token, before all penalties
    missing_eos_penalty: NonNegativeFloat = 1.0  # subtracted at the last token of a response that did not end
    value_init: Literal["reward", "sft"] = "reward"  # the value model's start; without a reward model: sft
    share_value: bool = False           # a value head on the policy, instead of a model from value_init
    kl_coef: NonNegativeFloat = 0.1     # β, weight of the KL penalty; with kl_target, its first value
    kl_target: PositiveFloat | None = None  # adapts β towards this KL(π‖π_ref) per response; None: β is fixed
    kl_horizon: PositiveFloat = 10000.0  # in episodes; larger: β adapts more slowly
    stop_kl: NonNegativeFloat | None = None  # KL(π_old‖π) per token at which an iteration's epochs end
    temperature: PositiveFloat = 1.0    # τ of π and π_ref: in sampling, in PPO, and in the final evaluation
    max_new_tokens: PositiveInt = 40    # the longest response
    advantage: Literal["gae", "rloo", "grpo"] = "gae"  # rloo, grpo: from each prompt's k responses, without V
    k: PositiveInt = 1                  # K: responses per prompt; batch_size counts responses
    gamma: UnitFloat = 1.0              # γ of GAE, the discount (arXiv:1506.02438)
    lam: UnitFloat = 0.95               # λ of GAE
    clip: PositiveFloat = 0.2           # ε: beyond 1 ± ε, moving the ratio further gains nothing
    value_clip: PositiveFloat = 0.2     # the same for V: beyond V_old ± value_clip
    vf_coef: NonNegativeFloat = 0.1     # weight of the value loss; matters mainly with --share_value
    ptx_coef: NonNegativeFloat = 0.0    # eq. 2's γ: weight of the language-model loss on demonstrations
    whiten_rewards: bool = False        # scale rewards to unit variance, with their mean kept (see `whiten`)
    whiten_advantages: bool = True      # shift and scale GAE's advantages to mean 0 and unit variance
    steps: PositiveInt = 80             # iterations of the seven steps above, not optimizer steps
    batch_size: PositiveInt = 128       # episodes (responses) per iteration, over all processes
    epochs: PositiveInt = 4             # passes over each rollout
    minibatches: PositiveInt = 4        # optimizer steps per epoch
    lr: NonNegativeFloat = 3e-4         # peak learning rate of the policy
    value_lr: NonNegativeFloat = 1e-3   # peak learning rate of the value model
    warmup: NonNegativeInt = 0          # iterations of linear warm-up, before the cosine to 0
    log_every: PositiveInt = 1          # iterations between lines on the console
    sample_every: PositiveInt = 20      # iterations between samples, on the console and in samples.txt
    ckpt_every: PositiveInt = 20        # iterations between checkpoints


RECIPES = {
    # Our choice, for GPT-2
    "hh": dict(data="hh", normalize_reward=True, kl_coef=0.05, max_new_tokens=128, steps=500, max_len=512,
               lr=3e-6, value_lr=1e-5, warmup=10, ckpt_every=50, eval_n=64),
    # arXiv:2009.01325 B.1, its 1.3B model: a million episodes in batches of 512, β 0.05, lr 1.5e-5, up to
    # 48 tokens
    "tldr": dict(data="tldr", kl_coef=0.05, max_new_tokens=48, steps=1950, batch_size=512, max_len=640,
                 lr=1.5e-5, value_lr=1.5e-5, ckpt_every=100, eval_n=64),
    # arXiv:2305.18290 §6.1, C.1: batches of 1024, normalized scores, a target KL of 3, 6, 9 or 12; kl_coef
    # as in TRL
    "imdb": dict(data="imdb", normalize_reward=True, missing_eos_penalty=0.0, kl_coef=0.2, kl_target=6.0,
                 max_new_tokens=128, steps=100, batch_size=1024, max_len=136, lr=1e-5, value_lr=1e-5,
                 warmup=5, ckpt_every=20, eval_n=64),
}

CONSOLE = ["score", "gold", "kl", "entropy", "clip_frac", "response_len"]  # log.jsonl has all
RUNAWAY_KL = 1.0  # nats per token: beyond this the policy has drifted too far from its reference; we warn


@dataclass
class Models:
    policy: torch.nn.Module               # π
    ref_policy: torch.nn.Module           # π_ref, frozen
    value_model: torch.nn.Module | None   # V; with --share_value the policy itself; None without GAE
    reward_model: torch.nn.Module | None  # r, frozen; None if the reward is not a model


@dataclass
class Episodes:
    """An iteration's rollout: B responses, their prompts, and (B, R) grids, filled in by the numbered steps.

    K neighbouring rows are the responses to one prompt: a group. Packing a group writes its prompt only once.
    """
    prompts: list                              # of token ids, each prompt K times
    responses: list                            # of token ids, the EOS included
    ended: torch.Tensor                        # (B,): did the response end with an EOS?
    mask: torch.Tensor                         # where there is a response token
    rewards: torch.Tensor                      # 1. what reward_fn returned
    sampler_logprobs: torch.Tensor | None      # 1. log π of the bfloat16 copy that sampled, on CUDA
    k: int = 1                                 # K: responses per prompt
    logprobs: torch.Tensor | None = None       # 2. log π(y_t|s_t) before the update
    ref_logprobs: torch.Tensor | None = None   # 2. log π_ref(y_t|s_t)
    values: torch.Tensor | None = None         # 2. V(s_t) before the update
    kl: torch.Tensor | None = None             # 2. KL(π(·|s_t) ‖ π_ref(·|s_t)), exact over the vocabulary
    entropy: torch.Tensor | None = None        # 2. of π(·|s_t)
    dense_rewards: torch.Tensor | None = None  # 3. rewards minus all penalties
    advantages: torch.Tensor | None = None     # 4. Â_t, whitened if asked for
    returns: torch.Tensor | None = None        # 4. GAE: Â_t + V(s_t), with Â_t before whitening

    @property
    def groups(self):
        """[(prompt_ids, [response_ids, …]), …], for packing: each prompt with its K responses."""
        return grids.group_by_prompt(self.prompts, self.responses, self.k)

    @property
    def n_tokens(self):
        """The number of tokens in all prompts and responses; each prompt counts once."""
        return sum(map(group_length, self.groups))

    def rows(self, indices):
        """The grid rows of the groups with these indices."""
        rows = []
        for i in indices:
            rows += range(i * self.k, (i + 1) * self.k)
        return rows

    def select(self, rows, device):
        """Some of the episodes, their grids on `device`."""
        selected = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if torch.is_tensor(value):
                value = value[rows].to(device)
            elif isinstance(value, list):
                value = [value[i] for i in rows]
            selected[field.name] = value
        return Episodes(**selected)


# ----------------------------------------------------------------------------------------------- 1. rollout

def rollout(policy, prompts, reward_fn, tokenizer, cfg):
    """Samples K responses y ~ π(·|x) to each prompt (lists of ids) and asks for their rewards -> Episodes.

    Each process samples its share of the prompts, and gets the episodes of all.
    """
    prompts = grids.repeat_each(prompts, cfg.k)
    sampler = sharding.sampling_copy(policy)  # in bfloat16 on CUDA; on a CPU the policy itself
    # One uniform number per token decides what is sampled, by inverting the CDF. Every process draws all of
    # them, so that the random states stay equal, and uses its share. In float64, because torch.rand's float32
    # numbers are multiples of 2⁻²⁴: most tokens rarer than that could never be sampled.
    noise = torch.rand(len(prompts), cfg.max_new_tokens, dtype=torch.float64)
    my_prompts = dist.process_share(prompts)  # whole groups of K rows (check_settings sees to that)
    my_responses, my_logprobs = sampler.generate(
        my_prompts, cfg.max_new_tokens, cfg.temperature, eos=tokenizer.eot_token,
        noise=dist.process_share(noise), return_logprobs=True)
    # What reward_fn draws must not advance the CPU's random state, which has to stay equal in all processes.
    with torch.random.fork_rng(devices=[]):
        my_rewards = grids.check_reward(reward_fn(my_prompts, my_responses), my_responses, tokenizer)

    # Gather the episodes of all processes. Their grids differ in width, so rewards travel as lists without
    # padding.
    responses = dist.gather_shares(my_responses)
    mask = grids.length_mask(responses)
    ended = torch.tensor([response[-1] == tokenizer.eot_token for response in responses])
    my_reward_lists = [row[:len(response)].tolist() for row, response in zip(my_rewards, my_responses)]
    rewards = grids.gather_grid(my_reward_lists, mask)
    sampler_logprobs = grids.gather_grid(my_logprobs, mask) if sampler is not policy else None
    return Episodes(prompts, responses, ended, mask, rewards, sampler_logprobs, cfg.k)


# -------------------------------------------------------------------------------------------------- rewards

def reward_model_reward(reward_model, cfg):
    """A reward_fn: the reward model's score of a response, on its last token."""
    def reward_fn(prompts, responses):
        groups = grids.group_by_prompt(prompts, responses, cfg.k)
        scores = scoring.scores_of_responses(reward_model, groups, cfg.micro_tokens)
        return grids.on_last_token(scores, grids.length_mask(responses))
    return reward_fn


def text_reward(function, tokenizer):
    """A reward_fn from function(prompt, response) -> a number, of two texts: on the response's last token.

    This is all a verifier needs. The true reward is made the same way: text_reward(run.data.gold, tokenizer).
    The tokenizer is the policy's; for GPT-2, `from data import get_tokenizer` and get_tokenizer("gpt2").
    """
    def reward_fn(prompts, responses):
        rewards = []
        for prompt, response in zip(prompts, responses):
            ids = [token for token in response if token != tokenizer.eot_token]
            rewards.append(float(function(tokenizer.decode(prompt), tokenizer.decode(ids))))
        return grids.on_last_token(torch.tensor(rewards), grids.length_mask(responses))
    return reward_fn


# ---------------------------------------------------------------------------------- 2. evaluate every token

@torch.no_grad()
def evaluate_tokens(episodes, models, micro_batches, cfg):
    """Fills in log π, log π_ref, V, the exact KL and the entropy at every token.

    π_old is the policy itself. On CUDA that is not quite what sampled, a copy in bfloat16: the mismatch is
    logged, as sampler_diff_mean and sampler_diff_max, and otherwise ignored.

    micro_batches are this process's micro-batches in the first epoch of `update`, lists of indices into
    episodes.groups. `update` computes log π again, and rounding depends on how a batch is packed, so both use
    the same packing: on a CPU, the ratio π/π_old is then exactly 1 in the first minibatch, before any
    optimizer step. (On CUDA, compiled code with gradients may round differently from code without.)
    """
    names = ["logprobs", "ref_logprobs", "kl", "entropy"]
    if models.value_model is not None:
        names.append("values")
    filled = {name: torch.zeros(episodes.mask.shape) for name in names}
    groups = episodes.groups
    for indices in micro_batches:
        batch = pack([groups[i] for i in indices]).to(models.policy.device)
        quantities = evaluate_batch(models, batch, cfg.temperature)
        rows = episodes.rows(indices)
        for name in names:
            filled[name][rows] = grids.to_grid(quantities[name].cpu(), episodes.mask[rows])
    for name in names:  # each process has filled in its share
        setattr(episodes, name, dist.all_reduce(filled[name].to(models.policy.device)).cpu())


def evaluate_batch(models, batch, temperature):
    """The quantities of `evaluate_tokens` for a packed batch of N response tokens: a dict of (N,) tensors."""
    states = models.policy.states(batch)
    ref_states = models.ref_policy.states(batch)
    pieces = {"logprobs": [], "ref_logprobs": [], "kl": [], "entropy": []}
    # The distributions over the vocabulary are held for only CHUNK positions at a time.
    for s, ref_s, y in zip(states.split(CHUNK), ref_states.split(CHUNK), batch.target[:, None].split(CHUNK)):
        logp = models.policy.log_softmax(s, temperature)              # (n, vocab_size)
        ref_logp = models.ref_policy.log_softmax(ref_s, temperature)  # (n, vocab_size)
        p = logp.exp()
        pieces["logprobs"].append(logp.gather(1, y)[:, 0])  # on a CPU those of `update`, bit for bit
        pieces["ref_logprobs"].append(ref_logp.gather(1, y)[:, 0])
        # Σ_v π(v|s_t) log π/π_ref (v|s_t); rounding can make a KL of almost 0 negative
        pieces["kl"].append((p * (logp - ref_logp)).sum(-1).clamp(min=0))
        pieces["entropy"].append(-(p * logp).sum(-1))
    quantities = {name: torch.cat(tensors) for name, tensors in pieces.items()}
    if models.value_model is not None:
        quantities["values"] = values_at(models, states, batch)
    return quantities


def values_at(models, states, batch):
    """V(s_t) of the N response tokens: (N,). A value head on the policy reads the policy's states."""
    if models.value_model is models.policy:
        return models.policy.scalars(states)[:, 0]
    return models.value_model.values(batch)


# -------------------------------------------------------------------------------- 3. reward with KL penalty

def dense_reward(rewards, logprobs, ref_logprobs, ended, mask, kl_coef, reward_clip=None,
                 missing_eos_penalty=0.0):
    """The r_t that PPO sees: rewards − β log π/π_ref (y_t|s_t). All (B, R).

    Summed over a response, this is arXiv:1909.08593 eq. 2. Before the KL term is subtracted, rewards are
    clipped to ±reward_clip, if it is set, and a response that has not `ended` (B,) pays missing_eos_penalty
    at its last token.
    """
    if reward_clip is not None:
        rewards = rewards.clamp(-reward_clip, reward_clip)
    penalty = missing_eos_penalty * (~ended).float()
    rewards = rewards - grids.on_last_token(penalty, mask)
    return (rewards - kl_coef * (logprobs - ref_logprobs)) * mask


# -------------------------------------------------------------------------------------------- 4. advantages

def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def masked_var(x, mask):
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def whiten(x, mask, shift_mean=True):
    """Scales x (B, R) to unit variance over the mask, and to mean 0 if shift_mean; 0 off the mask.

    Without shift_mean, the mean μ is kept: x/σ + (1 − 1/σ) μ. This adds the constant (1 − 1/σ) μ to every
    token, so --whiten_rewards also rewards length, or punishes it. A value model does not undo that: a
    baseline lowers the variance of the gradient, and leaves the objective as it is.
    """
    mean = masked_mean(x, mask)
    white = (x - mean) * torch.rsqrt(masked_var(x, mask) + 1e-8)
    if not shift_mean:
        white = white + mean
    return white * mask


def compute_gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation, arXiv:1506.02438 eq. 16: Â_t = Σ_l (γλ)^l δ_{t+l}. All (B, R).

    Each row of the mask is True, then False. The value after the last token is 0, even if the response was
    cut off. Returns advantages and returns = advantages + values (footnote 2 there), 0 off the mask. At λ = 1
    the returns are the Monte Carlo returns of eq. 28.
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0])
    next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.size(1))):
        # δ_t = r_t + γ V(s_{t+1}) − V(s_t), and Â_t = δ_t + γλ Â_{t+1}
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t]
        next_advantage = advantages[:, t]
    return advantages, advantages + values


def rloo_advantages(totals):
    """REINFORCE leave-one-out, Ahmadian et al. 2024, arXiv:2402.14740: A_i = R_i − mean_{j≠i} R_j.

    totals: (P, K), the total rewards R_i of each prompt's K responses; returns (P, K). The mean of the others
    does not depend on y_i, so as a baseline it does not bias the gradient. Step 5 remains PPO's clipped
    update of tokens; the paper uses plain REINFORCE on whole responses.
    """
    K = totals.size(1)
    mean_of_others = (totals.sum(1, keepdim=True) - totals) / (K - 1)
    return totals - mean_of_others


def grpo_advantages(totals):
    """GRPO, Shao et al. 2024, arXiv:2402.03300 §4.1.2: A_i = (R_i − mean(R)) / std(R). (P, K) -> (P, K).

    Dr. GRPO (arXiv:2503.20783) found a bias in the std: it gives more weight to prompts whose K rewards are
    nearly equal, such as very easy and very hard ones. Here R includes the KL penalty, which GRPO has in the
    loss instead. So where the task's rewards are all equal, the advantages come from the penalty alone, and
    dividing by the std scales them to unit size. Without that division, this is RLOO times (K − 1)/K.
    """
    mean = totals.mean(1, keepdim=True)
    std = totals.std(1, keepdim=True)
    return (totals - mean) / (std + 1e-4)  # 0, not NaN, where all are equal


def group_advantages(rewards, mask, estimator, k):
    """Advantages without a value model: `estimator` compares the K responses to each prompt. All (B, R).

    It sees the whole reward of a response, R(x, y) = Σ_t r_t: r(x, y) − β log π/π_ref (y|x), as in
    arXiv:2402.14740, less the penalty for a missing EOS. Every token of the response gets its advantage.
    """
    totals = rewards.sum(1).view(-1, k)  # (P, K)
    return estimator(totals).view(-1, 1) * mask


# ------------------------------------------------------------------------------------------------ 5. update

def policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """The clipped surrogate, arXiv:1707.06347 eq. 7: −E min(ρ Â, clip(ρ, 1−ε, 1+ε) Â), with ρ = π/π_old.

    All tensors are (B, R); clip is ε. Returns three scalars, means over the mask: the loss; the share of
    tokens where the clip binds, that is where ρ has left [1−ε, 1+ε] in the direction that Â favours; and
    approx_kl, the k3 estimate of KL(π_old‖π) per token. All tokens weigh the same: GRPO's mean over each
    response, 1/|y| Σ_t, makes a long wrong response cheaper than a short one (Dr. GRPO, arXiv:2503.20783).
    """
    logratio = (logprobs - old_logprobs) * mask
    ratio = logratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = masked_mean(-torch.min(unclipped, clipped), mask)
    with torch.no_grad():
        clip_frac = masked_mean((clipped < unclipped).float(), mask)
        approx_kl = masked_mean(ratio - 1 - logratio, mask)
    return loss, clip_frac, approx_kl


def value_loss(values, old_values, returns, mask, clip):
    """½ E max((V − V_targ)², (V_old + clip(V − V_old, ±clip) − V_targ)²), V_targ the returns. All (B, R).

    Returns a scalar, the mean over the mask. This is (V − V_targ)² of arXiv:1707.06347 eq. 9, halved and
    clipped as in its authors' code.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask)


def ptx_loss(policy, demonstrations, n_tokens):
    """arXiv:2203.02155 eq. 2's second term for some demonstrations: −Σ_t log π(y_t | x, y_<t) / n_tokens.

    At temperature 1, whatever the rollout's: demonstrations are imitated by the untempered model.
    """
    batch = pack(demonstrations).to(policy.device)
    return -policy.logprobs(batch).sum() / n_tokens


def shuffled_epochs(cfg):
    """For each epoch its minibatches, as lists of indices into the groups.

    Every group occurs once per epoch, in a new order. The random state is the same in every process, and so
    is the order.
    """
    epochs = []
    for _ in range(cfg.epochs):
        order = torch.randperm(cfg.batch_size // cfg.k)
        epochs.append([indices.tolist() for indices in order.chunk(cfg.minibatches)])
    return epochs


def update(run, models, optimizers, episodes, epochs, lrs, ptx_batches=None):
    """Step 5: an optimizer step for each minibatch of each epoch.

    epochs: from shuffled_epochs. optimizers: {"policy": …, "value": …}, without "value" if there is no
    separate value model; lrs: their learning rates. ptx_batches: an iterator over lists of
    demonstrations, one list per optimizer step; None: no demonstrations. Returns the means of losses and
    statistics over the optimizer steps, and how many there were; a step cancelled by stop_kl is not counted.
    """
    cfg = run.cfg
    groups = episodes.groups
    history = []  # the metrics of each optimizer step
    stop_early = False
    for minibatches in epochs:
        for minibatch in minibatches:
            metrics = Metrics()
            minibatch_tokens = episodes.mask[episodes.rows(minibatch)].sum().to(run.device)

            # run.micro_batches takes this process's share of the minibatch (all get equally many groups),
            # and splits it into lists of at most cfg.micro_tokens tokens, none of them empty. Every process
            # gets the same number of lists, because a sharded forward pass needs all processes at once.
            for indices in run.micro_batches(minibatch, groups):
                batch = pack([groups[i] for i in indices]).to(run.device)
                # The same responses, with what steps 2 and 4 computed for them under the old policy and the
                # old V: log π_old, V_old, Â and the returns. All of that stays fixed during the epochs.
                old = episodes.select(episodes.rows(indices), run.device)
                # weight is this micro-batch's share of the minibatch's response tokens. Each loss below is a
                # mean over the micro-batch; the sum of weight · loss, over micro-batches and processes, is
                # the mean over the minibatch. So the gradients add up to the minibatch's, too.
                weight = old.mask.sum() / minibatch_tokens

                # PPO's eq. 7, the clipped surrogate. First log π(y_t|s_t) under the current weights, back on
                # the grid.
                states = models.policy.states(batch)
                logprobs = models.policy.token_logprobs(states, batch.target, cfg.temperature)
                logprobs = grids.to_grid(logprobs, old.mask)
                pg_loss, clip_frac, approx_kl = policy_loss(
                    logprobs, old.logprobs, old.advantages, old.mask, cfg.clip)
                metrics.add(policy_loss=pg_loss * weight, clip_frac=clip_frac * weight,
                            approx_kl=approx_kl * weight)
                loss = pg_loss

                # PPO's eq. 9, the value loss, likewise with V(s_t)
                if models.value_model is not None:
                    values = grids.to_grid(values_at(models, states, batch), old.mask)
                    vf_loss = value_loss(values, old.values, old.returns, old.mask, cfg.value_clip)
                    loss = pg_loss + cfg.vf_coef * vf_loss
                    metrics.add(value_loss=vf_loss * weight)
                (loss * weight).backward()

            # InstructGPT's eq. 2, second term: ptx_coef · E[log π] on demonstrations; its gradient is added
            # to PPO's. ptx_loss sums over its demonstrations' tokens, and divides by the number of tokens of
            # all of them, so that the losses of micro-batches and processes add up to the mean per token.
            if ptx_batches is not None:
                demonstrations = next(ptx_batches)  # [(prompt_ids, [response_ids]), …], in every process
                n_ptx_tokens = sum(len(response) for _, (response,) in demonstrations)
                for indices in run.micro_batches(range(len(demonstrations)), demonstrations):
                    some = [demonstrations[i] for i in indices]
                    demonstration_loss = ptx_loss(models.policy, some, n_ptx_tokens)
                    (cfg.ptx_coef * demonstration_loss).backward()
                    metrics.add(ptx_loss=demonstration_loss)

            # Sum the gradients and the metrics over the processes. Every process then has the same metrics.
            dist.sync_gradients(models.policy)
            if "value" in optimizers:
                dist.sync_gradients(models.value_model)
            step_metrics = metrics.sum_over_processes()

            # The policy has moved far enough from the one that sampled: throw this gradient away, and
            # start a new rollout. All processes make the same decision, since they have the same metrics.
            if cfg.stop_kl is not None and step_metrics["approx_kl"] > cfg.stop_kl:
                for optimizer in optimizers.values():
                    optimizer.zero_grad(set_to_none=True)
                stop_early = True
                break

            # One optimizer step for each model: clip, step, clear the gradient.
            step_metrics["grad_norm"] = optimizer_step(
                models.policy, optimizers["policy"], lrs["policy"], cfg.grad_clip)
            if "value" in optimizers:
                step_metrics["value_grad_norm"] = optimizer_step(
                    models.value_model, optimizers["value"], lrs["value"], cfg.grad_clip)
            history.append(step_metrics)
        if stop_early:
            break

    return mean_over_steps(history, cfg)


def mean_over_steps(history, cfg):
    """The means of the metrics over the optimizer steps, the whole loss, and the number of those steps."""
    if not history:  # stop_kl cancelled the first step, where approx_kl was nothing but rounding error
        return {"optimizer_steps": 0}
    means = {}
    for key in history[0]:
        means[key] = sum(step_metrics[key] for step_metrics in history) / len(history)
    weighted_value_loss = cfg.vf_coef * means.get("value_loss", 0.0)
    weighted_ptx_loss = cfg.ptx_coef * means.get("ptx_loss", 0.0)
    means["loss"] = means["policy_loss"] + weighted_value_loss + weighted_ptx_loss
    means["optimizer_steps"] = len(history)
    return means


# ------------------------------------------------------------------------------------- 6. the KL controller

class AdaptiveKL:
    """Ziegler's controller, arXiv:1909.08593 §2.2: β rises while the KL per response is above the target.

    e = clip(KL/target − 1, ±0.2);  β ← β (1 + e n/horizon) for n episodes (n/horizon is 0.1 in the paper).
    With target None, β is fixed.
    """

    def __init__(self, coef, target, horizon):
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def update(self, kl, n):
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * n / self.horizon


# --------------------------------------------------------------------------------------------------- 7. log

def k1_k3(logprobs, ref_logprobs, mask):
    """Two unbiased estimates of KL(π‖π_ref) from samples of π, in nats per response: scalars.

    k1 = log π/π_ref, and k3 = π_ref/π − 1 + log π/π_ref, which is never negative (Schulman 2020,
    http://joschu.net/blog/kl-approx.html). Near π_ref, k3 has much less variance. But π_ref/π is unbounded:
    where π rarely takes an action that π_ref often takes, k3 has more. For π = (0.99, 0.01) and
    π_ref = (0.5, 0.5), the variances are 20 (k3) and 0.2 (k1).
    """
    logratio = (logprobs - ref_logprobs) * mask
    k1 = logratio
    k3 = (torch.exp(-logratio) - 1 + logratio) * mask
    return k1.sum(1).mean(), k3.sum(1).mean()


def statistics(episodes, kl_coef, data, tokenizer):
    """The logged statistics of an iteration's episodes: a dict of numbers."""
    mask = episodes.mask
    gold = None
    if hasattr(data, "gold"):
        gold_reward = text_reward(data.gold, tokenizer)
        gold = gold_reward(episodes.prompts, episodes.responses).sum(1).mean()
    kl_k1, kl_k3 = k1_k3(episodes.logprobs, episodes.ref_logprobs, mask)
    stats = {
        "score": episodes.rewards.sum(1).mean(),  # what reward_fn returned
        "gold": gold,
        "kl": episodes.kl.sum(1).mean(),
        "kl_coef": kl_coef,
        "reward": episodes.dense_rewards.sum(1).mean(),  # clipped, minus penalties and KL
        "entropy": masked_mean(episodes.entropy, mask),
        "response_len": mask.sum() / len(mask),
        "eos_rate": episodes.ended.float().mean(),
        "kl_k1": kl_k1,
        "kl_k3": kl_k3,
    }
    if episodes.values is not None:
        residual = episodes.returns - episodes.values
        stats["explained_variance"] = 1 - masked_var(residual, mask) / masked_var(episodes.returns, mask)
    if episodes.sampler_logprobs is not None:  # how far the bfloat16 sampler is from the policy, per token
        difference = (episodes.sampler_logprobs - episodes.logprobs).abs()
        stats["sampler_diff_mean"] = masked_mean(difference, mask)
        stats["sampler_diff_max"] = (difference * mask).max()
    return {key: value.item() if torch.is_tensor(value) else value for key, value in stats.items()}


# -------------------------------------------------------------------------------------------------- the run

def load_models(run, init_name, has_reward_fn):
    """Loads and prepares all models -> Models, tokenizer."""
    cfg = run.cfg
    policy, tokenizer = run.load_model(init_name)
    # If the model was trained on chat turns, run.rollout_prompts, called later, writes prompts as turns.
    run.adopt_template(init_name)
    policy.set_scalar_heads(0)  # drops the value head of a policy from --share_value
    ref_policy = copy.deepcopy(policy).requires_grad_(False)
    reward_model = None
    if cfg.reward == "rm" and not has_reward_fn:
        reward_model = run.load_reward_model(cfg.reward_model, cfg.normalize_reward)

    # The value model: a head on the policy, a copy of the reward model, or a copy of the policy with a new
    # head.
    if cfg.advantage != "gae":
        value_model = None
    elif cfg.share_value:
        policy.set_scalar_heads(1)
        value_model = policy
    elif reward_model is not None and cfg.value_init == "reward":
        value_model = copy.deepcopy(reward_model).requires_grad_(True)  # with normalized scores, if asked for
    else:
        value_model = copy.deepcopy(policy)
        value_model.set_scalar_heads(1)

    for model in (policy, ref_policy, value_model, reward_model):
        if model is not None:
            # In place: to the device; sharded or compiled. A second call, for a policy that is also the value
            # model, does nothing.
            run.prepare(model)
    return Models(policy, ref_policy, value_model, reward_model), tokenizer


def value_state(models, optimizers):
    """What a checkpoint holds of the value model and its optimizer; empty without a separate value model."""
    if "value" not in optimizers:
        return {}
    return {"value_model": models.value_model.state_dict(),
            "value_optimizer": optimizers["value"].state_dict()}


def check_settings(cfg, data, has_reward_fn):
    """Exits with one line if the settings cannot work together."""
    if cfg.advantage != "gae" and cfg.k == 1:
        raise SystemExit(f"--advantage={cfg.advantage} compares a response with others to the same prompt: "
                         "it needs --k=2 or more")
    if cfg.advantage != "gae" and cfg.share_value:
        raise SystemExit(f"--share_value: --advantage={cfg.advantage} has no value model to share")
    if cfg.advantage != "gae" and cfg.whiten_rewards:
        raise SystemExit("--whiten_rewards scales the rewards of single tokens; "
                         f"--advantage={cfg.advantage} compares the rewards of whole responses")
    if cfg.batch_size % (cfg.minibatches * cfg.k):
        raise SystemExit(f"--batch_size={cfg.batch_size} is not a multiple of "
                         f"--minibatches={cfg.minibatches} times --k={cfg.k}")
    if cfg.batch_size // (cfg.minibatches * cfg.k) % dist.n_processes():
        raise SystemExit(f"--batch_size={cfg.batch_size} in --minibatches={cfg.minibatches}: "
                         f"{dist.n_processes()} processes cannot share a minibatch evenly "
                         f"(with --k={cfg.k}, it has {cfg.batch_size // cfg.minibatches // cfg.k} groups)")
    if cfg.max_new_tokens >= cfg.max_len:
        raise SystemExit(f"--max_new_tokens={cfg.max_new_tokens} leaves no room for a prompt in "
                         f"--max_len={cfg.max_len}")
    if cfg.kl_target is not None and cfg.kl_coef == 0:
        raise SystemExit(f"--kl_target={cfg.kl_target:g}: the KL controller multiplies β, so --kl_coef, "
                         "where it starts, must be above 0")
    if cfg.kl_target is not None and cfg.kl_horizon <= cfg.batch_size / 5:
        raise SystemExit(f"--kl_horizon={cfg.kl_horizon:g}: must be above a fifth of --batch_size="
                         f"{cfg.batch_size}, or one update of the KL controller could make β 0 or negative")
    if cfg.reward == "gold" and not has_reward_fn and not hasattr(data, "gold"):
        raise SystemExit(f"--reward=gold: the true reward of --data={cfg.data} is not known")


def stage_name(cfg, reward_fn):
    """The first part of the folder's name, out/STAGE-RECIPE: "ppo", "rloo-gold" (the true reward), …"""
    stage = "ppo" if cfg.advantage == "gae" else cfg.advantage
    if cfg.reward == "gold" and reward_fn is None:
        stage += "-gold"
    return stage


def train(cfg, reward_fn=None):
    """Runs the stage, after training the models it needs if they are missing. Returns the trained policy.

    reward_fn(prompts, responses) -> (B, R) replaces cfg.reward, if given; the top of this page describes it.
    """
    run = Run(stage_name(cfg, reward_fn), cfg)  # the device, the folder, the log and the checkpoints
    data = run.data
    check_settings(cfg, data, reward_fn is not None)
    init_name = cfg.init or run.train_if_missing("sft")
    if cfg.reward == "rm" and reward_fn is None:
        cfg.reward_model = cfg.reward_model or run.train_if_missing("reward")

    # Up to four models: the policy π, its reference π_ref, the value model V (for GAE), and the reward model
    # r (unless the reward is a function).
    models, tokenizer = load_models(run, init_name, reward_fn is not None)
    if reward_fn is None:
        if models.reward_model is not None:
            reward_fn = reward_model_reward(models.reward_model, cfg)
        else:
            reward_fn = text_reward(data.gold, tokenizer)
    optimizers = {"policy": make_optimizer(models.policy, cfg.lr, cfg.weight_decay)}
    if cfg.advantage == "gae" and not cfg.share_value:
        optimizers["value"] = make_optimizer(models.value_model, cfg.value_lr, cfg.weight_decay)
    kl_controller = AdaptiveKL(cfg.kl_coef, cfg.kl_target, cfg.kl_horizon)

    prompts = run.rollout_prompts(cfg.max_new_tokens)  # lists of ids; long ones lose their beginning
    # For each iteration, the indices of its prompts, drawn from the seed
    prompt_indices = run.shuffled_batches(prompts, cfg.batch_size // cfg.k)
    if cfg.ptx_coef:
        demonstration_batches = DemonstrationBatches(run, tokenizer)  # of eq. 2's second term
    run.print0(
        f"{cfg.advantage}: {len(prompts)} prompts of {cfg.data}, {init_name} -> {run.out} on {run.device}")
    run.show_data([(prompt, []) for prompt in prompts])  # prints the first prompt; no responses yet

    # Opens the log. With --resume, it also restores the policy, its optimizer and the random state, and
    # returns the last checkpoint, from which β and V are restored here.
    checkpoint = run.start_or_resume(models.policy, optimizers["policy"], CONSOLE)
    if cfg.resume:
        kl_controller.coef = checkpoint["kl_coef"]
        if "value" in optimizers:
            run.restore(models.value_model, optimizers["value"],
                        checkpoint["value_model"], checkpoint["value_optimizer"])
    sample_file = SampleFile(run.out, run.start)
    warned = False

    for iteration in range(run.start, cfg.steps):  # cfg.steps counts PPO's iterations
        # 1. Rollout: sample K responses y ~ π(·|x) for each prompt, and get their rewards r(x, y).
        begin = time.time()
        batch_prompts = [prompts[i] for i in prompt_indices[iteration]]
        episodes = rollout(models.policy, batch_prompts, reward_fn, tokenizer, cfg)
        rollout_s = time.time() - begin

        # 2. Evaluate every token: log π, log π_ref, V(s_t), KL(π‖π_ref), in the micro-batches of the first
        # epoch.
        begin = time.time()
        epochs = shuffled_epochs(cfg)
        first_epoch = []
        for minibatch in epochs[0]:
            first_epoch += run.micro_batches(minibatch, episodes.groups)
        evaluate_tokens(episodes, models, first_epoch, cfg)

        # 3. PPO's r_t, before --whiten_rewards: each token's reward minus β log π/π_ref (y_t|s_t). Most
        # rewards, such as a reward model's, sit on the last token alone. So does the penalty for a missing
        # EOS.
        kl_coef = kl_controller.coef  # β
        episodes.dense_rewards = dense_reward(
            episodes.rewards, episodes.logprobs, episodes.ref_logprobs, episodes.ended, episodes.mask,
            kl_coef, cfg.reward_clip, cfg.missing_eos_penalty)

        # 4. Advantages: δ_t = r_t + γ V(s_{t+1}) − V(s_t), and Â_t = δ_t + γλ Â_{t+1}. Without V, the
        # advantage is how much better a response is than the others to its prompt.
        dense_rewards = episodes.dense_rewards
        if cfg.whiten_rewards:
            dense_rewards = whiten(dense_rewards, episodes.mask, shift_mean=False)
        if cfg.advantage == "gae":
            episodes.advantages, episodes.returns = compute_gae(
                dense_rewards, episodes.values, episodes.mask, cfg.gamma, cfg.lam)
            if cfg.whiten_advantages:
                episodes.advantages = whiten(episodes.advantages, episodes.mask)
        else:
            # Not whitened: each group already has its own baseline. Whitening would subtract a second one,
            # common to all groups, and rescale.
            estimator = rloo_advantages if cfg.advantage == "rloo" else grpo_advantages
            episodes.advantages = group_advantages(dense_rewards, episodes.mask, estimator, cfg.k)
        evaluate_s = time.time() - begin

        # 5. Epochs of clipped updates on minibatches of the episodes.
        begin = time.time()
        factor = run.lr_schedule(iteration)
        lrs = {"policy": cfg.lr * factor, "value": cfg.value_lr * factor}
        ptx_batches = None
        if cfg.ptx_coef:  # for each optimizer step as many demonstrations as it has episodes
            ptx_batches = demonstration_batches.of_iteration(iteration)
        losses = update(run, models, optimizers, episodes, epochs, lrs, ptx_batches)
        update_s = time.time() - begin

        # 6. The KL controller moves β for the next iteration, if there is a target.
        kl_controller.update(episodes.kl.sum(1).mean().item(), cfg.batch_size)

        # 7. Log, show samples, and save a checkpoint when one is due. On Ctrl-C, save_if_due saves one too,
        # and the program ends here.
        stats = statistics(episodes, kl_coef, data, tokenizer)
        run.log(iteration + 1, tokens=episodes.n_tokens, **stats, **losses, lr=lrs["policy"],
                rollout_s=rollout_s, evaluate_s=evaluate_s, update_s=update_s)  # of steps 1, 2 to 4, and 5
        if stats["kl"] > RUNAWAY_KL * stats["response_len"] and not warned:
            warned = True
            run.print0("warning: the KL to the reference is running away: "
                       f"{stats['kl']:.1f} nats in responses of {stats['response_len']:.0f} tokens; "
                       f"lower --lr (now {cfg.lr}) or --epochs, "
                       f"or raise --kl_coef (now {kl_controller.coef:.3g})")
        if iteration == 0 or (iteration + 1) % cfg.sample_every == 0:
            sample_file.show(iteration + 1, tokenizer, episodes.prompts, episodes.responses,
                             score=episodes.rewards.sum(1), kl=episodes.kl.sum(1))
        run.save_if_due(iteration + 1, models.policy, optimizers["policy"], kl_coef=kl_controller.coef,
                        **value_state(models, optimizers))

    # Compare the policy and its reference on held-out prompts. Both are sampled at the run's temperature τ,
    # at which PPO trained. The scores are the reward model's own, without --normalize_reward.
    del optimizers, checkpoint  # frees memory for the evaluation
    reward_model_folder = None if models.reward_model is None else cfg.reward_model
    evaluate.report(run, models.policy, init_name, models.ref_policy, reward_model_folder, cfg.temperature)
    return models.policy


if __name__ == "__main__":
    train(parse(Config, RECIPES))
