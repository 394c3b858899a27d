"""The reward model: the second stage of InstructGPT (Ouyang et al. 2022, arXiv:2203.02155 §3.5).

A GPT with a scalar head, r_θ(x, y). It starts from the SFT model, and the score is read at the last token of
the response. A comparison is a prompt x with K ranked responses; any two of different rank are a pair, the
better y_w and the worse y_l. Preferences are assumed to follow the Bradley–Terry model:

    P(y_w ≻ y_l | x) = σ( r(x, y_w) − r(x, y_l) )

All pairs among a prompt's K ranked responses go into one batch. When the paper shuffled them into separate
examples, its model overfit within one epoch. Together they are also cheaper: the model reads each response
once, and the prompt once for all of them. The loss is a mean over a prompt's pairs, then over prompts:

    L(θ) = −E_x [ 1/(K choose 2) Σ log σ( r_θ(x, y_w) − r_θ(x, y_l) ) ]                             (eq. 1)

Where responses tie, only the other pairs count. Eq. 1 sees only differences within a prompt, so it leaves
an offset open for each prompt. Two things settle it:

- During training, a small term center_coef · (2 r̄)² pulls the mean score r̄ of a prompt's responses towards
  0, so that all prompts share about one level. Otherwise PPO's value model would have to learn a separate
  offset for each prompt. The term's derivative is the same for each of the K scores, so it pushes on
  their mean and not on the differences between them. (It is ours; at K = 2 it is the (r_w + r_l)² of
  arXiv:2312.09244.)
- At the end, as in InstructGPT, the head's bias is shifted once, so that demonstrations score 0 on average:
  that sets the common level.

The final checkpoint also holds the standard deviation of the demonstrations' scores; `ppo.py
--normalize_reward` divides scores by it.

With --margin=m, a pair's loss is −log σ(r_w − r_l − m).

    python reward.py                                the animals world; trains its SFT model first
    python reward.py hh                             Anthropic's HH-RLHF, GPT-2
    python reward.py imdb                           the sentiment of IMDb reviews
    python reward.py tldr                           summaries of Reddit posts
    python reward.py qa_feedback                    long answers to questions
    python reward.py --data=mine.jsonl --init=gpt2  your own comparisons, with the settings of the recipe hh

Without --init it starts from the SFT model of the same data, and trains that first if it is missing.

Left out: graded preference labels, ensembles, a score for every turn of a conversation.
"""
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F

import evaluate
from common.dist import sync_gradients
from common.log import Metrics
from common.optim import make_optimizer, optimizer_step
from common.options import AtLeast, NonNegativeFloat, NonNegativeInt, PositiveInt, RunConfig, parse
from common.run import Run
from data import check_pairs, encode_groups
from engine.packing import pack


@dataclass
class Config(RunConfig):
    k: Annotated[int, AtLeast(2)] = 8   # K: ranked responses per prompt (InstructGPT: 4 to 9); a file has its own
    margin: NonNegativeFloat = 0.0      # m in log σ(r_w − r_l − m); arXiv:2307.09288 eq. 2 varies it
    center_coef: NonNegativeFloat = 0.01  # weight of (2 r̄)², which keeps a prompt's mean score near 0
    steps: PositiveInt = 1200           # optimizer steps
    batch_size: PositiveInt = 16        # prompts per step, each with its K responses, over all processes
    micro_tokens: PositiveInt = 1024    # most tokens per forward pass (a longer group goes alone)
    lr: NonNegativeFloat = 2e-3         # peak learning rate
    warmup: NonNegativeInt = 20         # steps of linear warm-up, before the cosine to 0
    val_every: PositiveInt = 600        # steps between validations
    log_every: PositiveInt = 50         # steps between lines on the console
    ckpt_every: PositiveInt = 100       # steps between checkpoints
    eval_n: NonNegativeInt = 1000       # number of validation comparisons
    center_n: Annotated[int, AtLeast(2)] = 1000  # number of training demonstrations to center the scores on


