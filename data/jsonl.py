"""Your own file, in the shapes that preference and instruction data commonly have.

    {"prompt": …, "completion": …}                    a demonstration (with "label": false, its prompt only)
    {"instruction": …, "input": …, "output": …}       a demonstration, as in Alpaca; input may be missing
    {"messages": [{"role": …, "content": …}, …]}      a demonstration: the last message, if the assistant's
    {"prompt": …, "chosen": …, "rejected": …}         a comparison
    {"messages": […], "chosen": …, "rejected": …}     a comparison: messages is the prompt
    {"prompt": …, "responses": [ … ]}                 a comparison of K responses, the best first; "ranks":
                                                      [0, 1, 1, …] if some are equally good
    {"chosen": …, "rejected": …}                      a comparison: the prompt is what both begin with
    {"prompt": …}                                     a prompt, which is all that PPO needs

The file holds one object per line, or is a JSON list of them, or {"data": [ … ]}; it may be gzipped. In a
.parquet file, which the package pyarrow reads, each row is such an object.

Text is used as it is. Prompt and response are joined without a space, so a response should start with its own
(" Yes."). A list of messages can stand in place of text. It is written as turns in the format of Anthropic's
HH-RLHF, "\\n\\nHuman: …\\n\\nAssistant: …". An Alpaca record becomes such a conversation too: the user's turn
is the instruction, a blank line and the input. A "system" text is put before the prompt. A record with text
in any other field is refused, so that no part of a prompt is lost. docs/data.md has an example of each shape.

Of every twenty prompts, the first goes to the validation split and the second to the test split. Records
with the same prompt stay together; in a file with a single prompt, the lines are counted instead.
"""
import logging
import os
import re
from functools import cache

from data.files import check_text, read_records
from data.schema import Comparison
from data.tokenizers import get_tokenizer
from data.turns import ASSISTANT, HUMAN, holds_text, render, user_turn
from engine.files import short_repr

log = logging.getLogger(__name__)
CONVERSATION = {"prompt", "messages", "instruction", "input", "system",
                "chosen", "rejected", "completion", "output", "responses"}
SENTENCE_END = re.compile(r"[.!?:]\s|\n|[。！？]")


# -------------------------------------------------------------------------------------------- text of a field

def text(record, key, where):
    """Returns a field as text. A list of messages is rendered."""
    return as_text(record[key], key, where)


def as_text(value, name, where):
    if isinstance(value, list):
        return render(value, where)
    if not isinstance(value, str):
        raise SystemExit(f"{where}: {name!r} is {type(value).__name__}, expected text or a list of messages")
    return value


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


# ------------------------------------------------------------------------------------------------- one record

def parse(record, where):
    """Converts a record to (prompt, responses), the responses best first, or [] for a prompt alone.

    Raises SystemExit with one line that starts with `where` ("path:line") for a record of any other shape.
    """
    record = {key: value for key, value in record.items() if value is not None}
    answers = find_answers(record, where)
    prompt_key = None
    for key in ("instruction", "messages", "prompt"):  # the last that is there
        if key in record:
            prompt_key = key

    if not answers and "messages" in record:
        prompt_key = "messages"  # it holds the response too
        prompt, responses = demonstration(record["messages"], "messages", where)
    elif not answers and prompt_key != "prompt":
        raise SystemExit(f"{where}: needs prompt and completion, instruction and output, messages, "
                         f"[prompt,] chosen and rejected, or a prompt; found {keys(record)}")
    elif prompt_key is None:
        prompt, responses = shared_prompt(record, where)
    else:
        prompt, responses = prompt_and_responses(record, prompt_key, answers, where)

    if "system" in record:
        system = text(record, "system", where)
        if system and not prompt.startswith(HUMAN):
            system += "\n\n"
        prompt = system + prompt
    if "" in responses:
        raise SystemExit(f"{where}: an empty response")
    if record.get("label") is False:
        responses = []  # a bad answer must not be imitated
    check_text(where, prompt, *responses)
    used = {prompt_key, *answers, "system", "label"}
    if "responses" in record and "responses[0]" in answers:
        used |= {"responses", "ranks"}
    if prompt_key == "instruction":
        used.add("input")
    check_unused(record, used, prompt, responses, where)
    return prompt, responses


