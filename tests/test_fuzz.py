"""Ten thousand inputs of every kind of wrong: each is read and encoded, or refused by one line that says where; none ends otherwise.

An input depends on its index alone, so that one that fails is made again by its number.
"""
import copy
import gzip
import json
import os
import random
import resource
import tempfile
import time
import typing
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import SHARED, feedback

import dpo
import ppo
import segment_reward
import sft
from common.options import parse, split_type
from data import encode_groups, encode_prompts, get_tokenizer, tldr
from data.hh import HH
from data.jsonl import CONVERSATION, Jsonl
from data.jsonl import parse as parse_record
from data.qa_feedback import QAFeedback
from data.turns import holds_text
from engine.packing import pack

TOKENIZER = "gpt2" if (SHARED / "tiktoken").is_dir() else "animals"  # GPT-2's where it need not be fetched
MESSAGE = {"role": "user", "content": "Hi"}
LINES = [{"prompt": "p", "completion": " c"}, {"prompt": "p", "chosen": " a", "rejected": " b"}, {"chosen": "a b", "rejected": "a c"},
         {"messages": [MESSAGE, {"role": "assistant", "content": "Hello"}]}, {"prompt": [MESSAGE], "chosen": " a", "rejected": [MESSAGE]}]
ALPHABETS = ["ab ", " \t\n\r\x0b\u2028\u00a0", "\x00\x01\x1b\x7f\x85\u202e\ufeff\ufffd", "\ud800\udbff\udc00\udfff", "é中🦉\u0301\u200d", "{}[]\",:\\u0'",
             "<|endoftext|>", "0123456789.eE+-_"]


def wild_text(rng):
    """Up to 20 characters of one alphabet, of all of them, or of all Unicode with its surrogates."""
    alphabet = rng.choice([*ALPHABETS, "".join(ALPHABETS), None])
    return "".join(rng.choice(alphabet) if alphabet else chr(rng.randrange(0x110000)) for _ in range(rng.randrange(20)))


def wild(rng, depth=0):
    """Any JSON value, and the NaN and Infinity that Python's reader knows."""
    kind = rng.randrange(10 if depth < 4 else 7)
    if kind < 7:
        return [None, rng.random() < 0.5, rng.randrange(-3, 30), 10 ** rng.randrange(5000), rng.choice([0.5, -0.0, 1e308, float("nan"), float("inf")]),
                wild_text(rng), wild_text(rng) * rng.choice([1, 1000])][kind]
    values = [wild(rng, depth + 1) for _ in range(rng.randrange(4))]
    return values if kind == 7 else {rng.choice(["role", "content", "start", "end", wild_text(rng)]): v for v in values}


