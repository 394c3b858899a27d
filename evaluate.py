"""Compares models on held-out prompts: a row a checkpoint, the first one the reference for KL and win rate.

    python evaluate.py out/sft-animals out/dpo-animals
    python evaluate.py out/dpo-animals --prompt="Tell me about the owl: what it eats and how it moves."

Every model answers the same prompts at temperature 1. Columns, each a mean over prompts with its standard error:

    gold           the true reward (animals) and its axes relevance, factuality, completeness
    kl             KL(π‖π_ref) of a response in nats: at each position exact over the vocabulary, summed over the response
    win_rate       how often gold is above the reference model's on the same prompt, a tie counting one half
    length         tokens of a response, the EOS included
    eos_rate       the share of responses that ended by themselves
    grammar        the share of the sentences that are sentences of the world (animals)
    score          a reward model's score, where there is a reward model

gold, win_rate and grammar are left empty for data whose true reward nobody knows.
"""
import argparse
import json
import math
import os

import torch

from common import RANK, load_checkpoint, load_model, say, score_groups
from data import dataset, encode_prompts, get_tokenizer, pack, per_sequence
from model import PRETRAINED

KEYS = ["gold", "relevance", "factuality", "completeness", "kl", "win_rate", "length", "eos_rate", "grammar", "score"]
MAX_NEW_TOKENS = 128


@torch.no_grad()
def respond(model, prompts, eos, seed=0, max_new_tokens=MAX_NEW_TOKENS, temperature=1.0):
    """prompts: lists of ids -> sampled responses, lists of ids; the caller's random state is left alone."""
    config, responses = model.config, []
    batch_size = max(1, 2**28 // (config.n_layer * config.n_embd * config.block_size))  # a KV cache of 2 GiB at most
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for i in range(0, len(prompts), batch_size):
            part = prompts[i:i + batch_size]
            room = config.block_size - max(map(len, part))
            responses += model.generate(part, min(max_new_tokens, room), temperature, eos=eos)
    return responses


@torch.no_grad()
def exact_kl(policy, ref_policy, prompts, responses, batch_size=64):
    """Σ_t KL(π(·|x, y_<t) ‖ π_ref(·|x, y_<t)) over each response, in nats -> (len(prompts),)"""
    result = []
    for i in range(0, len(prompts), batch_size):
        groups = [(p, [r]) for p, r in zip(prompts[i:i + batch_size], responses[i:i + batch_size])]
        batch = pack(groups, max(len(p) + len(r) for p, (r,) in groups)).to(policy.device)
        kl = []
        for states, ref_states in zip(policy.states(batch).split(512), ref_policy.states(batch).split(512)):
            logp, ref_logp = policy.log_softmax(states), ref_policy.log_softmax(ref_states)
            kl.append((logp.exp() * (logp - ref_logp)).sum(-1))
        result.append(per_sequence(torch.cat(kl), batch))
    return torch.cat(result).cpu()


def measure(name, policy, ref_policy, prompts, data, tokenizer, ref_gold=None, reward_model=None):
    """One row of the table, the responses as text, and the gold of each (None without a gold reward)."""
    ids = fit_prompts(prompts, policy, tokenizer)
    responses = respond(policy, ids, tokenizer.eot_token)
    ended = [r[-1] == tokenizer.eot_token for r in responses]
    texts = [tokenizer.decode(r[:-1] if end else r) for r, end in zip(responses, ended)]
    columns = {"kl": exact_kl(policy, ref_policy, ids, responses).tolist(), "length": list(map(len, responses)), "eos_rate": ended}
    if reward_model:
        columns["score"] = score_groups(reward_model, [(p, [r]) for p, r in zip(ids, responses)]).tolist()
    gold = None
    if hasattr(data, "gold"):
        axes = [data.axes(p, t) for p, t in zip(prompts, texts)]
        columns |= {axis: [a[axis] for a in axes] for axis in axes[0]}
        columns["gold"] = gold = [data.gold(p, t) for p, t in zip(prompts, texts)]
        columns["win_rate"] = [0.5 + 0.5 * ((g > r) - (g < r)) for g, r in zip(gold, ref_gold or gold)]
        grammatical = [data.grammatical(t) for t in texts]
        columns["grammar"] = [good / said for good, said in grammatical if said]
    row = {"checkpoint": name}
    for key in KEYS:
        row[key], row[key + "_se"] = mean_se(columns.get(key))
    return row, texts, gold


def fit_prompts(prompts, model, tokenizer):
    """Token ids, the beginning cut where a prompt would take more than half of the context."""
    return [ids[-model.config.block_size // 2:].tolist() for ids in encode_prompts(tokenizer, prompts)]


def mean_se(x):
    """Mean and its standard error s/√n; (None, None) for nothing."""
    if not x:
        return None, None
    x = torch.tensor(x, dtype=torch.float64)
    return x.mean().item(), (x.std().item() / math.sqrt(len(x)) if len(x) > 1 else None)


def compare(models, data, tokenizer, n, reward_model=None):
    """models: [(name, GPT), …], the first the reference -> the rows of the table, the prompts, the texts of each model."""
    prompts = data.prompts("test")[:n]
    rows, texts, ref_gold = [], [], None
    for name, model in models:
        row, text, gold = measure(name, model, models[0][1], prompts, data, tokenizer, ref_gold, reward_model)
        ref_gold = ref_gold or gold
        rows.append(row)
        texts.append(text)
    return rows, prompts, texts


def table(rows):
    """The rows as aligned text, mean±se, columns without a value left out."""
    keys = [key for key in rows[0] if key + "_se" in rows[0] and any(row[key] is not None for row in rows)]
    cells = [["", *keys]] + [[row["checkpoint"], *(cell(row[key], row[key + "_se"]) for key in keys)] for row in rows]
    width = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, width))) for line in cells)


