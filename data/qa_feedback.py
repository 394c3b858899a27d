"""QA-Feedback (Wu et al. 2023, arXiv:2306.01693): questions with four model answers and feedback.

Looks for DATA_DIR/qa_feedback/{train,dev}_feedback.json and downloads the file if it is missing. In the dev
file, records 0, 2, 4, … are the validation split and records 1, 3, 5, … the test split. You can also use your
own file, if its name ends in _feedback.json: of every ten records, the first goes to validation and the
second to test. A record is

    question    text
    passages    [[title, sentence, …], …]
    gold        the reference answer
    prediction 1, prediction 2, prediction 3, prediction 4        the answers of models
    preference  for the pairs 12 13 14 23 24 34: 1 if the first is better, 2 if the second is, 0 for a tie
    feedback    on prediction 1: {errors: [{error type, start, end}, …], missing-info: […],
                corrected-prediction: text}

The prompt ends with the question, after the passages, because a prompt that is too long loses its beginning.
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
PREDICTIONS = ["prediction 1", "prediction 2", "prediction 3", "prediction 4"]
PAIRS = list(combinations(range(4), 2))  # in the order of the six preferences


class QAFeedback:
    def __init__(self, data_dir, path=None):
        """Reads your own file at `path`, or the published files below `data_dir` if path is None."""
        self.data_dir = data_dir
        self.path = path
        self.read = cache(self.read)
        self.records = cache(self.records)

    def tokenizer(self):
        return get_tokenizer("gpt2")

    def read(self, name):
        """Returns all records of the published file "train" or "dev", or of your own file, checked."""
        path = self.path
        if not path:
            path = os.path.join(self.data_dir, "qa_feedback", name + "_feedback.json")
            fetch(path, URL.format(name), SHA256.get(name))
        try:
            with open(path, "rb") as f:
                records = json.load(f)
        except (OSError, ValueError, RecursionError) as error:
            raise SystemExit(f"{path}: cannot be read ({error})")
        if not isinstance(records, list):
            raise SystemExit(f"{path}: expected a list of records, found {type(records).__name__}")
        return [check(record, f"{path}: record {i}") for i, record in enumerate(records)]

    def records(self, split):
        """Returns the records of a split."""
        if self.path:
            keep = {"train": range(2, 10), "validation": [0], "test": [1]}[split]
            return [record for i, record in enumerate(self.read("")) if i % 10 in keep]
        if split == "train":
            return self.read("train")
        first = 1 if split == "test" else 0
        return self.read("dev")[first::2]

    def demonstrations(self, split):
        return [(prompt(record), " " + record["gold"].strip()) for record in self.records(split)]

    def prompts(self, split):
        return [prompt(record) for record in self.records(split)]

    def comparisons(self, split, k=2):
        """Returns [Comparison, …]. Leaves out ties and logs how many.

        With k=2, every pair of answers is a comparison. With k=4, every record is one: its answers are ranked
        by score, the number of wins minus losses in the six preferences, and equal scores share a rank. That
        is a compromise if the preferences are not transitive.
        """
        if k not in (2, 4):
            raise SystemExit(f"--k={k}: QA-Feedback compares four answers: K is 4, or 2 for their pairs")
        result = []
        n_ties = 0
        for record in self.records(split):
            answers = [" " + record[key].strip() for key in PREDICTIONS]
            decided = decided_pairs(record["preference"])
            if k == 2:
                n_ties += len(PAIRS) - len(decided)
                for better, worse in decided:
                    result.append(Comparison(prompt(record), [answers[better], answers[worse]], ranks=[0, 1]))
                continue
            scores = [0, 0, 0, 0]  # wins minus losses
            for better, worse in decided:
                scores[better] += 1
                scores[worse] -= 1
            if not any(scores):
                n_ties += 1
                continue
            best_first = sorted(range(4), key=lambda i: scores[i], reverse=True)
            sorted_scores = [scores[i] for i in best_first]
            ranks = [sorted_scores.index(score) for score in sorted_scores]  # place of the first equal score
            result.append(Comparison(prompt(record), [answers[i] for i in best_first], ranks))
        if n_ties:
            log.info(f"qa_feedback: left out {n_ties} comparisons of the {split} split that tie")
        return result

    def spans(self, split):
        """Returns [(prompt, prediction 1, [(start, end, category), …]), …]. Offsets are in characters."""
        result = []
        for record in self.records(split):
            spans = []
            for error in record["feedback"]["errors"]:
                # The response gets a leading space, which moves every span by one character.
                spans.append((error["start"] + 1, error["end"] + 1, error["error type"]))
            result.append((prompt(record), " " + record["prediction 1"], spans))
        return result

    def completeness(self, split):
        """Returns [Comparison, …]: the correction is better than a prediction 1 that misses information."""
        result = []
        for record in self.records(split):
            correction = record["feedback"]["corrected-prediction"].strip()
            if record["feedback"]["missing-info"] and correction:
                responses = [" " + correction, " " + record["prediction 1"].strip()]
                result.append(Comparison(prompt(record), responses, ranks=[0, 1]))
        return result


def prompt(record):
    """Writes the passages and then the question."""
    passages = ""
    for title, *sentences in record["passages"]:
        passages += f"{title}: {' '.join(sentences)}\n\n"
    return f"{passages}Question: {record['question'].strip()}\nAnswer:"


def decided_pairs(preference):
    """Converts six preferences to [(better, worse), …], as indices of answers. Ties are left out."""
    pairs = []
    for (first, second), choice in zip(PAIRS, preference):
        if choice == 1:
            pairs.append((first, second))
        elif choice == 2:
            pairs.append((second, first))
    return pairs


def check(record, where):
    """Returns the record. Raises SystemExit with one line that names `where` if a field is missing or wrong.

    Error spans must lie inside prediction 1 and must not overlap.
    """
    def require(condition, message):
        if not condition:
            raise SystemExit(f"{where}: {message}")

    require(isinstance(record, dict), "expected an object")
    for key in ("question", "gold", *PREDICTIONS):
        require(isinstance(record.get(key), str) and record[key].strip(), f"{key!r} must be text")

    passages = record.get("passages")
    require(isinstance(passages, list) and all(is_passage(passage) for passage in passages),
            "'passages' must be a list of [title, sentence, …]")

    preference = record.get("preference")
    require(isinstance(preference, list)
            and len(preference) == len(PAIRS)
            and all(choice in (0, 1, 2) for choice in preference),
            "'preference' must be six of 0, 1, 2: for the answers 12 13 14 23 24 34, "
            "1 if the first is better, 2 if the second is, 0 for a tie")

    feedback = record.get("feedback")
    require(isinstance(feedback, dict)
            and isinstance(feedback.get("errors"), list)
            and isinstance(feedback.get("missing-info"), list)
            and isinstance(feedback.get("corrected-prediction"), str),
            "'feedback' must have errors, missing-info and corrected-prediction")

    for error in feedback["errors"]:
        require(isinstance(error, dict) and type(error.get("start")) is int,
                "an error must have a whole number as its start")
    length = len(record["prediction 1"])
    previous_end = 0
    for error in sorted(feedback["errors"], key=lambda error: error["start"]):
        category = error.get("error type")
        require(category in CATEGORIES,
                f"unknown error type {short_repr(category)}; there are {', '.join(CATEGORIES)}")
        start = error["start"]
        end = error.get("end")
        span = f"the span {short_repr(start)}–{short_repr(end)}"
        require(type(end) is int and 0 <= start < end, f"{span} is empty, reversed or negative")
        require(end <= length, f"{span} ends outside prediction 1, which has {length} characters")
        require(start >= previous_end, f"{span} overlaps the one that ends at {previous_end}")
        previous_end = end

    answers = [record[key] for key in PREDICTIONS]
    check_text(where, prompt(record), record["gold"], *answers, feedback["corrected-prediction"])
    return record


def is_passage(value):
    """True for [title, sentence, …], all of them text."""
    return isinstance(value, list) and len(value) > 0 and all(isinstance(part, str) for part in value)
