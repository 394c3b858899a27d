"""Compares models on held-out prompts, one row per model; the first is the reference for KL and win rate.

    python evaluate.py out/sft-animals out/dpo-animals
    python evaluate.py out/sft-animals out/dpo-animals out/ppo-animals --frontier --plot=frontier.png
    python evaluate.py out/sft-animals out/mine --frontier --beside=docs/frontier.json --plot=mine.png
    python evaluate.py out/ppo-animals --overoptimization --plot=overoptimization.png
    python evaluate.py out/sft-animals out/ppo-seed0 out/ppo-seed1 out/ppo-seed2 --mean
    python evaluate.py --curves out/sft-animals out/dpo-animals out/ppo-animals --plot=curves.png

Every model answers the same prompts, at the temperature that the compared models were trained with: that of
ppo.py's runs, 1 for all others. Different ones need tables of their own. The columns are means over prompts,
with their standard errors (docs/measuring.md):

    gold           the true reward (animals), and its parts relevance, factuality, completeness
    kl             KL(π‖π_ref) in nats per response: exact over the vocabulary at each position, summed over
                   the response
    win_rate       how often the reward is above that of another answer, drawn from the reference model for
                   the same prompt; a tie counts one half. The reward is gold, or else score
    length         tokens of a response, EOS included
    eos_rate       the share of responses that ended by themselves
    grammar        the share of a response's sentences that are well formed (animals)
    score          a reward model's score, if there is a reward model; never normalized

gold and grammar are empty for data whose true reward is not known.

--frontier: max E[r] − β KL(π‖π_ref) has the optimum π*(y|x) ∝ π_ref(y|x) exp(r(x, y)/β). So samples of π_ref,
the first checkpoint, weighted by exp(r/β), estimate its reward and its KL. Over all β, these are the most
reward that any method can reach at each KL: the frontier. Its rows also have beta and ess; the checkpoints'
rows also have a gap:

    beta           the price of KL for which this row is the optimum
    ess            its effective sample size: how many of the samples count; rows below MIN_ESS are left out
                   (common/frontier.py)
    gap            π*'s reward minus the checkpoint's, at the same KL to π_ref; it equals β KL(π‖π*). Or
                   gap_at_most, an upper bound, where the frontier does not reach that KL

--overoptimization: reward-model score and true reward against √KL along runs of ppo.py that differ in their
seed, and along their mean, as in Gao et al. (2022, arXiv:2210.10760).
"""
import argparse
import json
import os
from dataclasses import dataclass

import torch

from common import curves, plots
from common.compared import load_data, load_models, named_reward_model, table_temperature
from common.dist import is_main, log_to_console, print0
from common.files import write_atomically
from common.frontier import MIN_ESS, frontier, gap
from common.grids import repeat_each
from common.log import printable
from common.models import load_model, load_reward_model, template_of_checkpoint
from common.preferences import comparison_samples, preference_row
from common.scoring import one_number_per_response, pair_accuracy, scores_of_responses
from common.sharding import unshard_model
from common.standard_errors import clusters_of, mean_se
from common.tables import table
from data import decode, encode_prompts
from data.turns import apply_template
from engine.decode import uniform_noise
from engine.packing import per_sequence

KEYS = ["gold", "relevance", "factuality", "completeness", "kl", "win_rate", "length", "eos_rate", "grammar",
        "score"]
MAX_NEW_TOKENS = 128

# Seeds of the sampling noise. All models answer with the same noise. The reference's answers for the win rate
# use another seed: with the same noise, a model close to the reference would repeat its answers, and tie far
# too often.
ANSWER_SEED = 0     # of every model's answers
REFERENCE_SEED = 1  # of the reference's answers that the win rate compares them with
FRONTIER_SEED = 2   # of the reference's samples for the frontier

# Limits on memory, so that the table at the end of a stage fits wherever training did
CACHE_BYTES = 2**28      # of a key-value cache
KL_TOKENS = 2048         # tokens in a forward pass
KL_LOGITS = 2**23        # logits of one model that exist at a time


# -------------------------------------------------------------------------------------------- sampling and KL

