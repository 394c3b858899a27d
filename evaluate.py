"""Compares models on held-out prompts: a row a checkpoint, the first one the reference for KL and win rate.

    python evaluate.py out/sft-animals out/dpo-animals
    python evaluate.py out/dpo-animals --prompt="Tell me about the owl: what it eats and how it moves."
    python evaluate.py out/sft-animals out/dpo-animals out/ppo-animals --frontier --plot=frontier.png
    python evaluate.py out/ppo-animals --overoptimization --plot=overoptimization.png
    python evaluate.py out/sft-animals out/ppo-seed0 out/ppo-seed1 out/ppo-seed2 --mean
    python evaluate.py --curves out/sft-animals out/dpo-animals out/ppo-animals --plot=curves.png
    python evaluate.py out/dpo-animals --export=dpo-for-transformers

Every model answers the same prompts at temperature 1. Columns, each a mean over prompts with its standard error:

    gold           the true reward (animals) and its axes relevance, factuality, completeness
    kl             KL(π‖π_ref) of a response in nats: at each position exact over the vocabulary, summed over the response
    win_rate       how often gold is above the reference model's on the same prompt, a tie counting one half
    length         tokens of a response, the EOS included
    eos_rate       the share of responses that ended by themselves
    grammar        the share of the sentences that are sentences of the world (animals)
    score          a reward model's score, where there is a reward model

gold, win_rate and grammar are left empty for data whose true reward nobody knows.

--frontier: max E[r] − β KL(π‖π_ref) has the optimum π*(y|x) ∝ π_ref(y|x) exp(r(x, y)/β), so the most reward that any method can reach
at each KL follows from samples of the first checkpoint, π_ref. Three numbers more:

    gap            reward of π* at the checkpoint's KL, less the checkpoint's: β KL(π‖π*), at the β where the two KLs are equal
    beta           the price of KL whose optimum a row of the frontier is
    ess            effective sample size of that row: of n samples, as many as count. Rows below MIN_ESS are cut off

--overoptimization: reward-model score and true reward along a run of ppo.py against √KL (Gao et al. 2022, arXiv:2210.10760).
"""
import argparse
import json
import math
import os

import torch
import torch.nn.functional as F

from common import RANK, load_checkpoint, load_model, say, score_groups, whole, writing
from data import dataset, encode_prompts, get_tokenizer, pack, per_sequence
from model import PRETRAINED

KEYS = ["gold", "relevance", "factuality", "completeness", "kl", "win_rate", "length", "eos_rate", "grammar", "score"]
CURVES = ["loss", "val_loss", "accuracy", "val_accuracy", "margin", "chosen_logp rejected_logp", "chosen_reward rejected_reward", "score",
          "gold", "reward", "kl", "kl_coef", "entropy", "clip_frac", "approx_kl", "policy_loss", "value_loss", "explained_variance", "response_len",
          "lr", "grad_norm"]
MAX_NEW_TOKENS = 128
MIN_ESS = 8  # below, log E exp(r/β) from samples falls short of the true one by more than about 1/(2 · 8)


