"""Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290).

RLHF maximizes E[r(x, y)] − β KL(π ‖ π_ref) (eq. 3). Its optimum has a closed form, which can be solved for r:

    π*(y|x) = π_ref(y|x) exp(r(x, y)/β) / Z(x)                                                      (eq. 4)
    r(x, y) = β log π*(y|x)/π_ref(y|x) + β log Z(x)                                                 (eq. 5)

Z(x) sums over all possible responses, so it cannot be computed. But it depends on x alone: up to this term,
every policy is a reward model in disguise. The Bradley–Terry model gives the probability that y_w is
preferred to y_l:

    P(y_w ≻ y_l | x) = σ( r(x, y_w) − r(x, y_l) )                                                   (eq. 1)

Substitute eq. 5 into eq. 1, and β log Z(x) cancels. Put a model π_θ in place of π*, and we can maximize the
likelihood of comparisons directly, without a reward model and without sampling:

    L(θ) = −E log σ( β log π_θ(y_w|x)/π_ref(y_w|x) − β log π_θ(y_l|x)/π_ref(y_l|x) )                (eq. 7)

A gradient step pushes log π_θ(y_w|x) up and log π_θ(y_l|x) down, both with the weight β σ(r_l − r_w), where
r is the implicit reward β log π_θ/π_ref: the weight is largest for pairs that r ranks in the wrong order.
(The two responses share the model's weights, so log π_θ(y_w|x) can fall all the same; see CONSOLE below.)

In the comments below, log π/π_ref (y|x) is short for log π_θ(y|x)/π_ref(y|x), a sum over the tokens of y
(or, with --ipo_average, a mean).

    python dpo.py                                           the animals world, from scratch, SFT included
    python dpo.py hh                                        Anthropic's HH-RLHF, GPT-2
    python dpo.py tldr                                      summaries of Reddit posts
    python dpo.py imdb                                      one point of Figure 2; see data/imdb.py first
    python dpo.py --data=mine.jsonl --steps=100 --warmup=10  your own comparisons: recipe hh, but shorter

π_ref is the initial policy, unless --ref names another model. The initial policy is --init, by default the
SFT model of the same data and recipe, which is trained first if it is missing. For DPO in rounds, each on new
pairs sampled from the current policy, see the loop in docs/using.md.

Left out: the SFT term that some implementations add. Different from the authors' code: AdamW instead of
RMSprop, a cosine decay of the learning rate instead of a constant, gradients clipped at norm 1 instead of 10,
GPT-2 instead of larger models.
"""
import copy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import evaluate
from common.dist import sync_gradients
from common.log import Metrics
from common.optim import make_optimizer, optimizer_step
from common.options import BelowHalf, NonNegativeFloat, PositiveFloat, RunConfig, parse
from common.run import Run
from engine.packing import pack, per_sequence


@dataclass
class Config(RunConfig):  # the other options (250 steps, batches of 64 pairs, …) are in common/options.py
    beta: PositiveFloat = 1.0       # β, the weight of the KL: a larger β keeps the policy closer to π_ref
    loss_type: Literal["sigmoid", "ipo", "hinge", "robust"] = "sigmoid"  # eq. 7 or a variant, see dpo_loss
    label_smoothing: BelowHalf = 0.0  # ε < ½: the share of labels assumed flipped, for sigmoid and robust
    ipo_average: bool = False       # with ipo: log-probs are means over tokens instead of sums
    ref: str | None = None          # π_ref, named as in --init; None: the initial policy
    precompute_ref: bool = True     # compute π_ref's log-probs before training; False: at each step
    reward_model: str | None = None  # a run of reward.py, for scores and win rates in the final tables
    lr: NonNegativeFloat = 1e-3     # peak learning rate: reached by a linear warm-up, then half a cosine to 0


