"""Files that are downloaded once, and short quotes of values for error messages."""
import hashlib
import importlib
import logging
import os
import reprlib
from http.client import HTTPException
from urllib.request import urlopen

log = logging.getLogger(__name__)
SHORT = reprlib.Repr()
SHORT.maxlevel = 1


def short_repr(value):
    """repr(value) on one line; the middle of a long one is left out."""
    return SHORT.repr(value)


def first_line(error):
    """The beginning of another package's error message, which may be long and have several lines."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def import_package(module, where, packages):
    """Imports a package that only some need; exits with one line if it is missing.

    where: the file or option that needs it. packages: what to install, as pip calls it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise SystemExit(f"{where} needs a package that is not installed: pip install {packages}")


def fetch(path, url, sha256=None):
    """Returns `path`, after downloading it from `url` if there is no such file.

    Exits with a one-line message if the download fails or the file's sha256 is not the expected one.
    """
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            download(url, path, sha256)
        except (OSError, HTTPException) as error:
            raise SystemExit(f"{path} is missing and {url} cannot be fetched ({error}); put the file there, "
                             "or point --data_dir (data) or TORCH_HOME (weights) at its folder")
    elif sha256:
        with open(path, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        if digest != sha256:
            raise SystemExit(f"{path} is not the published file (its sha256 differs); "
                             "delete it and it is fetched again")
    return path


def download(url, path, sha256=None):
    """Downloads `url` into a temporary file and renames it to `path` once it is complete.

    Raises OSError, and leaves nothing behind, if the server redirects to something other than https, closes
    the connection early, or sends a file with another sha256.
    """
    part = f"{path}.{os.getpid()}.part"
    digest = hashlib.sha256()
    done = 0
    log.info(f"fetching {url}")
    try:
        with urlopen(url, timeout=60) as response, open(part, "wb") as f:
            if not response.url.startswith("https://"):
                raise OSError(f"led to {response.url}, which is not https")
            while chunk := response.read(2**20):
                f.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                if done % 2**26 == 0:
                    log.info(f"    {done / 2**20:.0f} MiB so far")
            if response.length:  # http.client accepts a connection that ends early
                raise OSError(f"the connection ended {response.length} bytes early")
        if sha256 and digest.hexdigest() != sha256:
            raise OSError("its sha256 is not that of the published file")
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)