@torch.no_grad()
def respond(model, prompts, eos, seed=0, max_new_tokens=MAX_NEW_TOKENS, temperature=1.0):
    """prompts: lists of ids -> sampled responses, lists of ids; the caller's random state is left alone."""
    config, responses = model.config, []
    longest = min(config.block_size, max(map(len, prompts), default=0) + max_new_tokens)
    batch_size = max(1, 2**28 // (config.n_layer * config.n_embd * longest))  # a KV cache of 2 GiB at most
    with torch.random.fork_rng(devices=[]):
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
        batch = pack(groups).to(policy.device)
        kl = []
        for states, ref_states in zip(policy.states(batch).split(512), ref_policy.states(batch).split(512)):
            logp, ref_logp = policy.log_softmax(states), ref_policy.log_softmax(ref_states)
            kl.append((logp.exp() * (logp - ref_logp)).sum(-1))
        result.append(per_sequence(torch.cat(kl), batch))
    return torch.cat(result).cpu()


def measure(name, policy, ref_policy, prompts, data, tokenizer, ref_gold=None, reward_model=None):
    """One row of the table, the responses as text, and the row's columns: a list of numbers, one a prompt, under each key."""
    ids = fit_prompts(prompts, policy, tokenizer)
    responses = respond(policy, ids, tokenizer.eot_token)
    ended = [r[-1] == tokenizer.eot_token for r in responses]
    texts = [tokenizer.decode(r[:-1] if end else r) for r, end in zip(responses, ended)]
    columns = {"kl": exact_kl(policy, ref_policy, ids, responses).tolist(), "length": list(map(len, responses)), "eos_rate": ended}
    if reward_model:
        columns["score"] = score_groups(reward_model, [(p, [r]) for p, r in zip(ids, responses)]).tolist()
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
    return row, texts, columns


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
    """models: [(name, GPT), …], the first the reference -> the rows of the table, the prompts, the texts and columns of each model."""
    prompts = data.prompts("test")[:n]
    cut = sum(len(ids) > models[0][1].config.block_size // 2 for ids in encode_prompts(tokenizer, prompts))
    if cut:
        say(f"{cut} of {len(prompts)} prompts lost their beginning: they take more than half of the context")
    rows, texts, columns = [], [], []
    for name, model in models:
        ref_gold = columns[0].get("gold") if columns else None
        row, text, column = measure(name, model, models[0][1], prompts, data, tokenizer, ref_gold, reward_model)
        rows.append(row)
        texts.append(text)
        columns.append(column)
    return rows, prompts, texts, columns


def table(rows):
    """The rows as aligned text, mean±se, columns without a value left out."""
    keys = [key for key in rows[0] if key + "_se" in rows[0] and any(row[key] is not None for row in rows)]
    cells = [["", *keys]] + [[row["checkpoint"], *(cell(row[key], row[key + "_se"]) for key in keys)] for row in rows]
    return aligned(cells)


def aligned(cells):
    """Lines of cells as text, the first column to the left, the others to the right."""
    width = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, width))) for line in cells)


def cell(mean, se):
    return "" if mean is None else f"{mean:.3f}" + ("" if se is None else f"±{se:.3f}")


def mean_row(rows):
    """The mean of some rows, runs of one method from different seeds, and its standard error over them."""
    row = {"checkpoint": f"mean of {len(rows)}"}
    for key in KEYS:
        row[key], row[key + "_se"] = mean_se([r[key] for r in rows if r[key] is not None])
    return row


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
    if not cfg.eval_n:
        return
    models, reward_model = [(name, whole(model)) for name, model in models], reward_model and whole(reward_model)
    if RANK != 0:
        return
    models = [(name, model.to(models[-1][1].device)) for name, model in models]
    rows, prompts, texts, _ = compare(models, data, tokenizer, cfg.eval_n, reward_model)
    if not prompts:
        return say("no held-out prompts: nothing to evaluate")
    with writing(os.path.join(out, "eval.json")) as f:
        json.dump(rows, f, indent=2)
    say(f"\n{len(prompts)} held-out prompts, mean±standard error\n\n{table(rows)}\n{samples(models, prompts, texts)}")


# ------------------------------------------------------------------------------------------------ the frontier

def tilt(rewards, beta):
    """The optimum π* ∝ π_ref exp(r/β) from n samples of π_ref a prompt, self-normalised: weights w ∝ exp(r/β). rewards (P, n).

    -> E_π*[r], KL(π*‖π_ref) = E_π*[r]/β − log Z in nats, β log Z = β log E_ref[exp(r/β)], effective sample size 1/Σw²: (P,) each.
    """
    w = (rewards / beta).softmax(1)
    reward, log_z = (w * rewards).sum(1), (rewards / beta).logsumexp(1) - math.log(rewards.size(1))
    return reward, reward / beta - log_z, beta * log_z, 1 / (w**2).sum(1)


def best_of(rewards, k):
    """E[the largest of k samples], over all choices of k among n: (P, n) -> (P,), unbiased (arXiv:2112.09332 App. I).

    Its KL is log k − (k−1)/k, where no two tie (arXiv:2009.01325 G.3).
    """
    n = rewards.size(1)
    smaller = torch.arange(n, dtype=rewards.dtype)  # how many of the others lie below, in order
    log_choose = torch.lgamma(smaller + 1) - torch.lgamma((smaller - k + 2).clamp(min=1)) - math.lgamma(k)  # log (i−1 choose k−1)
    weight = torch.where(smaller >= k - 1, log_choose, -torch.inf).softmax(0)
    return rewards.sort(1).values @ weight


