"""Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290).

RLHF maximises  E[r(x, y)] − β KL(π ‖ π_ref), whose optimum is  π*(y|x) ∝ π_ref(y|x) exp(r(x, y)/β).  Solved for the reward,
r = β log π*/π_ref + β log Z(x): a policy is a reward model in disguise, and Z cancels in a comparison. So the Bradley–Terry
likelihood of the comparisons (x, y_w ≻ y_l) can be maximised in the policy itself, with no reward model and no sampling:

    L(θ) = − E log σ( β log π_θ/π_ref (y_w|x) − β log π_θ/π_ref (y_l|x) )                                          (eq. 7)

    python dpo.py                                                the animals world, from nothing, with the SFT that comes first
    python dpo.py hh --init=out/sft-hh                           Anthropic's HH-RLHF, GPT-2
    python dpo.py tldr                                           summaries of Reddit posts; imdb: data/imdb.py has the commands
    python dpo.py --data=mine.jsonl --init=gpt2 --beta=0.3       your own comparisons

Chosen and rejected share their prompt, which is computed once (data/packing.py). The reference is asked once for every pair,
before training, and then leaves memory.

Left out: the SFT term some add to the loss, iterated and online variants.
"""
import copy
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F

import evaluate
from common import (Log, Metrics, all_reduce, check_pairs, clip_and_step, configure, due, known, lr_schedule, level, load_model, make_optimizer,
                    open_run, parse, require, resume, run_dir, save_checkpoint, say, setup, shard, share, sum_over_ranks)
from data import batch_order, dataset, encode_groups, get_tokenizer, group_length, micro_batches, pack, per_sequence


@dataclass
class Config:
    recipe: str = "animals"         # the positional argument
    data: str = "animals"           # animals, hh, hh/SUBSET, qa_feedback, tldr, imdb, a .jsonl[.gz] or a _feedback.json file
    data_dir: str = "data/files"    # where published files are looked for before they are fetched
    init: str | None = None         # a run's folder, gpt2[-medium|-large|-xl], a Hugging Face folder, scratch; None: the SFT model, trained first if missing
    out: str | None = None          # the run's folder; None: out/dpo-RECIPE, or out/dpo-FILE
    beta: float = 1.0               # β of eq. 7: the price of KL
    loss_type: str = "sigmoid"      # sigmoid, ipo (arXiv:2310.12036), hinge (arXiv:2309.06657), robust (arXiv:2403.00409)
    label_smoothing: float = 0.0    # ε, the share of labels taken to be flipped (sigmoid and robust)
    precompute_ref: bool = True     # ask the reference once, before training; False keeps it in memory
    steps: int = 250                # optimizer steps
    batch_size: int = 64            # pairs a step, over all processes
    micro_tokens: int = 16384       # tokens a forward pass at most; a larger batch is accumulated
    max_len: int = 64               # prompt and response together, in tokens
    lr: float = 1e-3                # peak learning rate
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
    ckpt_every: int = 50            # steps between checkpoints
    wandb: str | None = None        # the project of Weights & Biases that gets the log too
    tensorboard: bool = False       # the log also for TensorBoard, in OUT/tensorboard
    eval_n: int = 500               # prompts in the closing table; 0: no table
    resume: bool = False            # go on from the run's last checkpoint


RECIPES = {
    "hh": dict(data="hh", beta=0.1, steps=2500, max_len=512, lr=1e-6, warmup=150, ckpt_every=500, eval_n=64),
    # arXiv:2305.18290 B: β 0.5 on TL;DR, else batch 64, 1e-6, 150 steps of warm-up (and RMSprop); one epoch of 92,858
    "tldr": dict(data="tldr", beta=0.5, steps=1450, max_len=640, lr=1e-6, warmup=150, ckpt_every=500, eval_n=64),
    # its C.1: the pairs that data/imdb.py makes, 6 for each of 25,000 prefixes; one epoch. β is 0.05, 0.1, 1 or 5 in its Figure 2
    "imdb": dict(data="out/imdb-pairs.jsonl", init="out/sft-imdb", beta=0.1, steps=2100, max_len=136, lr=1e-6, warmup=150,
                 ckpt_every=500, eval_n=64),
}


LOSS_TYPES = ["sigmoid", "ipo", "hinge", "robust"]


def dpo_loss(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta, label_smoothing=0.0, loss_type="sigmoid"):
    """DPO, arXiv:2305.18290 eq. 7, and its variants. Log-probs (B,), summed over response tokens, in nats.

    With h the difference of the two log-ratios and ε the label smoothing:
        sigmoid   −(1−ε) log σ(βh) − ε log σ(−βh)                eq. 7 at ε = 0, else Mitchell's cDPO (https://ericmitchell.ai/cdpo.pdf
                                                                 eq. 3); ε may be (B,), a label's chance of being wrong
        ipo       (h − 1/2β)²                                    arXiv:2310.12036 eq. 17
        hinge     max(0, 1 − βh)                                 hinge-norm of arXiv:2309.06657: SLiC's (arXiv:2305.10425) on log-ratios
        robust    (−(1−ε) log σ(βh) + ε log σ(−βh)) / (1−2ε)     arXiv:2403.00409
    Returns the losses and the implicit rewards β · log-ratio of chosen and rejected, (B,) each, without gradient.
    """
    chosen_logratio = chosen_logp - ref_chosen_logp        # log π/π_ref (y_w|x)
    rejected_logratio = rejected_logp - ref_rejected_logp  # log π/π_ref (y_l|x)
    h = chosen_logratio - rejected_logratio
    if loss_type == "sigmoid":
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    elif loss_type == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    elif loss_type == "hinge":
        losses = F.relu(1 - beta * h)
    elif loss_type == "robust":
        losses = (-(1 - label_smoothing) * F.logsigmoid(beta * h) + label_smoothing * F.logsigmoid(-beta * h)) / (1 - 2 * label_smoothing)
    else:
        raise ValueError(f"loss_type {loss_type!r}: there are {', '.join(LOSS_TYPES)}")
    return losses, (beta * chosen_logratio).detach(), (beta * rejected_logratio).detach()


