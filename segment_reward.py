"""The reward models of Fine-Grained RLHF (Wu et al. 2023, arXiv:2306.01693 §4), which finegrained.py uses.

Each of three reward models judges one axis, at its own granularity, with a score s for each segment:

    R_1  relevance      a sub-sentence      is it relevant, new and coherent?         −log σ(s) or −log σ(−s)
    R_2  factuality     a sentence          is it true, and supported by the sources? −log σ(s) or −log σ(−s)
    R_3  completeness   the whole response  does it say all that was asked for?       −log σ(s_w − s_l)

The last column is the training loss. Annotators flag errors: spans of the response, each with a category. A
segment is bad (label 0, loss −log σ(−s)) if a span of its axis overlaps it, and otherwise good (label 1, loss
−log σ(s)), with one exception: a sentence overlapped only by spans of relevance has no label for factuality.
R_3 learns from comparisons, as in reward.py: y_w is more complete than y_l. finegrained.py makes rewards of
the scores: the sign of s for R_1 and R_2, and for R_3 the score normalized to mean 0 and variance 1.

An example: of "A crab has ten legs, and it can swim in the sea. It has fur." an annotator flags "it can swim
in the sea" as Irrelevant and "It has fur" as Wrong-Grounding. Relevance has three segments, with labels 1, 0
and 1. Factuality has two, the sentences: the second has label 0, the first has none, because a part of it is
irrelevant.

This page cuts a response into segments, reads a model's scores at their last tokens, turns feedback into
labels, trains, and measures accuracy. It has no command of its own: finegrained.py trains the models that it
needs. By default they are three heads on one trunk, trained together; with --share_trunk=False they are three
models, as in the paper, and train_rewards runs once for each.

Left out:
  - the paper's filter, which drops error spans shorter than five words (in its code, only for relevance)
  - its reward models' encoders, which read the whole response, with separator tokens: here a causal model is
    read at a segment's last token, and sees nothing after it
  - hiding the passages from the relevance model, as the authors' code does; here all models see them
  - completeness labels from matching passages (see data/qa_feedback.py)
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

import evaluate
import reward
from common.batches import all_micro_batches
from common.dist import sync_gradients
from common.log import Metrics
from common.optim import make_optimizer, optimizer_step
from common.run import Run
from common.standard_errors import clusters_of, mean_se
from common.tables import table
from data import check_pairs, encode_groups, segments
from engine.packing import pack

# The axes, and the categories of errors that annotators flag for them. Completeness is learned from
# comparisons instead.
AXES = {
    "relevance": ["Irrelevant", "Redundant", "Incoherent"],
    "factuality": ["Wrong-Grounding", "Unverifiable"],
    "completeness": [],
}


# --------------------------------------------------------------------------------------------------- segments

class Segment(NamedTuple):
    axis: str
    token: int  # T_j^k: the segment's last token, counted from the start of its response
    start: int  # in characters of the response
    end: int


def cut_response(tokenizer, response):
    """The segments of a response (token ids) for every axis: a list of Segment.

    A segment ends in the token that completes its last character. The whole response ends in its EOS, if it
    has one.
    """
    tokens = response[:-1] if response[-1] == tokenizer.eot_token else response
    text, ends = segments.decode_with_ends(tokenizer, tokens)  # ends: characters complete after each token
    cuts = []
    for start, end in segments.segments(text):  # sub-sentences
        cuts.append(Segment("relevance", segments.last_token(ends, end), start, end))
    for start, end in segments.sentences(text):
        cuts.append(Segment("factuality", segments.last_token(ends, end), start, end))
    cuts.append(Segment("completeness", len(response) - 1, 0, len(text)))
    return cuts


# ------------------------------------------------------------------------------------------- judging segments

class Mark(NamedTuple):
    """The last token of a segment: the response token at which a reward model is read.

    The label is for training. Relevance, factuality: 1 for a good segment, 0 for a bad one. Completeness: the
    response's rank, 0 for the best.
    """
    axis: str
    token: int  # counted from the start of its group's first response
    label: int = 0


@dataclass
class PackedMarks:
    """The marks of a packed batch, one after the other: (M,) each."""
    axis: torch.Tensor   # index into the axes of the reward model
    token: torch.Tensor  # counted over the N response tokens of the batch
    label: torch.Tensor
    group: torch.Tensor  # index into the batch's groups


def pack_marks(groups, marks, axes, device):
    """Packs groups (lists or arrays of ids) and each group's list of Marks -> Batch, PackedMarks."""
    rows = []  # one per mark: axis, token, label, group
    first = 0  # where the group's response tokens begin, among those of the batch
    for i, ((_, responses), group_marks) in enumerate(zip(groups, marks)):
        for mark in group_marks:
            rows.append((axes.index(mark.axis), first + mark.token, mark.label, i))
        first += sum(map(len, responses))
    table_of_marks = torch.tensor(rows, dtype=torch.long, device=device).view(-1, 4)  # (0, 4) without marks
    axis, token, label, group = table_of_marks.unbind(1)
    return pack(groups).to(device), PackedMarks(axis, token, label, group)