def cell(mean, se):
    return "" if mean is None else f"{mean:.3f}" + ("" if se is None else f"±{se:.3f}")


def samples(models, prompts, texts, k=3):
    """The first k prompts with every model's answer."""
    width = max(len(name) for name, _ in models)
    lines = []
    for i, prompt in enumerate(prompts[:k]):
        lines.append("\n" + printable(prompt))
        lines += [f"  {name.rjust(width)} | {printable(text[i])}" for (name, _), text in zip(models, texts)]
    return "\n".join(lines)


def printable(text, most=400):
    """On one line, without control characters, its beginning left out where it is long."""
    text = "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))
    return text if len(text) <= most else "… " + text[-most:]


def report(out, cfg, models, data, tokenizer, reward_model=None):
    """What every stage ends with: before and after, in OUT/eval.json and on the console, with three samples."""
    if RANK != 0 or not cfg.eval_n:
        return
    models = [(name, model.to(models[-1][1].device)) for name, model in models]
    rows, prompts, texts = compare(models, data, tokenizer, cfg.eval_n, reward_model)
    if not prompts:
        return say("no held-out prompts: nothing to evaluate")
    with open(os.path.join(out, "eval.json"), "w") as f:
        json.dump(rows, f, indent=2)
    say(f"\n{len(prompts)} held-out prompts, mean±standard error\n\n{table(rows)}\n{samples(models, prompts, texts)}")


def main(argv=None):
    """The command line at the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="a run's folder, a ckpt.pt, a Hugging Face folder, or gpt2 …")
    parser.add_argument("--n", type=int, default=500, help="prompts (default 500)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--prompt", metavar="TEXT", help="print each model's answer to TEXT, and nothing else")
    parser.add_argument("--reward_model", metavar="RUN", help="for the column score; default: the one that a checkpoint here was trained against")
    parser.add_argument("--data", help="default: what the first checkpoint was trained on")
    parser.add_argument("--data_dir", help="likewise")
    args = parser.parse_args(argv)

    models, tokenizers, config = [], [], {}
    for name in args.checkpoints:
        model, tokenizer = load_model(name)
        models.append((name, model.to("cuda" if torch.cuda.is_available() else "cpu")))
        tokenizers.append(tokenizer)
        if name not in PRETRAINED and not os.path.exists(os.path.join(name, "config.json")):
            checkpoint = load_checkpoint(name)
            if "score_std" in checkpoint:
                raise SystemExit(f"{name}: a reward model writes no text; name it as --reward_model")
            config = config or checkpoint["config"]
            args.reward_model = args.reward_model or checkpoint["config"].get("reward_model")
    if len(set(tokenizers)) > 1:
        raise SystemExit("these models speak different tokenizers: " + ", ".join(f"{n} {t}" for n, t in zip(args.checkpoints, tokenizers)))
    tokenizer = get_tokenizer(tokenizers[0])
    if args.prompt is not None:
        for name, model in models:
            ids, = fit_prompts([args.prompt], model, tokenizer)
            response, = respond(model, [ids], tokenizer.eot_token, seed=torch.seed() % 2**32)
            print(f"{name}: {tokenizer.decode([t for t in response if t != tokenizer.eot_token]).strip()}")
        return
    reward_model = None
    if args.reward_model:
        reward_model, its_tokenizer = load_model(args.reward_model)
        if its_tokenizer != tokenizers[0] or reward_model.config.n_scalars != 1:
            raise SystemExit(f"{args.reward_model}: not a reward model for the tokenizer {tokenizers[0]}")
        reward_model.to(models[0][1].device)
    data = dataset(args.data or config.get("data", "animals"), args.data_dir or config.get("data_dir", "data/files"))
    rows, prompts, texts = compare(models, data, tokenizer, args.n, reward_model)
    print(f"{len(prompts)} held-out prompts, mean±standard error\n\n{table(rows)}\n{samples(models, prompts, texts)}")
    if args.json:
        with open(args.json, "w") as f:
            json.dump(rows, f, indent=2)


if __name__ == "__main__":
    main()
