"""The reward model: the second stage of InstructGPT (Ouyang et al. 2022, arXiv:2203.02155 §3.5).

A GPT with a scalar head, r_θ(x, y), started from the SFT model and read at the last token of the response. It learns from
comparisons under Bradley and Terry's model, P(y_w ≻ y_l | x) = σ(r(x, y_w) − r(x, y_l)). K ranked responses to one prompt are all of
their pairs at once, each response computed once and the prompt once for all of them (data/packing.py):

    L(θ) = − 1/(K choose 2) E log σ( r_θ(x, y_w) − r_θ(x, y_l) )                                                   (eq. 1)

The loss sees differences alone. So at the end the bias is set to where demonstrations score 0 on average, and the spread of their
scores is kept with the weights, for PPO to normalise by.

    python reward.py                                             the animals world, from nothing, with the SFT that comes first
    python reward.py hh --init=out/sft-hh                        Anthropic's HH-RLHF, GPT-2
    python reward.py imdb                                        the sentiment of IMDb reviews; qa_feedback and tldr likewise
    python reward.py --data=mine.jsonl --init=gpt2               your own comparisons

Left out: labels with a degree of preference, ensembles, models that read a whole conversation turn by turn.
"""
import json
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import evaluate
from common import (RANK, Log, Metrics, check_pairs, clip_and_step, configure, due, lr_schedule, level, load_model, make_optimizer, open_run,
                    parse, require, resume, run_dir, save_checkpoint, say, score_groups, setup, shard, share, sum_over_ranks, writing)
from data import batch_order, dataset, encode_groups, get_tokenizer, group_length, micro_batches, pack


@dataclass
class Config:
    recipe: str = "animals"         # the positional argument
    data: str = "animals"           # animals, hh, hh/SUBSET, qa_feedback, tldr, imdb, a .jsonl[.gz] or a _feedback.json file
    data_dir: str = "data/files"    # where published files are looked for before they are fetched
    init: str | None = None         # a run's folder, gpt2[-medium|-large|-xl], a Hugging Face folder, scratch; None: the SFT model, trained first if missing
    out: str | None = None          # the run's folder; None: out/reward-RECIPE, or out/reward-FILE
    k: int = 8                      # K, ranked responses to a prompt (InstructGPT: 4 to 9); files of pairs have 2
    margin: float = 0.0             # m in log σ(r_w − r_l − m) (Llama 2, arXiv:2307.09288 eq. 2, the same for all pairs)
    center_coef: float = 0.05       # weight of (r_w + r_l)², which keeps the scores of every prompt near 0 (arXiv:2312.09244)
    steps: int = 1600               # optimizer steps
    batch_size: int = 16            # prompts a step, each with its K responses, over all processes
    micro_tokens: int = 1024        # tokens a forward pass at most; a larger batch is accumulated, groups of like length together
    max_len: int = 64               # prompt and response together, in tokens
    lr: float = 2e-3                # peak learning rate
    warmup: int = 20                # steps of linear warm-up, before the cosine to 0
    weight_decay: float = 0.0       # on matrices
    grad_clip: float = 1.0          # largest norm of the gradient
    n_layer: int = 4                # with --init=scratch
    n_head: int = 4                 # with --init=scratch
    n_embd: int = 64                # with --init=scratch
    seed: int = 0                   # of the scalar head, data order
    device: str | None = None       # cpu, cuda, cuda:1 …; None: cuda where there is one
    compile: bool | None = None     # torch.compile; None: on CUDA
    checkpoint_blocks: bool = False  # recompute each block in the backward pass: a third more work, the activations of one block at a time
    fsdp: bool = False              # shard the model's weights, gradients and optimizer over the processes (torchrun)
    val_every: int = 800            # steps between validation accuracies
    log_every: int = 50             # steps between lines on the console
    ckpt_every: int = 100           # steps between checkpoints
    wandb: str | None = None        # the project of Weights & Biases that gets the log too
    tensorboard: bool = False       # the log also for TensorBoard, in OUT/tensorboard
    eval_n: int = 1000              # validation comparisons, and demonstrations that the scores are centred on
    resume: bool = False            # go on from the run's last checkpoint