# Config's defaults are for the animals world, a small data set with a known true reward. A recipe replaces
# some of them: `python dpo.py hh`. --data=FILE without a recipe uses hh. Its 2500 steps suit 160,000 pairs,
# so set --steps and --warmup for your file: an epoch has pairs / batch_size steps.
RECIPES = {
    # arXiv:2305.18290 App. B: β 0.1, lr 1e-6, batches of 64, 150 steps of warm-up. 2500 steps are one epoch
    "hh": dict(data="hh", beta=0.1, steps=2500, max_len=512, lr=1e-6, warmup=150, ckpt_every=500, eval_n=64),
    # App. B: β is 0.5 on TL;DR; the learning rate, batches and warm-up are those of hh. Again one epoch
    "tldr": dict(data="tldr", beta=0.5, steps=1450, max_len=640, lr=1e-6, warmup=150, ckpt_every=500,
                 eval_n=64),
    # App. C.1: 25,000 prefixes, each with 4 completions and so 6 pairs (sample.py makes them). We hold out a
    # tenth of the prefixes. One epoch. Figure 2 uses β = 0.05, 0.1, 1 and 5. max_len: 8 + 128 tokens
    "imdb": dict(data="out/imdb-pairs.jsonl", init="out/sft-imdb", beta=0.1, steps=2100, max_len=136, lr=1e-6,
                 warmup=150, ckpt_every=500, eval_n=64),
}

# The columns on the console; log.jsonl has more. With eq. 7 the margin should keep rising. chosen_logp may
# fall, as long as rejected_logp falls further: the loss sees only the difference.
CONSOLE = ["loss", "accuracy", "margin", "chosen_logp", "rejected_logp", "grad_norm"]


