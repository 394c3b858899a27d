"""Simple Preference Optimization (Meng, Xia and Chen 2024, arXiv:2405.14734): DPO without its reference.

DPO's reward of a response is β log π/π_ref, a sum over its tokens; but what generation follows is the
likelihood of the response itself. SimPO takes as the reward what generation follows, the mean log-prob of a
token (eq. 4), and asks the chosen response to win by a margin γ:

    r(x, y) = β/|y| log π_θ(y|x)
    L(θ) = −E log σ( β/|y_w| log π_θ(y_w|x) − β/|y_l| log π_θ(y_l|x) − γ )                          (eq. 6)

Only one model is in memory. So nothing but a small learning rate holds the policy near to where it started.
The length |y| counts the EOS, where the response has one.

Its known failure is that responses become too short. The loss divides by |y|, so each token of a short
response has more weight than a token of a long one; ending early is the cheapest way to a high mean.
Therefore the length is sampled and logged during training. The SFT term (App. H, weight 0 in the paper's
own settings) adds sft_weight times the mean of −log π over the tokens of the chosen responses. It gives all
tokens the same weight and holds the length.

    python simpo.py                                the animals world, from nothing: SFT first, then SimPO
    python simpo.py hh                             Anthropic's HH-RLHF, GPT-2
    python simpo.py tldr                           summaries of Reddit posts; likewise imdb
    python simpo.py --data=mine.jsonl --init=gpt2  your own comparisons
    python simpo.py --beta=10 --gamma_beta_ratio=0.3    γ = 3, as the authors' scripts give it

Left out: the hinge loss of the authors' code.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import evaluate
from common.dist import sync_gradients
from common.log import Metrics
from common.optim import make_optimizer, optimizer_step
from common.options import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, RunConfig, parse
from common.run import Run
from data import encode_pairs
from engine.packing import pack, per_sequence


@dataclass
class Config(RunConfig):
    beta: PositiveFloat = 2.0       # β of eq. 6: the scale of the mean log-prob
    gamma: float = 1.0              # γ of eq. 6: the margin that the chosen response is to win by
    gamma_beta_ratio: float | None = None  # γ/β, as the authors' scripts give it; overrides gamma
    sft_weight: float = 0.5         # weight of the SFT term, −log π of the chosen responses
    label_smoothing: float = 0.0    # ε: the share of labels assumed to be flipped
    lr: NonNegativeFloat = 3e-4     # peak learning rate
    sample_every: PositiveInt = 25  # steps between samples of the length
    sample_n: NonNegativeInt = 64   # validation prompts that are sampled for it


RECIPES = {
    "hh": dict(data="hh", sft_weight=0.0, steps=2500, max_len=512, lr=1e-6, warmup=150, sample_every=250,
               ckpt_every=500, eval_n=64),
    # not in the paper: the settings of hh, one epoch
    "tldr": dict(data="tldr", sft_weight=0.0, steps=1450, max_len=640, lr=1e-6, warmup=150, sample_every=250,
                 ckpt_every=500, eval_n=64),
    "imdb": dict(data="out/imdb-pairs.jsonl", init="out/sft-imdb", sft_weight=0.0, steps=2100, max_len=136,
                 lr=1e-6, warmup=150, sample_every=250, ckpt_every=500, eval_n=64),
}


def simpo_loss(chosen_logp, rejected_logp, chosen_len, rejected_len, beta, gamma, label_smoothing=0.0):
    """SimPO, arXiv:2405.14734 eq. 6. Log-probs (B,), summed over response tokens, in nats; lengths (B,),
    EOS included.

    With h = β/|y_w| log π(y_w|x) − β/|y_l| log π(y_l|x) − γ and ε the label smoothing: −(1−ε) log σ(h) − ε
    log σ(−h). Returns the losses and the rewards β/|y| log π(y|x) of chosen and rejected, without gradient:
    (B,) each.
    """
    chosen_reward = beta / chosen_len * chosen_logp        # β/|y_w| log π(y_w|x)
    rejected_reward = beta / rejected_len * rejected_logp  # β/|y_l| log π(y_l|x)
    h = chosen_reward - rejected_reward - gamma
    losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    return losses, chosen_reward.detach(), rejected_reward.detach()


def pair_logp(policy, pairs):
    """log π(y_w|x), log π(y_l|x), |y_w| and |y_l|: (B,) each. Log-probs are summed over response tokens.

    pairs: list of (prompt_ids, [chosen_ids, rejected_ids]). Both responses share one row with their prompt.
    """
    batch = pack(pairs).to(policy.device)
    logp = per_sequence(policy.logprobs(batch), batch)  # (2B,): chosen, rejected, chosen, …
    length = torch.bincount(batch.sequence)  # (2B,): `sequence` numbers the response of each response token
    return logp[0::2], logp[1::2], length[0::2], length[1::2]


def length_statistics(responses, eos):
    """What a collapse of the length shows in first. responses: lists of token ids.

    response_len: mean length in tokens; empty: the share of responses without a word; unfinished: the share
    that did not end by themselves.
    """
    n = len(responses)
    n_tokens = sum(map(len, responses))
    n_empty = sum(response == [eos] for response in responses)
    n_unfinished = sum(response[-1] != eos for response in responses)
    return {"response_len": n_tokens / n, "empty": n_empty / n, "unfinished": n_unfinished / n}


def train(cfg):
    """Runs the stage, after training the SFT model if that is missing. Returns the trained policy."""
    run = Run("simpo", cfg)  # the device, the folder, the log and the checkpoints
    init = cfg.init or run.train_if_missing("sft")
    gamma = cfg.gamma if cfg.gamma_beta_ratio is None else cfg.gamma_beta_ratio * cfg.beta

    # Comparisons: a prompt x, the chosen response y_w and the rejected response y_l, as token ids.
    policy, tokenizer = run.load_model(init)
    policy = run.prepare(policy)  # moved to the device; sharded or compiled if asked for
    comparisons = run.data.comparisons("train")
    pairs = encode_pairs(tokenizer, comparisons, cfg.max_len, source=cfg.data)
    batches = run.shuffled_batches(pairs)  # for each step a list of indices into pairs
    run.print0(f"simpo: {len(pairs)} pairs of {cfg.data}, {init} -> {run.out} on {run.device}")
    # Held-out prompts to watch the length on; a prompt longer than half of the context loses its beginning.
    sample_prompts = evaluate.encode_cut(run.data.prompts("validation")[:cfg.sample_n], policy, tokenizer)

    optimizer = make_optimizer(policy, cfg.lr, cfg.weight_decay)
    run.start_or_resume(policy, optimizer)  # with --resume, continues from the last checkpoint

    for step in range(run.start, cfg.steps):
        metrics = Metrics()
        n_chosen_tokens = 0  # in the whole batch, over all processes
        for i in batches[step]:
            prompt, (chosen, rejected) = pairs[i]
            n_chosen_tokens += len(chosen)

        # 1. The gradients of the micro-batches add up to the gradient of the batch. With several processes,
        # these are the micro-batches of this process's share.
        for rows in run.micro_batches(batches[step], pairs):
            chosen_logp, rejected_logp, chosen_len, rejected_len = pair_logp(policy, [pairs[i] for i in rows])

            # eq. 6: −log σ(β/|y_w| log π(y_w|x) − β/|y_l| log π(y_l|x) − γ)
            losses, chosen_reward, rejected_reward = simpo_loss(
                chosen_logp, rejected_logp, chosen_len, rejected_len, cfg.beta, gamma, cfg.label_smoothing)

            # App. H: the SFT term is a mean over all tokens of the chosen responses.
            sft_loss = -chosen_logp.sum() / n_chosen_tokens
            loss = losses.sum() / cfg.batch_size + cfg.sft_weight * sft_loss
            loss.backward()

            # The accuracy of the policy as a reward model, and the quantities to watch. loss and sft_loss
            # are shares of the batch's means already: × batch_size undoes the division in metrics.mean
            # below.
            metrics.add(loss=loss * cfg.batch_size, sft_loss=sft_loss * cfg.batch_size)
            metrics.add(accuracy=chosen_reward > rejected_reward, margin=chosen_reward - rejected_reward,
                        chosen_reward=chosen_reward, rejected_reward=rejected_reward,
                        chosen_logp=chosen_logp, rejected_logp=rejected_logp)

        # 2. One optimizer step on the whole batch: add up the gradients of all processes, clip, step.
        sync_gradients(policy)
        lr = cfg.lr * run.lr_schedule(step)
        grad_norm = optimizer_step(policy, optimizer, lr, cfg.grad_clip)

        # 3. Now and then, sample: has the length begun to collapse? All processes must call `respond`.
        lengths = {"response_len": None, "empty": None, "unfinished": None}
        if sample_prompts and ((step + 1) % cfg.sample_every == 0 or step + 1 == cfg.steps):
            responses = evaluate.respond(policy, sample_prompts, tokenizer.eot_token)
            lengths = length_statistics(responses, tokenizer.eot_token)

        # 4. Log, and save a checkpoint when one is due or when Ctrl-C asked for it.
        run.log(step + 1, **metrics.mean(cfg.batch_size), **lengths, lr=lr, grad_norm=grad_norm)
        run.save_if_due(step + 1, policy, optimizer)

    # The policy before and after, on held-out prompts. Evaluation needs the optimizer's memory.
    del optimizer
    evaluate.report(run, policy, init)
    return policy


if __name__ == "__main__":
    train(parse(Config, RECIPES))
