"""Simple Preference Optimization (Meng, Xia and Chen 2024, arXiv:2405.14734): DPO without its reference.

DPO's reward of a response is β log π/π_ref, a sum over tokens; what generation follows is the likelihood of the response itself.
SimPO takes for the reward what generation follows, the mean log-prob of a token (eq. 4), and asks the chosen response to win by γ:

    r(x, y) = β/|y| log π_θ(y|x)
    L(θ) = − E log σ( β/|y_w| log π_θ(y_w|x) − β/|y_l| log π_θ(y_l|x) − γ )                                        (eq. 6)

One model is in memory, no reference anywhere; so nothing holds the policy near to where it started but a small learning rate. The
length |y| counts the EOS. Its known failure is a collapse of the length, so that is sampled and logged on the way: a token of a short
response, its EOS above all, weighs 1/|y| in the loss, more than the next word of a long one. The SFT term (App. H; 0 in the paper's own
settings), sft_weight times the mean of −log π of the chosen's tokens, weighs all tokens alike and holds against it.

    python simpo.py                                              the animals world, from nothing, with the SFT that comes first
    python simpo.py hh --init=out/sft-hh                         Anthropic's HH-RLHF, GPT-2
    python simpo.py tldr                                         summaries of Reddit posts; imdb: data/imdb.py has the commands
    python simpo.py --data=mine.jsonl --init=gpt2 --beta=2 --gamma_beta_ratio=0.5      as the authors' scripts write γ

Left out: the hinge loss of the authors' code.
"""
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F

import evaluate
from common import (RANK, Log, Metrics, check_pairs, clip_and_step, configure, due, lr_schedule, level, load_model, make_optimizer, open_run,
                    parse, require, resume, run_dir, save_checkpoint, say, setup, shard, share, sum_over_ranks, whole)
from data import batch_order, dataset, encode_groups, get_tokenizer, group_length, micro_batches, pack, per_sequence


@dataclass
class Config:
    recipe: str = "animals"         # the positional argument
    data: str = "animals"           # animals, hh, hh/SUBSET, qa_feedback, tldr, imdb, a .jsonl[.gz] or a _feedback.json file
    data_dir: str = "data/files"    # where published files are looked for before they are fetched
    init: str | None = None         # a run's folder, gpt2[-medium|-large|-xl], a Hugging Face folder, scratch; None: the SFT model, trained first if missing
    out: str | None = None          # the run's folder; None: out/simpo-RECIPE, or out/simpo-FILE
    beta: float = 2.0               # β of eq. 6: the scale of the mean log-prob
    gamma: float = 1.0              # γ of eq. 6: the margin that the chosen is to win by
    gamma_beta_ratio: float | None = None  # γ/β, as the authors' scripts write it; sets gamma
    sft_weight: float = 0.5         # weight of the SFT term, −log π of the chosen, a mean over tokens
    label_smoothing: float = 0.0    # ε, the share of labels taken to be flipped
    steps: int = 250                # optimizer steps
    batch_size: int = 64            # pairs a step, over all processes
    micro_tokens: int = 16384       # tokens a forward pass at most; a larger batch is accumulated
    max_len: int = 64               # prompt and response together, in tokens
    lr: float = 3e-4                # peak learning rate
    warmup: int = 10                # steps of linear warm-up, before the cosine to 0
    weight_decay: float = 0.0       # on matrices
    grad_clip: float = 1.0          # largest norm of the gradient
    n_layer: int = 4                # with --init=scratch
    n_head: int = 4                 # with --init=scratch
    n_embd: int = 64                # with --init=scratch
    seed: int = 0                   # of weights, data order and sampling
    device: str | None = None       # cpu, cuda, cuda:1 …; None: cuda where there is one
    compile: bool | None = None     # torch.compile; None: on CUDA
    checkpoint_blocks: bool = False  # recompute each block in the backward pass: a third more work, the activations of one block at a time
    fsdp: bool = False              # shard the model's weights, gradients and optimizer over the processes (torchrun)
    log_every: int = 10             # steps between lines on the console
    sample_every: int = 25          # steps between looks at the length of sampled responses
    sample_n: int = 64              # validation prompts that are sampled for it
    ckpt_every: int = 50            # steps between checkpoints
    wandb: str | None = None        # the project of Weights & Biases that gets the log too
    tensorboard: bool = False       # the log also for TensorBoard, in OUT/tensorboard
    eval_n: int = 500               # prompts in the closing table; 0: no table
    resume: bool = False            # go on from the run's last checkpoint


RECIPES = {
    "hh": dict(data="hh", sft_weight=0.0, steps=2500, max_len=512, lr=1e-6, warmup=150, sample_every=250, ckpt_every=500, eval_n=64),
    # not in the paper: the settings of hh, one epoch
    "tldr": dict(data="tldr", sft_weight=0.0, steps=1450, max_len=640, lr=1e-6, warmup=150, sample_every=250, ckpt_every=500, eval_n=64),
    "imdb": dict(data="out/imdb-pairs.jsonl", init="out/sft-imdb", sft_weight=0.0, steps=2100, max_len=136, lr=1e-6, warmup=150,
                 sample_every=250, ckpt_every=500, eval_n=64),
}


