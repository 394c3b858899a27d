"""The animals world, files of the published schemas, and what is said of bad ones."""
import gzip
import json
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import numpy as np
import pytest
import tiktoken
from conftest import SHARED, feedback, make_model

import engine.files
import evaluate
import ppo
import sample
import sft
from common.options import RunConfig
from common.run import Run
from data import animals, dataset, encode_groups, encode_pairs, encode_prompts, files, get_tokenizer, tokenizers
from data.files import read_lines
from data.hh import HH
from data.jsonl import Jsonl, common_prompt, parse
from data.schema import Comparison
from data.tokenizers import encode
from engine.files import fetch

needs_gpt2 = pytest.mark.skipif(not (SHARED / "tiktoken").is_dir(), reason="the GPT-2 encoding is not beside the checkout")
PROMPT = "Tell me about the owl: what it eats and how it moves."


# ------------------------------------------------------------------------------------------------ animals

@pytest.mark.parametrize("response, relevance, factuality, completeness", [
    (" It eats mice. It can fly.", 0, 0, 1),
    (" It can fly. It eats mice.", 0, 0, 1),
    (" It eats mice.", 0, 0, 0.5),
    (" It eats grass. It can fly.", 0, -0.5, 0.5),
    (" It eats mice. It can fly. It has feathers.", -0.3, 0, 1),            # true, but nobody asked
    (" It eats mice. It can fly. It has fur.", -0.3, -0.5, 1),              # nor is it true
    (" It eats mice. It can fly. It eats mice.", -0.3, 0, 1),               # repeated
    (" It eats mice. It eats grass. It can fly.", 0, -0.5, 1),              # contradicts itself
    (" I hope this helps. It eats mice. It can fly.", -0.3, 0, 1),          # filler
    (" It eats the moon. It can fly.", -0.3, 0, 0.5),                       # no sentence of this world
    (" It eats mice. It can", -0.3, 0, 0.5),                                # cut off
    ("", 0, 0, 0),
])
def test_gold_by_hand(response, relevance, factuality, completeness):
    axes = animals.axes(PROMPT, response)
    assert axes == pytest.approx(dict(relevance=relevance, factuality=factuality, completeness=completeness))
    assert animals.gold(PROMPT, response) == pytest.approx(relevance + factuality + completeness)


def test_every_question_has_a_perfect_answer_and_every_answer_is_grammatical():
    for split in ("train", "validation", "test"):
        for animal, asked in animals.questions(split):
            prompt = animals.ask(animal, asked, animals.OPENINGS[0])
            assert animals.parse_prompt(prompt) == (animal, list(asked))
            assert animals.gold(prompt, " ".join(animals.state(a, animals.WORLD[animal][a]) for a in asked)) == 1
    assert all(good == said for good, said in (animals.grammatical(r) for _, r in animals.demonstrations("validation")))
    assert animals.grammatical(" It eats mice. It the.") == (1, 2)


def test_splits_share_no_question():
    pairs = {split: {animals.parse_prompt(p)[0] + str(animals.parse_prompt(p)[1]) for p in animals.prompts(split)} for split in animals.SIZES}
    assert all(not pairs[a] & pairs[b] for a in pairs for b in pairs if a != b)
    for split in pairs:
        texts = {p for p, _ in animals.demonstrations(split)} | {c.prompt for c in animals.comparisons(split)}
        assert texts <= set(animals.prompts(split))


def test_labelers_agree_with_each_other_as_often_as_instructgpts_did():
    """72.6 ± 1.5% (arXiv:2203.02155 §3.4): both right or both wrong about a pair, each Bradley–Terry."""
    comparisons = animals.comparisons("train")
    gap = np.array([abs(animals.gold(p, a) - animals.gold(p, b)) for p, (a, b), _ in comparisons])
    right = 1 / (1 + np.exp(-animals.LABEL_SCALE * gap))
    assert abs((right**2 + (1 - right)**2).mean() - 0.726) < 0.015
    assert abs(right.mean() - 0.79) < 0.01


