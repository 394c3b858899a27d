"""Reading a JSON object per line, and one-line messages about the lines that cannot be used."""
import gzip
import json
import zlib

LONGEST = 2**24  # bytes of a line: thousands of contexts, and no .gz can fill the memory with one


def read_lines(path):
    """Yields ("path:line", object) for every line of a .jsonl or .jsonl.gz file that is not blank."""
    line = 0
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as f:
            for line, text in enumerate(iter(lambda: f.readline(LONGEST), b""), 1):
                if len(text) == LONGEST:
                    raise SystemExit(f"{path}:{line}: a line of {LONGEST >> 20} MiB or more")
                if not text.strip():
                    continue
                try:
                    record = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise SystemExit(f"{path}:{line}: not JSON ({error})")
                if not isinstance(record, dict):
                    raise SystemExit(f"{path}:{line}: expected an object, found {type(record).__name__}")
                yield f"{path}:{line}", record
    except (OSError, EOFError, zlib.error) as error:
        raise SystemExit(f"{path}:{line + 1}: cannot be read ({error})")


def check_text(where, *texts):
    """SystemExit where a text holds half of a surrogate pair, as "\\ud800" in JSON makes one: neither UTF-8 nor a tokenizer has it."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise SystemExit(f"{where}: half of a surrogate pair (one of \\ud800 … \\udfff, alone) is no character")
