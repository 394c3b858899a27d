"""Reads files with one JSON object per line, and exits with a one-line message if a line cannot be used."""
import gzip
import json
import zlib

LONGEST = 2**24  # bytes per line: more than any context needs, and a .gz bomb cannot fill memory


def read_lines(path):
    """Yields ("path:line", object) for every non-blank line of a .jsonl or .jsonl.gz file."""
    open_file = gzip.open if path.endswith(".gz") else open
    line = 0
    try:
        with open_file(path, "rb") as f:
            while content := f.readline(LONGEST):
                line += 1
                where = f"{path}:{line}"
                if len(content) == LONGEST:
                    raise SystemExit(f"{where}: a line of {LONGEST >> 20} MiB or more")
                if not content.strip():
                    continue
                try:
                    record = json.loads(content)
                except (ValueError, RecursionError) as error:
                    raise SystemExit(f"{where}: not JSON ({error})")
                if not isinstance(record, dict):
                    raise SystemExit(f"{where}: expected an object, found {type(record).__name__}")
                yield where, record
    except (OSError, EOFError, zlib.error) as error:
        raise SystemExit(f"{path}:{line + 1}: cannot be read ({error})")


def check_text(where, *texts):
    """Raises SystemExit if a text contains half of a surrogate pair.

    JSON can spell one ("\\ud800"), but it is not a character: neither UTF-8 nor a tokenizer can encode it.
    """
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise SystemExit(f"{where}: half of a surrogate pair (\\ud800 … \\udfff) is not a character")