def simpo_loss(chosen_logp, rejected_logp, chosen_len, rejected_len, beta, gamma, label_smoothing=0.0):
    """SimPO, arXiv:2405.14734 eq. 6. Log-probs (B,), summed over response tokens, in nats; lengths (B,) in tokens, the EOS included.

    With h = β/|y_w| log π(y_w|x) − β/|y_l| log π(y_l|x) − γ and ε the label smoothing: −(1−ε) log σ(h) − ε log σ(−h).
    Returns the losses and the rewards β/|y| log π(y|x) of chosen and rejected, (B,) each, without gradient.
    """
    chosen_reward = beta / chosen_len * chosen_logp        # β/|y_w| log π(y_w|x)
    rejected_reward = beta / rejected_len * rejected_logp  # β/|y_l| log π(y_l|x)
    h = chosen_reward - rejected_reward - gamma
    losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    return losses, chosen_reward.detach(), rejected_reward.detach()


def pair_logp(policy, pairs, device, amp):
    """log π of the chosen and of the rejected of packed pairs, summed over response tokens, then their lengths: (B,) each."""
    batch = pack(pairs).to(device)
    with amp:
        logp = per_sequence(policy(batch), batch)  # (2B,)
    length = torch.bincount(batch.sequence)
    return logp[0::2], logp[1::2], length[0::2], length[1::2]


def lengths_of(responses, eos):
    """What a collapse shows in first: mean length in tokens, the share of responses without a word, and of those that did not end."""
    n = len(responses)
    return {"response_len": sum(map(len, responses)) / n, "empty": sum(r == [eos] for r in responses) / n,
            "unfinished": sum(r[-1] != eos for r in responses) / n}


def train(cfg):
    """Runs the stage, building its SFT model first where that is missing; returns the trained policy."""
    gamma = cfg.gamma if cfg.gamma_beta_ratio is None else cfg.gamma_beta_ratio * cfg.beta
    out = cfg.out or run_dir("simpo", cfg)
    open_run(out)
    init = require("sft", cfg, cfg.init)
    device, amp = setup(cfg)
    data = dataset(cfg.data, cfg.data_dir)
    policy, tokenizer_name = load_model(init, cfg)
    tokenizer, policy = get_tokenizer(tokenizer_name), shard(policy, cfg, device)
    comparisons = [(prompt, pair) for prompt, responses in data.comparisons("train") for pair in combinations(responses, 2)]
    pairs = encode_groups(tokenizer, comparisons, cfg.max_len)
    check_pairs(pairs, cfg)
    lengths = list(map(group_length, pairs))
    order = batch_order(len(pairs), cfg.batch_size, cfg.steps, cfg.seed)
    prompts = evaluate.fit_prompts(data.prompts("validation")[:cfg.sample_n], policy, tokenizer)
    say(f"simpo: {len(pairs)} pairs of {cfg.data}, {init} -> {out} on {device}")

    optimizer = make_optimizer(policy, cfg.lr, cfg.weight_decay)
    start = resume(out, cfg, policy, optimizer)["step"] if cfg.resume else 0
    log = Log(out, cfg, start)
    configure(policy, cfg)

    for step in range(start, cfg.steps):
        stats, metrics = {"tokens": 0}, Metrics()
        n_tokens = sum(len(pairs[i][1][0]) for i in order[step])  # of the chosen
        for micro in level(micro_batches(share(order[step]), lengths, cfg.micro_tokens), policy):
            chosen_logp, rejected_logp, chosen_len, rejected_len = pair_logp(policy, [pairs[i] for i in micro], device, amp)
            losses, chosen_reward, rejected_reward = simpo_loss(chosen_logp, rejected_logp, chosen_len, rejected_len,
                                                                cfg.beta, gamma, cfg.label_smoothing)
            sft_loss = -chosen_logp.sum() / n_tokens
            loss = losses.sum() / cfg.batch_size + cfg.sft_weight * sft_loss
            loss.backward()
            metrics.add(loss=loss * cfg.batch_size, sft_loss=sft_loss * cfg.batch_size, accuracy=chosen_reward > rejected_reward,
                        margin=chosen_reward - rejected_reward, chosen_reward=chosen_reward, rejected_reward=rejected_reward,
                        chosen_logp=chosen_logp, rejected_logp=rejected_logp)
            stats["tokens"] += sum(lengths[i] for i in micro)
        stats = metrics.mean(cfg.batch_size) | sum_over_ranks(policy, stats)
        lr = cfg.lr * lr_schedule(step, cfg)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr
        grad_norm = clip_and_step(policy, optimizer, cfg)

        done, shape = step + 1, dict.fromkeys(["response_len", "empty", "unfinished"])
        if prompts and (done % cfg.sample_every == 0 or done == cfg.steps):
            shape = lengths_of(evaluate.respond(whole(policy), prompts, tokenizer.eot_token), tokenizer.eot_token)
        log(done, **stats, **shape, lr=lr, grad_norm=grad_norm)
        if due(done, cfg):
            save_checkpoint(out, done, policy, optimizer, cfg, tokenizer_name)

    evaluate.report(out, cfg, [(init, load_model(init, cfg)[0]), (out, policy)], data, tokenizer)
    return policy


if __name__ == "__main__":
    train(parse(Config, RECIPES))