@torch.no_grad()
def respond(model, prompts, eos, seed=ANSWER_SEED, max_new_tokens=MAX_NEW_TOKENS, temperature=1.0):
    """Samples one response per prompt (lists of ids), without touching the global random state."""
    if not prompts:
        return []
    model = unshard_model(model)  # the whole model, in float32
    config = model.config
    longest = max(map(len, prompts))
    max_new_tokens = min(max_new_tokens, config.block_size - longest)
    noise = uniform_noise(len(prompts), max_new_tokens, torch.Generator().manual_seed(seed))

    # The key-value cache of a row: keys and values of 4 bytes.
    bytes_per_row = 2 * config.n_layer * config.n_embd * 4 * (longest + max_new_tokens)
    n = max(1, CACHE_BYTES // bytes_per_row)
    responses = []
    for i in range(0, len(prompts), n):
        part = slice(i, i + n)
        responses += model.generate(prompts[part], max_new_tokens, temperature, eos=eos, noise=noise[part])
    return responses


def exact_kl(policy, ref_policy, prompts, responses, temperature=1.0):
    """Σ_t KL(π(·|x, y_<t) ‖ π_ref(·|x, y_<t)) over each response, in nats: (len(prompts),)

    Both are taken at this temperature.
    """
    # How many tokens' distributions exist at one time; log_softmax takes no more than CHUNK.
    chunk = max(1, min(512, KL_LOGITS // policy.wte.num_embeddings))

    def kl_of_responses(batch):
        states = policy.states(batch).split(chunk)
        ref_states = ref_policy.states(batch).split(chunk)
        kl = []
        for s, ref_s in zip(states, ref_states):
            logp = policy.log_softmax(s, temperature)
            ref_logp = ref_policy.log_softmax(ref_s, temperature)
            position_kl = (logp.exp() * (logp - ref_logp)).sum(-1)
            kl.append(position_kl.clamp(min=0))  # rounding can make a KL near 0 slightly negative
        return per_sequence(torch.cat(kl), batch)

    groups = [(prompt, [response]) for prompt, response in zip(prompts, responses)]
    return one_number_per_response(policy, kl_of_responses, groups, KL_TOKENS)


def encode_with_room(prompts, context, tokenizer):
    """Encodes prompts as lists of ids. One that fills more than half of the context loses its beginning."""
    room = (context + 1) // 2
    return [ids[-room:].tolist() for ids in encode_prompts(tokenizer, prompts)]


# -------------------------------------------------------------------------------------------------- the table

@dataclass
class Setting:
    """What every model of a table is measured with."""
    data: object                # a dataset (data/__init__.py)
    tokenizer: object
    prompts: list               # of text
    context: int                # tokens of a prompt and a response together: what every model can read
    clusters: list              # of each prompt; standard errors treat a cluster as one sample
    ref_policy: torch.nn.Module
    ref_rewards: torch.Tensor | None  # (P,) of the reference's answers that the win rate compares with
    reward_model: torch.nn.Module | None
    temperature: float

    def max_new_tokens(self, prompts):
        """How many tokens a response to any of these prompts, lists of ids, may have."""
        return min(MAX_NEW_TOKENS, self.context - max(map(len, prompts), default=0))


def evaluate_model(name, policy, setting):
    """Returns a row of the table, the responses as text, and {column: a list with a number per prompt}."""
    data = setting.data
    prompts = setting.prompts
    eos = setting.tokenizer.eot_token
    ids = encode_with_room(prompts, setting.context, setting.tokenizer)
    responses = respond(policy, ids, eos, ANSWER_SEED, setting.max_new_tokens(ids), setting.temperature)
    texts = [decode(setting.tokenizer, response) for response in responses]
    kl = exact_kl(policy, setting.ref_policy, ids, responses, setting.temperature)
    columns = {
        "kl": kl.tolist(),
        "length": [len(response) for response in responses],
        "eos_rate": [response[-1] == eos for response in responses],
    }
    if setting.reward_model:
        groups = [(prompt, [response]) for prompt, response in zip(ids, responses)]
        columns["score"] = scores_of_responses(setting.reward_model, groups).tolist()
    if hasattr(data, "gold"):
        columns["gold"] = [data.gold(prompt, text) for prompt, text in zip(prompts, texts)]
    if hasattr(data, "axes"):
        for prompt, text in zip(prompts, texts):
            for axis, value in data.axes(prompt, text).items():
                columns.setdefault(axis, []).append(value)
    if hasattr(data, "grammatical"):
        columns["grammar"] = []
        for text in texts:
            n_good, n_sentences = data.grammatical(text)
            columns["grammar"].append(n_good / n_sentences if n_sentences else None)
    if setting.ref_rewards is not None:
        rewards = torch.tensor(columns.get("gold") or columns["score"], dtype=torch.float64)
        columns["win_rate"] = pair_accuracy(rewards, setting.ref_rewards).tolist()

    row = {"checkpoint": name}
    for key in KEYS:
        row[key], row[key + "_se"] = mean_se(columns.get(key), setting.clusters)
    return row, texts, columns


def reference_rewards(setting, n, seed):
    """Samples n responses of the reference per prompt -> their rewards (P, n): gold, or else the score."""
    ids = repeat_each(encode_with_room(setting.prompts, setting.context, setting.tokenizer), n)
    responses = respond(setting.ref_policy, ids, setting.tokenizer.eot_token, seed,
                        setting.max_new_tokens(ids), setting.temperature)
    if hasattr(setting.data, "gold"):
        texts = [decode(setting.tokenizer, response) for response in responses]
        rewards = [setting.data.gold(setting.prompts[i // n], text) for i, text in enumerate(texts)]
        return torch.tensor(rewards, dtype=torch.float64).view(-1, n)
    # Equal responses to a prompt must tie exactly, for best-of-n. Scores that are computed twice may differ
    # in their last digits, so each distinct response is scored once.
    keys = [(tuple(prompt), tuple(response)) for prompt, response in zip(ids, responses)]
    distinct = list(dict.fromkeys(keys))
    groups = [(list(prompt), [list(response)]) for prompt, response in distinct]
    score_of = dict(zip(distinct, scores_of_responses(setting.reward_model, groups).tolist()))
    return torch.tensor([score_of[key] for key in keys], dtype=torch.float64).view(-1, n)


def compare(models, data, tokenizer, n, reward_model=None, template="plain", temperature=1.0):
    """Evaluates models, [(name, GPT), …], the first of which is the reference, on n held-out prompts.

    template "turns": plain prompts become a user's turn first, as models trained on turns expect.

    Returns the rows of the table, the Setting, and the texts and columns of each model (see evaluate_model).
    """
    ref_policy = models[0][1]
    prompts = data.prompts("test")[:n]
    clusters = clusters_of(data, prompts)
    prompts = apply_template(template, prompts)
    context = min(model.config.block_size for _, model in models)
    n_cut = sum(len(ids) > (context + 1) // 2 for ids in encode_prompts(tokenizer, prompts))
    if n_cut:
        print0(f"{n_cut} of {len(prompts)} prompts lost their beginning: "
               "they take more than half of the context")
    setting = Setting(
        data, tokenizer, prompts, context, clusters, ref_policy, None, reward_model, temperature)
    if prompts and (hasattr(data, "gold") or reward_model):
        setting.ref_rewards = reference_rewards(setting, 1, REFERENCE_SEED)[:, 0]
    rows, texts, columns = [], [], []
    for name, model in models:
        row, model_texts, model_columns = evaluate_model(name, model, setting)
        rows.append(row)
        texts.append(model_texts)
        columns.append(model_columns)
    return rows, setting, texts, columns


def mean_row(rows):
    """The mean of rows (runs of one method with different seeds), and its standard error over them.

    It has a gap if all of them have one.
    """
    row = {"checkpoint": f"mean of {len(rows)}"}
    for key in KEYS:
        row[key], row[key + "_se"] = mean_se([r[key] for r in rows if r[key] is not None])
    gaps = [r.get("gap") for r in rows]
    if None not in gaps:
        row["gap"], row["gap_se"] = mean_se(gaps)
    return row


def report(run, policy, ref_name, ref_policy=None, reward_model=None, temperature=1.0, preferences=None):
    """Ends a stage: compares the trained policy with its reference, on the console and in OUT/eval.json.

    ref_name: the reference's name, on its rows. ref_policy: the reference; None: it is loaded by its name.
    reward_model: a run of reward.py, for the column score. preferences: (comparisons, rewards before, rewards
    after), with a reward for each of their responses (S,), for a second table. All processes must call this.
    """
    cfg = run.cfg
    if not cfg.eval_n:
        return
    policy = unshard_model(policy)
    if ref_policy is None:
        ref_policy, _ = load_model(ref_name, cfg)
    ref_policy = unshard_model(ref_policy)
    if not is_main():
        return
    if reward_model is not None:
        reward_model = load_reward_model(reward_model, run.tokenizer, cfg).to(policy.device)
    models = [(ref_name, ref_policy.to(policy.device)), (run.out, policy)]
    rows, setting, texts, columns = compare(
        models, run.data, run.tokenizer, cfg.eval_n, reward_model, run.template, temperature)
    if not setting.prompts:
        print("no held-out prompts: nothing to evaluate")
        return
    print_table(rows, models, setting, texts, columns)
    if preferences is not None and preferences[0]:
        preference_rows = report_preferences(run, ref_name, *preferences)
        rows = [row | more for row, more in zip(rows, preference_rows)]
    save_rows(run, rows)
    print(f"\ntoken by token: python sample.py {run.out} --page=tokens.html")


def report_preferences(run, ref_name, comparisons, rewards_before, rewards_after, n_samples=0):
    """Prints how well rewards (S,), one per response, order held-out comparisons before and after a stage.

    Returns the two rows of the table. n_samples: how many comparisons to print, with their rewards.
    """
    rows = [preference_row(ref_name, rewards_before, comparisons, run.data),
            preference_row(run.out, rewards_after, comparisons, run.data)]
    print0(f"\n{len(comparisons)} held-out comparisons: is the preferred response rewarded more?\n")
    print0(table(rows))
    if n_samples:
        print0(comparison_samples(rewards_after, comparisons, run.data, n_samples))
    return rows


def save_rows(run, rows):
    """Writes the rows of a final table to OUT/eval.json, in the main process."""
    if is_main():
        with write_atomically(os.path.join(run.out, "eval.json")) as f:
            json.dump(rows, f, indent=2)


# ---------------------------------------------------------------------------------------------------- as text

def print_table(rows, models, setting, texts, columns):
    title = f"{len(setting.prompts)} held-out prompts, mean±standard error"
    n_clusters = len(set(setting.clusters))
    if 1 < n_clusters < len(setting.prompts):
        title += f" over {n_clusters} clusters of prompts"
    if setting.temperature != 1:
        title += f", temperature {setting.temperature:g}"
    print(f"\n{title}\n\n{table(rows)}\n{samples(models, setting.prompts, texts, columns)}")


def samples(models, prompts, texts, columns, k=3):
    """The first k prompts with every model's answer, and its gold or score where there is one."""
    width = max(len(name) for name, _ in models)
    lines = []
    for i, prompt in enumerate(prompts[:k]):
        lines.append("\n" + printable(prompt))
        for (name, _), model_texts, model_columns in zip(models, texts, columns):
            reward = ""
            for key in ("score", "gold"):
                if key in model_columns:
                    reward = f"   {key} {model_columns[key][i]:5.2f}"
            lines.append(f"  {name.rjust(width)}{reward} | {printable(model_texts[i])}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------- the frontier

def reward_key(data):
    """The column that the frontier is about: the true reward, or else the reward model's score."""
    return "gold" if hasattr(data, "gold") else "score"


def show_frontier(args, models, rows, columns, setting, rows_beside):
    """Prints the frontier and each checkpoint's gap to it, and draws it if asked to.

    rows_beside: of another table, to draw too. Returns the rows that it adds to the table: of the mean, if
    asked for, now with its gap; of the optimum; of best-of-n.
    """
    key = reward_key(setting.data)
    max_reward = getattr(setting.data, "max_gold", None)
    if key == "score":
        print("the true reward of this data is not known: the reward model's score is used instead")
        max_reward = None
    rewards = reference_rewards(setting, args.samples, FRONTIER_SEED)
    # A row for each β, a row for each n of best-of-n, and {β: β log Z per prompt}, from which `gap` bounds
    # the reward at any KL
    optimum, best_of_n, dual = frontier(rewards, key, setting.clusters)
    for row, column in zip(rows, columns):
        mean, se, is_bound = gap(dual, column[key], column["kl"], setting.clusters, max_reward)
        row |= {"gap": None, "gap_se": None, "gap_at_most": None, "gap_at_most_se": None}
        name = "gap_at_most" if is_bound else "gap"
        row[name] = mean
        row[name + "_se"] = se
    print(f"\nthe most {key} that any policy can have at each KL, "
          f"from {args.samples} samples per prompt of {models[0][0]}\n")
    print(table(optimum[::10] + best_of_n))  # every tenth β; the picture and --json have all
    print("\nhow far below it each checkpoint is, at its own KL\n")
    shown = ["checkpoint", key, "kl", "gap", "gap_at_most"]
    shown += [name + "_se" for name in shown[1:]]
    mean_rows = [mean_row(rows[1:])] if args.mean else []
    print(table([{name: row.get(name) for name in shown} for row in rows + mean_rows]))
    if args.plot:
        plots.plot_frontier(args.plot, key, rows + rows_beside, optimum, best_of_n)
    return mean_rows + optimum + best_of_n


# ------------------------------------------------------------------------------------------- the command line

def arguments(argv):
    """Parses the command line; the top of this file describes it."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CKPT",
        help="a run's folder, a ckpt.pt, a Hugging Face folder, or gpt2 …")
    add("--n", type=int, default=500, help="prompts (default 500)")
    add("--json", metavar="FILE", help="write the rows there")
    add("--mean", action="store_true",
        help="add the mean of the checkpoints after the first, with its standard error over them")
    add("--frontier", action="store_true", help="the most reward at each KL, and each checkpoint's gap to it")
    add("--samples", type=int, default=256,
        help="samples of the reference per prompt, for --frontier (default 256)")
    add("--overoptimization", action="store_true",
        help="with --plot: score and gold along PPO runs, against √KL, and their mean")
    add("--curves", action="store_true", help="draw what the runs logged, into --plot (default curves.png)")
    add("--plot", metavar="FILE",
        help="draw --frontier, --overoptimization or --curves there (needs matplotlib)")
    add("--beside", metavar="FILE",
        help="draw the rows of another table too: docs/frontier.json, or what --json wrote")
    add("--reward_model", metavar="RUN", help="for the column score; default: the first that a run names")
    add("--data", help="default: what the checkpoints were trained on")
    add("--data_dir", help="likewise")
    args = parser.parse_args(argv)
    for name in ("n", "samples"):
        value = getattr(args, name)
        if value < 1:
            raise SystemExit(f"--{name}={value}: expected at least 1")
    if args.curves:
        args.plot = args.plot or "curves.png"
    if args.plot and not (args.frontier or args.overoptimization or args.curves):
        raise SystemExit("--plot draws --frontier, --overoptimization or --curves: say which")
    if args.plot and not args.plot.endswith((".png", ".pdf", ".svg")):
        raise SystemExit(f"--plot={args.plot}: name a .png, a .pdf or an .svg file")
    if args.plot:
        plots.import_pyplot()  # reports a missing package now, not after the work
    if args.beside and not (args.frontier and args.plot):
        raise SystemExit("--beside adds to the picture that --frontier --plot=FILE draws")
    if args.overoptimization and not args.plot:
        raise SystemExit("--overoptimization takes runs of ppo.py and --plot=FILE")
    if args.mean and len(args.checkpoints) < 2:
        raise SystemExit("--mean is over the checkpoints after the first: name some")
    # The frontier is estimated from all samples, their halves and their quarters. It ends where fewer than
    # MIN_ESS of them count, so we ask for at least twice that number.
    if args.frontier and (args.samples < 2 * MIN_ESS or args.samples % 4):
        raise SystemExit(f"--frontier needs {2 * MIN_ESS} --samples or more, a multiple of 4")
    return args


def main(argv=None):
    log_to_console()
    args = arguments(argv)
    if args.curves:
        return curves.plot_curves(args.plot, args.checkpoints)
    if args.overoptimization:
        return curves.plot_overoptimization(args.plot, args.checkpoints)

    # The models, the data that they are compared on, and a reward model if one is named here or by a PPO run.
    models, tokenizer, configs = load_models(args.checkpoints, need_same_data=args.data is None)
    data = load_data(args, configs)
    reward_model = named_reward_model(args.reward_model, configs)  # a run's folder
    if reward_model is not None:
        reward_model = load_reward_model(reward_model, tokenizer).to(models[0][1].device)

    n_prompts = min(args.n, len(data.prompts("test")))
    if n_prompts == 0:
        raise SystemExit("no held-out prompts: nothing to evaluate")
    if args.frontier and n_prompts < 2:
        raise SystemExit("--frontier needs at least two prompts, for its standard errors")
    if args.frontier and not hasattr(data, "gold") and not reward_model:
        raise SystemExit("--frontier: the true reward of this data is not known; name a --reward_model")
    rows_beside = plots.read_rows(args.beside, reward_key(data)) if args.beside else []

    templates = [template_of_checkpoint(name) for name in args.checkpoints]
    template = "turns" if "turns" in templates else "plain"
    temperature = table_temperature(args.checkpoints, configs)
    rows, setting, texts, columns = compare(
        models, data, tokenizer, args.n, reward_model, template, temperature)
    more = [mean_row(rows[1:])] if args.mean else []
    print_table(rows + more, models, setting, texts, columns)
    if args.frontier:
        more = show_frontier(args, models, rows, columns, setting, rows_beside)
    if args.json:
        all_rows = rows + more
        keys = {}  # every row gets the keys of all rows
        for row in all_rows:
            keys |= row
        with write_atomically(args.json) as f:
            json.dump([{key: row.get(key) for key in keys} for row in all_rows], f, indent=2)


if __name__ == "__main__":
    main()