def mutate(rng, value):
    """One thing somewhere inside it missing, twice, or another."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
        return wild(rng)
    key = rng.choice([*value] if isinstance(value, dict) else range(len(value)))
    how = rng.random()
    if how < 0.15:
        del value[key]
    elif how < 0.25:
        value = value + [value[key]] if isinstance(value, list) else value | {wild_text(rng): value[key]}
    else:
        value[key] = mutate(rng, value[key])
    return value


def spell(rng, value):
    """JSON as bytes, lone surrogates as escapes or raw; an integer that Python cannot spell becomes one that it can."""
    try:
        return json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    except ValueError:
        return b"1" * 5000


def garble(rng, content):
    """Bytes changed, inserted or missing; another encoding; bytes that have nothing to do with it."""
    at = rng.randrange(len(content) + 1)
    return rng.choice([content[:at], content[:at] + rng.choice([b"\x00", b"\xff", b"\xed\xa0\x80", b"\n", b"\\ud800", b"NaN"]) + content[at:],
                       b"\xef\xbb\xbf" + content, content.decode("utf-8", "replace").encode("utf-16"), rng.randbytes(rng.randrange(200)), b"\n \n" + content])


def content_of(rng, record):
    value = wild(rng) if rng.random() < 0.1 else record
    for _ in range(rng.randrange(4)):
        value = mutate(rng, copy.deepcopy(value))
    content = spell(rng, value)
    return garble(rng, content) if rng.random() < 0.25 else content


def compressed(rng, content):
    content = gzip.compress(content, 1, mtime=0)
    return garble(rng, content) if rng.random() < 0.2 else content


EXTREMES = [b"", b"\n", b" \r\n\t\n", b"\xef\xbb\xbf", b"\x00" * 10**6, b"a" * 10**6, b"[" * 100_000, b'{"prompt":' * 100_000, b"[" * 900 + b"]" * 900,
            *(json.dumps({"chosen": text, "rejected": other}).encode() for text, other in
              [("a" * 10**6, "b"), (" " * 10**6 + "x", "b"), ("é" * 10**5, "é" * 10**5 + " ")]), json.dumps({"k" * 10**6: 0}).encode(),
            json.dumps([feedback(gold="\n" * 10**6 + "x")] * 3).encode()]


# ------------------------------------------------------------------------------------------------ what is asked of each input

def read_all(data, splits=("validation", "test", "train")):
    """Everything the stages ask of a dataset, encoded and packed as they do."""
    tokenizer = get_tokenizer(TOKENIZER)
    examples = []
    for split in splits:
        examples += sft.group_by_prompt(data.demonstrations(split))
        examples += [(c.prompt, c.responses) for c in data.comparisons(split)]
    "".join(text for prompt, responses in examples for text in (prompt, *responses)).encode()  # can be printed
    groups = encode_groups(tokenizer, examples, 64)
    prompts = encode_prompts(tokenizer, [prompt for split in splits for prompt in data.prompts(split)])
    assert all(len(p) for p in prompts) and (not groups or pack(groups, 64 * 9))
    if hasattr(data, "spans"):
        segment_reward.load_feedback(data, "train", list(segment_reward.AXES), tokenizer, 64)


def trouble(read, place):
    """What is wrong with how an input was taken; None for one that was read, or refused as it should be."""
    begin = time.perf_counter()
    try:
        read()
    except SystemExit as error:
        message = str(error)
        if len(message) > 500 or not message.isprintable() or place not in message:
            return f"message of {len(message)} characters: {message[:300]!r}"
    except BaseException as error:  # tiktoken's panic is no Exception
        return f"{type(error).__name__}: {str(error)[:200]}"
    seconds = time.perf_counter() - begin
    return f"took {seconds:.1f} s" if seconds > 10 else None


def run(inputs, take, capsys):
    """Every input through `take`, which returns its trouble; all that had any are shown."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = [(i, content, what) for i, content in enumerate(inputs) if (what := take(content))]
    capsys.readouterr()
    assert not found, f"{len(found)} of the inputs:\n" + "\n".join(f"input {i}: {what}\n    {content[:200]!r}" for i, content, what in found[:20])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # kB: 1 GiB


WORDS = ["wren", "cod", "a small bird", "name one", "it is blue", "why so"]


def spoken(rng):
    """A text that no other text of the record contains."""
    return f"{rng.choice(WORDS)} {rng.randrange(10**9)}" if rng.random() < 0.8 else f"w{rng.randrange(10**9)}"


def some_messages(rng):
    roles = rng.choice([["user"], ["user", "assistant"], ["assistant"], ["system", "user", "assistant"], ["user", "assistant"] * 2, []])
    return [{"role": role, "content": spoken(rng)} for role in roles]


def some_record(rng):
    """Fields of the shapes and of none, in any mixture, with repetitions as published files have them."""
    record, earlier = {}, []
    names = ["prompt", "completion", "chosen", "rejected", "messages", "instruction", "input", "output", "system", "question", "text", "id", "note"]
    shapes = [["prompt", "chosen", "rejected"], ["chosen", "rejected"], ["messages"], ["instruction", "input", "output"], ["prompt", "completion"], ["prompt"], ["prompt", "responses"]]
    for name in rng.choice(shapes) + rng.sample(names, rng.choice([0, 0, 1, 2])):
        record[name] = some_messages(rng) if name == "messages" or rng.random() < 0.2 else spoken(rng)
        if name == "responses":
            record[name] = [rng.choice([spoken, some_messages])(rng) for _ in range(rng.choice([1, 2, 3]))]
        if earlier and rng.random() < 0.3:
            again = rng.choice(earlier)
            record[name] = again + record[name] if type(again) is type(record[name]) else again
        if rng.random() < 0.05:
            record[name] = rng.choice([None, "", [], {}, 3, True, {"a": spoken(rng)}])
        if record[name] is not None:
            earlier.append(record[name])
    if rng.random() < 0.1:
        record["label"] = rng.random() < 0.5
    return record


def texts_of(value):
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for item in value for text in texts_of(item)]
    return texts_of(value.get("content", "")) if isinstance(value, dict) else []


def test_no_text_of_any_mixture_of_shapes_is_lost():
    """Each text of a record that is read is in its prompt or responses, or its field is one that is named as not used."""
    taken = 0
    for i in range(10_000):
        record = some_record(random.Random(f"shapes {i}"))
        try:
            prompt, responses = parse_record(record, "f:1")
        except SystemExit as error:
            assert str(error).startswith("f:1: ") and "\n" not in str(error)
            continue
        taken += 1
        found = [prompt, *(prompt + response for response in responses)]
        for key, value in record.items():
            is_named = key not in CONVERSATION and (not holds_text(key, value) or key == "text" and all(r.strip() in value for r in responses))
            is_bad = record.get("label") is False and key != "prompt"
            for text in texts_of(value):
                assert is_named or is_bad or any(text.strip() in conversation for conversation in found), (i, record, prompt, responses)
    assert taken > 2000