def frontier(rewards, key):
    """rewards (P, n) of samples of π_ref -> the rows of the optimum, from small KL to large, and those of best-of-n; the dual.

    The dual, {β: β log Z (P,)}, bounds every policy at every β: E[r] ≤ β log Z + β KL(π‖π_ref).
    """
    optimum, dual = [], {}
    for beta in torch.logspace(2, -2, 61, dtype=torch.float64).mul(rewards.std().item()).tolist():
        reward, kl, beta_log_z, ess = tilt(rewards, beta)
        ess = 1 / (1 / ess).mean().item()  # the mean that the error goes with
        if ess < MIN_ESS:
            break
        dual[beta] = beta_log_z
        optimum.append(frontier_row(f"optimum, beta {beta:.3g}", key, reward, kl.tolist(), beta, ess))
    ks = [2**i for i in range(int(math.log2(rewards.size(1))) + 1)]
    best = [frontier_row(f"best of {k}", key, best_of(rewards, k), math.log(k) - (k - 1) / k) for k in ks]
    return optimum, best, dual


def frontier_row(name, key, reward, kl, beta=None, ess=None):
    row = {"checkpoint": name, "beta": beta, "beta_se": None, "ess": ess, "ess_se": None}
    row[key], row[key + "_se"] = mean_se(reward.tolist())
    row["kl"], row["kl_se"] = mean_se(kl) if isinstance(kl, list) else (kl, None)
    return row


def gap(dual, reward, kl):
    """How much more reward than this policy's π* reaches at the same KL, from columns of numbers a prompt: mean, standard error.

    min over β of β log Z + β KL(π‖π_ref) − E[r] = β KL(π‖π*), 0 for the optimum and negative for no policy.
    """
    reward, kl = torch.tensor(reward), torch.tensor(kl)
    return mean_se(min((beta_log_z + beta * kl - reward for beta, beta_log_z in dual.items()), key=torch.mean).tolist())


