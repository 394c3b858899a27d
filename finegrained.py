"""Fine-Grained RLHF (Wu et al. 2023, arXiv:2306.01693): a reward for each span and each kind of error, in place of one number a response.

Three reward models, one a kind of error, each as dense as the error is local. With y cut into L_k segments by the k-th of them,
the reward at token t, which PPO sees before its KL penalty, is

    r_t = Σ_k Σ_j 1(t = T_j^k) · w_k · R_k(x, y, j)                                                                (§2)

T_j^k the last token of the j-th segment. R_1, relevance, judges sub-sentences and R_2, factuality, sentences, ±1 each; R_3,
completeness, judges the response and is the score of a model of comparisons, normalised. PPO is ppo.py's, untouched: here are
the segments, the reward models, and the function that lays their judgements on the (B, R) grid.

    python finegrained.py                            the animals world, from nothing, with the SFT and the reward models before it
    python finegrained.py --reward=rm                the baseline: the same PPO from one holistic reward model
    python finegrained.py qa_feedback --init=gpt2    the paper's questions and its feedback

Left out: the paper's filter of error spans shorter than five words (in its code for relevance alone), its reward models' separator
tokens (a causal model can be read at a segment's last token), a relevance model that sees no passages (its code's does not),
completeness labels from matching passages (data/qa_feedback.py says what stands in their place).
"""
import codecs
import json
import os
import re
from bisect import bisect_left
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import evaluate
import ppo
import reward
from common import (RANK, Log, Metrics, check_pairs, checkpoint_files, clip_and_step, configure, due, known, lr_schedule, level, load_checkpoint,
                    load_model, make_optimizer, open_run, parse, require, resume, run_dir, save_checkpoint, say, setup, shard, share,
                    sum_over_ranks, writing)
from data import batch_order, dataset, encode_groups, get_tokenizer, group_length, micro_batches, pack

AXES = {"relevance": ["Irrelevant", "Redundant", "Incoherent"], "factuality": ["Wrong-Grounding", "Unverifiable"], "completeness": []}
MIN_WORDS = 5


@dataclass
class Config(ppo.Config):
    init: str | None = None         # the policy, its reference and the reward models' start: a run's folder, gpt2[-medium|-large|-xl], a Hugging Face folder, scratch; None: the SFT model, trained first if missing
    out: str | None = None          # the run's folder; None: out/finegrained-RECIPE, with --reward=rm out/holistic-RECIPE
    data: str = "animals"           # animals, qa_feedback, or a file of its format, …_feedback.json
    reward: str = "finegrained"     # finegrained: spans; rm: one holistic reward model, the paper's baseline; gold: the true reward
    reward_models: str | None = None  # the folder of the three; None: out/rewards-…, trained first if missing
    share_trunk: bool = True        # three heads on one trunk; False: three models
    value_init: str = "sft"         # what the value model starts from: sft, or with --reward=rm reward
    kl_coef: float = 0.1            # β: the price of a nat of KL; where kl_target is set, its first value
    w1: float = 0.3                 # weight of relevance, ±w1 for each sub-sentence
    w2: float = 0.3                 # weight of factuality, ±w2 for each sentence
    w3: float = 0.3                 # weight of completeness, in standard deviations of its model's scores
    soft: bool = False              # segments are worth 2p − 1, p the probability that they are good, in place of ±1
    reward_steps: int = 2000        # optimizer steps of the reward models
    reward_batch_size: int = 64     # responses with spans a step of theirs; comparisons are a quarter as many
    reward_lr: float = 2e-3         # peak learning rate of theirs


RECIPES = {
    "qa_feedback": dict(data="qa_feedback", w1=0.3, w2=0.5, w3=0.3, kl_coef=0.3, max_new_tokens=200, steps=500, batch_size=64, max_len=1024,
                        lr=3e-6, value_lr=1e-5, warmup=10, ckpt_every=50, eval_n=64, reward_steps=700, reward_lr=1e-5),
}


# ------------------------------------------------------------------------------------------------ segments

