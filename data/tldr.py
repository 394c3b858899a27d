"""Reddit posts, their TL;DRs, and comparisons of summaries (Stiennon et al. 2020, arXiv:2009.01325), as published by OpenAI.

A file is looked for at DATA_DIR/tldr/ before it is fetched; one line is

    {train,valid,test}.jsonl      {id, subreddit, title, post, summary}                                        demonstrations, prompts
    comparisons/batchN.json       {info: {id, subreddit, title, post}, summaries: [{text, policy, note}, …] two of them, choice: 0 | 1,
                                   worker, batch, split: train | valid1 | valid2, extra}                       comparisons

The comparisons of a split lie in all batches. The paper chose its models on valid1, which is "validation" here, and measured on valid2,
which is "test". Left out: the batches about CNN/DM articles, the ratings along axes, and the posts without a summary that the paper
added as prompts for PPO.
"""
import logging
import os
from functools import cache

from data.files import check_text, read_lines
from data.schema import Comparison
from data.tokenizers import get_tokenizer
from engine.files import fetch, short_repr

log = logging.getLogger(__name__)
URL = "https://openaipublic.blob.core.windows.net/summarize-from-feedback/"
BATCHES = [f"batch{i}" for i in [*range(3, 21), 22]] + ["edit_b2_eval_test"]  # all that are about posts; there is no batch21
FILES = {"train": "train", "validation": "valid", "test": "test"}
SPLITS = {"train": "train", "valid1": "validation", "valid2": "test"}
KINDS = {str: "text", dict: "an object", list: "a list"}


class TLDR:
    def __init__(self, data_dir):
        self.folder = os.path.join(data_dir, "tldr")
        self.demonstrations, self.pairs = cache(self.demonstrations), cache(self.pairs)

    def tokenizer(self):
        return get_tokenizer("gpt2")

    def demonstrations(self, split):
        name = FILES[split] + ".jsonl"
        path = fetch(os.path.join(self.folder, name), URL + "datasets/tldr_3_filtered/" + name)
        return [(prompt(record, where), response(record, "summary", where)) for where, record in read_lines(path)]

    def prompts(self, split):
        return [prompt for prompt, _ in self.demonstrations(split)]

    def pairs(self, split):
        """[(prompt, [chosen, rejected]), …]; what has an empty summary is left out, and counted."""
        examples, empty = [], 0
        for batch in BATCHES:
            path = fetch(os.path.join(self.folder, "comparisons", batch + ".json"), f"{URL}dataset/comparisons/{batch}.json")
            for where, record in read_lines(path):
                example = comparison(record, split, where)
                if example and " " in example.responses:
                    empty += 1
                elif example:
                    examples.append(example)
        if empty:
            log.info(f"tldr: left out {empty} comparisons of the {split} split with an empty summary")
        return examples

    def comparisons(self, split, k=2):
        if k != 2:
            raise SystemExit(f"--k={k}: the comparisons of tldr are pairs, K is 2")
        return self.pairs(split)


def prompt(post, where):
    """The format of the paper, its Table 4."""
    subreddit, title, body = (field(post, key, str, where) for key in ("subreddit", "title", "post"))
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {body}\n\nTL;DR:"


def response(record, key, where):
    """Begins with one space whoever wrote it: models' summaries are published with it, people's without."""
    return " " + field(record, key, str, where).strip()


def comparison(record, split, where):
    """(prompt, [chosen, rejected]), or None for a record of another split; SystemExit naming file and line where it is no comparison."""
    if field(record, "split", str, where) not in SPLITS:
        raise SystemExit(f"{where}: unknown split {short_repr(record['split'])}; there are {', '.join(SPLITS)}")
    if SPLITS[record["split"]] != split:
        return None
    info, summaries, choice = field(record, "info", dict, where), field(record, "summaries", list, where), record.get("choice")
    if len(summaries) != 2 or not all(isinstance(s, dict) for s in summaries):
        raise SystemExit(f"{where}: 'summaries' must be two objects with a 'text'")
    if type(choice) is not int or choice not in (0, 1):
        raise SystemExit(f"{where}: 'choice' must be 0 or 1, the better of the two summaries; found {short_repr(choice)}")
    responses = [response(s, "text", where) for s in summaries]
    return Comparison(prompt(info, where), [responses[choice], responses[1 - choice]], ranks=[0, 1])


def field(record, key, kind, where):
    """record[key], if it is there and of that kind; SystemExit naming file and line where not."""
    if not isinstance(record.get(key), kind):
        found = f"found {type(record[key]).__name__}" if key in record else "it is missing"
        raise SystemExit(f"{where}: {key!r} must be {KINDS[kind]}, {found}")
    if kind is str:
        check_text(where, record[key])
    return record[key]
