"""Pictures of what runs logged: their curves, and over-optimization. They need matplotlib."""
import json
import math
import os

import torch
import torch.nn.functional as F

from common.plots import import_pyplot, save_figure

# A panel for each entry; two keys in one entry share a panel.
CURVES = ["loss", "val_loss", "accuracy", "val_accuracy", "margin", "chosen_logp rejected_logp",
          "chosen_reward rejected_reward", "score", "gold", "reward", "kl", "kl_coef", "entropy", "clip_frac",
          "approx_kl", "policy_loss", "value_loss", "explained_variance", "response_len", "lr", "grad_norm"]


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


def plot_overoptimization(path, runs):
    """Draws reward-model score and true reward against √KL along PPO runs that differ in their seed.

    A point is an iteration of all runs; the line is its running mean, over fewer iterations at both ends.
    Behind it, faint, are the running means of each run.
    """
    logs = []
    for run in runs:
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
        logs.append(points)
    n = min(map(len, logs))
    mean = torch.stack([points[:n] for points in logs]).mean(0)  # (n, 3)
    plt = import_pyplot()
    figure, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    for i, label in ((1, "reward model's score"), (2, "true reward")):
        for points in logs:
            smooth = shrinking_means(points, 5)
            ax.plot(smooth[:, 0], smooth[:, i], color=f"C{i}", alpha=0.3, lw=1)
        smooth = shrinking_means(mean, 5)
        ax.plot(mean[:, 0], mean[:, i], ".", color=f"C{i}", alpha=0.3)
        ax.plot(smooth[:, 0], smooth[:, i], color=f"C{i}", label=label)
    title = runs[0] if len(runs) == 1 else f"mean of {len(runs)} runs, and each of them"
    ax.set(xlabel="√KL(π‖π_ref), nats", ylabel="reward", title=title)
    ax.legend()
    save_figure(figure, path)
