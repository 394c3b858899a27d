"""Every point of the frontier in docs/results.md: each method as a curve, over seeds of the whole pipeline.

    python docs/frontier.py 0 1 2          # a curve for each method
    python docs/frontier.py 0 1 2 --all    # and SimPO in rounds, a fixed reference, GRPO, RLOO on gold,
                                           # and over-optimization

The first seed makes all points; the others make those that the table has errors for. A run that is finished
is skipped, so this may be stopped and started again, and `python docs/frontier.py 0` and `… 1` may run side
by side. When all of these seeds are done, it prints the table, draws frontier.png, and writes the rows drawn
there into frontier.json, for `evaluate.py --beside`; with --all it also draws overoptimization.png. (Drawing
needs matplotlib.) Everything lies in out/frontier. ± is the standard error over seeds.
"""
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from common.checkpoints import checkpoint_files, is_finished  # noqa: E402
from common.curves import plot_overoptimization  # noqa: E402
from common.plots import plot_frontier  # noqa: E402
from common.standard_errors import mean_se  # noqa: E402
from data.animals import LABEL_SCALE  # noqa: E402

FOLDER = "out/frontier"


@dataclass
class Point:
    name: str                 # of its folder
    command: str              # {out} is the folder of the seed
    method: str = ""          # points of one method are joined by a line; "": not in the table
    label: str | None = ""    # in the picture; None: not drawn
    beta: float | None = None  # the price of a nat, in units of gold
    every_seed: bool = True   # or only the first
    extra: bool = False       # only with --all


# The labels are σ(LABEL_SCALE · difference of gold), so the rewards that DPO fits and the reward model's
# scores are about LABEL_SCALE · gold. In units of gold, their β is β / LABEL_SCALE.
def dpo(beta, label, every_seed=False):
    return Point(f"dpo-beta{beta}", f"dpo.py --beta={beta} --init={{out}}/sft", "DPO", label,
                 beta / LABEL_SCALE, every_seed)


def simpo(name, options, label="", every_seed=False):
    return Point(name, f"simpo.py {options} --init={{out}}/sft", "SimPO", label, None, every_seed)


def ppo(kl_coef, label="", every_seed=False):
    command = f"ppo.py --kl_coef={kl_coef} --init={{out}}/sft --reward_model={{out}}/reward"
    return Point(f"ppo-kl{kl_coef}", command, "PPO", label, kl_coef / LABEL_SCALE, every_seed)


def rank_answers(last, i, pairs):
    """The command that ranks the answers of the last round's policy, for round i."""
    return f"sample.py {last} --rank=gold --data=animals --k=4 --n=4332 --seed={i} --out={pairs}"


def dpo_round(i, kind, label=""):
    """Round i of DPO: pairs of the last round's answers, then DPO that starts from its policy.

    kind "fixed": the reference stays the SFT model. "moving": it is the policy of the last round.
    """
    last = "{out}/sft" if i == 1 else f"{{out}}/{kind}{i - 1}"
    pairs = f"{{out}}/{kind}{i}.jsonl"
    ref = f"--ref={{out}}/sft --beta={FIXED_BETA}" if kind == "fixed" else f"--beta={MOVING_BETA}"
    beta = FIXED_BETA / LABEL_SCALE if kind == "fixed" else MOVING_BETA / i / LABEL_SCALE
    train = f"dpo.py animals --data={pairs} --init={last} {ref} --lr=5e-4 --steps=300"
    method = f"DPO in rounds, {kind} reference"
    is_fixed = kind == "fixed"
    return [Point(f"{kind}{i}.jsonl", rank_answers(last, i, pairs), every_seed=not is_fixed, extra=is_fixed),
            Point(f"{kind}{i}", train, method, label, beta, every_seed=not is_fixed, extra=is_fixed)]


def simpo_round(i, label=""):
    """Round i of SimPO, likewise; the pairs of its first round are those of DPO's."""
    last = "{out}/sft" if i == 1 else f"{{out}}/simpo-round{i - 1}"
    pairs = "{out}/moving1.jsonl" if i == 1 else f"{{out}}/simpo-round{i}.jsonl"
    train = f"simpo.py animals --data={pairs} --init={last} --steps=200"
    points = [Point(f"simpo-round{i}", train, "SimPO in rounds", label, extra=True)]
    if i > 1:
        points.insert(0, Point(f"simpo-round{i}.jsonl", rank_answers(last, i, pairs), extra=True))
    return points


