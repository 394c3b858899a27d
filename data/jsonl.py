"""Your own file: one JSON object per line, plain or gzipped, in formats that are already in common use.

    {"prompt": …, "completion": …}                    a demonstration
    {"prompt": …, "chosen": …, "rejected": …}         a comparison
    {"chosen": …, "rejected": …}                      a comparison; the prompt is what the two share
    {"messages": [{"role": …, "content": …}, …]}      a demonstration: the last message is the response

Text is used as it is. Prompt and response are joined without a space, so a response should start with its own
(" Yes."). prompt, completion, chosen and rejected may also be lists of messages, which are then written in
the format of Anthropic's HH-RLHF, "\\n\\nHuman: …\\n\\nAssistant: …". Of every twenty records, the first goes
to the validation split and the second to the test split.
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
    """Returns a field as text. A list of messages is rendered."""
    value = record[key]
    if isinstance(value, list):
        return render(value, where)
    if not isinstance(value, str):
        raise SystemExit(f"{where}: {key!r} is {type(value).__name__}, expected text or a list of messages")
    return value


def render(messages, where):
    """Writes messages as one text, in the format of HH-RLHF."""
    try:
        return "".join(ROLES[message["role"]] + message["content"] for message in messages)
    except (KeyError, TypeError):
        raise SystemExit(f'{where}: a message must be {{"role": {" | ".join(ROLES)}, "content": text}}')


def keys(record):
    """Lists the keys of a record for a one-line error message, at most six of them."""
    return ", ".join(short_repr(key) for key in sorted(record)[:6]) or "nothing"


def common_prompt(chosen, rejected):
    """Splits two texts that begin alike into (prompt, rest of chosen, rest of rejected).

    The prompt ends with the last "\\n\\nAssistant:" that they share. If they share none, it ends before
    the last space or newline that they share.
    """
    shared = os.path.commonprefix([chosen, rejected])
    if ASSISTANT in shared:
        end = shared.rindex(ASSISTANT) + len(ASSISTANT)
    else:
        end = max(shared.rfind(" "), shared.rfind("\n"), 0)
    return chosen[:end], chosen[end:], rejected[end:]


def parse(record, where):
    """Converts a record to (prompt, [response]) or (prompt, [chosen, rejected]).

    Raises SystemExit with one line that starts with `where` ("path:line") for any other record.
    """
    if "messages" in record:
        messages = record["messages"]
        if not isinstance(messages, list) or not messages:
            raise SystemExit(f"{where}: 'messages' must be a list of messages")
        prompt = render(messages[:-1], where)
        responses = [render(messages[-1:], where)]
    elif "chosen" in record and "rejected" in record:
        responses = [text(record, "chosen", where), text(record, "rejected", where)]
        if "prompt" in record:
            prompt = text(record, "prompt", where)
        else:
            prompt, *responses = common_prompt(*responses)
    elif "prompt" in record and "completion" in record:
        prompt = text(record, "prompt", where)
        responses = [text(record, "completion", where)]
    else:
        raise SystemExit(f"{where}: needs prompt and completion, [prompt,] chosen and rejected, or messages; "
                         f"found {keys(record)}")
    # In rendered messages, the "Assistant:" before the response belongs to the prompt.
    if all(response.startswith(ASSISTANT) for response in responses):
        prompt += ASSISTANT
        responses = [response.removeprefix(ASSISTANT) for response in responses]
    if "" in responses:
        raise SystemExit(f"{where}: an empty response")
    check_text(where, prompt, *responses)
    return prompt, responses


class Jsonl:
    """A dataset that is read from one file."""

    def __init__(self, path):
        self.path = path
        self.records = cache(self.records)

    def tokenizer(self):
        return get_tokenizer("gpt2")

    def records(self, split):
        """Returns [(prompt, [response]) or (prompt, [chosen, rejected]), …]."""
        keep = {"train": range(2, 20), "validation": [0], "test": [1]}[split]
        examples = []
        for i, (where, record) in enumerate(read_lines(self.path)):
            if i % 20 in keep:
                examples.append(parse(record, where))
        if split == "train" and not examples:
            raise SystemExit(f"{self.path}: no example to train on "
                             "(the first two of every 20 are kept for validation and test)")
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
            raise SystemExit(f"{self.path}: holds demonstrations only; "
                             "a comparison has 'chosen' and 'rejected'")
        return pairs

    def prompts(self, split):
        return [prompt for prompt, _ in self.records(split)]