RECIPES = {
    "hh": dict(data="hh", k=2, steps=2500, batch_size=64, micro_tokens=16384, max_len=512, lr=1e-5, warmup=100, val_every=250, log_every=10, ckpt_every=500),
    "qa_feedback": dict(data="qa_feedback", k=4, steps=500, batch_size=16, micro_tokens=16384, max_len=1024, lr=1e-5, warmup=20, val_every=100,
                        log_every=10, ckpt_every=100),
    # arXiv:2009.01325 B.1, its 1.3B model: batch 64, one epoch of 92,858, 1.5e-5
    "tldr": dict(data="tldr", k=2, steps=1450, batch_size=64, micro_tokens=16384, max_len=640, lr=1.5e-5, warmup=50, val_every=250,
                 log_every=10, ckpt_every=500),
    # positive and negative reviews, two epochs of 12,500 pairs; they share one prompt, so that no prompt's scores can drift
    "imdb": dict(data="imdb", k=2, center_coef=0.0, steps=390, batch_size=64, micro_tokens=16384, max_len=136, lr=1e-5, warmup=20,
                 val_every=100, log_every=10, ckpt_every=100),
}


def ranked_pairs(scores, rank):
    """The scores of winner and loser of every pair of one prompt's responses that is no tie: (P,) each. scores, rank (K,)."""
    winner, loser = (rank[:, None] < rank).nonzero(as_tuple=True)
    return scores[winner], scores[loser]


def by_prompt(scores, group, rank):
    """(scores, rank) of the responses of each prompt, (K,) each: how eq. 1 sees (S,)."""
    return [(scores[group == g], rank[group == g]) for g in group.unique()]


def ranking_loss(scores, group, rank, margin=0.0, center_coef=0.0):
    """The reward model's loss, arXiv:2203.02155 eq. 1: mean over groups of the mean over that group's pairs.

    scores (S,); group (S,) ids; rank (S,) 0 best, equal = tie, excluded. For each pair
        −log σ(r_w − r_l − margin) + center_coef · (r_w + r_l)²
    Returns the loss (scalar, in nats) and the accuracy (scalar): the share of pairs with r_w > r_l, equal scores counting one half.
    """
    losses, accuracies = [], []
    for its_scores, its_rank in by_prompt(scores, group, rank):
        r_w, r_l = ranked_pairs(its_scores, its_rank)
        if len(r_w):
            losses.append((-F.logsigmoid(r_w - r_l - margin) + center_coef * (r_w + r_l) ** 2).mean())
            accuracies.append((0.5 + 0.5 * (r_w - r_l).detach().sign()).mean())
    if not losses:
        return 0 * scores.sum(), 0 * scores.detach().sum()
    return torch.stack(losses).mean(), torch.stack(accuracies).mean()


def margins(scores, group, rank):
    """The mean over each prompt's pairs of r_w − r_l: (prompts,), without gradient."""
    pairs = [ranked_pairs(*each) for each in by_prompt(scores.detach(), group, rank)]
    return torch.stack([(r_w - r_l).mean() if len(r_w) else 0 * r_w.sum() for r_w, r_l in pairs])


def rank_of(comparison):
    """The ranks of (prompt, responses best first), which has them as a third where some tie."""
    return comparison[2] if len(comparison) == 3 else range(len(comparison[1]))


def ranks(comparisons, device="cpu"):
    """group and rank (S,) of the responses of some comparisons."""
    each = list(map(rank_of, comparisons))
    group = torch.tensor([i for i, rank in enumerate(each) for _ in rank], device=device)
    return group, torch.tensor([k for rank in each for k in rank], device=device)


def center(reward_model, demonstrations, cfg, amp):
    """Sets the bias to where the demonstrations score 0 on average; returns the standard deviation of their scores."""
    scores = score_groups(reward_model, demonstrations, cfg.micro_tokens, amp)
    with torch.no_grad():
        reward_model.state_dict()["scalar_head.bias"] -= scores.mean().item()  # of a sharded model this process's part
    return scores.std().item()


def measure(name, scores, comparisons, data):
    """One row of the closing table: accuracy on the comparisons; beside it, where the true reward is known, the accuracy that
    the true reward itself has on these noisy labels (no model can do better), and the correlation of the scores with it."""
    sizes = [len(c[1]) for c in comparisons]

    def accuracy(scores):
        each = [(s, *ranks([c])) for s, c in zip(scores.split(sizes), comparisons)]
        return evaluate.mean_se([ranking_loss(s, group, rank)[1].item() for s, group, rank in each])

    row = {"checkpoint": name}
    row["accuracy"], row["accuracy_se"] = accuracy(scores)
    if hasattr(data, "gold"):
        gold = torch.tensor([data.gold(prompt, r) for prompt, responses, *_ in comparisons for r in responses])
        row["ceiling"], row["ceiling_se"] = accuracy(gold)
        row["correlation"], row["correlation_se"] = torch.corrcoef(torch.stack([scores, gold]))[0, 1].item(), None
    return row