def judge(models, batch, packed_marks):
    """Each mark's score, from the head of its axis: (M,) float32.

    models: one with a head for each axis, or one for each axis. Either way, the heads are in the order of the
    axes.
    """
    # token_index (N,): where each response token stands among all tokens of the batch, prompts included. A
    # score is read at the segment's last token itself. (V(s_t), by contrast, is read one token earlier.)
    positions = batch.token_index[packed_marks.token]
    scores = [model.scalars(model.states(batch, positions)) for model in models]
    scores = torch.cat(scores, 1)  # (M, axes): every head scores every mark
    return scores.gather(1, packed_marks.axis[:, None])[:, 0]


@torch.no_grad()
def judge_all(models, groups, marks, axes, micro_tokens):
    """The scores of every group's marks, without gradient: a list of (len(marks[i]),) tensors on the CPU.

    Under torchrun, each process judges the groups that it is given.
    """
    scores = [None] * len(groups)
    # Lists of indices into groups, at most micro_tokens tokens each (a longer group goes alone). A sharded
    # model must run equally often in every process, so all processes get the same number of lists.
    for indices in all_micro_batches(groups, micro_tokens, models[0]):
        batch, packed_marks = pack_marks(
            [groups[i] for i in indices], [marks[i] for i in indices], axes, models[0].device)
        n_marks = [len(marks[i]) for i in indices]
        scores_of_groups = judge(models, batch, packed_marks).cpu().split(n_marks)
        for i, scores_of_group in zip(indices, scores_of_groups):
            scores[i] = scores_of_group
    return scores


# ------------------------------------------------------------------------------------- feedback to learn from

@dataclass
class Feedback:
    groups: list    # (prompt_ids, [response_ids, …])
    marks: list     # for each group a list of Mark
    clusters: list  # for each group, the cluster of its prompt: standard errors treat it as one sample


def load_feedback(data, split, axes, tokenizer, max_len, limit=None):
    """The feedback of a split: {"spans": Feedback, "comparisons": Feedback}, or only what `axes` need.

    limit: at most this many examples of each kind. An example longer than max_len loses the beginning of its
    prompt, and if that is not enough the end of its response, and with it the EOS. What is left of a response
    decodes to the beginning of the annotated text, so the spans' offsets stay valid. A span beyond the cut
    overlaps no segment, so a sentence that is cut before its error counts as good.
    """
    feedback = {}
    if "relevance" in axes or "factuality" in axes:
        examples = data.spans(split)[:limit]
        groups = encode_groups(tokenizer, [(prompt, [response]) for prompt, response, _ in examples], max_len)
        marks = [span_marks(tokenizer, group, spans, axes) for group, (_, _, spans) in zip(groups, examples)]
        clusters = clusters_of(data, [prompt for prompt, _, _ in examples])
        feedback["spans"] = Feedback(groups, marks, clusters)
    if "completeness" in axes:
        comparisons = data.completeness(split)[:limit]
        comparisons = [c for c in comparisons if len(set(c.ranks)) > 1]  # drop those whose responses all tie
        groups = encode_groups(tokenizer, [(c.prompt, c.responses) for c in comparisons], max_len)
        marks = [rank_marks(group, c.ranks) for group, c in zip(groups, comparisons)]
        clusters = clusters_of(data, [c.prompt for c in comparisons])
        feedback["comparisons"] = Feedback(groups, marks, clusters)
    return feedback