# The defaults above are for the animals world. --data=FILE without a recipe uses hh.
RECIPES = {
    # Our choice, for GPT-2: about one epoch of hh's 160,800 pairs
    "hh": dict(data="hh", k=2, steps=2500, batch_size=64, micro_tokens=16384, max_len=512, lr=1e-5,
               warmup=100, val_every=250, log_every=10, ckpt_every=500),
    # Our choice, for GPT-2
    "qa_feedback": dict(data="qa_feedback", k=4, steps=500, batch_size=16, micro_tokens=16384, max_len=1024,
                        lr=1e-5, warmup=20, val_every=100, log_every=10, ckpt_every=100),
    # arXiv:2009.01325 B.1, its 1.3B model: batch 64, lr 1.5e-5; one epoch of the 92,858 released pairs
    "tldr": dict(data="tldr", k=2, steps=1450, batch_size=64, micro_tokens=16384, max_len=640, lr=1.5e-5,
                 warmup=50, val_every=250, log_every=10, ckpt_every=500),
    # Positive against negative reviews, paired arbitrarily, two epochs of 12,500 pairs. All share one empty
    # prompt, so no prompt has an offset of its own. And two pairs may well differ in their mean: two strong
    # reviews, two weak ones. Pulling every mean to 0 would erase that, so center_coef is 0
    "imdb": dict(data="imdb", k=2, center_coef=0.0, steps=390, batch_size=64, micro_tokens=16384, max_len=136,
                 lr=1e-5, warmup=20, val_every=100, log_every=10, ckpt_every=100),
}


# ------------------------------------------------------------------------------------------------- the loss

def ranked_pairs(scores, rank):
    """r_w and r_l of every untied pair among one prompt's K responses: (P,) each."""
    better = rank[:, None] < rank[None, :]  # (K, K): does i rank above j?
    winner, loser = better.nonzero(as_tuple=True)
    return scores[winner], scores[loser]


def split_by_group(scores, group, rank):
    """Splits scores and ranks, (S,) each, by group: a list of (scores, ranks) of its responses, (K,) each."""
    return [(scores[group == g], rank[group == g]) for g in group.unique()]


def ranking_loss(scores, group, rank, margin=0.0, center_coef=0.0):
    """The reward model's loss, arXiv:2203.02155 eq. 1: a mean over each group's pairs, then over groups.

    A group is a prompt with its ranked responses. scores (S,); group (S,): the group each response belongs
    to; rank (S,): 0 is best, equal ranks tie and form no pair. A pair's loss is −log σ(r_w − r_l − margin).
    Each group with a pair adds center_coef · (2 r̄)², with r̄ the mean of its scores. (Not the sum over pairs
    of (r_w + r_l)²: without ties that is (Σ r_i)² + (K − 2) Σ r_i², and the second term shrinks differences.)
    Returns the loss and the accuracy, both means over the groups that have a pair (0 if none has). A group's
    accuracy is the share of its pairs with r_w > r_l, equal scores counting one half.
    """
    losses, accuracies = [], []
    for group_scores, group_rank in split_by_group(scores, group, rank):
        r_w, r_l = ranked_pairs(group_scores, group_rank)
        if len(r_w) == 0:
            continue  # all of its responses tie
        pair_losses = -F.logsigmoid(r_w - r_l - margin)
        centering = center_coef * (2 * group_scores.mean()) ** 2
        losses.append(pair_losses.mean() + centering)  # without ties, over the K choose 2 pairs of eq. 1
        right = (r_w > r_l).float() + 0.5 * (r_w == r_l).float()
        accuracies.append(right.mean())
    if not losses:  # no pairs, as can happen in finegrained.py: a zero that is still part of the graph
        return 0 * scores.sum(), 0 * scores.detach().sum()
    return torch.stack(losses).mean(), torch.stack(accuracies).mean()


def score_gap(scores, group, rank):
    """For the log: each group's mean of r_w − r_l over its pairs, (G,). Every group must have a pair."""
    gaps = []
    for group_scores, group_rank in split_by_group(scores.detach(), group, rank):
        r_w, r_l = ranked_pairs(group_scores, group_rank)
        gaps.append((r_w - r_l).mean())
    return torch.stack(gaps)