def pair_logp(policy, pairs, device, amp):
    """log π(y_w|x) and log π(y_l|x) of packed pairs: (B,) each, summed over response tokens."""
    batch = pack(pairs).to(device)
    with amp:
        logp = per_sequence(policy(batch), batch)  # (2B,)
    return logp[0::2], logp[1::2]


@torch.no_grad()
def reference_logp(ref_policy, pairs, lengths, order, cfg, device, amp):
    """log π_ref of the chosen and the rejected of every pair that `order` visits: (len(pairs), 2); 0 for the others.

    In the micro-batches of training, so that the first step's log-ratios are 0 to the bit.
    """
    logp, seen = torch.zeros(len(pairs), 2), set()
    for batch in order:
        if seen.issuperset(batch):
            continue
        new = set(share(batch)) - seen
        seen.update(batch)
        for micro in level(micro_batches(share(batch), lengths, cfg.micro_tokens), ref_policy):
            chosen, rejected = pair_logp(ref_policy, [pairs[i] for i in micro], device, amp)
            for i, w, l in zip(micro, chosen.tolist(), rejected.tolist()):
                if i in new:
                    logp[i, 0], logp[i, 1] = w, l
    return all_reduce(logp.to(device))


def train(cfg):
    """Runs the stage, building its SFT model first where that is missing; returns the trained policy."""
    known("loss_type", cfg.loss_type, LOSS_TYPES)
    out = cfg.out or run_dir("dpo", cfg)
    open_run(out)
    init = require("sft", cfg, cfg.init)
    device, amp = setup(cfg)
    data = dataset(cfg.data, cfg.data_dir)
    policy, tokenizer_name = load_model(init, cfg)
    tokenizer = get_tokenizer(tokenizer_name)
    ref_policy = None if cfg.precompute_ref else shard(copy.deepcopy(policy).requires_grad_(False), cfg, device)
    policy = shard(policy, cfg, device)
    comparisons = [(prompt, pair) for prompt, responses in data.comparisons("train") for pair in combinations(responses, 2)]
    pairs = encode_groups(tokenizer, comparisons, cfg.max_len)
    check_pairs(pairs, cfg)
    lengths = list(map(group_length, pairs))
    order = batch_order(len(pairs), cfg.batch_size, cfg.steps, cfg.seed)
    say(f"dpo: {len(pairs)} pairs of {cfg.data}, {init} -> {out} on {device}")

    optimizer = make_optimizer(policy, cfg.lr, cfg.weight_decay)
    for model in [policy] if cfg.precompute_ref else [policy, ref_policy]:
        configure(model, cfg)
    checkpoint = resume(out, cfg, policy, optimizer) if cfg.resume else {"step": 0}
    if cfg.precompute_ref:  # before the first step, the policy is the reference
        ref_logp = checkpoint["ref_logp"].to(device) if cfg.resume else reference_logp(policy, pairs, lengths, order, cfg, device, amp)
    log = Log(out, cfg, checkpoint["step"])

    for step in range(checkpoint["step"], cfg.steps):
        stats, metrics = {"tokens": 0}, Metrics()
        for micro in level(micro_batches(share(order[step]), lengths, cfg.micro_tokens), policy):
            micro_pairs = [pairs[i] for i in micro]
            chosen_logp, rejected_logp = pair_logp(policy, micro_pairs, device, amp)
            with torch.no_grad():
                ref_chosen_logp, ref_rejected_logp = (
                    ref_logp[micro].unbind(1) if cfg.precompute_ref else pair_logp(ref_policy, micro_pairs, device, amp))
            losses, chosen_reward, rejected_reward = dpo_loss(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp,
                                                              cfg.beta, cfg.label_smoothing, cfg.loss_type)
            (losses.sum() / cfg.batch_size).backward()
            metrics.add(loss=losses, accuracy=chosen_reward > rejected_reward, margin=chosen_reward - rejected_reward,
                        chosen_reward=chosen_reward, rejected_reward=rejected_reward, chosen_logp=chosen_logp, rejected_logp=rejected_logp)
            stats["tokens"] += sum(lengths[i] for i in micro)
        stats = metrics.mean(cfg.batch_size) | sum_over_ranks(policy, stats)
        lr = cfg.lr * lr_schedule(step, cfg)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr
        grad_norm = clip_and_step(policy, optimizer, cfg)

        done = step + 1
        log(done, **stats, lr=lr, grad_norm=grad_norm)
        if due(done, cfg):
            save_checkpoint(out, done, policy, optimizer, cfg, tokenizer_name, ref_logp=ref_logp.cpu() if cfg.precompute_ref else None)

    evaluate.report(out, cfg, [(init, load_model(init, cfg)[0]), (out, policy)], data, tokenizer)
    return policy


if __name__ == "__main__":
    train(parse(Config, RECIPES))
