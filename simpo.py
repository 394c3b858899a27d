"""Simple Preference Optimization (Meng, Xia and Chen 2024, arXiv:2405.14734): DPO without a reference model.

DPO's reward for a response is β log π/π_ref, a sum over its tokens. But generation uses only the policy's own
log-probs, so SimPO leaves π_ref out. What remains, a sum of log-probs, falls with every token. A longer
chosen response then starts behind, and training must inflate the probabilities of its tokens to make it win.
So SimPO divides by the length |y|: the reward is β times the mean log-prob (eq. 4). Without the division, the
paper's models write long, repetitive responses. The reward of the chosen y_w should exceed that of the
rejected y_l by at least γ:

    r(x, y) = β/|y| log π_θ(y|x)
    L(θ) = −E log σ( β/|y_w| log π_θ(y_w|x) − β/|y_l| log π_θ(y_l|x) − γ )                          (eq. 6)

The length |y| is in tokens, with the EOS unless the response was cut. Without a reference, training holds
only one model in memory. The cost: nothing in eq. 6 keeps the policy near its start. The paper relies on a
small learning rate, diverse data, and large models being slow to forget.

In our runs on the animals world, a small synthetic data set, responses become too short with this loss alone
(docs/results.md). We have not isolated the reason. One candidate: 1/|y| gives each token of a short response,
its EOS included, more weight than a token of a long one. So a short chosen response strongly raises the
probability of its EOS, and a short rejected one strongly lowers it. Which effect wins depends on the data. An
SFT term keeps the length up. The authors' code has the same term, averaged over the chosen tokens of a
micro-batch; ours is averaged over those of the whole batch:

    sft_weight · ( −Σ log π_θ(y_w|x) ) / ( Σ |y_w| )

In this term a token has the same weight, whether its response is short or long. The paper's main runs have
sft_weight 0, and so do our recipes for real data. With these recipes, watch `response_len` on the console and
`unfinished` in log.jsonl: responses of at most 128 tokens are sampled during training for that purpose.

    python simpo.py                                the animals world, from scratch: SFT first, then SimPO
    python simpo.py hh                             Anthropic's HH-RLHF: SFT of GPT-2, then SimPO
    python simpo.py tldr                           summaries of Reddit posts
    python simpo.py imdb                           film reviews, after the steps in data/imdb.py
    python simpo.py --data=mine.jsonl --init=gpt2  your own comparisons, without SFT; settings of hh
    python simpo.py --beta=10 --gamma_beta_ratio=0.3    the authors' scripts give γ/β; here γ = 0.3 · 10 = 3

Left out: the hinge loss of the authors' code.
"""
from dataclasses import dataclass

import torch.nn.functional as F

import evaluate
from common.dist import sync_gradients
from common.log import Metrics
from common.optim import make_optimizer, optimizer_step
from common.options import (BelowHalf, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt,
                            RunConfig, parse)
from common.run import Run
from engine.packing import pack, per_sequence


@dataclass
class Config(RunConfig):  # the other options (250 steps, batches of 64 pairs, …) are in common/options.py
    beta: PositiveFloat = 2.0       # β of eq. 6: the scale of the mean log-prob
    gamma: NonNegativeFloat = 1.0   # γ of eq. 6: the margin that the chosen response should win by
    gamma_beta_ratio: NonNegativeFloat | None = None  # γ/β, as the authors' scripts give it; replaces gamma
    sft_weight: NonNegativeFloat = 0.5  # weight of the SFT term, the mean −log π per chosen token
    label_smoothing: BelowHalf = 0.0  # ε, as in the authors' code: see simpo_loss
    reward_model: str | None = None  # a run of reward.py, for scores and win rates in the final tables
    lr: NonNegativeFloat = 3e-4     # peak learning rate: reached by a linear warm-up, then half a cosine to 0
    sample_every: PositiveInt = 20  # steps between samples, to watch the length
    sample_n: NonNegativeInt = 64   # number of validation prompts to answer; 0 turns sampling off


# `python simpo.py hh` selects a recipe; --data=FILE selects hh's settings. None of these data sets is in the
# paper, and nothing was tuned on them: learning rate, steps and warm-up are those of dpo.py, and β and γ the
# defaults above.
RECIPES = {
    "hh": dict(data="hh", sft_weight=0.0, steps=2500, max_len=512, lr=1e-6, warmup=150, sample_every=250,
               ckpt_every=500, eval_n=64),
    "tldr": dict(data="tldr", sft_weight=0.0, steps=1450, max_len=640, lr=1e-6, warmup=150, sample_every=250,
                 ckpt_every=500, eval_n=64),
    "imdb": dict(data="out/imdb-pairs.jsonl", init="out/sft-imdb", sft_weight=0.0, steps=2100, max_len=136,
                 lr=1e-6, warmup=150, sample_every=250, ckpt_every=500, eval_n=64),
}

