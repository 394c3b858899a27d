"""The first example as a model sees it, warnings about data, and a console that fits the screen."""
import io
import json
from types import SimpleNamespace

import pytest
from conftest import feedback
from test_stages import here

import ppo
import sample
from common.examine import first_example, warnings
from common.options import RunConfig
from common.run import Run
from data import dataset, encode_groups, get_tokenizer


def test_the_first_example_by_hand():
    tokenizer = get_tokenizer("animals")
    (group,) = encode_groups(tokenizer, [("Tell me about the owl: what it eats.", [" It eats mice.", " It can fly."])], 64)
    words = [[tokenizer.decode([token]) for token in response] for response in group[1]]
    assert first_example(tokenizer, group, ["chosen", "rejected"]).split("\n") == [
        "  prompt    Tell me about the owl: what it eats.",
        "  chosen    " + "|".join(words[0]) + "|", "  rejected  " + "|".join(words[1]) + "|"]
    last = [[len(response) - 1] for response in group[1]]
    assert first_example(tokenizer, group, ["rank 0"], last).split("\n")[1:] == ["  rank 0   It eats mice.<|endoftext|>|"]


def test_a_long_example_takes_a_line_each():
    tokenizer = get_tokenizer("gpt2")
    groups = encode_groups(tokenizer, [("one\ntwo\x1b " * 90, [" yes\r no" * 90])], 2000)
    lines = first_example(tokenizer, groups[0], ["response"]).split("\n")
    assert len(lines) == 2 and all(line.isprintable() and len(line) < 180 for line in lines)
    assert lines[0].startswith("  prompt    … ") and lines[1].endswith(" …") and "one⏎two\ufffd" in lines[0]


GOOD = [(f"What is {i}?", [f" It is {i}."]) for i in range(20)]


@pytest.mark.parametrize("examples, max_len, expected", [
    (GOOD, 64, None),
    ([(f"{i}+{i}=", [f" {2 * i}"]) for i in range(20)], 64, None),
    ([("これは何ですか", ["鳥です"])] * 20, 64, None),  # no spaces there
    ([(prompt, [response[0].strip()]) for prompt, response in GOOD], 64, "20 of 20 responses follow their prompt without a space: 'What is 0?It is 0.'"),
    (GOOD[:9] + [("", ["It"])] * 11, 64, None),  # no prompt, nothing to be joined with
    (GOOD, 7, "20 of 20 responses are cut to --max_len and have lost their end"),
    ([(response[0], [" " + prompt]) for prompt, response in GOOD], 64, "20 of 20 responses end with a question mark, and 0 of the prompts do"),
    (GOOD[:19] + [("Hi.", [" Hello.\n\nHuman: Bye.\n\nAssistant: Bye."])], 64, "1 of 20 responses contain a user's turn (Human:)"),
])
def test_what_is_probably_wrong(examples, max_len, expected):
    tokenizer = get_tokenizer("gpt2")
    lines = warnings(tokenizer, encode_groups(tokenizer, examples, max_len))
    if expected is None:
        assert lines == []
    else:
        assert len(lines) == 1 and lines[0].startswith(expected)


def test_the_animals_and_the_warnings_agree(small_world):
    data = dataset("animals")
    groups = encode_groups(data.tokenizer(), [(prompt, [response]) for prompt, response in data.demonstrations("train")], 64)
    assert warnings(data.tokenizer(), groups) == []


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "dpo", "simpo", "finegrained"])
def test_each_stage_shows_its_first_example_on_a_console_of_100_columns(stage, start, capsys):
    (start / "small_feedback.json").write_text(json.dumps([feedback(question=f"{i}?") for i in range(40)]))
    here(stage, start, "a", "--steps=2", "--log_every=1")
    lines = capsys.readouterr().out.split("\n")
    headers = [line for line in lines if line.startswith("  step ")]
    numbers = [line for line in lines if line[:6].strip().isdigit()]
    assert headers and len(numbers) >= 2 and all(len(line) <= 100 for line in headers + numbers)
    assert all(len(line.split()) <= 9 for line in headers)  # step, six columns, tokens/s, left
    where = [i for i, line in enumerate(lines) if line.startswith(("the first example (a | ends", "the first prompt:"))]
    assert where and all(lines[i + 1].startswith("  prompt ") for i in where)


