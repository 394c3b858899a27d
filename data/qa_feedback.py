"""QA-Feedback (Wu et al. 2023, arXiv:2306.01693): questions, passages, four model answers, and what annotators marked in them, as published.

A file is looked for at DATA_DIR/qa_feedback/{train,dev}_feedback.json before it is fetched; a path of one's own, ending in
_feedback.json, is split instead: of every ten records, the first is kept for validation and the second for test. One record is

    question, passages [[title, sentence, …], …], gold, "prediction 1" … "prediction 4", preference [12, 13, 14, 23, 24, 34],
    feedback {errors [{error type, start, end}, …] in prediction 1, missing-info […], corrected-prediction}

The prompt is passages and question, the question last: a prompt that is cut loses its beginning.
"""
import json
import logging
import os
from functools import cache
from itertools import combinations

from data.files import check_text
from data.schema import Comparison
from data.tokenizers import get_tokenizer
from engine.files import fetch, short_repr

log = logging.getLogger(__name__)
URL = "https://raw.githubusercontent.com/allenai/FineGrainedRLHF/main/tasks/qa_feedback/data/{}_feedback.json"
SHA256 = {"dev": "f394289ecfdc5a2d1663170254b92d75ad3c53ba36df9f627c70d4c6fc4f3291"}
CATEGORIES = ["Irrelevant", "Redundant", "Incoherent", "Wrong-Grounding", "Unverifiable"]
PREDICTIONS = [f"prediction {i}" for i in (1, 2, 3, 4)]
PAIRS = list(combinations(range(4), 2))  # the order of the six preferences


class QAFeedback:
    def __init__(self, data_dir, path=None):
        """path: one's own file; None: the published ones, below data_dir."""
        self.data_dir, self.path = data_dir, path
        self.read, self.records = cache(self.read), cache(self.records)

    def tokenizer(self):
        return get_tokenizer("gpt2")

    def read(self, name):
        path = self.path or fetch(os.path.join(self.data_dir, "qa_feedback", name + "_feedback.json"), URL.format(name), SHA256.get(name))
        try:
            with open(path, "rb") as f:
                records = json.load(f)
        except (OSError, ValueError, RecursionError) as error:
            raise SystemExit(f"{path}: cannot be read ({error})")
        if not isinstance(records, list):
            raise SystemExit(f"{path}: expected a list of records, found {type(records).__name__}")
        return [check(record, f"{path}: record {i}") for i, record in enumerate(records)]

    def records(self, split):
        if self.path:
            keep = {"train": range(2, 10), "validation": [0], "test": [1]}[split]
            return [record for i, record in enumerate(self.read("")) if i % 10 in keep]
        return self.read("train") if split == "train" else self.read("dev")[split == "test"::2]

    def demonstrations(self, split):
        return [(prompt(r), " " + r["gold"].strip()) for r in self.records(split)]

    def prompts(self, split):
        return [prompt(r) for r in self.records(split)]

    def comparisons(self, split, k=2):
        """k=2: every pair that one answer won. k=4: all four answers, best first, and their ranks, those that tie sharing one.

        A rank is what the six preferences add up to, an answer's wins less its losses; where they contradict each other, or a tie
        does not pass on, the ranks are their compromise.
        """
        result, ties = [], 0
        if k not in (2, 4):
            raise SystemExit(f"--k={k}: QA-Feedback compares four answers: K is 4, or 2 for their pairs")
        for r in self.records(split):
            answers = [" " + r[p].strip() for p in PREDICTIONS]
            pairs = [(a, b) if p == 1 else (b, a) for (a, b), p in zip(PAIRS, r["preference"]) if p]
            if k == 2:
                result += [Comparison(prompt(r), [answers[w], answers[l]], ranks=[0, 1]) for w, l in pairs]
                ties += len(PAIRS) - len(pairs)
                continue
            score = [sum((w == i) - (l == i) for w, l in pairs) for i in range(4)]
            order = sorted(range(4), key=lambda i: -score[i])
            ties += not any(score)
            if any(score):  # not all of them tie
                ranks = [sum(s > score[i] for s in score) for i in order]
                result.append(Comparison(prompt(r), [answers[i] for i in order], ranks))
        if ties:
            log.info(f"qa_feedback: left out {ties} comparisons of the {split} split that tie")
        return result

    def spans(self, split):
        """(prompt, prediction 1, [(start, end, category), …]), in characters of the response, a span to a place at most."""
        return [(prompt(r), " " + r["prediction 1"], [(e["start"] + 1, e["end"] + 1, e["error type"]) for e in r["feedback"]["errors"]])
                for r in self.records(split)]

    def completeness(self, split):
        """(prompt, [the annotator's correction, prediction 1]) where information was marked as missing in prediction 1."""
        result = []
        for r in self.records(split):
            correction = r["feedback"]["corrected-prediction"].strip()
            if r["feedback"]["missing-info"] and correction:
                responses = [" " + correction, " " + r["prediction 1"].strip()]
                result.append(Comparison(prompt(r), responses, ranks=[0, 1]))
        return result


def prompt(record):
    passages = "".join(f"{title}: {' '.join(sentences)}\n\n" for title, *sentences in record["passages"])
    return f"{passages}Question: {record['question'].strip()}\nAnswer:"


def check(record, where):
    """The record, if all that is read of it is there; SystemExit naming it where not."""
    def need(condition, what):
        if not condition:
            raise SystemExit(f"{where}: {what}")

    need(isinstance(record, dict), "expected an object")
    for key in ("question", "gold", *PREDICTIONS):
        need(isinstance(record.get(key), str) and record[key].strip(), f"{key!r} must be text")
    passages = record.get("passages")
    need(isinstance(passages, list) and all(isinstance(p, list) and p and all(isinstance(s, str) for s in p) for p in passages),
         "'passages' must be a list of [title, sentence, …]")
    preference = record.get("preference")
    need(isinstance(preference, list) and len(preference) == len(PAIRS) and all(p in (0, 1, 2) for p in preference),
         "'preference' must be six of 0, 1, 2: the answers 12 13 14 23 24 34, the first better, the second, or a tie")
    feedback = record.get("feedback")
    need(isinstance(feedback, dict) and isinstance(feedback.get("errors"), list) and isinstance(feedback.get("missing-info"), list)
         and isinstance(feedback.get("corrected-prediction"), str), "'feedback' must have errors, missing-info and corrected-prediction")
    end_of_last, length = 0, len(record["prediction 1"])
    for error in sorted(feedback["errors"], key=lambda e: start_of(e, need)):
        start, end = error["start"], error.get("end")
        span = f"the span {short_repr(start)}–{short_repr(end)}"
        need(error.get("error type") in CATEGORIES, f"unknown error type {short_repr(error.get('error type'))}; there are {', '.join(CATEGORIES)}")
        need(type(end) is int and 0 <= start < end, f"{span} is empty, reversed or negative")
        need(end <= length, f"{span} ends outside prediction 1, which has {length} characters")
        need(start >= end_of_last, f"{span} overlaps the one that ends at {end_of_last}")
        end_of_last = end
    check_text(where, prompt(record), record["gold"], *(record[p] for p in PREDICTIONS), feedback["corrected-prediction"])
    return record


def start_of(error, need):
    need(isinstance(error, dict) and type(error.get("start")) is int, "an error must have a whole number as its start")
    return error["start"]
