"""Datasets, tokenizers and the packed batch. What a dataset gives:

    demonstrations(split)   -> list of (prompt, response)
    comparisons(split, k=2) -> list of (prompt, [response, …] best first), k responses where the data has as many
    prompts(split)          -> list of prompt
    gold(prompt, response)  -> the true reward, where one can be computed
    tokenizer()             -> a tiktoken.Encoding

with split one of "train", "validation", "test".
"""
import os

from data.packing import Batch, batch_order, group_length, micro_batches, pack, per_sequence
from data.tokenizers import encode_groups, encode_prompts, get_tokenizer


def dataset(name, data_dir="data/files"):
    """The dataset called `name` ("animals", "hh", "hh/SUBSET"), or the one in the file of that path."""
    if name == "animals":
        from data import animals
        return animals
    if name.split("/")[0] == "hh" and not os.path.exists(name):
        from data.hh import HH, SUBSETS
        subset = name.partition("/")[2]
        if subset and subset not in SUBSETS:
            raise SystemExit(f"--data={name}: HH-RLHF has {', '.join(SUBSETS)}")
        return HH(data_dir, [subset] if subset else SUBSETS)
    if not os.path.isfile(name):
        raise SystemExit(f"--data={name}: no such file, and none of the datasets animals, hh")
    from data.jsonl import Jsonl
    return Jsonl(name)
