"""Datasets and tokenizers. A dataset is a module or an object with these functions, as far as its data have them:

    demonstrations(split)   -> [(prompt, response), …]
    comparisons(split, k=2) -> [Comparison(prompt, responses, ranks), …] of k responses each, if the data have as many
    prompts(split)          -> [prompt, …]
    spans(split)            -> [(prompt, response, [(start, end, category), …]), …], in characters of the response
    completeness(split)     -> comparisons by how complete the responses are
    gold(prompt, response)  -> the true reward, where it can be computed
    tokenizer()             -> a tiktoken.Encoding

split is "train", "validation" or "test". Prompts and responses are text.
"""
import os

from data import animals
from data.comparisons import check_pairs, encode_pairs
from data.hh import HH, SUBSETS
from data.imdb import IMDB
from data.jsonl import Jsonl
from data.qa_feedback import QAFeedback
from data.tldr import TLDR
from data.tokenizers import encode_groups, encode_prompts, get_tokenizer


def dataset(name, data_dir="data/files"):
    """The dataset of that name ("animals", "hh", "hh/SUBSET", "qa_feedback", "tldr", "imdb"), or of the file at that path."""
    if name == "animals":
        return animals
    if name.split("/")[0] == "hh" and not os.path.isfile(name):
        subset = name.partition("/")[2]
        if subset and subset not in SUBSETS:
            raise SystemExit(f"--data={name}: HH-RLHF has {', '.join(SUBSETS)}")
        return HH(data_dir, [subset] if subset else SUBSETS)
    if name == "qa_feedback" or name.endswith("_feedback.json") and os.path.isfile(name):
        return QAFeedback(data_dir, None if name == "qa_feedback" else name)
    if name == "tldr":
        return TLDR(data_dir)
    if name == "imdb":
        return IMDB(data_dir)
    if not os.path.isfile(name):
        hint = ""
        if os.path.basename(name) == "imdb-pairs.jsonl":
            hint = "; `python sample.py out/sft-imdb --pairs=out/imdb-pairs.jsonl --reward_model=out/reward-imdb` makes it"
        raise SystemExit(f"--data={name}: no such file, and none of the datasets animals, hh, qa_feedback, tldr, imdb{hint}")
    return Jsonl(name)