def sentences(text):
    """[(start, end), …] in characters: every character that is no space lies in one, none begins or ends with a space.

    A sentence ends at a line's end, or at . ! ? with what closes after it, where a space and no small letter follow; not after an
    initial ("J. Smith") or a title.
    """
    spans = []
    for line in re.finditer(r"\S[^\n]*", text):
        start = line.start()
        for stop in re.finditer(r"(\S*[.!?][\"'”’)\]]*)\s+(?=[^\sa-z])", line[0]):
            if not re.fullmatch(r"[\"'“(\[]*([A-Z]|Mr|Mrs|Ms|Dr|St|Jr|Sr|No|vs)\.", stop[1]):
                spans.append((start, line.start() + stop.end(1)))
                start = line.start() + stop.end()
        if text[start:line.end()].strip():
            spans.append((start, start + len(text[start:line.end()].rstrip())))
    return spans


def segments(text):
    """[(start, end), …] in characters: sentences cut after , ; ! ? into sub-sentences, as in the code of arXiv:2306.01693.

    Of a sentence, a first piece of fewer than MIN_WORDS words joins the next, a later one the one before it, and the last has more.
    """
    spans = []
    for start, end in sentences(text):
        words = [(start + m.start(), start + m.end()) for m in re.finditer(r"\S+", text[start:end])]
        begins = [0]  # the word that each piece begins with
        for i in range(1, len(words) - MIN_WORDS):
            if text[words[i - 1][1] - 1] in ",;!?":
                if i - begins[-1] >= MIN_WORDS:
                    begins.append(i)
                elif len(begins) > 1:
                    begins[-1] = i
        spans += [(words[a][0], words[b - 1][1]) for a, b in zip(begins, [*begins[1:], len(words)])]
    return spans


def spell(tokenizer, tokens):
    """The text of some tokens, and for each of them how many of its characters are complete where the token ends."""
    decoder, text, ends = codecs.getincrementaldecoder("utf-8")("replace"), "", []
    for token in tokens:
        text += decoder.decode(tokenizer.decode_single_token_bytes(token))
        ends.append(len(text))
    text += decoder.decode(b"", final=True)
    return text, ends[:-1] + [len(text)] * bool(ends)


def segment_ends(tokenizer, response):
    """Where a response, a list of ids, is judged: [(axis, index of the last token, start, end), …], axis by axis.

    A segment's last token is the one that completes its last character; the response's is its EOS, where it has one.
    """
    words = response[:-1] if response[-1] == tokenizer.eot_token else response
    text, ends = spell(tokenizer, words)
    cuts = [("relevance", s) for s in segments(text)] + [("factuality", s) for s in sentences(text)]
    return [(axis, bisect_left(ends, end), start, end) for axis, (start, end) in cuts] + [("completeness", len(response) - 1, 0, len(text))]


def label(axis, start, end, spans):
    """1 for a good segment, 0 for one that a span of the axis overlaps; None, where only spans of another kind do and the axis is
    factuality: nobody asked whether what is beside the point is true (the code of arXiv:2306.01693 does likewise)."""
    kinds = [kind for s, e, kind in spans if s < end and start < e]
    if any(kind in AXES[axis] for kind in kinds):
        return 0
    return None if kinds and axis == "factuality" else 1


# ------------------------------------------------------------------------------------------------ reward models

def judge(models, batch, places):
    """The heads of some reward models at `places`, indices into the packed batch's response tokens: (M,) -> (M, heads) float32."""
    return torch.cat([model.scalars(model.states(batch, batch.at[places])) for model in models], 1)


def pack_marks(groups, marks, rows, device):
    """The packed batch of some groups, and their marks side by side -> Batch; axis, place, value (M,) and the mark's row, (M,)"""
    table, begin = [], 0
    for n, i in enumerate(rows):
        table += [(axis, begin + token, value, n) for axis, token, value in marks[i]]
        begin += sum(map(len, groups[i][1]))
    return pack([groups[i] for i in rows]).to(device), *torch.tensor(table, dtype=torch.long, device=device).view(-1, 4).unbind(1)


@torch.no_grad()
def judgements(models, groups, marks, micro_tokens, amp):
    """Every mark judged by the head of its axis, micro-batch by micro-batch: yields the rows, then axis, value, row and score, (M,) each."""
    for rows in level(micro_batches(range(len(groups)), list(map(group_length, groups)), micro_tokens), models[0]):
        batch, axis, place, value, row = pack_marks(groups, marks, rows, models[0].device)
        with amp:
            scores = judge(models, batch, place).gather(1, axis[:, None])[:, 0]
        yield rows, axis, value, row, scores