CONSOLE = ["loss", "accuracy", "margin", "chosen_logp", "response_len", "grad_norm"]  # log.jsonl has more


def simpo_loss(chosen_logp, rejected_logp, chosen_len, rejected_len, beta, gamma, label_smoothing=0.0):
    """SimPO, arXiv:2405.14734 eq. 6: −log σ(h), where

        h = β/|y_w| log π(y_w|x) − β/|y_l| log π(y_l|x) − γ

    With the label smoothing ε of the authors' code it is −(1−ε) log σ(h) − ε log σ(−h): the second term
    negates all of h, γ included (swapping y_w and y_l would keep −γ). Log-probs are (B,), summed over
    response tokens, in nats; lengths are (B,), in tokens. Returns three tensors (B,): the losses, and,
    detached, the rewards β/|y| log π(y|x) of the chosen and of the rejected responses.
    """
    chosen_reward = beta / chosen_len * chosen_logp        # β/|y_w| log π(y_w|x)
    rejected_reward = beta / rejected_len * rejected_logp  # β/|y_l| log π(y_l|x)
    h = chosen_reward - rejected_reward - gamma
    losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    return losses, chosen_reward.detach(), rejected_reward.detach()


def pair_logp(policy, pairs):
    """log π(y_w|x), log π(y_l|x), |y_w| and |y_l|: (B,) each. Log-probs are summed over response tokens.

    pairs: list of (prompt_ids, [chosen_ids, rejected_ids]). The prompt and its two responses are packed into
    one row, so the prompt goes through the model once. Each response sees the prompt and itself, and its
    positions continue from the prompt's, so the log-probs equal those of two separate rows, up to rounding.
    """
    batch = pack(pairs).to(policy.device)
    logprobs = policy.logprobs(batch)     # (N,): one per response token
    logp = per_sequence(logprobs, batch)  # (2B,), a sum for each: chosen, rejected, chosen, …
    length = batch.response_length        # (2B,), |y| in tokens
    return logp[0::2], logp[1::2], length[0::2], length[1::2]


def count_chosen_tokens(pairs):
    """Σ |y_w|: the number of tokens in the chosen responses, with the EOS unless one was cut."""
    return sum(len(chosen) for _, (chosen, _) in pairs)


def length_statistics(responses, eos):
    """Statistics that show early whether responses (lists of token ids) shrink to nothing, or no longer end.

    response_len: mean length in tokens, EOS included; empty: the share of responses that are nothing but the
    EOS; unfinished: the share that reached the limit of new tokens before an EOS.
    """
    n = len(responses)
    n_tokens = sum(map(len, responses))
    n_empty = sum(response == [eos] for response in responses)
    n_unfinished = sum(response[-1] != eos for response in responses)
    return {"response_len": n_tokens / n, "empty": n_empty / n, "unfinished": n_unfinished / n}


def compare_with_initial_policy(run, policy, init_name):
    """The final evaluation: two tables, each with a row for the initial policy and one for the trained one.

    - Answers to the first eval_n prompts of the test split: KL to the initial policy, length and, with the
      data's true reward or --reward_model, reward and win rate against the initial policy.
    - The first eval_n comparisons of the validation split: how often the rewards β/|y| log π(y|x) rank the
      responses correctly.
    """
    cfg = run.cfg
    initial_policy = run.load_frozen(init_name)
    # The same comparisons in two forms: text with ranks, and token ids, [(prompt_ids, [response_ids, …]), …].
    comparisons, groups = run.validation_comparisons()
    # The rewards β/|y| log π(y|x), one per response, comparison after comparison: (S,). `average` divides
    # log π(y|x) by |y|.
    rewards_before = cfg.beta * run.logp_of_responses(initial_policy, groups, average=True)
    rewards = cfg.beta * run.logp_of_responses(policy, groups, average=True)
    evaluate.report(run, policy, init_name, initial_policy, cfg.reward_model,
                    preferences=(comparisons, rewards_before, rewards))