def span_marks(tokenizer, group, spans, axes):
    """The marks of a group with one response: a label for each segment of relevance and factuality."""
    _, (response,) = group
    marks = []
    for segment in cut_response(tokenizer, response.tolist()):
        if segment.axis == "completeness" or segment.axis not in axes:
            continue
        label = segment_label(segment, spans)
        if label is not None:
            marks.append(Mark(segment.axis, segment.token, label))
    return marks


def segment_label(segment, spans):
    """1 for a good segment, 0 if a span of its axis overlaps it, None if its label is unknown.

    Annotators did not judge the truth of what they had flagged as irrelevant, redundant or incoherent. So if
    spans overlap a sentence, and none of them is an error of factuality, its factuality is unknown (as in the
    code of arXiv:2306.01693). spans: [(start, end, category), …] in characters.
    """
    overlapping = [category for start, end, category in spans if start < segment.end and segment.start < end]
    if any(category in AXES[segment.axis] for category in overlapping):
        return 0
    if overlapping and segment.axis == "factuality":
        return None
    return 1


def rank_marks(group, ranks):
    """The marks of a comparison: the rank of each response, at its last token."""
    marks = []
    end = 0
    for response, rank in zip(group[1], ranks):
        end += len(response)
        marks.append(Mark("completeness", end - 1, rank))
    return marks


def check_feedback(feedback, axes, run):
    """Warns about an axis whose labels are all the same; exits if no comparison has a pair to learn from."""
    for axis in axes:
        if axis == "completeness":
            continue
        labels = set()
        for marks in feedback["spans"].marks:
            labels.update(mark.label for mark in marks if mark.axis == axis)
        if len(labels) < 2:
            every_or_no = "every" if labels == {0} else "no"  # label 0 is a flagged segment
            run.print0(f"{every_or_no} segment of {run.cfg.data} is flagged as {' or '.join(AXES[axis])}: "
                       f"the {axis} model has nothing to learn")
    if "comparisons" in feedback:
        # Prints how many pairs are the same tokens, as cut to max_len, so that no loss can order them. Exits
        # if all are.
        comparisons = feedback["comparisons"]
        ranks = [[mark.label for mark in marks] for marks in comparisons.marks]
        check_pairs(comparisons.groups, ranks, run.cfg.max_len, run.cfg.data)


# --------------------------------------------------------------------------------- training the reward models

def reward_losses(scores, packed_marks, axes):
    """The summed loss and the number of correct judgements of each axis: dicts. scores: (M,), one per mark.

    Relevance and factuality: the sum over segments of the cross-entropy of σ(score) with the label.
    Completeness: the sum over comparisons of the mean of −log σ(s_w − s_l) over the comparison's pairs.
    """
    losses, right = {}, {}
    for k, axis in enumerate(axes):
        of_axis = packed_marks.axis == k
        s = scores[of_axis]
        label = packed_marks.label[of_axis]
        if axis == "completeness":
            group = packed_marks.group[of_axis]
            # ranking_loss returns a mean over comparisons (0 if there are none): multiply it back to a sum.
            # Each comparison has a pair, since load_feedback left out those whose responses all tie.
            n_comparisons = len(group.unique())
            loss, accuracy = reward.ranking_loss(s, group, label)
            losses[axis] = n_comparisons * loss
            right[axis] = n_comparisons * accuracy
        else:
            losses[axis] = F.binary_cross_entropy_with_logits(s, label.float(), reduction="sum")
            right[axis] = ((s > 0) == (label == 1)).sum()
    return losses, right


def count_per_axis(marks, axes):
    """How many labelled segments each axis has, and for completeness how many comparisons.

    At least 1, for divisions: an axis without any has a loss of 0.
    """
    n_of_axis = dict.fromkeys(axes, 0)
    for group_marks in marks:
        for axis in axes:
            n_marks = sum(mark.axis == axis for mark in group_marks)
            if axis == "completeness":
                n_of_axis[axis] += 1 if n_marks else 0
            else:
                n_of_axis[axis] += n_marks
    return {axis: max(1, n) for axis, n in n_of_axis.items()}