def reward_losses(scores, axis, value, row, axes):
    """The losses that reward models learn by, each of `axes` a sum over what it is about, and how often each was right.

    scores (M, len(axes)); axis (M,) indices into axes; value (M,). Relevance and factuality: cross-entropy of σ(score) with value, 1 good
    and 0 bad, over segments. Completeness: −log σ(r_w − r_l), value a response's rank and row (M,) its comparison, over comparisons.
    """
    losses, hits = {}, {}
    for k, name in enumerate(axes):
        s, v = scores[axis == k, k], value[axis == k]
        if name == "completeness":
            n = len(row[axis == k].unique())
            losses[name], hits[name] = (n * x for x in reward.ranking_loss(s, row[axis == k], v))
        else:
            losses[name], hits[name] = F.binary_cross_entropy_with_logits(s, v.float(), reduction="sum"), ((s > 0) == (v == 1)).sum()
    return losses, hits


def examples(data, split, axes, tokenizer, max_len, most=None):
    """What `axes` learn from: {"spans": (groups, marks), "comparisons": (groups, marks)}, as far as some axis needs them.

    marks: for each group [(index into axes, token among the group's response tokens, value), …], value as in reward_losses.
    """
    sources = {}
    if {"relevance", "factuality"} & set(axes):
        marked = data.spans(split)[:most]
        groups, marks = encode_groups(tokenizer, [(prompt, [response]) for prompt, response, _ in marked], max_len), []
        for (_, (response,)), (_, _, spans) in zip(groups, marked):
            labels = [(axis, token, label(axis, start, end, spans)) for axis, token, start, end in segment_ends(tokenizer, response.tolist())
                      if axis in axes and axis != "completeness"]
            marks.append([(axes.index(axis), token, value) for axis, token, value in labels if value is not None])
        sources["spans"] = groups, marks
    if "completeness" in axes:
        groups = encode_groups(tokenizer, data.completeness(split)[:most], max_len)
        ends = [torch.tensor([len(r) for r in responses]).cumsum(0).tolist() for _, responses in groups]
        sources["comparisons"] = groups, [[(axes.index("completeness"), end - 1, rank) for rank, end in enumerate(each)] for each in ends]
    return sources


def check_labels(sources, axes, cfg):
    """Says of which axis all labels are alike: its head can learn no more than that. And what check_pairs does."""
    for k, name in enumerate(axes):
        if name != "completeness":
            values = {value for marks in sources["spans"][1] for axis, _, value in marks if axis == k}
            if len(values) < 2:
                say(f"{'every' if values == {0} else 'no'} segment of {cfg.data} is marked {' or '.join(AXES[name])}: "
                    f"the {name} of all text will be judged alike")
    if "comparisons" in sources:
        check_pairs(sources["comparisons"][0], cfg)


def measure(model, axes, sources, cfg, amp):
    """A row an axis: accuracy; majority, the accuracy of the commoner answer (of a coin, between two responses); F1 of the errors."""
    right, true, guess = ({name: [] for name in axes} for _ in range(3))
    for groups, marks in sources.values():
        for _, axis, value, row, scores in judgements([model], groups, marks, cfg.micro_tokens, amp):
            for k, name in enumerate(axes):
                s, v, which = (x[axis == k] for x in (scores, value, row))
                if name == "completeness":
                    right[name] += [reward.ranking_loss(s[which == n], which[which == n], v[which == n])[1].item() for n in which.unique()]
                else:
                    true[name] += (v == 1).tolist()
                    guess[name] += (s > 0).tolist()
    rows = []
    for name in axes:
        row = {"checkpoint": name, "majority": 0.5 if name == "completeness" else None, "majority_se": None, "f1": None, "f1_se": None}
        if true[name]:
            right[name] = [t == g for t, g in zip(true[name], guess[name])]
            good, errors, called = sum(true[name]) / len(true[name]), true[name].count(False), guess[name].count(False)
            caught = sum(not t and not g for t, g in zip(true[name], guess[name]))
            row |= {"majority": max(good, 1 - good), "f1": 2 * caught / max(1, errors + called)}
        row["accuracy"], row["accuracy_se"] = evaluate.mean_se(right[name])
        rows.append(row)
    return rows


