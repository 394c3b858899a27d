"""Datasets, tokenizers and the packed batch. What a dataset gives:

    demonstrations(split)   -> list of (prompt, response)
    comparisons(split, k=2) -> list of (prompt, [response, …] best first), k responses where the data has as many; where some tie,
                               (prompt, [response, …], [rank, …]), 0 best
    prompts(split)          -> list of prompt
    spans(split)            -> list of (prompt, response, [(start, end, category), …]), in characters of the response
    completeness(split)     -> list of (prompt, [response, …] the most complete first)
    gold(prompt, response)  -> the true reward, where one can be computed
    tokenizer()             -> a tiktoken.Encoding

with split one of "train", "validation", "test".
"""
import os

from data.packing import Batch, batch_order, group_length, micro_batches, pack, per_sequence
from data.tokenizers import encode_groups, encode_prompts, get_tokenizer


def dataset(name, data_dir="data/files"):
    """The dataset called `name` ("animals", "hh", "hh/SUBSET", "qa_feedback", "tldr", "imdb"), or the one in the file of that path."""
    if name == "animals":
        from data import animals
        return animals
    if name.split("/")[0] == "hh" and not os.path.isfile(name):
        from data.hh import HH, SUBSETS
        subset = name.partition("/")[2]
        if subset and subset not in SUBSETS:
            raise SystemExit(f"--data={name}: HH-RLHF has {', '.join(SUBSETS)}")
        return HH(data_dir, [subset] if subset else SUBSETS)
    if name == "qa_feedback" or name.endswith("_feedback.json") and os.path.isfile(name):
        from data.qa_feedback import QAFeedback
        return QAFeedback(data_dir, None if name == "qa_feedback" else name)
    if name == "tldr":
        from data.tldr import TLDR
        return TLDR(data_dir)
    if name == "imdb":
        from data.imdb import IMDB
        return IMDB(data_dir)
    if not os.path.isfile(name):
        hint = "; `python data/imdb.py` makes it" if os.path.basename(name) == "imdb-pairs.jsonl" else ""
        raise SystemExit(f"--data={name}: no such file, and none of the datasets animals, hh, qa_feedback, tldr, imdb{hint}")
    from data.jsonl import Jsonl
    return Jsonl(name)