def reference_rewards(ref_policy, prompts, data, tokenizer, n, reward_model):
    """The reward of n responses of the reference to each prompt, (P, n): gold, or the reward model's score where there is none."""
    ids = fit_prompts(prompts, ref_policy, tokenizer)
    ids = [p for p in ids for _ in range(n)]
    responses = respond(ref_policy, ids, tokenizer.eot_token, seed=1)  # not those that the reference's own row is made of
    if hasattr(data, "gold"):
        texts = [tokenizer.decode([t for t in r if t != tokenizer.eot_token]) for r in responses]
        rewards = torch.tensor([data.gold(prompts[i // n], text) for i, text in enumerate(texts)])
    else:
        rewards = score_groups(reward_model, [(p, [r]) for p, r in zip(ids, responses)])
    return rewards.view(len(prompts), n).double()


# ------------------------------------------------------------------------------------------------ pictures

def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("drawing needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def draw(figure, path):
    with writing(path, "wb") as f:
        figure.savefig(f, dpi=120, format=path.rpartition(".")[2])


def plot_frontier(path, key, rows, optimum, best):
    """Reward against exact KL: the optimum, best-of-n, and each checkpoint with its standard errors."""
    plt = pyplot()
    figure, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    x, y, se = (torch.tensor([row[k] for row in optimum]) for k in ("kl", key, key + "_se"))
    ax.plot(x, y, color="black", label="optimum  π* ∝ π_ref exp(r/β)")
    ax.fill_between(x, y - se, y + se, color="black", alpha=0.15, lw=0)
    ax.plot([row["kl"] for row in best], [row[key] for row in best], ".--", color="gray", label="best of 1, 2, 4, …")
    stages = sorted({stage_of(row["checkpoint"]) for row in rows})
    for row in rows:
        nearest = min((other for other in rows if other is not row), key=lambda other: abs(other["kl"] - row["kl"]), default=row)
        label = dict(xytext=(6, -10), ha="left") if row[key] <= nearest[key] else dict(xytext=(-6, 8), ha="right")
        color = f"C{stages.index(stage_of(row['checkpoint']))}"
        ax.errorbar(row["kl"], row[key], row[key + "_se"], row["kl_se"], "o", color=color, capsize=2, ms=4)
        ax.annotate(row["checkpoint"].removeprefix("out/"), (row["kl"], row[key]), color=color, fontsize=8,
                    textcoords="offset points", **label)  # below the lower of two neighbours, above the higher
    ax.margins(x=0.12)
    ax.set(xlabel="KL(π‖π_ref), exact, nats a response", ylabel={"gold": "true reward"}.get(key, "reward model's score"))
    ax.legend(loc="lower right")
    draw(figure, path)


def stage_of(name):
    return os.path.basename(name.rstrip("/")).split("-")[0]


def read_log(run):
    """[(step, record), …] of a run's log.jsonl; SystemExit with one line where it is missing or damaged."""
    path, log = os.path.join(run, "log.jsonl"), []
    try:
        with open(path) as f:
            for line in filter(lambda line: line.endswith("\n"), f):  # one without is still being written
                record = json.loads(line)
                log.append((record["step"], record))
    except OSError as error:
        raise SystemExit(f"{path}: cannot be read ({error.strerror}); name a run's folder")
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path}: line {len(log) + 1} is no line of a run's log ({type(error).__name__})")
    return log


def curve(log, key):
    """Steps, values and their running mean, (n,) each, NaN where a value was not finite; None where no value is.

    What most steps lack, as val_loss, was measured now and then: the steps that have it are all there are.
    """
    points = [(step, math.nan if record[key] is None else record[key]) for step, record in log if key in record]
    measured = [point for point in points if not math.isnan(point[1])]
    if not measured:
        return None
    points = measured if 2 * len(measured) < len(points) else points
    steps, values = torch.tensor(points, dtype=torch.float64).unbind(1)
    half = len(points) // 100  # no mean of fewer than 100
    means = F.pad(values, (half, half), value=math.nan).unfold(0, 2 * half + 1, 1).nanmean(-1)
    return steps, values, means.where(values.isfinite(), math.nan)


def plot_curves(path, runs):
    """What the runs logged at each step: a panel a key of CURVES, a line a run, faint behind it what it is the running mean of."""
    logs = [read_log(run) for run in runs]
    panels = {}
    for keys in CURVES:
        lines = [(i, style, curve(log, key)) for i, log in enumerate(logs) for key, style in zip(keys.split(), ("-", "--"))]
        panels[keys] = [line for line in lines if line[2]]
    panels = {keys: lines for keys, lines in panels.items() if lines}
    if not panels:
        raise SystemExit(f"{', '.join(runs)}: no steps are logged yet")
    plt, columns = pyplot(), min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 2.7 * rows), squeeze=False, layout="constrained")
    for ax, (keys, lines) in zip(axes.flat, panels.items()):
        for i, style, (steps, values, means) in lines:
            look = dict(color=f"C{i}", ls=style, marker="." if len(steps) < 100 else "", ms=3)
            ax.plot(steps, values, alpha=0.25, **look)
            ax.plot(steps, means, **look)
        ax.set_title(keys.replace(" ", ", ") + " (dashed)" * (" " in keys), fontsize=10)
    for ax in axes.flat[len(panels):]:
        ax.remove()
    figure.supxlabel("step")
    figure.legend([plt.Line2D([], [], color=f"C{i}") for i in range(len(runs))], runs, loc="outside upper center", ncols=min(4, len(runs)))
    draw(figure, path)
    print(f"{path}: {len(panels)} panels of {', '.join(runs)}")


def plot_overoptimization(path, run):
    """Reward-model score and gold of each iteration of a PPO run against √KL, and their mean over 10 iterations."""
    log = [[record.get(key) for key in ("kl", "score", "gold")] for _, record in read_log(run)]
    log = [row for row in log if None not in row]
    if len(log) < 2:
        raise SystemExit(f"{run}: --overoptimization reads the log of a run of ppo.py on data whose true reward is known")
    log, width = torch.tensor(log), min(10, len(log))
    log[:, 0].sqrt_()
    plt = pyplot()
    figure, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    means = log.unfold(0, width, 1).mean(-1)
    for i, label in ((1, "reward model's score"), (2, "true reward")):
        ax.plot(log[:, 0], log[:, i], ".", color=f"C{i}", alpha=0.3)
        ax.plot(means[:, 0], means[:, i], color=f"C{i}", label=label)
    ax.set(xlabel="√KL(π‖π_ref), nats", ylabel="reward", title=run)
    ax.legend()
    draw(figure, path)


# ------------------------------------------------------------------------------------------------ the command line

def load_models(args):
    """-> [(name, GPT), …], the tokenizer, of the command line's checkpoints; the data and the reward model or None, for all but --prompt."""
    models, tokenizers, trained_on, configs = [], [], {}, []
    for name in args.checkpoints:
        model, tokenizer = load_model(name)
        models.append((name, model.to("cuda" if torch.cuda.is_available() else "cpu")))
        tokenizers.append(tokenizer)
        if name not in PRETRAINED and not os.path.exists(os.path.join(name, "config.json")):
            checkpoint = load_checkpoint(name)
            if {"score_std", "axes"} & checkpoint.keys():
                raise SystemExit(f"{name}: a reward model writes no text; name it as --reward_model")
            configs.append(checkpoint["config"])
            trained_on.setdefault(checkpoint["config"]["data"], name)
    if len(set(tokenizers)) > 1:
        raise SystemExit("these models speak different tokenizers: " + ", ".join(f"{n} {t}" for n, t in zip(args.checkpoints, tokenizers)))
    if args.prompt is not None:
        return models, get_tokenizer(tokenizers[0]), None, None
    if len(trained_on) > 1 and not args.data:
        raise SystemExit("these models were trained on different data (" + ", ".join(f"{n}: {d}" for d, n in trained_on.items())
                         + "): say which to compare them on with --data")
    path = args.reward_model or next((c["reward_model"] for c in configs if c.get("reward_model")), None)
    reward_model = None
    if path:
        reward_model, its_tokenizer = load_model(path)
        if its_tokenizer != tokenizers[0] or reward_model.config.n_scalars != 1:
            raise SystemExit(f"{path}: not a reward model for the tokenizer {tokenizers[0]}")
        reward_model.to(models[0][1].device)
    config = configs[0] if configs else {"data": "animals", "data_dir": "data/files"}
    data = dataset(args.data or config["data"], args.data_dir or config["data_dir"])
    return models, get_tokenizer(tokenizers[0]), data, reward_model


def answer(models, prompt, tokenizer):
    """Each model's answer to one prompt, a line a model."""
    for name, model in models:
        ids, = fit_prompts([prompt], model, tokenizer)
        response, = respond(model, [ids], tokenizer.eot_token, seed=torch.seed() % 2**32)
        print(f"{name}: {tokenizer.decode([t for t in response if t != tokenizer.eot_token]).strip()}")


def export(name, dir):
    """Writes the checkpoint `name` into the folder `dir` in the Hugging Face format, and says what of it stays behind."""
    if os.path.isfile(dir) or os.path.isdir(dir) and os.listdir(dir):
        raise SystemExit(f"--export={dir}: something is there already; name a new folder")
    model, tokenizer = load_model(name)
    try:
        model.save_pretrained(dir)
    except (OSError, RuntimeError) as error:  # of torch.save
        raise SystemExit(f"--export={dir}: cannot be written ({error})")
    print(f"{name} -> {dir}, which transformers' GPT2LMHeadModel.from_pretrained opens")
    theirs = {"gpt2": 'AutoTokenizer.from_pretrained("gpt2")', "animals": "that of data/animals.py, which transformers cannot open"}
    print(f"its tokenizer: {theirs[tokenizer]}")
    if model.config.n_scalars:
        print("its scalar head stays behind: the format has no place for one")


def show_frontier(args, models, rows, columns, prompts, data, tokenizer, reward_model):
    """Prints the frontier and each checkpoint's gap to it, draws it where asked; returns its rows."""
    key = "gold" if hasattr(data, "gold") else "score"
    if key == "score":
        print("nobody knows the true reward of this data: the reward model's score is taken for it")
    rewards = reference_rewards(models[0][1], prompts, data, tokenizer, args.samples, reward_model)
    optimum, best, dual = frontier(rewards, key)
    for row, column in zip(rows, columns):
        row["gap"], row["gap_se"] = gap(dual, column[key], column["kl"])
    print(f"\nthe most {key} that any policy reaches at each KL, from {args.samples} samples a prompt of {models[0][0]}\n")
    print(table(optimum[::5] + best))
    print(f"\nhow far below it each checkpoint is, at its own KL\n\n{table([{k: row[k] for k in ('checkpoint', key, key + '_se', 'kl', 'kl_se', 'gap', 'gap_se')} for row in rows])}")
    if args.plot:
        plot_frontier(args.plot, key, rows, optimum, best)
    return optimum + best


def arguments(argv):
    """The command line at the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="a run's folder, a ckpt.pt, a Hugging Face folder, or gpt2 …")
    parser.add_argument("--n", type=int, default=500, help="prompts (default 500)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--prompt", metavar="TEXT", help="print each model's answer to TEXT, and nothing else")
    parser.add_argument("--mean", action="store_true", help="one row more: the mean of the checkpoints after the first, ± its standard error over them")
    parser.add_argument("--frontier", action="store_true", help="the most reward that any policy can reach at each KL, and each checkpoint's gap to it")
    parser.add_argument("--samples", type=int, default=64, help="samples of the reference a prompt, for --frontier (default 64)")
    parser.add_argument("--overoptimization", action="store_true", help="with --plot: score and gold along the one PPO run named, against √KL")
    parser.add_argument("--curves", action="store_true", help="draw what the runs named logged into --plot (default curves.png)")
    parser.add_argument("--plot", metavar="FILE", help="draw --frontier, --overoptimization or --curves there (needs matplotlib)")
    parser.add_argument("--export", metavar="DIR", help="write the one checkpoint named there for transformers; its tokenizer is "
                        "AutoTokenizer.from_pretrained('gpt2'), for animals that of data/animals.py, and a scalar head stays behind")
    parser.add_argument("--reward_model", metavar="RUN", help="for the column score; default: the one that a checkpoint here was trained against")
    parser.add_argument("--data", help="default: what the checkpoints were trained on")
    parser.add_argument("--data_dir", help="likewise")
    args = parser.parse_args(argv)
    for name in ("n", "samples"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name}={getattr(args, name)}: expected at least 1")
    if args.curves:
        args.plot = args.plot or "curves.png"
    if args.plot and not (args.frontier or args.overoptimization or args.curves):
        raise SystemExit("--plot draws --frontier, --overoptimization or --curves: say which")
    if args.plot:
        if not args.plot.endswith((".png", ".pdf", ".svg")):
            raise SystemExit(f"--plot={args.plot}: name a .png, a .pdf or an .svg file")
        pyplot()  # missing, it is said before the work is done
    if args.overoptimization and (not args.plot or len(args.checkpoints) != 1):
        raise SystemExit("--overoptimization takes one run of ppo.py and --plot=FILE")
    if args.export and len(args.checkpoints) != 1:
        raise SystemExit("--export takes one checkpoint")
    return args


def main(argv=None):
    """Does what the command line asks for: curves, a picture of over-optimization, an export, answers, or the table and the frontier."""
    args = arguments(argv)
    if args.curves:
        return plot_curves(args.plot, args.checkpoints)
    if args.overoptimization:
        return plot_overoptimization(args.plot, args.checkpoints[0])
    if args.export:
        return export(args.checkpoints[0], args.export)
    models, tokenizer, data, reward_model = load_models(args)
    if args.prompt is not None:
        return answer(models, args.prompt, tokenizer)
    if args.mean and len(models) < 2:
        raise SystemExit("--mean is over the checkpoints after the first: name some")
    if args.frontier and (min(args.n, len(data.prompts("test"))) < 2 or args.samples < 2 * MIN_ESS):
        raise SystemExit(f"--frontier needs at least two prompts (--n) and {2 * MIN_ESS} --samples of each")
    if args.frontier and not hasattr(data, "gold") and not reward_model:
        raise SystemExit("--frontier: nobody knows the true reward of this data; name a --reward_model")
    rows, prompts, texts, columns = compare(models, data, tokenizer, args.n, reward_model)
    more = [mean_row(rows[1:])] if args.mean else []
    print(f"{len(prompts)} held-out prompts, mean±standard error\n\n{table(rows + more)}\n{samples(models, prompts, texts)}")
    if args.frontier:
        more += show_frontier(args, models, rows, columns, prompts, data, tokenizer, reward_model)
    keys = list(dict.fromkeys(key for row in rows + more for key in row))
    rows = [{key: row.get(key) for key in keys} for row in rows + more]
    if args.json:
        with writing(args.json) as f:
            json.dump(rows, f, indent=2)


if __name__ == "__main__":
    main()