def samples(scores, comparisons, data, n=3):
    """The first n comparisons, a line a response, as they were ranked: score, true reward, text."""
    lines, scores = [], iter(scores.tolist())
    for prompt, responses, *_ in comparisons[:n]:
        lines.append("\n" + evaluate.printable(prompt))
        for r in responses:
            gold = f"   gold {data.gold(prompt, r):5.2f}" if hasattr(data, "gold") else ""
            lines.append(f"  score {next(scores):6.3f}{gold} | {evaluate.printable(r)}")
    return "\n".join(lines)


def train(cfg):
    """Runs the stage, building its SFT model first where that is missing; returns the trained reward model."""
    out = cfg.out or run_dir("reward", cfg)
    open_run(out)
    init = require("sft", cfg, cfg.init)
    device, amp = setup(cfg)
    data = dataset(cfg.data, cfg.data_dir)
    reward_model, tokenizer_name = load_model(init, cfg)
    reward_model.set_scalar_heads(1)
    reward_model, tokenizer = shard(reward_model, cfg, device), get_tokenizer(tokenizer_name)
    training, comparisons = data.comparisons("train", cfg.k), data.comparisons("validation", cfg.k)[:cfg.eval_n]
    groups, validation = (encode_groups(tokenizer, [c[:2] for c in cs], cfg.max_len) for cs in (training, comparisons))
    check_pairs(groups, cfg, [rank_of(c) for c in training])
    lengths = list(map(group_length, groups))
    order = batch_order(len(groups), cfg.batch_size, cfg.steps, cfg.seed)
    say(f"reward: {len(groups)} comparisons of {cfg.data}, {init} -> {out} on {device}")

    scores_before = score_groups(reward_model, validation, cfg.micro_tokens, amp) if validation else None
    optimizer = make_optimizer(reward_model, cfg.lr, cfg.weight_decay, (0.9, 0.99))
    checkpoint = resume(out, cfg, reward_model, optimizer) if cfg.resume else {"step": 0}
    log = Log(out, cfg, checkpoint["step"])
    configure(reward_model, cfg)

    for step in range(checkpoint["step"], cfg.steps):
        stats, metrics = {"tokens": 0}, Metrics()
        for micro in level(micro_batches(share(order[step]), lengths, cfg.micro_tokens), reward_model):
            batch = pack([groups[i] for i in micro]).to(device)
            group, rank = ranks([training[i] for i in micro], device)
            with amp:
                scores = reward_model.score(batch)  # (S,)
            loss, accuracy = ranking_loss(scores, group, rank, cfg.margin, cfg.center_coef)
            (loss * len(micro) / cfg.batch_size).backward()
            metrics.add(loss=loss * len(micro), accuracy=accuracy * len(micro), margin=margins(scores, group, rank))
            stats["tokens"] += sum(lengths[i] for i in micro)
        stats = metrics.mean(cfg.batch_size) | sum_over_ranks(reward_model, stats)
        lr = cfg.lr * lr_schedule(step, cfg)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr
        grad_norm = clip_and_step(reward_model, optimizer, cfg)

        done, val_accuracy = step + 1, None
        if validation and (done % cfg.val_every == 0 or done == cfg.steps):
            val_accuracy = ranking_loss(score_groups(reward_model, validation, cfg.micro_tokens, amp), *ranks(comparisons))[1].item()
        log(done, **stats, val_accuracy=val_accuracy, lr=lr, grad_norm=grad_norm)
        if due(done, cfg) and done < cfg.steps:
            save_checkpoint(out, done, reward_model, optimizer, cfg, tokenizer_name)

    score_std = checkpoint.get("score_std")  # a run that ended after its last checkpoint is centred already
    if score_std is None:
        demonstrations = [(prompt, [response]) for prompt, response in data.demonstrations("train")[:max(2, cfg.eval_n)]]
        score_std = center(reward_model, encode_groups(tokenizer, demonstrations, cfg.max_len), cfg, amp)
        save_checkpoint(out, cfg.steps, reward_model, optimizer, cfg, tokenizer_name, score_std=score_std)
    scores = score_groups(reward_model, validation, cfg.micro_tokens, amp) if validation else None
    if validation and RANK == 0:
        rows = [measure(init, scores_before, comparisons, data), measure(out, scores, comparisons, data)]
        with writing(os.path.join(out, "eval.json")) as f:
            json.dump(rows, f, indent=2)
        say(f"\n{len(comparisons)} held-out comparisons; demonstrations score 0 ± {score_std:.3f}\n\n{evaluate.table(rows)}\n{samples(scores, comparisons, data)}")
    return reward_model


if __name__ == "__main__":
    train(parse(Config, RECIPES))