FIXED_BETA = 0.4
MOVING_BETA = 1.0
POINTS = [
    Point("sft", "sft.py", "SFT", "SFT"),
    Point("reward", "reward.py --init={out}/sft"),
    dpo(3.0, "β 3"),
    dpo(1.0, "DPO", every_seed=True),
    dpo(0.5, "β 0.5"),
    dpo(0.3, "β 0.3"),
    simpo("simpo-paper", "--beta=10 --gamma=3 --lr=1e-4 --sft_weight=0"),
    simpo("simpo-no-sft", "--beta=2 --gamma=1 --lr=3e-4 --sft_weight=0"),
    simpo("simpo-sft1", "--beta=10 --gamma=5 --lr=3e-4 --sft_weight=1"),
    simpo("simpo", "", "SimPO", every_seed=True),
    *dpo_round(1, "moving"), *dpo_round(2, "moving"), *dpo_round(3, "moving", "DPO in rounds"),
    *simpo_round(1), *simpo_round(2), *simpo_round(3, "SimPO in rounds"),
    *dpo_round(1, "fixed"), *dpo_round(2, "fixed"), *dpo_round(3, "fixed", "rounds, fixed reference"),
    ppo(1.0),
    ppo(0.3),
    ppo(0.1, "PPO", every_seed=True),
    ppo(0.03),
    Point("rloo", "ppo.py --advantage=rloo --k=8 --init={out}/sft --reward_model={out}/reward",
          "RLOO", "RLOO", 0.1 / LABEL_SCALE),
    Point("grpo", "ppo.py --advantage=grpo --k=8 --init={out}/sft --reward_model={out}/reward",
          "GRPO", None, 0.1 / LABEL_SCALE, extra=True),
    Point("ppo-gold", "ppo.py --reward=gold --kl_coef=0.05 --init={out}/sft",
          "PPO on gold", "PPO on gold", 0.05),
    Point("rloo-gold", "ppo.py --reward=gold --kl_coef=0.05 --advantage=rloo --k=8 --init={out}/sft",
          "RLOO on gold", None, 0.05, extra=True),
    Point("grpo-gold", "ppo.py --reward=gold --kl_coef=0.05 --advantage=grpo --k=8 --init={out}/sft",
          "GRPO on gold", None, 0.05, extra=True),
    Point("finegrained", "finegrained.py --init={out}/sft --reward_models={out}/rewards", "fine-grained",
          "fine-grained"),
    # Over-optimization: a reward model that was stopped early, and no price on KL.
    Point("reward-weak", "reward.py --steps=300 --init={out}/sft", extra=True),
    Point("ppo-weak", "ppo.py --kl_coef=0 --lr=5e-4 --init={out}/sft --reward_model={out}/reward-weak",
          extra=True),
]
COLUMNS = ["gold", "kl", "gap", "win_rate", "length", "grammar"]


def run(seed, point):
    """Runs a point's command in a folder of its own, unless it is finished, and notes how long it took."""
    out = f"{FOLDER}/{seed}"
    folder = f"{out}/{point.name}"
    script, *options = point.command.format(out=out).split()
    if script == "sample.py":
        if os.path.exists(folder) and os.path.getsize(folder):  # it is empty until all answers are ranked
            return
    else:
        if is_finished(folder):
            return
        options += [f"--seed={seed}", f"--out={folder}"]
        if script not in ("reward.py", "finegrained.py"):  # their tables are of comparisons and spans
            options.append("--eval_n=0")  # `evaluate` compares all points at the end
        if checkpoint_files(folder):
            options.append("--resume")
    os.makedirs(out, exist_ok=True)
    print(" ".join(["python", script, *options]), flush=True)
    begin = time.time()
    with open(f"{out}/{point.name}.txt", "a") as console:
        subprocess.run([sys.executable, ROOT / script, *options], stdout=console, check=True)
        print(f"{time.time() - begin:.0f} seconds", file=console)


def evaluate(seed, points):
    """Evaluates a seed's points -> {name of a point: its row}, the rows of the optimum and of best-of-n.

    The rows are kept in a file, and computed again if it lacks a point.
    """
    path = f"{FOLDER}/{seed}/frontier.json"
    folders = [f"{FOLDER}/{seed}/{point.name}" for point in points]
    if not os.path.exists(path) or not set(folders) <= read_table(path).keys():
        options = ["--data=animals", "--frontier", f"--json={path}"]
        command = [sys.executable, ROOT / "evaluate.py", *folders, *options]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    table = read_table(path)  # of these points, and perhaps of more: another time, this was the first seed
    frontier = [row for name, row in table.items() if name.startswith(("optimum", "best"))]
    return {point.name: table[folder] for point, folder in zip(points, folders)}, frontier


