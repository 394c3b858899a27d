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

COLORS = [f"C{i}" for i in (0, 1, 2, 3, 4, 5, 6, 8, 9)]  # matplotlib's, without the gray of best-of-n


def plot_frontier(path, key, rows, optimum, best):
    """Reward against exact KL: the optimum, best-of-n, and each checkpoint with its standard errors.

    Rows of one method (row["method"], or else the stage in the checkpoint's name) share a color. With
    "method", a line also joins them, in their order. Each row is labeled with row["label"], or else its name;
    "" means no label. The axis ends a little beyond the optimum's curve. A row further out is an arrow at the
    edge, with its KL.
    """
    plt = import_pyplot()
    figure, ax = plt.subplots(figsize=(8, 5.5), layout="constrained")
    x = torch.tensor([row["kl"] for row in optimum])
    y = torch.tensor([row[key] for row in optimum])
    se = torch.tensor([row[key + "_se"] for row in optimum])
    ax.plot(x, y, color="black", label="optimum  π* ∝ π_ref exp(r/β)")
    ax.fill_between(x, y - se, y + se, color="black", alpha=0.15, lw=0)
    x_best = [row["kl"] for row in best]
    y_best = [row[key] for row in best]
    ax.plot(x_best, y_best, ".--", color="gray", label="best of 1, 2, 4, …")
    end = 1.2 * max(x.max().item(), 0.1)
    # What labels must not cover: points along all that is drawn.
    obstacles = along(x.tolist(), y.tolist()) + along(x_best, y_best)

    methods = list(dict.fromkeys(row.get("method") or stage_of(row["checkpoint"]) for row in rows))
    labels = []  # (text, x, y, color)
    for method in methods:
        color = COLORS[methods.index(method) % len(COLORS)]
        points = [row for row in rows if (row.get("method") or stage_of(row["checkpoint"])) == method]
        if "method" in points[0]:
            shown = [row for row in points if row["kl"] <= end]
            line = [row["kl"] for row in shown], [row[key] for row in shown]
            ax.plot(*line, color=color, lw=0.8, alpha=0.5)
            obstacles += along(*line)
        for row in points:
            name = row.get("label", row["checkpoint"].removeprefix("out/"))
            where = (min(row["kl"], end), row[key])
            if row["kl"] > end:
                ax.plot(*where, ">", color=color, ms=6)
                name = f"{name} at {row['kl']:.1f}"
            else:
                ax.errorbar(*where, row[key + "_se"], row["kl_se"], "o", color=color, capsize=2, ms=4)
                low, high = row["kl"] - (row["kl_se"] or 0), row["kl"] + (row["kl_se"] or 0)
                obstacles += along([low, high], [row[key], row[key]])
                low, high = row[key] - (row[key + "_se"] or 0), row[key] + (row[key + "_se"] or 0)
                obstacles += along([row["kl"], row["kl"]], [low, high])
            obstacles.append(where)
            if name:
                labels.append((name, *where, color))
    ax.set_xlim(-0.06 * end, 1.04 * end)
    ax.set(xlabel="KL(π‖π_ref), exact, nats per response",
           ylabel="true reward" if key == "gold" else "reward model's score")
    ax.legend(loc="lower right")
    place_labels(figure, ax, labels, obstacles)
    save_figure(figure, path)


def along(x, y, n=20):
    """Points (x, y) along the line through some points, n on each piece."""
    points = []
    for i in range(len(x) - 1):
        for j in range(n + 1):
            points.append((x[i] + (x[i + 1] - x[i]) * j / n, y[i] + (y[i + 1] - y[i]) * j / n))
    return points


def place_labels(figure, ax, labels, obstacles):
    """Writes each label (text, x, y, color) beside its point, where it covers no other label and no obstacle.

    obstacles: points (x, y). If every place covers something, the one that covers least is taken.
    """
    figure.canvas.draw()  # only now are positions in pixels known
    frame = ax.get_window_extent()
    taken = [ax.get_legend().get_window_extent()]
    points = ax.transData.transform(obstacles)
    # Each label tries all directions, near its point first, and keeps the place that covers least.
    for text, x, y, color in labels:
        annotation = ax.annotate(text, (x, y), (0, 0), color=color, fontsize=8, textcoords="offset points")
        annotation.set_va("center")
        places = []
        for distance in (8, 14, 20, 28, 38, 50):
            # In each direction: on the right, below, above, on the left, …
            for dx, dy in ((1, 0), (1, -1), (1, 1), (-1, 0), (-1, 1), (-1, -1), (0, -1.5), (0, 1.5)):
                annotation.set_ha({1: "left", -1: "right", 0: "center"}[dx])
                annotation.set_position((distance * dx, distance * dy))
                box = annotation.get_window_extent()
                covered = sum(box.overlaps(other) for other in taken)
                covered += sum(box.contains(*point) for point in points)
                is_inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
                places.append((covered + 100 * (not is_inside), distance, dx, dy))
        _, distance, dx, dy = min(places, key=lambda place: place[:2])
        annotation.set_ha({1: "left", -1: "right", 0: "center"}[dx])
        annotation.set_position((distance * dx, distance * dy))
        if distance > 14:  # a thin line from a label that had to move away to its point
            ax.annotate("", (x, y), (distance * dx, distance * dy), textcoords="offset points",
                        arrowprops=dict(arrowstyle="-", color=color, lw=0.5, shrinkA=0, shrinkB=3))
        taken.append(annotation.get_window_extent())


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
