"""Anybody's own file: one JSON object a line, plain or .gz, in the schemas that the field already has.

    {"prompt": …, "completion": …}                    a demonstration
    {"prompt": …, "chosen": …, "rejected": …}         a comparison
    {"chosen": …, "rejected": …}                      a comparison whose prompt is what the two have in common
    {"messages": [{"role": …, "content": …}, …]}      a demonstration: the last message answers the ones before it

Text is used as it stands: prompt and response are joined without a space, so let the response bring its own (" Yes.").
prompt, completion, chosen and rejected may be lists of messages too; turns are then written as in Anthropic's HH-RLHF,
"\\n\\nHuman: …\\n\\nAssistant: …". Of every twenty lines, the first is kept for validation and the second for test.
"""
import os
from functools import cache

from data.files import check_text, read_lines
from data.schema import Comparison
from data.tokenizers import get_tokenizer
from engine.files import short_repr

ROLES = {"system": "", "user": "\n\nHuman: ", "human": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
ASSISTANT = "\n\nAssistant:"


def text(record, key, where):
    """The field as text, messages rendered."""
    value = record[key]
    if isinstance(value, list):
        return render(value, where)
    if not isinstance(value, str):
        raise SystemExit(f"{where}: {key!r} is {type(value).__name__}, expected text or a list of messages")
    return value


def render(messages, where):
    try:
        return "".join(ROLES[m["role"]] + m["content"] for m in messages)
    except (KeyError, TypeError):
        raise SystemExit(f'{where}: a message must be {{"role": {" | ".join(ROLES)}, "content": text}}')


def keys(record):
    """The keys that were found, for an error's one line."""
    return ", ".join(map(short_repr, sorted(record)[:6])) or "nothing"


def common_prompt(chosen, rejected):
    """Splits two texts that begin alike: at the last "\\n\\nAssistant:" they share, else at the last space they share."""
    shared = os.path.commonprefix([chosen, rejected])
    if ASSISTANT in shared:
        cut = shared.rindex(ASSISTANT) + len(ASSISTANT)
    else:
        cut = max(shared.rfind(" "), shared.rfind("\n"), 0)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def parse(record, where):
    """A record -> (prompt, [response]) or (prompt, [chosen, rejected]); SystemExit naming file and line where it is neither."""
    if "messages" in record:
        if not isinstance(record["messages"], list) or not record["messages"]:
            raise SystemExit(f"{where}: 'messages' must be a list of messages")
        prompt, responses = render(record["messages"][:-1], where), [render(record["messages"][-1:], where)]
    elif "chosen" in record and "rejected" in record:
        responses = [text(record, "chosen", where), text(record, "rejected", where)]
        if "prompt" in record:
            prompt = text(record, "prompt", where)
        else:
            prompt, *responses = common_prompt(*responses)
    elif "prompt" in record and "completion" in record:
        prompt, responses = text(record, "prompt", where), [text(record, "completion", where)]
    else:
        raise SystemExit(f"{where}: needs prompt and completion, [prompt,] chosen and rejected, or messages; "
                         f"found {keys(record)}")
    if all(r.startswith(ASSISTANT) for r in responses):  # rendered turns: the marker belongs to the prompt
        prompt, responses = prompt + ASSISTANT, [r[len(ASSISTANT):] for r in responses]
    if "" in responses:
        raise SystemExit(f"{where}: an empty response")
    check_text(where, prompt, *responses)
    return prompt, responses


class Jsonl:
    """A dataset module over one file."""

    def __init__(self, path):
        self.path = path
        self.records = cache(self.records)

    def tokenizer(self):
        return get_tokenizer("gpt2")

    def records(self, split):
        keep = {"train": range(2, 20), "validation": [0], "test": [1]}[split]
        examples = [parse(record, where) for i, (where, record) in enumerate(read_lines(self.path)) if i % 20 in keep]
        if split == "train" and not examples:
            raise SystemExit(f"{self.path}: no example to train on (of every 20 lines, the first two are kept for validation and test)")
        return examples

    def demonstrations(self, split):
        return [(prompt, responses[0]) for prompt, responses in self.records(split)]

    def comparisons(self, split, k=2):
        if k != 2:
            raise SystemExit(f"--k={k}: {self.path} holds pairs, K is 2")
        pairs = []
        for prompt, responses in self.records(split):
            if len(responses) == 2:
                pairs.append(Comparison(prompt, responses, ranks=[0, 1]))
        if split == "train" and not pairs:
            raise SystemExit(f"{self.path}: holds demonstrations only; a comparison has 'chosen' and 'rejected'")
        return pairs

    def prompts(self, split):
        return [prompt for prompt, _ in self.records(split)]