@pytest.fixture
def tmp_path():
    """In memory, where the system has a folder there: on a disk, writing a file anew takes milliseconds."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_lines_of_ones_own(tmp_path, capsys):
    inputs = [*EXTREMES, *(content_of(rng, rng.choice(LINES)) for rng in (random.Random(f"jsonl {i}") for i in range(2500)))]
    path, good = tmp_path / "mine.jsonl", b"".join(b"\n" + json.dumps(line).encode() for line in LINES[:3])  # a line for each split

    def take(content):
        path.write_bytes(content + good)
        return trouble(lambda: read_all(Jsonl(str(path))), str(path))
    run(inputs, take, capsys)


def test_hh(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "hh-rlhf" / "helpful-base"
    folder.mkdir(parents=True)
    pair = {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}
    inputs = [gzip.compress(content, 1, mtime=0) for content in EXTREMES]
    inputs += [compressed(rng, content_of(rng, pair)) for rng in (random.Random(f"hh {i}") for i in range(2500))]

    def take(content):
        (folder / "test.jsonl.gz").write_bytes(content)
        return trouble(lambda: read_all(HH(str(tmp_path), ["helpful-base"]), ["test"]), str(folder))
    run(inputs, take, capsys)


def test_qa_feedback(tmp_path, capsys):
    path = tmp_path / "my_feedback.json"
    inputs = [*EXTREMES, *(content_of(rng, [feedback()] * 3) for rng in (random.Random(f"qa {i}") for i in range(2500)))]

    def take(content):
        path.write_bytes(content)
        return trouble(lambda: read_all(QAFeedback("", str(path))), str(path))
    run(inputs, take, capsys)


def test_tldr(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tldr, "BATCHES", ["batch3"])
    post, summary = {"id": "t3_1", "subreddit": "tifu", "title": "TIFU", "post": "It was."}, {"text": " a", "policy": "p", "note": None}
    good = {"test.jsonl": post | {"summary": "Was."}, "comparisons/batch3.json": {
        "info": post, "summaries": [summary, summary | {"text": " b"}], "choice": 1, "worker": "w", "batch": "batch3", "split": "valid2", "extra": {}}}
    (tmp_path / "tldr" / "comparisons").mkdir(parents=True)
    inputs = [(name, content) for content in EXTREMES for name in good]
    for rng in (random.Random(f"tldr {i}") for i in range(2500)):
        name = rng.choice([*good])
        inputs.append((name, content_of(rng, good[name])))

    def take(named):
        for name, record in good.items():
            (tmp_path / "tldr" / name).write_bytes(named[1] if name == named[0] else json.dumps(record).encode())
        return trouble(lambda: read_all(tldr.TLDR(str(tmp_path)), ["test"]), str(tmp_path / "tldr" / named[0]))
    run(inputs, take, capsys)


def wild_argument(rng, stage):
    name = rng.choice([f.name for f in fields(stage.Config)])
    value = rng.choice([wild_text(rng), str(rng.randrange(10)), "1e3", "nan", "-inf", "1e999", "None", "true", "9" * 5000, "x" * 10**5, str(rng.random())])
    return rng.choice([f"--{name}={value}"] * 6 + [f"--{name}", f"-{name}={value}", f"--{name[:-1]}={value}", value, "hh", "animals", "--" + value])


@pytest.mark.parametrize("stage", [dpo, ppo])
def test_options(stage, capsys):
    kinds = {}
    for name, annotation in typing.get_type_hints(stage.Config, include_extras=True).items():
        kind, _, optional = split_type(annotation)
        kinds[name] = kind | None if optional else kind
    inputs = [[wild_argument(rng, stage) for _ in range(rng.randrange(4))] for rng in (random.Random(f"{stage.__name__} {i}") for i in range(1250))]

    def take(argv):
        def read():
            cfg = parse(stage.Config, stage.RECIPES, argv)
            assert all(isinstance(getattr(cfg, name), kind) for name, kind in kinds.items()), cfg
            assert cfg.recipe in ("animals", *stage.RECIPES)
            assert not any(arg.startswith("--recipe=") for arg in argv) or cfg.recipe == "animals" or cfg.data != "animals"
        return trouble(read, "-h" if "-h" in argv else "-")
    run(inputs, take, capsys)