def train_rewards(cfg, init, axes):
    """Trains one reward model with a head for each of `axes`, from `init`, into cfg.out; cfg is a reward.Config."""
    open_run(cfg.out)
    device, amp = setup(cfg)
    data = dataset(cfg.data, cfg.data_dir)
    model, tokenizer_name = load_model(init, cfg)
    model.set_scalar_heads(len(axes))
    model, tokenizer = shard(model, cfg, device), get_tokenizer(tokenizer_name)
    sources = examples(data, "train", axes, tokenizer, cfg.max_len)
    check_labels(sources, axes, cfg)
    groups, marks = (sum(lists, []) for lists in zip(*sources.values()))  # one list, the sources one after the other
    lengths, order, first = list(map(group_length, groups)), [[] for _ in range(cfg.steps)], 0
    sizes = {"spans": cfg.batch_size, "comparisons": cfg.batch_size // 4}
    for kind, (source, _) in sources.items():
        for rows, more in zip(order, batch_order(len(source), sizes[kind], cfg.steps, cfg.seed + first)):
            rows += [first + i for i in more]
        first += len(source)
    say(f"finegrained: {', '.join(f'{len(source)} {kind}' for kind, (source, _) in sources.items())} of {cfg.data}, {init} -> {cfg.out} on {device}")

    optimizer = make_optimizer(model, cfg.lr, cfg.weight_decay, (0.9, 0.99))
    start = resume(cfg.out, cfg, model, optimizer)["step"] if cfg.resume else 0
    log = Log(cfg.out, cfg, start)
    configure(model, cfg)
    for step in range(start, cfg.steps):
        n = {name: max(1, sum(mark[0] == k for i in order[step] for mark in marks[i])) for k, name in enumerate(axes)}
        n |= {"completeness": sizes["comparisons"]}
        stats, metrics = {"tokens": 0}, Metrics()
        for micro in level(micro_batches(share(order[step]), lengths, cfg.micro_tokens), model):
            batch, *table = pack_marks(groups, marks, micro, device)
            with amp:
                scores = judge([model], batch, table[1])
            losses, hits = reward_losses(scores, table[0], table[2], table[3], axes)
            loss = sum(losses[name] / n[name] for name in axes)
            loss.backward()
            metrics.add(loss=loss, **{f"{name}_accuracy": hits[name] / n[name] for name in axes})
            stats["tokens"] += sum(lengths[i] for i in micro)
        stats, lr = metrics.mean(1) | sum_over_ranks(model, stats), cfg.lr * lr_schedule(step, cfg)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr
        grad_norm = clip_and_step(model, optimizer, cfg)
        log(step + 1, **stats, lr=lr, grad_norm=grad_norm)
        if due(step + 1, cfg) and step + 1 < cfg.steps:
            save_checkpoint(cfg.out, step + 1, model, optimizer, cfg, tokenizer_name, axes=axes)

    norm = normaliser(model, sources["comparisons"], cfg, amp) if "completeness" in axes else (0.0, 1.0)
    save_checkpoint(cfg.out, cfg.steps, model, optimizer, cfg, tokenizer_name, axes=axes, completeness_mean=norm[0], completeness_std=norm[1])
    rows = measure(model, axes, examples(data, "validation", axes, tokenizer, cfg.max_len, cfg.eval_n), cfg, amp)
    if RANK == 0:
        with writing(os.path.join(cfg.out, "eval.json")) as f:
            json.dump(rows, f, indent=2)
        say(f"\nheld-out feedback\n\n{evaluate.table(rows)}\n")


def normaliser(model, source, cfg, amp):
    """Mean and standard deviation of the completeness head on (at most eval_n of) the comparisons it learned from."""
    groups, marks = (x[:max(2, cfg.eval_n)] for x in source)
    scores = torch.cat([scores for *_, scores in judgements([model], groups, marks, cfg.micro_tokens, amp)])
    return scores.mean().item(), scores.std().item()


def load_rewards(cfg, init, tokenizer_name):
    """The reward models, trained first where they are missing -> models and their axes, in one order; completeness' mean and std."""
    out = cfg.reward_models or run_dir("rewards", cfg)
    parts = {out: list(AXES)} if cfg.share_trunk else {os.path.join(out, name): [name] for name in AXES}
    settings = {"recipe": cfg.recipe, **reward.RECIPES.get(cfg.recipe, {}), "steps": cfg.reward_steps, "batch_size": cfg.reward_batch_size, "lr": cfg.reward_lr}
    settings |= {k: getattr(cfg, k) for k in ("data", "data_dir", "device", "compile", "checkpoint_blocks", "fsdp", "max_len", "micro_tokens", "n_layer", "n_head", "n_embd")}
    models, axes, norm = [], [], (0.0, 1.0)
    for part, names in parts.items():
        checkpoint = load_checkpoint(part) if checkpoint_files(part) else None
        if checkpoint and checkpoint.get("axes") != names:
            raise SystemExit(f"{part}: not a reward model for {', '.join(names)} (finegrained.py makes one)")
        if not checkpoint or checkpoint["step"] < checkpoint["config"]["steps"]:
            say(f"no reward model for {', '.join(names)} in {part}: training it first")
            train_rewards(reward.Config(**settings, out=part, resume=bool(checkpoint)), init, names)
            checkpoint = load_checkpoint(part)
        model, its_tokenizer = load_model(part, cfg)
        if its_tokenizer != tokenizer_name:
            raise SystemExit(f"{part}: this reward model reads the tokenizer {its_tokenizer}, the policy {init} writes {tokenizer_name}")
        models.append(model.requires_grad_(False))
        axes += names
        if "completeness" in names:
            norm = checkpoint["completeness_mean"], checkpoint["completeness_std"]
    return models, axes, norm


# ------------------------------------------------------------------------------------------------ the reward

def finegrained_reward(models, axes, norm, tokenizer, cfg, amp):
    """A reward_fn for ppo.train: r_t of §2 on the (B, R) grid, each judgement on its segment's last token, summed where they coincide."""
    weights, (mean, std) = dict(zip(AXES, (cfg.w1, cfg.w2, cfg.w3))), norm

    def worth(name, score):
        if name == "completeness":
            return (score - mean) / std
        return 2 * score.sigmoid() - 1 if cfg.soft else score.sign()

    def reward_fn(prompts, responses):
        groups = [(p, [r]) for p, r in zip(prompts, responses)]
        marks = [[(axes.index(axis), token, 0) for axis, token, _, _ in segment_ends(tokenizer, r) if weights[axis]] for r in responses]
        rewards = torch.zeros(ppo.length_mask(responses).shape)
        for rows, axis, _, _, scores in judgements(models, groups, marks, cfg.micro_tokens, amp):
            where = [(i, token) for i in rows for _, token, _ in marks[i]]
            for (i, token), k, score in zip(where, axis.tolist(), scores.cpu()):
                rewards[i, token] += weights[axes[k]] * worth(axes[k], score)
        return rewards
    return reward_fn


def train(cfg):
    """Runs the stage, building its SFT and reward models first where they are missing; returns the trained policy."""
    known("reward", cfg.reward, ["finegrained", "rm", "gold"])
    if cfg.reward != "finegrained":
        return ppo.train(replace(cfg, out=cfg.out or run_dir({"rm": "holistic"}.get(cfg.reward, cfg.reward), cfg)))
    data = dataset(cfg.data, cfg.data_dir)
    if not hasattr(data, "spans"):
        raise SystemExit(f"--data={cfg.data}: holds no span feedback")
    ppo.check(cfg, data, finegrained_reward)
    out = cfg.out or run_dir("finegrained", cfg)
    open_run(out)
    cfg = replace(cfg, init=require("sft", cfg, cfg.init), out=out)
    device, amp = setup(cfg)
    tokenizer_name = load_model(cfg.init, cfg)[1]
    models, axes, norm = load_rewards(cfg, cfg.init, tokenizer_name)
    models = [shard(model, cfg, device) for model in models]
    return ppo.train(cfg, finegrained_reward(models, axes, norm, get_tokenizer(tokenizer_name), cfg, amp))


if __name__ == "__main__":
    train(parse(Config, RECIPES))