@pytest.mark.parametrize("k", [2, 4])
def test_every_pair_of_a_ranking_is_bradley_terry(k):
    """Labels go against gold as often as σ(−scale · |Δgold|) says."""
    comparisons = animals.comparisons("train", k)[:5000]
    assert all(c.ranks == list(range(k)) for c in comparisons)  # the best first
    pairs = [(animals.gold(prompt, a), animals.gold(prompt, b))
             for prompt, responses, _ in comparisons for a, b in combinations(responses, 2)]
    pairs = np.array([(a, b) for a, b in pairs if not math.isclose(a, b, abs_tol=1e-9)])
    against = (pairs[:, 0] < pairs[:, 1]).mean()
    expected = (1 / (1 + np.exp(animals.LABEL_SCALE * np.abs(pairs[:, 0] - pairs[:, 1])))).mean()
    assert abs(against - expected) < 0.02


def test_generator_is_the_same_every_time():
    assert animals.demonstrations("validation") == animals.demonstrations("validation")
    assert animals.comparisons("validation") == animals.comparisons("validation")
    assert animals.demonstrations("validation") != animals.demonstrations("test")


def test_not_a_prompt_of_this_world():
    with pytest.raises(ValueError, match="not a prompt of the animals world: 'Hello'"):
        animals.gold("Hello", "")


def test_animals_tokenizer_spells_anything_and_knows_its_words():
    tokenizer = animals.tokenizer()
    for text in ("héllo wörld  12\n\n x", PROMPT, " It is an insect.", "<|endoftext|>", "\x00🦉"):
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    assert [tokenizer.decode([t]) for t in tokenizer.encode_ordinary(" It eats mice.")] == [" It", " eats", " mice", "."]
    assert tokenizer.eot_token not in tokenizer.encode_ordinary("<|endoftext|>")


# ------------------------------------------------------------------------------------------------ groups

@pytest.mark.parametrize("k, ties", [(2, 24), (4, 0)])
def test_comparisons_that_tie_are_counted_and_said(tmp_path, k, ties, capsys):
    """Of the six preferences of each of eight records, three are ties; but its four answers do not all tie."""
    (tmp_path / "my_feedback.json").write_text(json.dumps([feedback(preference=[1, 0, 2, 0, 2, 0])] * 10))
    dataset(str(tmp_path / "my_feedback.json")).comparisons("train", k)
    assert capsys.readouterr().out == (f"qa_feedback: left out {ties} comparisons of the train split that tie\n" if ties else "")


def test_encode_groups_ends_responses_and_cuts_as_documented(capsys):
    t = animals.tokenizer()
    words = lambda n: " it" * n  # noqa: E731
    (p, (r,)), = encode_groups(t, [(words(3), [words(2)])], 10)
    assert len(p) == 3 and r.tolist() == t.encode_ordinary(words(2)) + [t.eot_token]
    assert capsys.readouterr().out == ""
    groups = encode_groups(t, [("the" + words(20), [words(3)]),          # the prompt's beginning goes
                               (words(3), [words(20), words(1)]),        # the response's end goes, and its EOS
                               ("the" + words(20), [words(20)])], 10)    # both
    assert [(len(p), [len(r) for r in rs]) for p, rs in groups] == [(6, [4]), (3, [7, 2]), (5, [5])]
    assert [[r[-1] == t.eot_token for r in rs] for _, rs in groups] == [[True], [False, True], [False]]
    assert all(t.encode_ordinary("the")[0] not in p for p, _ in groups)
    assert capsys.readouterr().out.strip() == "cut to max_len=10: the beginning of 2 prompts, the end of 2 responses, of 3 examples"


def test_an_empty_prompt_begins_with_eos():
    t = animals.tokenizer()
    assert [p.tolist() for p in encode_prompts(t, ["", " it"])] == [[t.eot_token], t.encode_ordinary(" it")]


@pytest.mark.parametrize("name", ["animals", pytest.param("gpt2", marks=needs_gpt2)])
def test_special_token_text_is_text_on_every_way_in(name):
    """Neither a prompt nor a response can hold the control token by spelling it."""
    t, text = get_tokenizer(name), "a<|endoftext|>b<|endoftext|>"
    (prompt, responses), = encode_groups(t, [(text, [text, "<|endoftext|>"])], 200)
    assert t.decode(prompt.tolist()) == text and t.eot_token not in prompt
    assert [t.decode(r[:-1].tolist()) for r in responses] == [text, "<|endoftext|>"] and [r.tolist().count(t.eot_token) for r in responses] == [1, 1]
    assert [t.decode(p.tolist()) for p in encode_prompts(t, [text])] == [text]
    ids, = evaluate.encode_with_room([text], make_model().config.block_size, t)
    assert t.decode(ids) == text[-len(t.decode(ids)):] and t.eot_token not in ids


