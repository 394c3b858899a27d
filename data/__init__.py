"""Datasets and tokenizers. A dataset is a module or an object with some of these functions.

Every stage needs prompts and tokenizer; a stage that needs more says so when it starts.

    demonstrations(split)   -> [(prompt, response), …]
    comparisons(split, k=2) -> [Comparison(prompt, responses, ranks), …], each of k responses
    prompts(split)          -> [prompt, …]
    spans(split)            -> [(prompt, response, [(start, end, category), …]), …], in characters
    completeness(split)     -> [Comparison, …] that rank responses by how complete they are
    gold(prompt, response)  -> the true reward, where it can be computed
    label(prompt, response, rng) -> gold as a labeler sees it, with noise; sample.py ranks by it
    axes(prompt, response)  -> its parts, {"relevance": …, "factuality": …, "completeness": …}, if it has them
    grammatical(response)   -> how many sentences are well formed, and how many there are
    max_gold                   a number: the most that gold can be, where it is bounded
    cluster(prompt)         -> what prompts share that are not independent samples of prompts, for standard
                               errors; without it, only equal prompts share a cluster
    tokenizer()             -> a tiktoken.Encoding

`split` is "train", "validation" or "test". Prompts and responses are text.
"""
import os

from data import animals
from data.comparisons import check_pairs, encode_pairs
from data.hh import HH, SUBSETS
from data.hub import PREFIX, Hub
from data.imdb import IMDB
from data.jsonl import Jsonl
from data.qa_feedback import QAFeedback
from data.tldr import TLDR
from data.tokenizers import decode, encode_groups, encode_prompts, get_tokenizer


NEEDED = {"sft": "demonstrations", "reward": "comparisons", "dpo": "comparisons", "simpo": "comparisons"}


def check_contract(data, stage, name):
    """Exits with one line if a dataset lacks a function that a stage needs. name: that of --data."""
    for function in ("prompts", "tokenizer", NEEDED.get(stage, "prompts")):
        if not hasattr(data, function):
            raise SystemExit(f"--data={name}: {stage} needs its function {function} (data/__init__.py)")


def dataset(name, data_dir="data/files"):
    """Returns the dataset animals, hh, hh/SUBSET, qa_feedback, tldr or imdb, or hub:OWNER/NAME, or a file's.

    Raises SystemExit with a one-line message if there is no such dataset and no such file.
    """
    if name == "animals":
        return animals
    if name == "qa_feedback":
        return QAFeedback(data_dir)
    if name == "tldr":
        return TLDR(data_dir)
    if name == "imdb":
        return IMDB(data_dir)
    if os.path.isfile(name):
        if name.endswith("_feedback.json"):
            return QAFeedback(data_dir, name)
        return Jsonl(name)
    if name.startswith(PREFIX):
        return Hub(name)
    base, _, subset = name.partition("/")
    if base == "hh":
        if not subset:
            return HH(data_dir)
        if subset not in SUBSETS:
            raise SystemExit(f"--data={name}: HH-RLHF has {', '.join(SUBSETS)}")
        return HH(data_dir, [subset])
    hint = ""
    if os.path.basename(name) == "imdb-pairs.jsonl":
        hint = ("; `python sample.py out/sft-imdb --rank=out/reward-imdb --n=25000 "
                "--out=out/imdb-pairs.jsonl` makes it")
    raise SystemExit(f"--data={name}: no such file, and none of the datasets "
                     f"animals, hh, qa_feedback, tldr, imdb, hub:OWNER/NAME{hint}")