def test_a_warm_up_of_most_of_the_steps(start, capsys):
    for warmup, is_warned in ((11, True), (10, False)):
        Run("dpo", RunConfig(data=str(start / "mine.jsonl"), out=str(start / f"{warmup}"), steps=20, warmup=warmup, device="cpu"))
        assert ("takes most of --steps=20" in capsys.readouterr().out) == is_warned


# ------------------------------------------------------------------------------------------- text and samples

def test_a_reward_of_two_texts():
    tokenizer = get_tokenizer("animals")
    seen = []

    def length(prompt, response):
        seen.append((prompt, response))
        return len(response)
    prompt = tokenizer.encode_ordinary("Tell me about the owl:")
    response = tokenizer.encode_ordinary(" It can fly.")
    rewards = ppo.text_reward(length, tokenizer)([prompt, prompt], [response + [tokenizer.eot_token], response[:1]])
    first = tokenizer.decode(response[:1])
    assert seen == [("Tell me about the owl:", " It can fly."), ("Tell me about the owl:", first)]
    assert rewards.shape == (2, len(response) + 1) and rewards[0, -1] == len(" It can fly.")
    assert rewards[1, 0] == len(first) and rewards.count_nonzero() == 2


def test_a_conversation_of_several_turns(start, capsys, monkeypatch):
    """A model of conversations sees the turns before; any other, and every model with --raw, a line alone."""
    asked = []

    def answer(model, prompt, tokenizer, args):
        asked.append(prompt)
        return f" answer {len(asked)}"
    monkeypatch.setattr(sample, "answer", answer)
    monkeypatch.setattr(sample, "template_of_checkpoint", lambda name: "turns")
    folder = str(start / "start")
    for more, expected in (([], ["\n\nHuman: one\n\nAssistant:", "\n\nHuman: one\n\nAssistant: answer 1\n\nHuman: two\n\nAssistant:"]),
                           (["--raw"], ["one", "two"])):
        asked.clear()
        monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n\nthree\n"))
        sample.main([folder, *more])
        assert asked == expected
        assert capsys.readouterr().out == f"{folder}: answer 1\n{folder}: answer 2\n"


def test_the_temperature_and_the_length_of_an_answer(start, capsys):
    folder = str(start / "start")
    answers = set()
    for _ in range(3):
        sample.main([folder, "--prompt=Tell me about the owl:", "--temperature=0", "--max_new_tokens=4"])
        answers.add(capsys.readouterr().out)
    assert len(answers) == 1
    tokenizer = get_tokenizer("animals")
    assert len(tokenizer.encode_ordinary(answers.pop().strip().removeprefix(folder + ":"))) <= 4
    for option, message in (("--temperature=-1", "expected at least 0"), ("--max_new_tokens=0", "expected at least 1")):
        with pytest.raises(SystemExit, match=message):
            sample.main([folder, "--prompt=x", option])


def test_many_passes_over_few_examples_get_a_warning(capsys):
    """A file of one's own gets the steps of hh, which are for 160,000 pairs."""
    run = Run.__new__(Run)
    run.cfg = SimpleNamespace(steps=100, batch_size=4, seed=0)
    run.digests, run.tokens_per_step = {"data": ""}, 0
    run.shuffled_batches([([1], [[2]])] * 20)
    assert capsys.readouterr().out == ""
    run.shuffled_batches([([1], [[2]])] * 8)
    assert capsys.readouterr().out == "warning: --steps=100 goes through the 8 examples 50 times\n"