def test_special_token_text_reaches_the_models_as_text(start, monkeypatch):
    """sample.py --prompt, and the prompts of a rollout."""
    t, seen = get_tokenizer("animals"), []
    monkeypatch.setattr(evaluate, "respond", lambda model, ids, *rest, **more: seen.extend(ids) or [[t.eot_token]] * len(ids))
    sample.main([str(start / "start"), "--prompt=a<|endoftext|>"])
    path = write(start / "special.jsonl", [{"prompt": "a<|endoftext|>", "completion": " <|endoftext|>"}] * 20)
    ppo.train(ppo.Config(data=path, init=str(start / "start"), out=str(start / "a"), steps=1, batch_size=4, minibatches=1, epochs=1, eval_n=0, device="cpu",
                         ptx_coef=0.1), lambda prompts, responses: seen.extend(prompts) or [[0.0] * max(map(len, responses))] * len(responses))
    assert len(seen) == 5 and all(t.decode(ids) == "a<|endoftext|>" and t.eot_token not in ids for ids in seen)


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_encoding_is_the_same_whatever_the_pool(workers, monkeypatch):
    t, texts = animals.tokenizer(), [f"{i} " * (i % 7) for i in range(3000)]  # six pieces
    monkeypatch.setattr(tokenizers, "ThreadPoolExecutor", lambda: ThreadPoolExecutor(workers))
    assert [ids.tolist() for ids in encode(t, texts)] == [t.encode_ordinary(text) for text in texts]


def test_a_text_without_end_is_encoded_in_parts():
    t = animals.tokenizer()
    n = tokenizers.LONGEST
    ids, = encode(t, [" " * (2 * n) + "x"])  # at once, the spaces would be too many for GPT-2's pattern
    assert t.decode(ids.tolist()) == " " * (2 * n) + "x"


def test_the_gpt2_encoding_without_network(monkeypatch):
    def refuse(name):
        raise ConnectionError("no route")
    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(SystemExit, match="cannot fetch the GPT-2 encoding .ConnectionError.*TIKTOKEN_CACHE_DIR"):
        get_tokenizer("gpt2")


# ------------------------------------------------------------------------------------------------ jsonl

