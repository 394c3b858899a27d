"""Files: fetched once and whole, read a JSON line at a time, and what is said of bad ones: one line, whatever they hold."""
import gzip
import hashlib
import json
import os
import reprlib
import zlib
from http.client import HTTPException
from urllib.request import urlopen

LONGEST = 2**24  # bytes of a line: thousands of contexts, and no .gz can fill the memory with one
RANK = int(os.environ.get("RANK", 0))  # which process of torchrun's this is
SHORT = reprlib.Repr()
SHORT.maxlevel = 1
shown = SHORT.repr  # repr on one line, its middle left out where it is long


def say(*text, end="\n"):
    """Prints, once and not once a process."""
    if RANK == 0:
        print(*text, end=end, flush=True)


def fetch(path, url, sha256=None):
    """`path`, downloaded from `url` first where it is missing; SystemExit where that fails or its sha256 is another."""
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            download(url, path, sha256)
        except (OSError, HTTPException) as error:
            raise SystemExit(f"{path} is missing and {url} cannot be fetched ({error}); put the file there, "
                             "or point --data_dir (data) or TORCH_HOME (weights) at its folder")
    elif sha256:
        with open(path, "rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != sha256:
                raise SystemExit(f"{path} is not the published file (its sha256 differs); delete it and it is fetched again")
    return path


def download(url, path, sha256=None):
    """Whole or not at all: with its progress, written aside, then renamed. OSError where it is not what was asked for."""
    part, digest, done = f"{path}.{os.getpid()}.part", hashlib.sha256(), 0
    try:
        with urlopen(url, timeout=60) as response, open(part, "wb") as f:
            if not response.url.startswith("https://"):
                raise OSError(f"led to {response.url}, which is not https")
            while chunk := response.read(2**20):
                f.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                say(f"\rfetching {url}: {done / 2**20:.1f} MiB", end="")
            if response.length:  # http.client does not mind an early end
                raise OSError(f"the connection ended {response.length} bytes early")
        if sha256 and digest.hexdigest() != sha256:
            raise OSError("its sha256 is not that of the published file")
        os.replace(part, path)
    finally:
        say()
        if os.path.exists(part):
            os.remove(part)


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
