"""Reddit posts with TL;DRs, and comparisons of summaries (Stiennon et al. 2020, arXiv:2009.01325).

Looks for the files below DATA_DIR/tldr/ and downloads those that are missing. Each line is a record:

    {train,valid,test}.jsonl     a demonstration: {id, subreddit, title, post, summary}
    comparisons/batchN.json      a comparison: {info: {id, subreddit, title, post},
                                                summaries: [{text, policy, note}, {text, policy, note}],
                                                choice: 0 or 1, the better summary,
                                                worker, batch, split: train, valid1 or valid2, extra}

Every batch of comparisons may contain records of every split. The paper selected its models on valid1, which
is "validation" here, and evaluated them on valid2, which is "test".

Left out: the batches about CNN/DM articles, the ratings on separate axes, and the posts without a summary
that the paper added as prompts for PPO.
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
# All batches about Reddit posts. There is no batch21.
BATCHES = [f"batch{i}" for i in range(3, 21)] + ["batch22", "edit_b2_eval_test"]
FILES = {"train": "train", "validation": "valid", "test": "test"}
SPLITS = {"train": "train", "valid1": "validation", "valid2": "test"}
KINDS = {str: "text", dict: "an object", list: "a list"}


class TLDR:
    def __init__(self, data_dir):
        self.folder = os.path.join(data_dir, "tldr")
        self.demonstrations = cache(self.demonstrations)

    def tokenizer(self):
        return get_tokenizer("gpt2")

    def demonstrations(self, split):
        name = FILES[split] + ".jsonl"
        path = fetch(os.path.join(self.folder, name), URL + "datasets/tldr_3_filtered/" + name)
        examples = []
        for where, record in read_lines(path):
            examples.append((prompt(record, where), response(record, "summary", where)))
        return examples

    def prompts(self, split):
        return [prompt for prompt, _ in self.demonstrations(split)]

    def comparisons(self, split, k=2):
        """Returns [Comparison, …]. Leaves out comparisons with an empty summary and logs how many."""
        if k != 2:
            raise SystemExit(f"--k={k}: the comparisons of tldr are pairs, K is 2")
        examples = []
        n_empty = 0
        for batch in BATCHES:
            name = f"comparisons/{batch}.json"
            path = fetch(os.path.join(self.folder, name), URL + "dataset/" + name)
            for where, record in read_lines(path):
                example = comparison(record, split, where)
                if example is None:
                    continue
                if " " in example.responses:  # nothing but the space that `response` adds
                    n_empty += 1
                else:
                    examples.append(example)
        if n_empty:
            log.info(f"tldr: left out {n_empty} comparisons of the {split} split with an empty summary")
        return examples


def prompt(post, where):
    """Writes a post in the format of the paper's Table 4."""
    subreddit = field(post, "subreddit", str, where)
    title = field(post, "title", str, where)
    body = field(post, "post", str, where)
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {body}\n\nTL;DR:"


def response(record, key, where):
    """Returns a summary with one leading space. In the files, only summaries written by models have one."""
    return " " + field(record, key, str, where).strip()


def comparison(record, split, where):
    """Converts a record to a Comparison, or returns None if it belongs to another split.

    Raises SystemExit with one line that starts with `where` ("path:line") if the record is not a comparison.
    """
    record_split = field(record, "split", str, where)
    if record_split not in SPLITS:
        raise SystemExit(f"{where}: unknown split {short_repr(record_split)}; there are {', '.join(SPLITS)}")
    if SPLITS[record_split] != split:
        return None
    info = field(record, "info", dict, where)
    summaries = field(record, "summaries", list, where)
    choice = record.get("choice")
    if len(summaries) != 2 or not all(isinstance(summary, dict) for summary in summaries):
        raise SystemExit(f"{where}: 'summaries' must be two objects with a 'text'")
    if type(choice) is not int or choice not in (0, 1):
        raise SystemExit(f"{where}: 'choice' must be 0 or 1, the better of the two summaries; "
                         f"found {short_repr(choice)}")
    responses = [response(summary, "text", where) for summary in summaries]
    return Comparison(prompt(info, where), [responses[choice], responses[1 - choice]], ranks=[0, 1])


def field(record, key, kind, where):
    """Returns record[key] if it is a `kind`. Otherwise raises SystemExit with one line that names `where`."""
    if key not in record:
        raise SystemExit(f"{where}: {key!r} must be {KINDS[kind]}, it is missing")
    value = record[key]
    if not isinstance(value, kind):
        raise SystemExit(f"{where}: {key!r} must be {KINDS[kind]}, found {type(value).__name__}")
    if kind is str:
        check_text(where, value)
    return value