def group_and_rank(comparisons, device="cpu"):
    """For each response of the comparisons, the index of its comparison, and its rank: (S,) each."""
    group, rank = [], []
    for i, comparison in enumerate(comparisons):
        group += [i] * len(comparison.ranks)
        rank += comparison.ranks
    return torch.tensor(group, device=device), torch.tensor(rank, device=device)


def shift_bias(reward_model, shift):
    """Adds `shift` to every score of a reward model, by changing its head's bias in place."""
    # A state dict's tensors share their memory with the parameters, so changing one changes the model.
    # reward_model.scalar_head.bias itself would not do: in a sharded model, after a forward pass, it may be a
    # gathered copy, which is thrown away later.
    bias = reward_model.state_dict()["scalar_head.bias"]
    bias += shift


def train(cfg):
    """Runs the stage, after training the SFT model if that is missing. Returns the trained reward model."""
    run = Run("reward", cfg)  # the device, the folder, the log and the checkpoints
    init_name = cfg.init or run.train_if_missing("sft")

    # The initial model may be a policy or a reward model: either way, it gets a new scalar head.
    reward_model, tokenizer = run.load_model(init_name, require_policy=False)
    reward_model.set_scalar_heads(1)  # a new head with random weights, bias 0
    reward_model = run.prepare(reward_model)  # moved to the device; sharded or compiled if asked for

    # Comparisons: a prompt and its K ranked responses. `groups` holds the same ones, in the same order, as
    # token ids: (prompt_ids, [response_ids, …]). If a prompt and its longest response exceed max_len
    # tokens, the prompt is cut at its start, down to max_len // 2 tokens at the least. A response that is
    # still too long is cut at its end, and loses its EOS.
    data = run.data
    comparisons = data.comparisons("train", cfg.k)
    comparisons = [c for c in comparisons if len(set(c.ranks)) > 1]  # drop those whose responses all tie
    groups = encode_groups(tokenizer, [(c.prompt, c.responses) for c in comparisons], cfg.max_len)
    # Pairs whose responses are identical after cutting teach nothing, but are kept. This prints how many
    # there are, and exits if every pair is like that.
    check_pairs(groups, [comparison.ranks for comparison in comparisons], cfg.max_len, source=cfg.data)
    # The first eval_n validation comparisons, as text with ranks, and the same comparisons as token ids
    validation, validation_groups = run.validation_comparisons(cfg.k)
    # For each step of the run, a list of batch_size indices into groups. Each epoch is shuffled anew, from
    # the seed, and drops its last, incomplete batch.
    batches = run.shuffled_batches(groups)
    run.print0(f"reward: {len(groups)} comparisons of {cfg.data}, {init_name} -> {run.out} on {run.device}")
    # Prints the first comparison, with a mark at each response's last token, where its score is read, and
    # warns of what is probably wrong with the data. (The marks are a list of positions for each response.)
    last_tokens = [[len(response) - 1] for response in groups[0][1]]
    run.show_data(groups, [f"rank {rank}" for rank in comparisons[0].ranks], last_tokens)

    # The untrained head's scores of all S validation responses, for the table at the end: (S,), without
    # gradient. This comes before run.start_or_resume, which with --resume replaces the initial weights.
    scores_before = run.scores_of_responses(reward_model, validation_groups)
    # β2 is 0.99, not the 0.95 of the other stages: these gradients are noisy, so their squares are averaged
    # over more steps.
    optimizer = make_optimizer(reward_model, cfg.lr, cfg.weight_decay, betas=(0.9, 0.99))
    checkpoint = run.start_or_resume(reward_model, optimizer)  # the last checkpoint, or {}; sets run.start

    for step in range(run.start, cfg.steps):
        metrics = Metrics()

        # 1. The gradients of the micro-batches add up to the gradient of the batch. A micro-batch is a list
        # of indices into groups, at most cfg.micro_tokens tokens in total (a longer group goes alone). Under
        # torchrun, each process takes its own share of the batch. All processes get the same number of
        # micro-batches, none of them empty, because a sharded model's processes must run forward and backward
        # together.
        for indices in run.micro_batches(batches[step], groups):
            # r(x, y) of every response, group by group; the responses to one prompt do not see each other.
            batch = pack([groups[i] for i in indices]).to(run.device)
            scores = reward_model.score(batch)  # (S,), read at each response's last token
            # The group each response belongs to, as an index, and its rank in that group: (S,) each
            group, rank = group_and_rank([comparisons[i] for i in indices], run.device)

            # eq. 1: −log σ(r(x, y_w) − r(x, y_l)), a mean over each group's pairs, then over groups; and a
            # small term that holds a group's mean score near 0
            loss, accuracy = ranking_loss(scores, group, rank, cfg.margin, cfg.center_coef)

            # Rescale, so that the losses of the micro-batches add up to the batch's mean. (Every group has a
            # pair: those whose responses all tie were left out when the comparisons were loaded.)
            n_groups = len(indices)
            (loss * n_groups / cfg.batch_size).backward()

            # For the log: `add` detaches and sums the elements; mean(batch_size), below, divides. (score_gap
            # has an element per group; the other two are means.) The loss includes the centering term. The
            # logged margin is r_w − r_l, not --margin.
            metrics.add(loss=loss * n_groups, accuracy=accuracy * n_groups,
                        margin=score_gap(scores, group, rank))

        # 2. Sum the gradients over the processes: a sum, not a mean, since each loss was divided by the size
        # of the whole batch. (A sharded model has already summed them, in its backward pass.)
        sync_gradients(reward_model)

        # 3. One optimizer step on the whole batch: clip the gradients, step, zero them. If a gradient is not
        # finite, the weights stay as they are.
        lr = cfg.lr * run.lr_schedule(step)  # a factor: up to 1 in cfg.warmup steps, then half a cosine to 0
        grad_norm = optimizer_step(reward_model, optimizer, lr, cfg.grad_clip)

        # 4. Log the batch means: the sums over all processes, divided by the batch size. Every val_every
        # steps, and after the last, also log the accuracy on the validation comparisons.
        val_accuracy = None
        if validation and ((step + 1) % cfg.val_every == 0 or step + 1 == cfg.steps):
            # Every process scores all of them: (S,) on the CPU
            scores = run.scores_of_responses(reward_model, validation_groups)
            group, rank = group_and_rank(validation)
            _, accuracy = ranking_loss(scores, group, rank)
            val_accuracy = accuracy.item()
        run.log(step + 1, **metrics.mean(cfg.batch_size), val_accuracy=val_accuracy,
                lr=lr, grad_norm=grad_norm)

        # 5. Save a checkpoint every ckpt_every steps. On Ctrl-C, save_if_due saves one too, and exits. The
        # last checkpoint is saved below, once the scores are centered.
        if step + 1 < cfg.steps:
            run.save_if_due(step + 1, reward_model, optimizer)

    # Center the scores: shift the bias so that training demonstrations (the best responses, if the data have
    # only comparisons) score 0 on average. Every process scores all of them, so all have the same mean.
    # Only a finished run's checkpoint has score_std. Resumed with the same --steps, the run is centered
    # already. Resumed with more, it has trained since, so it is centered again.
    already_centered = "score_std" in checkpoint and run.start == cfg.steps
    if already_centered:
        score_std = checkpoint["score_std"]
    else:
        demonstrations = data.demonstrations("train")[:cfg.center_n]
        examples = [(prompt, [response]) for prompt, response in demonstrations]
        demonstration_groups = encode_groups(tokenizer, examples, cfg.max_len)
        scores = run.scores_of_responses(reward_model, demonstration_groups)
        score_std = scores.std().item()
        shift_bias(reward_model, -scores.mean().item())
        run.save(cfg.steps, reward_model, optimizer, score_std=score_std)

    run.print0(f"\ndemonstrations score 0 ± {score_std:.3f}")

    # The final table, which save_rows writes to eval.json: how well the scores order the validation
    # comparisons, before training (in the row with the initial model's name) and after. Below it, three
    # comparisons with their scores.
    if validation:
        scores = run.scores_of_responses(reward_model, validation_groups)
        rows = evaluate.report_preferences(run, init_name, validation, scores_before, scores, n_samples=3)
        evaluate.save_rows(run, rows)
    return reward_model


if __name__ == "__main__":
    train(parse(Config, RECIPES))