def read_table(path):
    """{checkpoint: its row} of what evaluate.py wrote with --json."""
    with open(path) as f:
        return {row["checkpoint"]: row for row in json.load(f)}


def mean_over_seeds(name, rows):
    """The mean of a row of each seed, with standard errors over them; of one seed, with those of its table.

    No gap where a seed has none.
    """
    if len(rows) == 1:
        return rows[0] | {"checkpoint": name, "n_seeds": 1}
    row = {"checkpoint": name, "n_seeds": len(rows)}
    for key in COLUMNS:
        values = [r.get(key) for r in rows]
        row[key], row[key + "_se"] = (None, None) if None in values else mean_se(values)
    return row


def aim(beta, optimum):
    """Gold and KL of the optimum of a method's own β, as text; empty where the curve does not reach it."""
    if beta is None or beta < min(row["beta"] for row in optimum):
        return ""
    nearest = min(optimum, key=lambda row: abs(math.log(row["beta"] / beta)))
    return f"{nearest['gold']:.2f} at {nearest['kl']:.2f}"


def markdown(rows, optimum):
    """The table, with the command of each row."""
    lines = ["| | seeds | " + " | ".join(COLUMNS) + " | its β aims at |", "|" + "---|" * (len(COLUMNS) + 3)]
    for point, row in rows:
        cells = []
        for key in COLUMNS:
            cells.append("" if row[key] is None else f"{row[key]:.3f}±{row[key + '_se'] or 0:.3f}")
        cells.append(aim(point.beta, optimum))
        command = " ".join(part for part in point.command.split() if "{out}/" not in part or "--ref" in part)
        command = command.replace("{out}", "out")
        lines.append(f"| {point.name}: `python {command}` | {row['n_seeds']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    with_extras = "--all" in sys.argv
    seeds = [argument for argument in sys.argv[1:] if argument != "--all"] or ["0", "1", "2"]
    if not all(seed.isdigit() for seed in seeds):
        raise SystemExit(__doc__)
    tables = {}  # {seed: {name of a point: its row}}
    frontiers = []  # of each seed: the rows of the optimum and of best-of-n
    for seed in seeds:
        points = [point for point in POINTS if with_extras or not point.extra]
        if seed != seeds[0]:
            points = [point for point in points if point.every_seed]
        for point in points:
            run(seed, point)
        shown = [point for point in points if point.method]
        tables[seed], frontier = evaluate(seed, shown)
        frontiers.append(frontier)

    rows = []
    for point in POINTS:
        if point.method:
            same = [table[point.name] for table in tables.values() if point.name in table]
            if same:  # without --all, the extras are not made
                row = mean_over_seeds(point.name, same) | {"method": point.method, "label": point.label}
                rows.append((point, row))

    # The curve of the optimum, row by row. Its β differ between seeds by their rewards' spread, about 1%.
    optimum = []
    curves = [[row for row in frontier if row["checkpoint"].startswith("optimum")] for frontier in frontiers]
    for same in zip(*curves):  # a seed's curve may end before another's
        beta = sum(row["beta"] for row in same) / len(same)
        optimum.append(mean_over_seeds(same[0]["checkpoint"], same) | {"beta": beta})
    best = []
    for name in [row["checkpoint"] for row in frontiers[0] if row["checkpoint"].startswith("best")]:
        same = [row for frontier in frontiers for row in frontier if row["checkpoint"] == name]
        best.append(mean_over_seeds(name, same))
    print(markdown(rows, optimum))
    drawn = [row for point, row in rows if point.label is not None]
    keys = ["checkpoint", "method", "label", "n_seeds", *COLUMNS, *[key + "_se" for key in COLUMNS]]
    with open(f"{FOLDER}/frontier.json", "w") as f:
        json.dump([{key: row[key] for key in keys} for row in drawn], f, indent=1)
    plot_frontier(f"{FOLDER}/frontier.png", "gold", drawn, optimum, best)
    if with_extras:
        weak = [f"{FOLDER}/{seed}/ppo-weak" for seed in seeds]
        plot_overoptimization(f"{FOLDER}/overoptimization.png", weak)


if __name__ == "__main__":
    main()