def train(cfg):
    """Trains with SimPO, after training the SFT model if that is missing. Returns the trained policy."""
    run = Run("simpo", cfg)  # the device, the folder, the log and the checkpoints
    init_name = cfg.init or run.train_if_missing("sft")  # --init, or the SFT model of the same data
    gamma = cfg.gamma if cfg.gamma_beta_ratio is None else cfg.gamma_beta_ratio * cfg.beta

    policy, tokenizer = run.load_model(init_name)
    policy = run.prepare(policy)  # moved to the device; sharded or compiled if asked for

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
    # Validation prompts, which are answered during training to watch the length. A prompt longer than half of
    # the model's context loses its beginning, to leave room for the response.
    sample_prompts = evaluate.encode_with_room(
        run.data.prompts("validation")[:cfg.sample_n], policy.config.block_size, tokenizer)

    optimizer = make_optimizer(policy, cfg.lr, cfg.weight_decay)
    run.start_or_resume(policy, optimizer, CONSOLE)  # with --resume, continues from the last checkpoint

    for step in range(run.start, cfg.steps):
        metrics = Metrics()
        # The SFT loss below divides by Σ |y_w|, over the whole batch, all processes included.
        n_chosen_tokens = count_chosen_tokens([pairs[i] for i in batches[step]])

        # 1. The gradients of the micro-batches add up to the gradient of the batch. A micro-batch is a list
        # of indices into pairs, at most cfg.micro_tokens tokens in total (a longer pair goes alone). Under
        # torchrun, each process takes its own share of the batch. All processes get the same number of
        # micro-batches, none of them empty, because a sharded model's processes must run forward and backward
        # together.
        for indices in run.micro_batches(batches[step], pairs):
            chosen_logp, rejected_logp, chosen_len, rejected_len = pair_logp(
                policy, [pairs[i] for i in indices])  # (b,) each

            # eq. 6: −log σ(β/|y_w| log π(y_w|x) − β/|y_l| log π(y_l|x) − γ)
            losses, chosen_reward, rejected_reward = simpo_loss(
                chosen_logp, rejected_logp, chosen_len, rejected_len, cfg.beta, gamma, cfg.label_smoothing)

            # The SFT loss, −Σ log π(y_w|x) / Σ |y_w| over the batch. Eq. 6 is a mean over pairs, but this is
            # a mean over tokens: the factor batch_size cancels the division by batch_size below.
            sft_losses = -chosen_logp * cfg.batch_size / n_chosen_tokens
            total_losses = losses + cfg.sft_weight * sft_losses
            (total_losses.sum() / cfg.batch_size).backward()

            # The policy's accuracy as a reward model: is the chosen response's reward higher? A tie counts
            # as one half.
            tie = (chosen_reward == rejected_reward).float()
            correct = (chosen_reward > rejected_reward).float() + 0.5 * tie

            # For the log: `add` detaches each tensor, and adds it to the batch's sum. The loss is eq. 6 plus
            # sft_weight times the SFT loss; the margin is the difference of the rewards, and γ its target.
            metrics.add(loss=total_losses, simpo_loss=losses, sft_loss=sft_losses, accuracy=correct,
                        margin=chosen_reward - rejected_reward,
                        chosen_reward=chosen_reward, rejected_reward=rejected_reward,
                        chosen_logp=chosen_logp, rejected_logp=rejected_logp)

        # 2. Sum the gradients over the processes: a sum, not a mean, since each loss was divided by the size
        # of the whole batch. (A sharded model has already summed them, in its backward pass.)
        sync_gradients(policy)

        # 3. One optimizer step on the whole batch: clip the gradients, step, zero them. If a gradient is not
        # finite, the weights stay as they are.
        lr = cfg.lr * run.lr_schedule(step)  # a factor: up to 1 in cfg.warmup steps, then half a cosine to 0
        grad_norm = optimizer_step(policy, optimizer, lr, cfg.grad_clip)

        # 4. Every sample_every steps, and after the last, sample responses of at most 128 tokens to see their
        # length. `respond` uses the same seed every time, so the lengths differ only because the policy does.
        # Under torchrun, every process samples the same responses (a sharded model is gathered by all of them
        # together). At other steps the values are None (blank on the console).
        sample_stats = {"response_len": None, "empty": None, "unfinished": None}
        if sample_prompts and ((step + 1) % cfg.sample_every == 0 or step + 1 == cfg.steps):
            responses = evaluate.respond(policy, sample_prompts, tokenizer.eot_token, max_new_tokens=128)
            sample_stats = length_statistics(responses, tokenizer.eot_token)

        # 5. Log the batch means: the sums over all processes, divided by the batch size.
        run.log(step + 1, **metrics.mean(cfg.batch_size), **sample_stats, lr=lr, grad_norm=grad_norm)

        # 6. Save a checkpoint every ckpt_every steps and after the last one. On Ctrl-C, save_if_due saves one
        # too, and exits, skipping the tables below.
        run.save_if_due(step + 1, policy, optimizer)

    # What has training changed? Two tables, on held-out data.
    if cfg.eval_n > 0:
        del optimizer  # frees memory for the evaluation
        compare_with_initial_policy(run, policy, init_name)
    return policy


if __name__ == "__main__":
    train(parse(Config, RECIPES))