def write(path, records, opener=open):
    with opener(path, "wt") as f:
        f.writelines((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)
    return str(path)


def test_every_schema():
    user, assistant = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    assert parse({"prompt": "2+2=", "completion": "4"}, "f:1") == ("2+2=", ["4"])
    assert parse({"prompt": "2+2=", "chosen": "4", "rejected": "5"}, "f:1") == ("2+2=", ["4", "5"])
    assert parse({"messages": [user, assistant]}, "f:1") == ("\n\nHuman: Hi\n\nAssistant:", [" Hello"])
    assert parse({"prompt": [user], "chosen": [assistant], "rejected": [assistant | {"content": "No"}]}, "f:1") == \
        ("\n\nHuman: Hi\n\nAssistant:", [" Hello", " No"])
    assert parse({"chosen": [user, assistant], "rejected": [user, assistant | {"content": "He"}]}, "f:1") == \
        ("\n\nHuman: Hi\n\nAssistant:", [" Hello", " He"])


USER = {"role": "user", "content": "Name a small bird."}
GOOD, BAD = {"role": "assistant", "content": "A wren."}, {"role": "assistant", "content": "A cod."}
TURN = "\n\nHuman: Name a small bird.\n\nAssistant:"


@pytest.mark.parametrize("record, expected", [
    ({"instruction": "Name a bird.", "input": "It is small.", "output": "A wren."},
     ("\n\nHuman: Name a bird.\n\nIt is small.\n\nAssistant:", [" A wren."])),
    ({"instruction": "Name a small bird.", "input": "", "output": "A wren."}, (TURN, [" A wren."])),
    ({"instruction": "Name a small bird.", "output": "A wren.", "text": "Do it. Name a small bird. A wren."}, (TURN, [" A wren."])),
    ({"instruction": "Name a small bird.", "chosen": "A wren.", "rejected": "A cod."}, (TURN, [" A wren.", " A cod."])),
    ({"system": "Be brief.", "prompt": "Name a bird.", "completion": " A wren."}, ("Be brief.\n\nName a bird.", [" A wren."])),
    ({"system": "Be brief.", "messages": [USER, GOOD]}, ("Be brief." + TURN, [" A wren."])),
    # UltraFeedback as published, with its metadata
    ({"prompt": "Name a small bird.", "prompt_id": "f0e3", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD],
      "score_chosen": 8.5, "score_rejected": 3.0, "source": "a web forum"}, (TURN, [" A wren.", " A cod."])),
    ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, (TURN, [" A wren.", " A cod."])),
    ({"messages": [USER], "chosen": [GOOD], "rejected": [BAD]}, (TURN, [" A wren.", " A cod."])),
    ({"prompt": "Name a small bird.", "chosen": [GOOD], "rejected": [BAD]}, (TURN, [" A wren.", " A cod."])),
    ({"prompt": [USER], "completion": "A wren."}, (TURN, [" A wren."])),
    ({"messages": [USER]}, (TURN, [])),
    ({"prompt": "Name a small bird.", "prompt_id": "f0", "messages": [USER, GOOD]}, (TURN, [" A wren."])),  # UltraChat as published
    ({"messages": [{"role": "system", "content": "Be brief."}, USER, GOOD]}, ("Be brief." + TURN, [" A wren."])),
    ({"prompt": "Q", "completion": " bad", "label": False}, ("Q", [])),
    ({"prompt": "Q", "completion": " good", "label": True}, ("Q", [" good"])),
    ({"prompt": "Q"}, ("Q", [])),
    ({"chosen": "Name a bird. A wren.", "rejected": "Name a bird. A cod."}, ("Name a bird. A", [" wren.", " cod."])),
    ({"prompt": "Q", "responses": [" a", " b", " c"], "ranks": [0, 1, 1]}, ("Q", [" a", " b", " c"])),
    ({"prompt": [USER], "responses": [[GOOD], "A cod.", [USER, BAD]]}, (TURN, [" A wren.", " A cod.", " A cod."])),
])
def test_shapes_of_the_field(record, expected):
    assert parse(record, "f:1") == expected


