"""Rows of numbers as aligned text."""


def table(rows):
    """The rows as aligned text, mean±se; columns without a value are left out."""
    columns = [key for key in rows[0] if key + "_se" in rows[0]]
    keys = [key for key in columns if any(row[key] is not None for row in rows)]
    lines = [["", *keys]]
    for row in rows:
        cells = [mean_and_error(row[key], row[key + "_se"]) for key in keys]
        lines.append([row["checkpoint"], *cells])
    return aligned(lines)


def aligned(lines):
    """Lists of cells as aligned text, the first column to the left and the others to the right."""
    width = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = []
    for first, *others in lines:
        cells = [first.ljust(width[0])] + [cell.rjust(w) for cell, w in zip(others, width[1:])]
        text.append("  ".join(cells))
    return "\n".join(text)


def mean_and_error(mean, se):
    if mean is None:
        return ""
    return f"{mean:.3f}" if se is None else f"{mean:.3f}±{se:.3f}"
