"""Files that are written completely or not at all."""
import os
from contextlib import contextmanager, suppress


@contextmanager
def write_atomically(path, mode="w"):
    """Opens a temporary file to write to; at the end it is flushed to disk and renamed to `path`.

    Makes the folder if it is missing. If writing fails, the file that was there before is untouched, and the
    program exits with a one-line message.
    """
    temporary = path + ".tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        problem = os_error(error)
        with suppress(OSError):
            os.remove(temporary)
        raise cannot_write(path, problem)


@contextmanager
def append_to(path):
    """Opens a file to append to, after making its folder if it is missing.

    If writing fails, what was appended is cut off again, and the program exits with a one-line message.
    """
    size = None
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "a", encoding="utf-8") as f:
            size = f.tell()
            yield f
    except (OSError, RuntimeError) as error:
        problem = os_error(error)
        with suppress(OSError):
            if size is not None:
                os.truncate(path, size)
        raise cannot_write(path, problem)


def os_error(error):
    """The OSError behind an error, which torch.save hides in a RuntimeError; raises any other error again."""
    problem = error if isinstance(error, OSError) else error.__context__
    if not isinstance(problem, OSError):
        raise error
    return problem


def cannot_write(path, problem):
    return SystemExit(f"{path}: cannot be written ({problem}); what was there before is untouched. "
                      "Make room or name another place; a run continues with --resume")