@pytest.mark.parametrize("record, message", [
    ({"question": "Name a small bird.", "chosen": "A wren.", "rejected": "A cod."}, "f:1: no 'prompt'.*if 'question' is the prompt, name it 'prompt'"),
    ({"chosen": "A wren.", "rejected": "A cod."}, "f:1: no 'prompt', and chosen and rejected do not begin with the same turn, line or sentence"),
    ({"question": "Why is it so?", "prompt": "Q", "chosen": " a", "rejected": " b"}, "f:1: 'question' holds text that would be lost"),
    ({"prompt": "Q", "completion": " the answer", "chosen": " a", "rejected": " d"}, "'completion' holds text"),
    ({"prompt": "Another one", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "the messages before the response are not those of 'prompt'"),
    ({"prompt": "Q", "chosen": [USER], "rejected": [USER, BAD]}, "the last message of 'chosen' is not the assistant's"),
    ({"messages": [USER | {"name": "Ann of the farm"}, GOOD]}, "a message holds text in 'name'"),
    ({"messages": [USER, GOOD | {"content": ""}]}, "an empty response"),
    ({"completion": " c"}, "a completion without its prompt"),
    ({"prompt": "Q", "responses": " c"}, "'responses' must be a list of two responses or more, the best first"),
    ({"prompt": "Q", "responses": [" a", 3]}, r"'responses\[1\]' is int, expected text or a list of messages"),
    ({"prompt": "Q", "responses": [" a", ""]}, "an empty response"),
    ({"prompt": "Q", "completion": " c", "responses": ["another one", "and one"]}, "'responses' holds text"),
    ({"prompt": "Q", "completion": " c", "history": [["one question", "one answer"]]}, "'history' holds text"),
])
def test_no_text_of_a_record_is_lost(record, message):
    with pytest.raises(SystemExit, match=message):
        parse(record, "f:1")


def test_ranked_responses(tmp_path):
    records = [{"prompt": f"{i}:", "responses": [" a", " b", " c", " d"], "ranks": [0, 1, 1, 5]} for i in range(39)]
    data = dataset(write(tmp_path / "mine.jsonl", [*records, {"prompt": "39:", "chosen": " a", "rejected": " b"}]))
    comparisons = data.comparisons("train")
    assert comparisons[0] == ("2:", [" a", " b", " c", " d"], [0, 1, 1, 5]) and comparisons[-1] == ("39:", [" a", " b"], [0, 1])
    assert data.comparisons("train", 4) == comparisons and data.demonstrations("train")[0] == ("2:", " a")
    pairs = encode_pairs(get_tokenizer("gpt2"), comparisons[:1], 64, "mine")
    assert len(pairs) == 5  # of six, b and c tie
    with pytest.raises(SystemExit, match="--k=8: .*mine.jsonl ranks at most 4 responses to a prompt"):
        data.comparisons("train", 8)


@pytest.mark.parametrize("ranks, message", [
    ([0, 1], "'ranks' must be 3 whole numbers"), ([0, 1, 0.5], "'ranks' must be 3 whole numbers"), ("012", "'ranks' must be 3 whole numbers"),
    ([1, 0, 2], "'responses' must be sorted by 'ranks'")])
def test_ranks_that_are_none(tmp_path, ranks, message):
    with pytest.raises(SystemExit, match=f"mine.jsonl:1: {message}"):
        dataset(write(tmp_path / "mine.jsonl", [{"prompt": "Q", "responses": [" a", " b", " c"], "ranks": ranks}])).prompts("train")


def test_a_file_that_is_one_json_value(tmp_path):
    records = [{"prompt": f"{i}:", "completion": " a"} for i in range(40)]
    for i, content in enumerate((json.dumps(records, indent=2), json.dumps(records), json.dumps({"data": records}), json.dumps({"data": records}, indent=1))):
        (tmp_path / f"{i}.json").write_text(content)
        assert len(dataset(str(tmp_path / f"{i}.json")).demonstrations("train")) == 36
    (tmp_path / "bad.json").write_text(json.dumps([*records[:3], {"prompt": 1, "completion": " a"}], indent=2))
    with pytest.raises(SystemExit, match="bad.json:record 4: 'prompt' is int"):
        dataset(str(tmp_path / "bad.json")).prompts("train")


def test_a_key_that_appears_twice_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="mine.jsonl:1: not JSON .*'prompt' appears twice"):
        dataset(write(tmp_path / "mine.jsonl", ['{"prompt": "a", "prompt": "b", "completion": " c"}'])).prompts("train")


def test_pairs_of_one_prompt_stay_in_one_split(tmp_path):
    data = dataset(write(tmp_path / "mine.jsonl", [{"prompt": f"{i // 6}:", "chosen": f" {i}", "rejected": " b"} for i in range(600)]))
    prompts = {split: set(data.prompts(split)) for split in ("train", "validation", "test")}
    assert {split: len(p) for split, p in prompts.items()} == {"train": 90, "validation": 5, "test": 5}
    assert len(data.comparisons("train")) == 540 and not prompts["train"] & (prompts["validation"] | prompts["test"])


def test_prompts_alone_and_bad_answers(tmp_path, caplog):
    caplog.set_level("INFO")
    data = dataset(write(tmp_path / "a.jsonl", [{"prompt": f"{i}:"} for i in range(40)]))
    assert len(data.prompts("train")) == 36
    with pytest.raises(SystemExit, match="holds no demonstrations, prompts only"):
        data.demonstrations("train")
    records = [{"prompt": f"{i}:", "completion": " c", "label": i % 2 == 0, "id": f"x{i}"} for i in range(40)]
    data = dataset(write(tmp_path / "b.jsonl", records))
    assert len(data.demonstrations("train")) == 18 and len(data.prompts("train")) == 36
    assert "20 responses with" in caplog.text and caplog.text.count("fields that are not used: 'id'") == 1


