"""Every point of the frontier in docs/results.md: seeds of the whole pipeline, SFT and reward model included.

    python docs/frontier.py 0 1 2

A run that is finished is skipped, so this may be stopped and started again, and `python docs/frontier.py 0` and
`… 1` may run side by side. When all of these seeds are done, it prints the table and draws frontier.png (which
needs matplotlib). Everything lies in out/frontier/SEED. ± is the standard error over seeds.
"""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from common.plots import plot_frontier  # noqa: E402
from common.standard_errors import mean_se  # noqa: E402
from data.animals import LABEL_SCALE  # noqa: E402

FOLDER = "out/frontier"
FIRST = {  # what the others start from
    "sft": "sft.py",
    "reward": "reward.py",
}
METHODS = {
    "dpo-beta0.3": "dpo.py --beta=0.3",
    "dpo": "dpo.py",
    "simpo": "simpo.py",
    "ppo": "ppo.py",
    "ppo-kl0.3": "ppo.py --kl_coef=0.3",
    "rloo": "ppo.py --advantage=rloo --k=8",
    "ppo-gold": "ppo.py --reward=gold --kl_coef=0.05",
}
COLUMNS = ["gold", "kl", "gap", "win_rate", "length", "grammar"]
# The β of each method in units of gold. The labels are σ(LABEL_SCALE · difference of gold), so the rewards that
# DPO fits and the reward model's scores are about LABEL_SCALE · gold.
BETA = {"dpo-beta0.3": 0.3 / LABEL_SCALE, "dpo": 1 / LABEL_SCALE, "ppo": 0.1 / LABEL_SCALE, "rloo": 0.1 / LABEL_SCALE,
        "ppo-kl0.3": 0.3 / LABEL_SCALE, "ppo-gold": 0.05}


def run(seed, name, command):
    """Runs a command in a folder of its own, unless it is finished."""
    folder = f"{FOLDER}/{seed}/{name}"
    if os.path.exists(f"{folder}/eval.json"):
        return
    script, *options = command.split()
    options += [f"--seed={seed}", f"--out={folder}"]
    if name != "sft":
        options.append(f"--init={FOLDER}/{seed}/sft")
    if script == "ppo.py" and "--reward=gold" not in options:
        options.append(f"--reward_model={FOLDER}/{seed}/reward")
    if os.path.exists(f"{folder}/ckpt.pt"):
        options.append("--resume")
    os.makedirs(folder, exist_ok=True)
    print(" ".join(["python", script, *options]), flush=True)
    with open(f"{folder}/console.txt", "a") as console:
        subprocess.run([sys.executable, ROOT / script, *options], stdout=console, check=True)


def evaluate(seed):
    """The frontier of this seed's SFT model, and all of its runs beside it."""
    path = f"{FOLDER}/{seed}/frontier.json"
    if not os.path.exists(path):
        folders = [f"{FOLDER}/{seed}/{name}" for name in ["sft", *METHODS]]
        command = [sys.executable, ROOT / "evaluate.py", *folders, "--frontier", f"--json={path}"]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    with open(path) as f:
        return json.load(f)


def mean_over_seeds(name, rows):
    """The mean of a row of each seed, with standard errors over them; no gap where a seed has none."""
    row = {"checkpoint": name}
    if len(rows) == 1:
        return rows[0] | row  # with the errors of that one table
    for key in ["gold", "kl", "gap", "win_rate", "length", "grammar", "score"]:
        values = [r.get(key) for r in rows]
        row[key], row[key + "_se"] = (None, None) if None in values else mean_se(values)
    return row


def aim(name, optimum):
    """Gold and KL of the optimum of a method's own β, as text; empty where the curve does not reach it."""
    beta = BETA.get(name)
    if beta is None or beta < min(row["beta"] for row in optimum):
        return ""
    nearest = min(optimum, key=lambda row: abs(math.log(row["beta"] / beta)))
    return f"{nearest['gold']:.2f} at {nearest['kl']:.2f}"


def markdown(rows, optimum):
    """The table, with the command of each row."""
    lines = ["| | " + " | ".join(COLUMNS) + " | its β aims at |", "|" + "---|" * (len(COLUMNS) + 2)]
    for row in rows:
        command = (FIRST | METHODS)[row["checkpoint"]]
        cells = []
        for key in COLUMNS:
            cells.append("" if row[key] is None else f"{row[key]:.3f}±{row[key + '_se'] or 0:.3f}")
        cells.append(aim(row["checkpoint"], optimum))
        lines.append(f"| `python {command}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    seeds = sys.argv[1:] or ["0", "1", "2"]
    for seed in seeds:
        for name, command in (FIRST | METHODS).items():
            run(seed, name, command)
    tables = [evaluate(seed) for seed in seeds]

    # The n-th row of each table is the same method; rows of the optimum and of best-of-n follow.
    n_rows = min(map(len, tables))
    names = ["sft", *METHODS]
    rows = [mean_over_seeds(name, [table[i] for table in tables]) for i, name in enumerate(names)]
    optimum, best = [], []
    for i in range(len(names), n_rows):
        same = [table[i] for table in tables]
        kind = same[0]["checkpoint"]
        if all(row["checkpoint"].startswith("optimum") for row in same):
            optimum.append(mean_over_seeds(kind, same) | {"beta": same[0]["beta"]})
    for kind in dict.fromkeys(row["checkpoint"] for row in tables[0] if row["checkpoint"].startswith("best")):
        same = [row for table in tables for row in table if row["checkpoint"] == kind]
        best.append(mean_over_seeds(kind, same))
    print(markdown(rows, optimum))
    plot_frontier(f"{FOLDER}/frontier.png", "gold", rows, optimum, best)


if __name__ == "__main__":
    main()
