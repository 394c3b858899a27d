"""The picture of the frontier. It needs matplotlib."""
import json
import os

import torch

from common.files import write_atomically
from engine.files import import_package


def import_pyplot():
    """matplotlib's pyplot, drawing into files; exits with one line if it is not installed."""
    import_package("matplotlib", "drawing", "matplotlib").use("Agg")
    return import_package("matplotlib.pyplot", "drawing", "matplotlib")


def save_figure(figure, path):
    with write_atomically(path, "wb") as f:
        figure.savefig(f, dpi=120, format=path.rpartition(".")[2])


def read_rows(path, key):
    """The rows of another table to draw beside one's own: of docs/frontier.json, or what --json wrote.

    Leaves out those of the optimum and of best-of-n. Exits with one line if the file is no such table, or if
    no row has a `key`, "gold" or "score".
    """
    try:
        with open(path, encoding="utf-8") as f:
            table = json.load(f)
        rows = []
        for row in table:
            is_model = not row["checkpoint"].startswith(("optimum", "best"))
            if is_model and row["kl"] is not None and row.get(key) is not None:
                rows.append(row)
    except OSError as error:
        raise SystemExit(f"--beside={path}: cannot be read ({error})")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SystemExit(f"--beside={path}: not a table that evaluate.py --json or docs/frontier.py wrote")
    if not rows:
        raise SystemExit(f"--beside={path}: no row has both kl and {key}")
    return rows


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