@pytest.mark.parametrize("shape", ["prompt", "messages"])
def test_prompts_alone_are_enough_for_ppo(shape, start, capsys):
    """With the policy and the reward model named; without, SFT says that it has nothing to learn from."""
    records = [{"prompt": f"{i}:"} if shape == "prompt" else {"messages": [{"role": "user", "content": f"{i}?"}]} for i in range(60)]
    path = write(start / "prompts.jsonl", records)
    settings = dict(data=path, steps=2, batch_size=8, epochs=1, minibatches=2, max_new_tokens=4, eval_n=3, device="cpu", out=str(start / "out"))
    ppo.train(ppo.Config(**settings, init=str(start / "start"), reward_model=str(start / "reward")))
    log = [json.loads(line) for line in open(start / "out" / "log.jsonl")]
    assert [record["step"] for record in log] == [1, 2] and all(math.isfinite(record["score"]) for record in log)
    assert [row["score"] is not None for row in json.load(open(start / "out" / "eval.json"))] == [True, True]

    def reward_fn(prompts, responses):
        return [[1.0] + [0.0] * (max(map(len, responses)) - 1) for _ in responses]

    ppo.train(ppo.Config(**settings | {"out": str(start / "verifier")}, init=str(start / "start")), reward_fn)
    with pytest.raises(SystemExit, match="prompts.jsonl: holds no demonstrations, prompts only; to train on prompts alone, ppo.py needs --init"):
        sft.train(sft.Config(data=path, steps=2, device="cpu", out=str(start / "sft"), init=str(start / "start")))


def test_a_bad_record_of_any_split_stops_a_run_before_it_begins(tmp_path):
    lines = [{"prompt": f"{i}:", "chosen": " a", "rejected": " b"} for i in range(40)]
    lines[21]["rejected"] = ""  # of the test split
    path = write(tmp_path / "mine.jsonl", lines)
    with pytest.raises(SystemExit, match="mine.jsonl:22: an empty response"):
        Run("dpo", RunConfig(data=path, out=str(tmp_path / "a"), device="cpu"))
    assert not (tmp_path / "a").exists()


def test_common_prompt():
    assert common_prompt("Q: x A: yes", "Q: x A: yes, no") == ("Q: x A:", " yes", " yes, no")
    a = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert common_prompt(a + " d", a + " e") == (a, " d", " e")
    assert common_prompt("abc", "xyz") == ("", "abc", "xyz")


@pytest.mark.parametrize("opener, suffix", [(open, ".jsonl"), (gzip.open, ".jsonl.gz")])
def test_a_file_is_split_by_line(tmp_path, opener, suffix):
    data = dataset(write(tmp_path / f"mine{suffix}", [{"prompt": f"{i}:", "chosen": " a", "rejected": " b"} for i in range(40)], opener))
    assert data.prompts("validation") == ["0:", "20:"] and data.prompts("test") == ["1:", "21:"]
    assert len(data.comparisons("train")) == 36 and data.demonstrations("train")[0] == ("2:", " a")


OK = {"prompt": "p", "chosen": " a", "rejected": " b"}


@pytest.mark.parametrize("line, message", [
    ('{"prompt": "p", "chosen": ', r"mine.jsonl:4: not JSON"),
    ("[1, 2]", "mine.jsonl:4: expected an object, found list"),
    ({"prompts": "p"}, "mine.jsonl:4: needs prompt and completion.*found 'prompts'"),
    ({}, "mine.jsonl:4: needs prompt and completion.*found nothing"),
    ({"prompt": "p", "chosen": "", "rejected": " b"}, "mine.jsonl:4: an empty response"),
    ({"prompt": 1, "chosen": " a", "rejected": " b"}, "mine.jsonl:4: 'prompt' is int"),
    ({"messages": []}, "mine.jsonl:4: 'messages' must be a list"),
    ({"messages": [{"role": "robot", "content": ""}]}, "mine.jsonl:4: a message must be"),
    ("[" * 100_000, "mine.jsonl:4: not JSON"),
    ("\udcff", "mine.jsonl:4: not JSON"),
    ('{"prompt": "p", "completion": "\\ud800"}', "mine.jsonl:4: half of a surrogate pair"),
    ({"messages": [{"role": "user", "content": "\udcff"}]}, "mine.jsonl:4: half of a surrogate pair"),
    (" " * files.LONGEST, "mine.jsonl:4: a line of 16 MiB or more"),
])
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "mine.jsonl"
    lines = [json.dumps(OK), json.dumps(OK), "", line if isinstance(line, str) else json.dumps(line)]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    with pytest.raises(SystemExit, match=message) as error:
        dataset(str(path)).comparisons("train")
    assert "\n" not in str(error.value)