def dpo_loss(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta, label_smoothing=0.0,
             loss_type="sigmoid"):
    """DPO, arXiv:2305.18290 eq. 7, and its variants.

    All log-probs are (B,), summed over response tokens (with --ipo_average, means over them).
    With h = log π/π_ref (y_w|x) − log π/π_ref (y_l|x), and ε = label_smoothing:
        sigmoid   −(1−ε) log σ(βh) − ε log σ(−βh)               eq. 7 at ε = 0, otherwise cDPO (Mitchell 2023,
                                                                ericmitchell.ai/cdpo.pdf eq. 3)
        ipo       (h − 1/(2β))²                                 arXiv:2310.12036 eq. 17 with τ = β: pulls h
                                                                to 1/(2β), where eq. 7 would raise it without
                                                                limit for a pair always labelled the same way.
                                                                Log-probs are sums over tokens, as in the
                                                                paper; its authors later recommended means
                                                                (--ipo_average): h and its target 1/(2β) are
                                                                then per token
        hinge     max(0, 1 − βh)                                SLiC's hinge on log-ratios, arXiv:2309.06657
        robust    (−(1−ε) log σ(βh) + ε log σ(−βh)) / (1−2ε)    arXiv:2403.00409: an unbiased estimate of the
                                                                noise-free loss, if ε is the true share of
                                                                flipped labels; unbounded below if ε > 0
    Returns three (B,) tensors: the losses, and the implicit rewards β log π/π_ref of the chosen and of the
    rejected responses, detached.
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
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * h) + label_smoothing * F.logsigmoid(-beta * h)
        losses = losses / (1 - 2 * label_smoothing)
    else:
        raise ValueError(f"loss_type {loss_type!r}: expected sigmoid, ipo, hinge or robust")
    return losses, (beta * chosen_logratio).detach(), (beta * rejected_logratio).detach()


def pair_logp(policy, pairs, average=False):
    """log π(y_w|x) and log π(y_l|x), summed over response tokens or, with `average`, averaged: (B,) each.

    pairs: list of (prompt_ids, [chosen_ids, rejected_ids]). The prompt and its two responses are packed into
    one row, so the prompt goes through the model once. Each response sees the prompt and itself, and its
    positions continue from the prompt's, so the log-probs equal those of two separate rows, up to rounding.
    The training loop uses this function, for the policy and, with --precompute_ref=False, for the reference.
    Before and after the loop, run.precompute_logp and run.logp_of_responses compute the same numbers with
    response_logp of common/scoring.py. Change the two together; a test checks that they agree.
    """
    batch = pack(pairs).to(policy.device)
    logprobs = policy.logprobs(batch)       # (N,): one per response token
    logp = per_sequence(logprobs, batch)    # (2B,), a sum for each: chosen, rejected, chosen, …
    if average:
        logp = logp / batch.response_length  # (2B,): tokens of each response, EOS included
    return logp[0::2], logp[1::2]


def compare_with_reference(run, policy, ref_name, ref_policy):
    """The final evaluation: prints two tables, each with a row for the reference and a row for the policy.

    - Answers to the first eval_n prompts of the test split: KL to the reference, length and, with the data's
      true reward or --reward_model, reward and win rate against the reference.
    - The first eval_n comparisons of the validation split: how often the implicit rewards β log π/π_ref rank
      the responses correctly. The reference's own are all 0, so all its pairs tie and its accuracy is 0.5.
    """
    cfg = run.cfg
    # The same comparisons in two forms: text with ranks, and token ids, [(prompt_ids, [response_ids, …]), …].
    comparisons, groups = run.validation_comparisons()
    # Log-probs and rewards are (S,): one per response, comparison after comparison.
    logp = run.logp_of_responses(policy, groups, cfg.ipo_average)
    logp_of_reference = run.logp_of_responses(ref_policy, groups, cfg.ipo_average)
    rewards = cfg.beta * (logp - logp_of_reference)
    rewards_of_reference = torch.zeros_like(rewards)
    evaluate.report(run, policy, ref_name, ref_policy, cfg.reward_model,
                    preferences=(comparisons, rewards_of_reference, rewards))


def check_settings(cfg):
    """Exits with a one-line message if two options are incompatible."""
    if cfg.label_smoothing and cfg.loss_type not in ("sigmoid", "robust"):
        raise SystemExit(f"--label_smoothing={cfg.label_smoothing:g} has no effect with "
                         f"--loss_type={cfg.loss_type}; only sigmoid and robust use it")
    if cfg.ipo_average and cfg.loss_type != "ipo":
        raise SystemExit(f"--ipo_average needs --loss_type=ipo, not {cfg.loss_type}")


def train(cfg):
    """Trains with DPO, after training the SFT model if that is missing. Returns the trained policy."""
    check_settings(cfg)
    run = Run("dpo", cfg)  # the device, the folder, the log and the checkpoints
    init_name = cfg.init or run.train_if_missing("sft")  # --init, or the SFT model of the same data
    policy, _ = run.load_model(init_name)  # the second value is the tokenizer; run keeps it too

    # Comparisons are prompts with ranked responses, as text. Any two responses with different ranks form a
    # pair: a prompt x, the chosen response y_w and the rejected response y_l, as token ids. If the prompt and
    # the longer response together exceed max_len tokens, the prompt is cut at its start, down to max_len // 2
    # tokens at the least. A response that is still too long is cut at its end, and loses its EOS.
    pairs = run.encode_pairs(run.data.comparisons("train"))
    # For each step of the run, a list of batch_size indices into pairs. Each epoch is shuffled anew, from the
    # seed, and drops its last, incomplete batch.
    batches = run.shuffled_batches(pairs)
    run.print0(f"{len(pairs)} pairs of {cfg.data}, {init_name} -> {run.out} on {run.device}")
    run.show_data(pairs, ["chosen", "rejected"])  # prints the first pair, and warns if the data look wrong

    # The reference π_ref: the initial policy, or the model that --ref names. `policy` still has its initial
    # weights here; with --resume, run.start_or_resume below loads those of the last checkpoint.
    ref_name = cfg.ref or init_name
    if cfg.ref:
        ref_policy = run.load_reference(ref_name, policy)  # frozen; must have policy's shape and tokenizer
    else:
        ref_policy = copy.deepcopy(policy).requires_grad_(False)
    # Moved to the device; sharded or compiled if asked for. (Only now: a sharded model cannot be copied.)
    policy = run.prepare(policy)
    ref_policy = run.prepare(ref_policy)

    # π_ref is frozen, so by default its log-probs are computed once, before training. Row i holds the two of
    # pairs[i], on the policy's device and in every process (0 if `batches` never visits the pair). They are
    # not saved: a resumed run computes them again.
    # Without --ref, π equals π_ref in the first step, and its pairs should tie exactly. But rounding depends
    # on what else is in a micro-batch. So each pair is computed in the micro-batch in which training first
    # meets it. (On a GPU, a compiled model may still round differently with gradients than without.)
    if cfg.precompute_ref:
        ref_logp = run.precompute_logp(ref_policy, pairs, batches, cfg.ipo_average)  # (len(pairs), 2)
        ref_policy = None  # frees its memory

    @torch.no_grad()
    def reference_logp(indices):
        """log π_ref(y_w|x) and log π_ref(y_l|x) of the pairs at `indices`, (b,) each."""
        if cfg.precompute_ref:
            return ref_logp[indices].unbind(1)
        return pair_logp(ref_policy, [pairs[i] for i in indices], cfg.ipo_average)

    optimizer = make_optimizer(policy, cfg.lr, cfg.weight_decay)
    run.start_or_resume(policy, optimizer, CONSOLE)  # with --resume, continues from the last checkpoint

    for step in range(run.start, cfg.steps):
        metrics = Metrics()

        # 1. The gradients of the micro-batches add up to the gradient of the batch. A micro-batch is a list
        # of indices into pairs, at most cfg.micro_tokens tokens in total (a longer pair goes alone). Under
        # torchrun, each process takes its own share of the batch. All processes get the same number of
        # micro-batches, none of them empty, because a sharded model's processes must run forward and backward
        # together.
        for indices in run.micro_batches(batches[step], pairs):
            chosen_logp, rejected_logp = pair_logp(
                policy, [pairs[i] for i in indices], cfg.ipo_average)  # (b,) each
            ref_chosen_logp, ref_rejected_logp = reference_logp(indices)

            # eq. 7: −log σ(β [log π/π_ref (y_w|x) − log π/π_ref (y_l|x)]), or another --loss_type
            losses, chosen_reward, rejected_reward = dpo_loss(
                chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp,
                cfg.beta, cfg.label_smoothing, cfg.loss_type)
            (losses.sum() / cfg.batch_size).backward()

            # The policy's accuracy as a reward model: is the chosen response's reward higher? A tie counts
            # as one half. There is no dropout, so without --ref, π equals π_ref before the first update: all
            # pairs tie (but for the rounding described above), and the first accuracy is 0.5.
            tie = (chosen_reward == rejected_reward).float()
            correct = (chosen_reward > rejected_reward).float() + 0.5 * tie

            # For the log: `add` detaches each tensor, and adds it to the batch's sum.
            metrics.add(loss=losses, accuracy=correct, margin=chosen_reward - rejected_reward,
                        chosen_reward=chosen_reward, rejected_reward=rejected_reward,
                        chosen_logp=chosen_logp, rejected_logp=rejected_logp)

        # 2. Sum the gradients over the processes: a sum, not a mean, since each loss was divided by the size
        # of the whole batch. (A sharded model has already summed them, in its backward pass.)
        sync_gradients(policy)

        # 3. One optimizer step on the whole batch: clip the gradients, step, zero them. If a gradient is not
        # finite, the weights stay as they are.
        lr = cfg.lr * run.lr_schedule(step)  # a factor: up to 1 in cfg.warmup steps, then half a cosine to 0
        grad_norm = optimizer_step(policy, optimizer, lr, cfg.grad_clip)

        # 4. Log the batch means: the sums over all processes, divided by the batch size.
        run.log(step + 1, **metrics.mean(cfg.batch_size), lr=lr, grad_norm=grad_norm)

        # 5. Save a checkpoint every ckpt_every steps and after the last one. On Ctrl-C, save_if_due saves one
        # too, and exits, skipping the tables below.
        run.save_if_due(step + 1, policy, optimizer)

    # What has training changed? Two tables, on held-out data.
    if cfg.eval_n > 0:
        del optimizer  # frees memory for the evaluation
        if ref_policy is None:
            ref_policy = run.load_frozen(ref_name)  # precompute_ref dropped it; again frozen and prepared
        compare_with_reference(run, policy, ref_name, ref_policy)
    return policy


if __name__ == "__main__":
    train(parse(Config, RECIPES))