def find_answers(record, where):
    """A record's responses, each text or a list of messages, by their names: {"chosen": …, "rejected": …}.

    The best one comes first. The dict is empty if the record has none.
    """
    if "chosen" in record and "rejected" in record:
        return {"chosen": record["chosen"], "rejected": record["rejected"]}
    for key in ("completion", "output"):
        if key in record:
            return {key: record[key]}
    responses = record.get("responses")
    if responses is None:
        return {}
    if not isinstance(responses, list) or len(responses) < 2:
        raise SystemExit(f"{where}: 'responses' must be a list of two responses or more, the best first")
    return {f"responses[{i}]": response for i, response in enumerate(responses)}


def find_ranks(record, n, where):
    """The ranks of a record's n responses: 0 is the best, equal ranks are a tie."""
    ranks = record.get("ranks")
    if ranks is None or n == 0 or "responses" not in record:
        return list(range(n))
    if not isinstance(ranks, list) or len(ranks) != n or not all(type(rank) is int for rank in ranks):
        raise SystemExit(f"{where}: 'ranks' must be {n} whole numbers, one for each response, 0 for the best")
    if ranks != sorted(ranks):
        raise SystemExit(f"{where}: 'responses' must be sorted by 'ranks', the best first")
    return ranks


def demonstration(messages, name, where):
    """A list of messages -> (prompt, [response]); [] if the last message is not the assistant's."""
    if not isinstance(messages, list) or not messages:
        raise SystemExit(f"{where}: {name!r} must be a list of messages")
    last = render(messages[-1:], where)
    if not last.startswith(ASSISTANT):
        return render(messages, where) + ASSISTANT, []
    if not messages[-1]["content"]:
        raise SystemExit(f"{where}: an empty response")
    return render(messages[:-1], where) + ASSISTANT, [last.removeprefix(ASSISTANT)]


def shared_prompt(record, where):
    """`chosen` and `rejected` without a prompt -> (what both begin with, the rests)."""
    if "chosen" not in record or "rejected" not in record:
        raise SystemExit(f"{where}: a completion without its prompt; found {keys(record)}")
    chosen = text(record, "chosen", where)
    rejected = text(record, "rejected", where)
    prompt, *responses = common_prompt(chosen, rejected)
    if prompt.endswith(ASSISTANT):
        return prompt, responses
    if not SENTENCE_END.search(prompt + " "):
        hint = ""
        for key in record:
            if key not in ("chosen", "rejected") and holds_text(key, record[key]):
                hint = f"; if {short_repr(key)} is the prompt, name it 'prompt'"
        raise SystemExit(f"{where}: no 'prompt', and chosen and rejected do not begin with the same "
                         f"turn, line or sentence{hint}")
    return prompt, responses


def prompt_and_responses(record, prompt_key, answers, where):
    """A record that names its prompt -> (prompt, responses). answers: from find_answers."""
    prompt_text = text(record, prompt_key, where)
    if prompt_key == "instruction" and record.get("input"):
        prompt_text += "\n\n" + text(record, "input", where)
    prompt_is_list = isinstance(record[prompt_key], list)

    # An answer is text, or messages of which the last is the response. Those before it are its context.
    responses = []
    contexts = []  # of each answer that is a list: (the context as text, its messages)
    for name, value in answers.items():
        if not isinstance(value, list):
            responses.append(as_text(value, name, where))
            continue
        context, answer = demonstration(value, name, where)
        if not answer:
            raise SystemExit(f"{where}: the last message of {name!r} is not the assistant's")
        responses += answer
        contexts.append((context, value[:-1]))

    is_plain = not prompt_is_list and not contexts and prompt_key != "instruction"
    if is_plain:
        return prompt_text, responses

    # Write prompt and responses as turns.
    for i, response in enumerate(responses):
        if response and not response[0].isspace():
            responses[i] = " " + response  # as after "Assistant:"
    if prompt_is_list or HUMAN in prompt_text:
        prompt = prompt_text.removesuffix(ASSISTANT) + ASSISTANT
    else:
        prompt = user_turn(prompt_text)

    # A context repeats the prompt. It may hold more, such as a system message and earlier turns, if the
    # prompt is text that is one of its messages and all answers have this context.
    all_have_one = len(contexts) == len(answers)
    for context, messages in contexts:
        if not messages or context == prompt:
            continue
        holds_prompt = any(message["content"] == prompt_text for message in messages)
        is_shared = all_have_one and context == contexts[0][0]
        if prompt_is_list or not holds_prompt or not is_shared:
            raise SystemExit(f"{where}: the messages before the response are not those of {prompt_key!r}")
    if contexts and contexts[0][1]:
        prompt = contexts[0][0]
    return prompt, responses