def test_files_with_nothing_to_train_on(tmp_path):
    with pytest.raises(SystemExit, match="no example to train on"):
        dataset(write(tmp_path / "a.jsonl", [])).demonstrations("train")
    with pytest.raises(SystemExit, match="no example to train on"):
        dataset(write(tmp_path / "b.jsonl", [OK])).comparisons("train")
    with pytest.raises(SystemExit, match="holds no comparisons"):
        dataset(write(tmp_path / "c.jsonl", [{"prompt": "p", "completion": "c"}] * 5)).comparisons("train")
    with pytest.raises(SystemExit, match="no such file, and none of the datasets"):
        dataset(str(tmp_path / "d.jsonl"))


def test_a_gz_that_is_cut_short_or_is_none(tmp_path):
    path = write(tmp_path / "mine.jsonl.gz", [OK] * 1000, gzip.open)
    whole = open(path, "rb").read()
    for content in (whole[:len(whole) // 2], b"plain text", whole[:20] + b"\xff" * 40):
        (tmp_path / "bad.jsonl.gz").write_bytes(content)
        with pytest.raises(SystemExit, match=r"bad.jsonl.gz:\d+: "):
            list(read_lines(str(tmp_path / "bad.jsonl.gz")))


# ------------------------------------------------------------------------------------------------ hh

@pytest.fixture
def hh_files(tmp_path):
    """Two files of the published schema."""
    turn = "\n\nHuman: What is {}?\n\nAssistant:"
    for file, n in (("train", 101), ("test", 3)):
        folder = tmp_path / "hh-rlhf" / "helpful-base"
        folder.mkdir(parents=True, exist_ok=True)
        records = [{"chosen": turn.format(i) + f" It is {i}.", "rejected": turn.format(i) + " I cannot say."} for i in range(n)]
        records[2]["rejected"] = turn.format(2)
        write(folder / f"{file}.jsonl.gz", records, gzip.open)
    return str(tmp_path)


def test_hh_reads_the_published_files(hh_files, capsys):
    data = dataset("hh/helpful-base", hh_files)
    prompt = "\n\nHuman: What is 1?\n\nAssistant:"
    assert data.comparisons("test")[1] == Comparison(prompt, [" It is 1.", " I cannot say."], [0, 1])
    assert "left out 1 comparisons of the test split with an empty response" in capsys.readouterr().out
    assert len(data.comparisons("train")) == 98 and len(data.comparisons("validation")) == 2 and len(data.comparisons("test")) == 2
    assert data.demonstrations("validation")[1][1] == " It is 100."


def test_hh_without_file_or_network(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route")
    monkeypatch.setattr(engine.files, "urlopen", refuse)
    with pytest.raises(SystemExit, match="harmless-base/train.jsonl.gz is missing and https.*no route.*--data_dir") as error:
        dataset("hh", str(tmp_path)).comparisons("train")
    assert "\n" not in str(error.value)
    with pytest.raises(SystemExit, match="HH-RLHF has harmless-base, "):
        dataset("hh/kind-base", str(tmp_path))


def test_a_file_that_is_not_the_published_one_is_refused(tmp_path):
    path = tmp_path / "x.gz"
    path.write_bytes(b"not it")
    with pytest.raises(SystemExit, match="sha256 differs"):
        fetch(str(path), "https://example.org/x.gz", "0" * 64)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public files are not beside the checkout")
def test_the_real_file():
    data = Jsonl(str(SHARED / "hh-rlhf/harmless-base/test.jsonl.gz"))
    pairs = [pair for split in ("train", "validation", "test") for pair in data.comparisons(split)]
    assert len(pairs) == 2312
    assert all(pair.prompt.endswith("\n\nAssistant:") for pair in pairs)
    assert len(HH(str(SHARED), ["harmless-base"]).comparisons("test")) == 2312
