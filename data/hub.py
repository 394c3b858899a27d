"""--data=hub:OWNER/NAME[:SPLIT]: a data set of the Hugging Face hub, read with the package `datasets`.

Its rows are records in one of the shapes of data/jsonl.py, and are read, refused and split as those of a
file. SPLIT is one of its splits; without it, the one named train, or else the only one. A folder of .parquet,
.json or .jsonl files can stand in place of OWNER/NAME, as `datasets` allows. Nothing from the hub is executed.
"""
from data.jsonl import Jsonl
from engine.files import first_line, import_package, short_repr

PREFIX = "hub:"
PACKAGES = '"datasets>=4"'  # older ones may run a script of the data set


class Hub(Jsonl):
    """self.path is the value of --data here, for messages."""

    def raw_records(self):
        """Yields ("hub:OWNER/NAME:record N", row as a dict)."""
        for n, record in enumerate(load(self.path), 1):
            yield f"{self.path}:record {n}", record


def load(name):
    """The rows of hub:OWNER/NAME[:SPLIT]; exits with one line if they cannot be had."""
    datasets = import_package("datasets", f"--data={name}", PACKAGES)
    if int(datasets.__version__.partition(".")[0]) < 4:
        raise SystemExit(f"--data={name}: datasets {datasets.__version__} is too old, since it may run "
                         f"code from the hub: pip install -U {PACKAGES}")
    path, _, split = name.removeprefix(PREFIX).partition(":")
    try:
        splits = datasets.load_dataset(path)
    except Exception as error:  # those of datasets, huggingface_hub, pyarrow and requests
        raise SystemExit(f"--data={name}: cannot be loaded ({first_line(error)})")
    if not split:
        split = "train" if "train" in splits or len(splits) > 1 else [*splits][0]
    if split not in splits:
        raise SystemExit(f"--data={name}: has no split {short_repr(split)}, only {', '.join(splits)}; "
                         f"name one as {PREFIX}{path}:SPLIT")
    return splits[split]