def check_unused(record, used, prompt, responses, where):
    """Exits if a field that was not used holds text, unless the text repeats what was used."""
    conversations = [prompt, *(prompt + response for response in responses)]
    for key, value in record.items():
        is_text = holds_text(key, value)
        if key in CONVERSATION:  # there, a single word is text too
            is_text = value not in ("", [])
        if key in used or not is_text:
            continue
        if isinstance(value, str) and any(value in conversation for conversation in conversations):
            continue  # as in UltraChat, where prompt is the first of the messages once more
        if key == "messages" and isinstance(value, list) and render(value, where) in conversations:
            continue  # as in UltraFeedback, where messages is the prompt and the chosen response once more
        if key == "text" and responses and all(response.strip() in value for response in responses):
            continue  # as in Alpaca, where text is all of the record once more
        raise SystemExit(f"{where}: {short_repr(key)} holds text that would be lost: give it one of the "
                         "names of docs/data.md (prompt, system, chosen, rejected, completion, …), or remove it")


# --------------------------------------------------------------------------------------------------- the file

class Jsonl:
    """A dataset that is read from one file, as a whole: a bad record is an error before any work is done."""

    def __init__(self, path):
        self.path = path
        self.records = cache(self.records)
        self.read = cache(self.read)

    def tokenizer(self):
        return get_tokenizer("gpt2")

    def raw_records(self):
        """Yields ("path:line", record), the record as the file has it."""
        return read_records(self.path)

    def read(self):
        """Returns [(prompt, responses, ranks), …] of the whole file."""
        examples = []
        unused = set()
        n_bad = 0
        for where, record in self.raw_records():
            prompt, responses = parse(record, where)
            examples.append((prompt, responses, find_ranks(record, len(responses), where)))
            n_bad += record.get("label") is False
            unused |= record.keys() - CONVERSATION - {"label", "ranks"}
        if unused:
            log.info(f"{self.path}: fields that are not used: {keys(unused)}")
        if n_bad:
            log.info(f"{self.path}: {n_bad} responses with \"label\": false are no demonstrations")
        return examples

    def records(self, split):
        """Returns [(prompt, responses, ranks), …]; there are no responses where a prompt stands alone."""
        keep = {"train": range(2, 20), "validation": [0], "test": [1]}[split]
        number_of = {}  # of each prompt, in the order in which they first appear
        for prompt, _, _ in self.read():
            number_of.setdefault(prompt, len(number_of))
        examples = []
        for line, example in enumerate(self.read()):
            number = number_of[example[0]] if len(number_of) > 1 else line
            if number % 20 in keep:
                examples.append(example)
        if split == "train" and not examples:
            raise SystemExit(f"{self.path}: no example to train on "
                             "(the first two of every 20 prompts are kept for validation and test)")
        return examples

    def demonstrations(self, split):
        examples = [(prompt, responses[0]) for prompt, responses, _ in self.records(split) if responses]
        if split == "train" and not examples:
            raise SystemExit(f"{self.path}: holds no demonstrations, prompts only; to train on prompts alone, "
                             "ppo.py needs --init, and --reward_model unless the reward is a function")
        return examples

    def comparisons(self, split, k=2):
        """Returns [Comparison, …], each with as many responses as its record ranks, whatever k is."""
        comparisons = []
        for prompt, responses, ranks in self.records(split):
            if len(responses) > 1:
                comparisons.append(Comparison(prompt, responses, ranks))
        if split == "train" and not comparisons:
            raise SystemExit(f"{self.path}: holds no comparisons; "
                             "a comparison has 'chosen' and 'rejected', or 'responses'")
        most = max((len(comparison.responses) for comparison in comparisons), default=k)
        if k > max(2, most):
            raise SystemExit(f"--k={k}: {self.path} ranks at most {most} responses to a prompt")
        return comparisons

    def prompts(self, split):
        return [prompt for prompt, _, _ in self.records(split)]
