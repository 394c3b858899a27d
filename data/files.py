"""Reads files of JSON objects or Parquet rows; exits with a one-line message if one cannot be used."""
import gzip
import json
import re
import zlib
from contextlib import contextmanager

from engine.files import first_line, import_package, short_repr

LONGEST = 2**24  # bytes per line: more than any context needs, and a .gz bomb cannot fill memory
LARGEST = 2**30  # bytes of a file that is one JSON value
ROWS = 1024      # of a Parquet file that are in memory as objects at one time
ONE_VALUE = re.compile(rb'\[|\{$|\{\s*"data"\s*:\s*(\[|$)')  # how the first line of such a file begins


def open_file(path):
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")


@contextmanager
def readable(path):
    """Opens a file; exits with one line if it cannot be opened or read."""
    try:
        with open_file(path) as f:
            yield f
    except (OSError, EOFError, zlib.error) as error:
        raise SystemExit(f"{path}:1: cannot be read ({error})")


def read_records(path):
    """Yields ("path:line", object) of a file of one object per line, a JSON list, {"data": […]}, or Parquet.

    In the latter three, the place of an object is "path:record N".
    """
    if path.endswith(".parquet"):
        yield from read_parquet(path)
        return
    if not is_one_value(path):
        yield from read_lines(path)
        return
    with readable(path) as f:
        content = f.read(LARGEST)
    if len(content) == LARGEST:
        raise SystemExit(f"{path}:1: a JSON value of {LARGEST >> 30} GiB or more; write one object per line")
    records = parse_json(content, f"{path}:1")
    if isinstance(records, dict) and isinstance(records.get("data"), list):
        records = records["data"]
    if isinstance(records, dict):
        records = [records]  # a single object, written over several lines
    for i, record in enumerate(records, 1):
        where = f"{path}:record {i}"
        yield where, as_object(record, where)


def read_parquet(path):
    """Yields ("path:record N", row as a dict) of a Parquet file, with the package pyarrow."""
    pyarrow = import_package("pyarrow", path, "pyarrow")
    parquet = import_package("pyarrow.parquet", path, "pyarrow")
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for name in names:
                if names.count(name) > 1:
                    raise SystemExit(f"{path}: the column {short_repr(name)} appears twice")
            n = 0
            for rows in file.iter_batches(ROWS):
                for record in rows.to_pylist():
                    n += 1
                    yield f"{path}:record {n}", record
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise SystemExit(f"{path}: not a Parquet file, or damaged ({first_line(error)})")


def is_one_value(path):
    """Whether the file is one JSON value, by how its first line begins."""
    with readable(path) as f:
        content = f.readline(LONGEST)
        while content.isspace():
            content = f.readline(LONGEST)
    return ONE_VALUE.match(content.strip()) is not None


def parse_json(content, where):
    """Parses JSON bytes; exits with one line if they are none, or if an object has a key twice."""
    def without_duplicates(pairs):
        record = dict(pairs)
        if len(record) < len(pairs):
            names = [key for key, _ in pairs]
            twice = next(key for key in names if names.count(key) > 1)
            raise ValueError(f"the key {short_repr(twice)} appears twice")
        return record

    try:
        return json.loads(content, object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise SystemExit(f"{where}: not JSON ({error})")


def as_object(record, where):
    if not isinstance(record, dict):
        raise SystemExit(f"{where}: expected an object, found {type(record).__name__}")
    return record


def read_lines(path):
    """Yields ("path:line", object) for every non-blank line of a .jsonl or .jsonl.gz file."""
    line = 0
    try:
        with open_file(path) as f:
            while content := f.readline(LONGEST):
                line += 1
                where = f"{path}:{line}"
                if len(content) == LONGEST:
                    raise SystemExit(f"{where}: a line of {LONGEST >> 20} MiB or more")
                if not content.strip():
                    continue
                yield where, as_object(parse_json(content, where), where)
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