def join_feedback(feedback, run):
    """Joins spans and comparisons: the groups of both, their marks, and what each step trains on.

    Returns groups, marks, and for each step a list of indices into them: batch_size responses with spans, and
    a quarter as many comparisons. A comparison has about four responses, so that is about as many responses.
    """
    cfg = run.cfg
    batch_sizes = {"spans": cfg.batch_size, "comparisons": cfg.batch_size // 4}
    groups, marks = [], []
    step_batches = [[] for _ in range(cfg.steps)]
    for kind, source in feedback.items():
        first = len(groups)  # where this source begins in groups
        seed = cfg.seed + first  # differs from source to source, so that their orders do too
        # For each step a list of indices into source.groups.
        batches_of_source = run.shuffled_batches(source.groups, batch_sizes[kind], cfg.steps, seed)
        for step in range(cfg.steps):
            step_batches[step] += [first + i for i in batches_of_source[step]]
        groups += source.groups
        marks += source.marks
    return groups, marks, step_batches


def train_rewards(cfg, init, axes):
    """Trains one reward model, which starts from `init` and has a head for each of `axes`.

    cfg is a reward.Config; the model is saved in cfg.out.
    """
    run = Run("rewards", cfg)
    data = run.data
    model, tokenizer = run.load_model(init)
    model.set_scalar_heads(len(axes))
    model = run.prepare(model)

    # Responses with annotated spans, for relevance and factuality, and comparisons, for completeness.
    feedback = load_feedback(data, "train", axes, tokenizer, cfg.max_len)
    check_feedback(feedback, axes, run)
    groups, marks, step_batches = join_feedback(feedback, run)
    sizes = ", ".join(f"{len(source.groups)} {kind}" for kind, source in feedback.items())
    run.print0(f"finegrained: {sizes} of {cfg.data}, {init} -> {run.out} on {run.device}")
    # Prints the first group's first response, with a | after each token at which it is judged, and warns if
    # the data look wrong.
    _, (response, *_) = groups[0]
    judged_tokens = [mark.token for mark in marks[0] if mark.token < len(response)]
    run.show_data(groups, loss_tokens=[judged_tokens])

    # β2 is 0.99, as in reward.py: the gradients are noisy.
    optimizer = make_optimizer(model, cfg.lr, cfg.weight_decay, betas=(0.9, 0.99))
    console = ["loss"] + [f"{axis}_accuracy" for axis in axes]  # the columns that the console shows
    run.start_or_resume(model, optimizer, console)

    for step in range(run.start, cfg.steps):
        metrics = Metrics()

        # The loss of an axis is a mean over its segments, or its comparisons, in the whole batch: count them.
        n_of_axis = count_per_axis([marks[i] for i in step_batches[step]], axes)

        # 1. The gradients of the micro-batches add up to the gradient of the batch. A micro-batch is a list
        # of indices into groups, at most cfg.micro_tokens tokens in total (a longer group goes alone). Under
        # torchrun, each process takes its own share of the batch. All processes get the same number of
        # micro-batches, none of them empty, because a sharded model's processes must run forward and backward
        # together.
        for indices in run.micro_batches(step_batches[step], groups):
            batch, packed_marks = pack_marks(
                [groups[i] for i in indices], [marks[i] for i in indices], axes, run.device)

            # Relevance, factuality: −log σ(±score) of each segment. Completeness: −log σ(s_w − s_l).
            scores = judge([model], batch, packed_marks)  # (M,)
            losses, right = reward_losses(scores, packed_marks, axes)
            loss = sum(losses[axis] / n_of_axis[axis] for axis in axes)
            loss.backward()
            metrics.add(loss=loss)
            metrics.add(**{f"{axis}_accuracy": right[axis] / n_of_axis[axis] for axis in axes})

        # 2. One optimizer step on the whole batch: add up the gradients of all processes, clip, step, clear.
        sync_gradients(model)
        lr = cfg.lr * run.lr_schedule(step)
        grad_norm = optimizer_step(model, optimizer, lr, cfg.grad_clip)

        # 3. Log the batch means: every term was already divided by its count in the whole batch, so the sums
        # over micro-batches and processes are means. Save a checkpoint when one is due; the last one is saved
        # below, with the normalizer.
        run.log(step + 1, **metrics.sum_over_processes(), lr=lr, grad_norm=grad_norm)
        if step + 1 < cfg.steps:
            run.save_if_due(step + 1, model, optimizer, axes=axes)

    # R_3 is normalized by the mean and standard deviation of its scores on the first center_n training
    # comparisons.
    mean, std = 0.0, 1.0
    if "completeness" in axes:
        mean, std = completeness_normalizer(model, feedback["comparisons"], axes, cfg)
    run.save(cfg.steps, model, optimizer, axes=axes, completeness_mean=mean, completeness_std=std)

    # The accuracy on held-out feedback.
    held_out = load_feedback(data, "validation", axes, tokenizer, cfg.max_len, cfg.eval_n)
    rows = accuracy_rows(model, axes, held_out, cfg)
    evaluate.save_rows(run, rows)
    run.print0(f"\nheld-out feedback\n\n{table(rows)}\n")


def completeness_normalizer(model, feedback, axes, cfg):
    """The mean and standard deviation of the completeness scores of some comparisons.

    The loss sees only differences of scores within a prompt, so the scores of every prompt may carry an
    offset of their own (reward.py's center_coef, which would pull it to 0, is not used here). Subtracting one
    mean leaves these offsets in place. In PPO they do little harm: an offset is the same for all responses to
    a prompt, so V(s) can learn it. But they raise the standard deviation that we divide by, and so shrink
    R_3.
    """
    groups = feedback.groups[:cfg.center_n]
    marks = feedback.marks[:cfg.center_n]
    scores = torch.cat(judge_all([model], groups, marks, axes, cfg.micro_tokens))
    return scores.mean().item(), scores.std().item()


# --------------------------------------------------------------------------------------------- their accuracy

def accuracy_rows(model, axes, feedback, cfg):
    """A row per axis: the accuracy, that of guessing without reading, and for segments the F1 on errors."""
    right = {axis: [] for axis in axes}     # is the judgement right? For a comparison, the share of its pairs
    clusters = {axis: [] for axis in axes}  # of the prompt
    labels = {axis: [] for axis in axes}    # True for a good segment
    guesses = {axis: [] for axis in axes}   # True where the model takes the segment for a good one

    # Judge all held-out feedback, and collect what came out for each axis.
    for kind, source in feedback.items():
        scores = judge_all([model], source.groups, source.marks, axes, cfg.micro_tokens)
        for group_marks, group_scores, cluster in zip(source.marks, scores, source.clusters):
            if kind == "comparisons":
                ranks = torch.tensor([mark.label for mark in group_marks])
                one_group = torch.zeros_like(ranks)
                _, accuracy = reward.ranking_loss(group_scores, one_group, ranks)
                right["completeness"].append(accuracy.item())
                clusters["completeness"].append(cluster)
                continue
            for mark, score in zip(group_marks, group_scores.tolist()):
                label = mark.label == 1
                guess = score > 0
                right[mark.axis].append(label == guess)
                clusters[mark.axis].append(cluster)
                labels[mark.axis].append(label)
                guesses[mark.axis].append(guess)

    # The table: a row for each axis, with its accuracy beside that of guessing without reading: the commoner
    # label, or one of two responses.
    rows = []
    for axis in axes:
        # The table's first column is called "checkpoint"; each number needs a column NAME_se beside it.
        row = {"checkpoint": axis, "majority": None, "majority_se": None, "f1": None, "f1_se": None}
        if axis == "completeness":
            row["majority"] = 0.5  # guessing which of two responses is better
        elif right[axis]:
            good = labels[axis].count(True) / len(labels[axis])
            row["majority"] = max(good, 1 - good)
            row["f1"] = f1_of_errors(labels[axis], guesses[axis])
        row["accuracy"], row["accuracy_se"] = mean_se(right[axis], clusters[axis])
        rows.append(row)
    return rows


def f1_of_errors(labels, guesses):
    """2 · caught / (errors + guessed errors); labels and guesses are True for good segments."""
    caught = sum(not label and not guess for label, guess in zip(labels, guesses))
    return 2 * caught / max(1, labels.count(False) + guesses.count(False))
