"""Pictures: the frontier, the curves of runs, over-optimization. They need matplotlib."""
import json
import math
import os

import torch
import torch.nn.functional as F

from common.files import write_atomically

# A panel for each entry; two keys in one entry share a panel.
CURVES = ["loss", "val_loss", "accuracy", "val_accuracy", "margin", "chosen_logp rejected_logp",
          "chosen_reward rejected_reward", "score", "gold", "reward", "kl", "kl_coef", "entropy", "clip_frac",
          "approx_kl", "policy_loss", "value_loss", "explained_variance", "response_len", "lr", "grad_norm"]


def import_pyplot():
    """matplotlib's pyplot, drawing into files; exits with one line if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("drawing needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def save_figure(figure, path):
    with write_atomically(path, "wb") as f:
        figure.savefig(f, dpi=120, format=path.rpartition(".")[2])


# ----------------------------------------------------------------------------------------------- the frontier

def plot_frontier(path, key, rows, optimum, best):
    """Reward against exact KL: the optimum, best-of-n, and each checkpoint with its standard errors."""
    plt = import_pyplot()
    figure, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    x = torch.tensor([row["kl"] for row in optimum])
    y = torch.tensor([row[key] for row in optimum])
    se = torch.tensor([row[key + "_se"] for row in optimum])
    ax.plot(x, y, color="black", label="optimum  π* ∝ π_ref exp(r/β)")
    ax.fill_between(x, y - se, y + se, color="black", alpha=0.15, lw=0)
    x_best = [row["kl"] for row in best]
    y_best = [row[key] for row in best]
    ax.plot(x_best, y_best, ".--", color="gray", label="best of 1, 2, 4, …")

    stages = sorted({stage_of(row["checkpoint"]) for row in rows})
    for row in rows:
        color = f"C{stages.index(stage_of(row['checkpoint']))}"
        ax.errorbar(row["kl"], row[key], row[key + "_se"], row["kl_se"], "o", color=color, capsize=2, ms=4)
        # To keep the labels of neighbors apart, the lower one's is below its point, the higher one's above.
        others = [other for other in rows if other is not row]
        nearest = min(others, key=lambda other: abs(other["kl"] - row["kl"]), default=row)
        if row[key] <= nearest[key]:
            place = dict(xytext=(6, -10), ha="left")
        else:
            place = dict(xytext=(-6, 8), ha="right")
        ax.annotate(row["checkpoint"].removeprefix("out/"), (row["kl"], row[key]), color=color, fontsize=8,
                    textcoords="offset points", **place)
    ax.margins(x=0.12)
    ax.set(xlabel="KL(π‖π_ref), exact, nats per response",
           ylabel="true reward" if key == "gold" else "reward model's score")
    ax.legend(loc="lower right")
    save_figure(figure, path)


def stage_of(name):
    """out/dpo-animals -> dpo."""
    return os.path.basename(name.rstrip("/")).split("-")[0]


# ------------------------------------------------------------------------------------------------------- logs

def read_log(run):
    """[(step, record), …] of a run's log.jsonl; exits with one line if it is missing or damaged."""
    path = os.path.join(run, "log.jsonl")
    log = []
    try:
        with open(path, encoding="utf-8") as f:
            for line in f:
                if line.endswith("\n"):  # a line without a newline is still being written
                    record = json.loads(line)
                    log.append((record["step"], record))
    except OSError as error:
        raise SystemExit(f"{path}: cannot be read ({error.strerror}); expected a run's folder")
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path}: line {len(log) + 1} is not a line of a run's log ({type(error).__name__})")
    return log


def curve(log, key):
    """The steps, values and running means of a key, (n,) each; None if the log has no value of it.

    A value that was not finite is NaN. A key that most steps lack, such as val_loss, was measured now and
    then; only the steps that have it count.
    """
    points = []
    for step, record in log:
        if key in record:
            points.append((step, math.nan if record[key] is None else record[key]))
    measured = [(step, value) for step, value in points if not math.isnan(value)]
    if not measured:
        return None
    if 2 * len(measured) < len(points):
        points = measured
    steps, values = torch.tensor(points, dtype=torch.float64).unbind(1)
    half = len(points) // 100  # no running mean with fewer than 100 points
    padded = F.pad(values, (half, half), value=math.nan)
    means = padded.unfold(0, 2 * half + 1, 1).nanmean(-1)
    return steps, values, means.where(values.isfinite(), math.nan)


def plot_curves(path, runs):
    """Draws what the runs logged: a panel for each of CURVES, and in it a line for each run.

    The line is the running mean; behind it, faint, are the values.
    """
    logs = [read_log(run) for run in runs]
    panels = {}
    for keys in CURVES:
        lines = []
        for i, log in enumerate(logs):
            for key, style in zip(keys.split(), ("-", "--")):
                points = curve(log, key)
                if points:
                    lines.append((i, style, points))
        if lines:
            panels[keys] = lines
    if not panels:
        raise SystemExit(f"{', '.join(runs)}: no steps are logged yet")

    plt = import_pyplot()
    n_columns = min(4, len(panels))
    n_rows = -(-len(panels) // n_columns)
    size = (4 * n_columns, 2.7 * n_rows)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained")
    for ax, (keys, lines) in zip(axes.flat, panels.items()):
        for i, style, (steps, values, means) in lines:
            look = dict(color=f"C{i}", ls=style, marker="." if len(steps) < 100 else "", ms=3)
            ax.plot(steps, values, alpha=0.25, **look)
            ax.plot(steps, means, **look)
        title = f"{keys.replace(' ', ', ')} (dashed)" if " " in keys else keys
        ax.set_title(title, fontsize=10)
    for ax in axes.flat[len(panels):]:
        ax.remove()
    figure.supxlabel("step")
    handles = [plt.Line2D([], [], color=f"C{i}") for i in range(len(runs))]
    figure.legend(handles, runs, loc="outside upper center", ncols=min(4, len(runs)))
    save_figure(figure, path)
    print(f"{path}: {len(panels)} panels of {', '.join(runs)}")


def shrinking_means(points, half):
    """Means of each point and its neighbors, `half` on either side and fewer towards both ends: (n, k)."""
    n = len(points)
    means = []
    for i in range(n):
        width = min(half, i, n - 1 - i)
        means.append(points[i - width:i + width + 1].mean(0))
    return torch.stack(means)


def plot_overoptimization(path, run):
    """Draws reward-model score and true reward against √KL along a PPO run.

    A point is an iteration, and the lines are running means, over fewer iterations towards both ends.
    """
    points = []
    for _, record in read_log(run):
        point = [record.get(key) for key in ("kl", "score", "gold")]
        if None not in point:
            points.append(point)
    if len(points) < 2:
        raise SystemExit(f"{run}: --overoptimization reads the log of a run of ppo.py "
                         "on data whose true reward is known")
    points = torch.tensor(points)
    points[:, 0].sqrt_()  # d = √KL(π‖π_init), arXiv:2210.10760 §1
    means = shrinking_means(points, 5)
    plt = import_pyplot()
    figure, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    for i, label in ((1, "reward model's score"), (2, "true reward")):
        ax.plot(points[:, 0], points[:, i], ".", color=f"C{i}", alpha=0.3)
        ax.plot(means[:, 0], means[:, i], color=f"C{i}", label=label)
    ax.set(xlabel="√KL(π‖π_ref), nats", ylabel="reward", title=run)
    ax.legend()
    save_figure(figure, path)
