"""Segments, the dense reward token by token, the reward models' losses, runs that equal ppo.py's."""
import json
import math
import os
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiktoken
import torch
from conftest import SHARED, feedback, make_model

import common.run
import finegrained
import ppo
import reward
import segment_reward
import sft
from common.checkpoints import save_checkpoint
from common.models import load_model
from common.optim import make_optimizer
from data import animals, dataset, get_tokenizer
from data.segments import decode_with_ends, segments, sentences
from finegrained import RewardModels, finegrained_reward
from segment_reward import (AXES, PackedMarks, Segment, accuracy_rows, cut_response, judge, load_feedback, pack_marks,
                            reward_losses, segment_label)
from test_stages import TINY, log_of

QA = SHARED / "qa_feedback/dev_feedback.json"
real = pytest.mark.skipif(not QA.exists(), reason="the public files are not beside the checkout")


def cut(function, text):
    return [text[a:b] for a, b in function(text)]


# ------------------------------------------------------------------------------------------------- segments

@pytest.mark.parametrize("text, expected", [
    (" It eats mice. It can fly.", ["It eats mice.", "It can fly."]),
    ('He said "No." Then he left!  Why?', ['He said "No."', "Then he left!", "Why?"]),
    ("Dr. J. Smith of St. Ives came. 7 stayed", ["Dr. J. Smith of St. Ives came.", "7 stayed"]),
    ("It cost 3.5 dollars, i.e. much. é? Él vino.", ["It cost 3.5 dollars, i.e. much.", "é?", "Él vino."]),
    ("one line\n\ntwo. lines \n", ["one line", "two. lines"]),
    ("", []), (" \n ", []), ("...", ["..."])])
def test_sentences_by_hand(text, expected):
    assert cut(sentences, text) == expected


@pytest.mark.parametrize("text, expected", [
    ("a b c d e, f g h i j k", ["a b c d e,", "f g h i j k"]),
    # the last piece needs more than five words
    ("a b c d e, f g h i j", ["a b c d e, f g h i j"]),
    # the first is short: it joins the next
    ("a b, c d e f g h; i j k l m n", ["a b, c d e f g h;", "i j k l m n"]),
    # a later one joins the one before it
    ("a b c d e, f g, h i j k l m", ["a b c d e, f g,", "h i j k l m"]),
    ("a b c d e! f g h i j k. L m.", ["a b c d e!", "f g h i j k.", "L m."])])
def test_segments_by_hand(text, expected):
    assert cut(segments, text) == expected


PIECES = ["a", "B", "é", "語", "🦉", "e\u0301", " ", " ", "\n", ".", "!", "?", ",", ";", '"', ")", "Mr.", " 7"]


def random_text(rng, n=60):
    return "".join(rng.choice(PIECES) for _ in range(n))


def test_every_character_lies_in_one_segment_and_every_segment_in_one_sentence():
    rng = random.Random(0)
    for _ in range(500):
        text = random_text(rng)
        whole, parts = sentences(text), segments(text)
        for spans in (whole, parts):
            assert all(a < b and text[a:b] == text[a:b].strip() for a, b in spans)
            assert all(b <= c for (_, b), (c, _) in zip(spans, spans[1:]))
            covered = {i for a, b in spans for i in range(a, b)}
            assert {i for i, c in enumerate(text) if not c.isspace()} <= covered
        assert all(sum(a <= c and d <= b for a, b in whole) == 1 for c, d in parts)


@pytest.mark.parametrize("name", ["animals", pytest.param("gpt2", marks=real)])
def test_a_segment_ends_in_the_token_that_completes_its_last_character(name):
    tokenizer, rng = get_tokenizer(name), random.Random(1)
    for _ in range(200):
        text = random_text(rng)
        tokens = tokenizer.encode_ordinary(text)
        assert decode_with_ends(tokenizer, tokens)[0] == text
        lengths = [len(tokenizer.decode_single_token_bytes(t)) for t in tokens]
        for axis, token, start, end in cut_response(tokenizer, tokens + [tokenizer.eot_token])[:-1]:
            byte = len(text[:end].encode()) - 1  # of the segment, the last
            assert sum(lengths[:token]) <= byte < sum(lengths[:token + 1])


def test_what_is_cut_in_the_middle_of_a_character_still_has_an_end():
    tokenizer = get_tokenizer("animals")
    for n in range(1, 9):
        tokens = tokenizer.encode_ordinary("é. 🦉")[:n]
        text, ends = decode_with_ends(tokenizer, tokens)
        assert text == tokenizer.decode(tokens) and ends[-1] == len(text) and sorted(ends) == ends
        assert all(token < n for _, token, _, _ in cut_response(tokenizer, tokens))


def test_a_token_that_straddles_a_boundary():
    ranks = {bytes([i]): i for i in range(256)} | {b". ": 256, b". C": 257}
    tokenizer = tiktoken.Encoding("x", pat_str=r"(?s).+", mergeable_ranks=ranks,
                                  special_tokens={"<|endoftext|>": 258})
    tokens = tokenizer.encode_ordinary("A b. C d.")
    assert len(tokens) == 7 and tokens[3] == 257  # A, space, b, ". C", space, d, .
    assert [(axis, token) for axis, token, _, _ in cut_response(tokenizer, tokens)] == [
        ("relevance", 3), ("relevance", 6), ("factuality", 3), ("factuality", 6), ("completeness", 6)]
    assert cut_response(tokenizer, [258]) == [("completeness", 0, 0, 0)]


# ---------------------------------------------------------------------------------------- labels and losses

def test_labels_by_hand():
    spans = [(0, 5, "Irrelevant"), (10, 15, "Unverifiable")]

    def labels(axis, *places):
        return [segment_label(Segment(axis, 0, start, end), spans) for start, end in places]
    assert labels("relevance", (0, 9), (4, 9), (5, 9), (9, 20)) == [0, 0, 1, 1]
    assert labels("factuality", (0, 9), (5, 10), (14, 20), (0, 20)) == [None, 1, 0, 0]


def test_the_example_at_the_top_of_the_page():
    text = "A crab has ten legs, and it can swim in the sea. It has fur."
    assert '"A crab has ten legs, and it can swim in the sea. It has fur."' in segment_reward.__doc__
    irrelevant, wrong = "it can swim in the sea", "It has fur"
    spans = [(text.index(irrelevant), text.index(irrelevant) + len(irrelevant), "Irrelevant"),
             (text.index(wrong), text.index(wrong) + len(wrong), "Wrong-Grounding")]

    def labels(axis, places):
        return [segment_label(Segment(axis, 0, start, end), spans) for start, end in places]
    assert labels("relevance", segments(text)) == [1, 0, 1]
    assert labels("factuality", sentences(text)) == [None, 0]


def test_animals_are_annotated_by_hand(monkeypatch):
    monkeypatch.setattr(animals, "SLIPS", 0.0)
    prompt, rng = "Tell me about the owl: what it eats and how it moves.", random.Random(0)
    response = " It eats grass. It has fur. It can fly. It can fly. Many people like it."
    assert [(response[a:b], kind) for a, b, kind in animals.annotate(prompt, response, rng)] == [
        ("It eats grass.", "Wrong-Grounding"), ("It has fur.", "Irrelevant"), ("It can fly.", "Redundant"),
        ("Many people like it.", "Irrelevant")]
    monkeypatch.setattr(animals, "SLIPS", 1.0)
    kinds = {kind for _ in range(50) for _, _, kind in animals.annotate(prompt, " It can fly.", rng)}
    assert kinds == {"Irrelevant", "Wrong-Grounding"}


def test_the_most_complete_come_first_more_often_than_not(small_world):
    gap = []
    for prompt, responses, ranks in animals.completeness("train"):
        assert ranks == list(range(len(responses)))
        complete = [animals.axes(prompt, response)["completeness"] for response in responses]
        gap.append(complete[0] - complete[-1])
    assert sum(gap) / len(gap) > 0.2


def nll(x):
    return math.log(1 + math.exp(-x))


class Table:
    """A reward model of three heads whose scores are given: a row for each place."""
    scores = torch.tensor([[2.0, 9, 9], [-1, 9, 9], [9, 0.5, 9], [9, 9, 3], [9, 9, 1], [9, 9, 0]])

    def states(self, batch, positions):
        return positions

    def scalars(self, positions):
        return self.scores[positions]


def test_the_losses_of_the_reward_models_by_hand():
    axis, value = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([1, 1, 0, 0, 1, 1])
    marks = PackedMarks(axis, torch.arange(6), value, group=torch.tensor([0, 0, 0, 1, 1, 1]))
    scores = judge([Table()], SimpleNamespace(token_index=torch.arange(6)), marks)
    assert scores.tolist() == [2, -1, 0.5, 3, 1, 0]  # each by the head of its own axis
    losses, right = reward_losses(scores, marks, list(AXES))
    assert losses["relevance"].item() == pytest.approx(nll(2) + nll(-1)) and right["relevance"] == 1
    assert losses["factuality"].item() == pytest.approx(nll(-0.5)) and right["factuality"] == 0
    assert losses["completeness"].item() == pytest.approx((nll(2) + nll(3)) / 2)  # ranks 1 and 1 tie
    assert right["completeness"] == 1


def test_the_losses_do_not_depend_on_what_is_packed_together():
    """Padding, siblings, order: the summed losses and their gradients are those of each example alone."""
    tokenizer, axes = get_tokenizer("animals"), list(AXES)
    model = make_model(vocab_size=tokenizer.n_vocab, n_scalars=3)
    feedback = load_feedback(animals, "validation", axes, tokenizer, 64, limit=6)
    assert list(feedback) == ["spans", "comparisons"]
    groups, marks = [], []
    for source in feedback.values():
        groups += source.groups
        marks += source.marks

    def gradient(pieces):
        model.zero_grad()
        for rows in pieces:
            batch, their_marks = pack_marks([groups[i] for i in rows], [marks[i] for i in rows], axes, "cpu")
            losses, _ = reward_losses(judge([model], batch, their_marks), their_marks, axes)
            sum(losses.values()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    n = len(groups)
    alone = gradient([[i] for i in range(n)])
    torch.testing.assert_close(gradient([list(range(n))]), alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient([list(range(n))[::-1]]), alone, rtol=1e-4, atol=1e-4)


def test_errors_of_the_accuracies_are_clustered_by_question():
    """Segments of one response, and responses to one question, are not independent."""
    tokenizer, axes = get_tokenizer("animals"), list(AXES)
    model = make_model(vocab_size=tokenizer.n_vocab, n_scalars=3)
    feedback = load_feedback(animals, "validation", axes, tokenizer, 64, limit=40)
    assert feedback["spans"].clusters == [animals.cluster(prompt) for prompt, _, _ in animals.spans("validation")[:40]]
    by_question = accuracy_rows(model, axes, feedback, reward.Config())
    for source in feedback.values():
        source.clusters = ["one"] * 40  # every number then counts as independent
    for row, plain in zip(by_question, accuracy_rows(model, axes, feedback, reward.Config())):
        assert row["accuracy"] == plain["accuracy"] and row["accuracy_se"] != plain["accuracy_se"]


def test_responses_without_a_mark_have_a_loss_of_nothing():
    """A sharded model runs on all processes at once, whether or not one of them has marks to learn from."""
    model = make_model(n_scalars=3)
    batch, marks = pack_marks([([1, 2], [[3, 4]]), ([5], [[6]])], [[], []], list(AXES), "cpu")
    losses, right = reward_losses(judge([model], batch, marks), marks, list(AXES))
    sum(losses.values()).backward()
    assert list(losses.values()) == list(right.values()) == [0, 0, 0]
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


# ----------------------------------------------------------------------------------------- the dense reward

class Judge:
    """Judges by position: at the prompt's end + 4 relevance is good and factuality bad.

    Elsewhere it is the other way round. Completeness is 5.
    """
    device = "cpu"

    def states(self, batch, positions):
        return batch.position.flatten()[positions]

    def scalars(self, position):
        good = torch.where(position == 6, 2.0, -2.0)
        return torch.stack([good, -good, torch.full_like(good, 5.0)], 1)


def reward_of(responses, models=(Judge(),), axes=tuple(AXES), norm=(1.0, 2.0), **options):
    tokenizer = get_tokenizer("animals")
    ids = [tokenizer.encode_ordinary(text) + [tokenizer.eot_token] * end for text, end in responses]
    rewards = RewardModels(list(models), list(axes), *norm)
    reward_fn = finegrained_reward(rewards, tokenizer, finegrained.Config(**options))
    return reward_fn([[1, 2, 3]] * len(ids), ids)


def test_the_dense_reward_token_by_token():
    """ It| eats| mice|.| It| can| fly|.|EOS; and a shorter one, without an EOS, that ends in mid-sentence."""
    rewards = reward_of([(" It eats mice. It can fly.", 1), (" It eats mice. It", 0)], w1=0.3, w2=0.5, w3=0.1)
    a, b, c = 0.3 - 0.5, -0.3 + 0.5, 0.1 * (5 - 1) / 2
    expected = torch.tensor([[0, 0, 0, a, 0, 0, 0, b, c], [0, 0, 0, a, b + c, 0, 0, 0, 0]])
    torch.testing.assert_close(rewards, expected)
    p = 2 / (1 + math.exp(-2)) - 1
    soft = reward_of([(" It eats mice. It can fly.", 1)], w1=1.0, w2=0.0, w3=0.0, soft=True)
    torch.testing.assert_close(soft, torch.tensor([[0, 0, 0, p, 0, 0, 0, -p, 0]]))
    assert (reward_of([(" It", 1)], w1=0.0, w2=0.0, w3=0.0) == 0).all()


def test_a_weight_of_0_removes_an_axis_to_the_bit():
    model = make_model(vocab_size=get_tokenizer("animals").n_vocab, n_scalars=3)
    texts = [(" It eats mice. It can fly.", 1), (" It has fur.", 1), ("", 1)]
    for k, weight in enumerate(("w1", "w2", "w3")):
        before = reward_of(texts, [model], **{weight: 0.0})
        with torch.no_grad():
            model.scalar_head.weight[k].normal_()
        assert torch.equal(reward_of(texts, [model], **{weight: 0.0}), before)
        assert not torch.equal(reward_of(texts, [model]), before)


@pytest.fixture
def world(tmp_path, monkeypatch, small_world):
    """A tiny SFT model, a holistic reward model of one head."""
    monkeypatch.chdir(tmp_path)
    policy = make_model(vocab_size=get_tokenizer("animals").n_vocab, n_layer=1, n_embd=16)
    save_checkpoint_of(tmp_path / "start", policy, sft.Config())
    policy.set_scalar_heads(1)
    save_checkpoint_of(tmp_path / "rm", policy, sft.Config(), score_std=1.0)
    return finegrained.Config(**TINY, init="start", reward_model="rm", steps=3, minibatches=2,
                              max_new_tokens=12, eval_n=0, ckpt_every=2, out="a", reward_steps=6,
                              reward_batch_size=8)


def save_checkpoint_of(out, model, cfg, **more):
    os.makedirs(out)
    save_checkpoint(str(out), 1, model, make_optimizer(model, 1e-3), cfg, "animals", **more)


def test_one_span_and_one_axis_is_holistic_ppo_to_the_bit(world, monkeypatch):
    cfg = replace(world, reward="rm", w1=0.0, w2=0.0, w3=1.0)
    holistic = finegrained.train(cfg)
    real_load_models, real_adopt_template = ppo.load_models, common.run.Run.adopt_template

    def load_models(*args):
        models, tokenizer = real_load_models(*args)
        assert models.reward_model is None
        return models, tokenizer

    def adopt_template(run, init):  # and, where holistic PPO loads its reward model, one that nobody uses:
        real_adopt_template(run, init)
        load_model("rm", cfg, require_policy=False)  # making it moves the random numbers on
    monkeypatch.setattr(ppo, "load_models", load_models)
    monkeypatch.setattr(common.run.Run, "adopt_template", adopt_template)
    model, tokenizer = load_model("rm", cfg, require_policy=False)
    reward_fn = finegrained_reward(RewardModels([model], ["completeness"], 0.0, 1.0), tokenizer, cfg)
    policy = ppo.train(replace(cfg, out="b"), reward_fn)
    assert log_of("a") == log_of("b") and len(log_of("a")) == 3
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), holistic.parameters()))


@pytest.mark.parametrize("options", [{}, dict(share_trunk=False), dict(soft=True, w2=0.0)])
def test_from_nothing_to_a_policy(world, options, capsys):
    finegrained.train(replace(world, **options))
    log = log_of("a")
    assert len(log) == 3 and log[0]["kl"] == 0
    assert all(math.isfinite(v) for record in log for v in record.values())
    out = capsys.readouterr().out
    folders = ["out/rewards-animals"]
    if not options.get("share_trunk", True):
        folders = [f"out/rewards-animals/{axis}" for axis in AXES]
    for folder in folders:
        assert f"in {folder}: training it first" in out
    rows = [row for folder in folders for row in json.load(open(f"{folder}/eval.json"))]
    assert [row["checkpoint"] for row in rows] == list(AXES)
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    finegrained.train(replace(world, **options, overwrite=True))
    assert "training it first" not in capsys.readouterr().out  # they stand


def test_reward_models_that_were_cut_off_go_on_to_the_bit(world, monkeypatch):
    settings = finegrained.reward.Config(**TINY | dict(batch_size=8), steps=6, ckpt_every=2, eval_n=20)
    segment_reward.train_rewards(replace(settings, out="whole"), "start", list(AXES))
    save = common.run.save_checkpoint

    def save_and_die(out, step, *args, **more):
        save(out, step, *args, **more)
        raise KeyboardInterrupt
    monkeypatch.setattr(common.run, "save_checkpoint", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        segment_reward.train_rewards(replace(settings, out="cut"), "start", list(AXES))
    monkeypatch.setattr(common.run, "save_checkpoint", save)
    segment_reward.train_rewards(replace(settings, out="cut", resume=True), "start", list(AXES))
    assert log_of("whole") == log_of("cut") and len(log_of("cut")) == 6
    assert json.load(open("whole/eval.json")) == json.load(open("cut/eval.json"))


def test_reward_models_learn_what_they_are_shown(small_world, tmp_path, monkeypatch):
    """Without slips, relevance follows from prompt and sentence; a small model learns 200 examples of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(animals, "SLIPS", 0.0)
    model = make_model(vocab_size=get_tokenizer("animals").n_vocab, scale=1.0)
    save_checkpoint_of(tmp_path / "start", model, sft.Config())
    cfg = finegrained.reward.Config(**TINY | dict(batch_size=16), lr=3e-3, steps=120, out="r")
    segment_reward.train_rewards(cfg, "start", ["relevance"])
    log = log_of("r")
    assert log[-1]["loss"] < 0.5 * log[0]["loss"] and log[-1]["relevance_accuracy"] > 0.85


def test_settings_that_cannot_be_run_get_one_line(world, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a", "completion": " b"}\n' * 40)
    for options, message in [
            (dict(reward="fine"), "unknown reward 'fine'; did you mean 'finegrained'"),
            (dict(data="mine.jsonl"), "--data=mine.jsonl has no span feedback"),
            (dict(minibatches=3), "--batch_size=8 is not a multiple of --minibatches=3"),
            (dict(reward_models="rm"), "rm: not a reward model for relevance, factuality, completeness")]:
        with pytest.raises(SystemExit, match=message) as error:
            finegrained.train(replace(world, **options))
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------- QA-Feedback

def qa(tmp_path, *records):
    path = tmp_path / "small_feedback.json"
    path.write_text(json.dumps(list(records)))
    return dataset(str(path))


def test_qa_feedback_as_published(tmp_path):
    data = qa(tmp_path, *[feedback(question=f"{i}?") for i in range(10)])
    assert [len(data.prompts(split)) for split in ("train", "validation", "test")] == [8, 1, 1]
    prompt = "Title: One. Two.\n\nQuestion: 2?\nAnswer:"
    assert data.prompts("train")[0] == prompt and data.demonstrations("train")[0] == (prompt, " He.")
    (same, response, ((start, end, kind),)) = data.spans("train")[0]
    assert same == prompt and response[start:end] == "Or not." and kind == "Irrelevant"
    by_completeness = [" It was him, so it was.", " It was him. Or not."]
    assert data.completeness("train")[0] == (prompt, by_completeness, [0, 1])
    all_four = [" It was him. Or not.", " D.", " B.", " C."]
    assert data.comparisons("train", 4)[0] == (prompt, all_four, [0, 1, 2, 2])  # 2 and 3 tie
    pairs = data.comparisons("train")
    assert len(pairs) == 8 * 5 and (prompt, [" D.", " B."], [0, 1]) in pairs
    with pytest.raises(SystemExit, match="--k=3: QA-Feedback compares four answers"):
        data.comparisons("train", 3)


def error(start, end, kind="Irrelevant"):
    return {"error type": kind, "start": start, "end": end}


@pytest.mark.parametrize("bad, message", [
    (feedback(errors=[error(12, 20)]), "the span 12–20 ends outside prediction 1, which has 19 characters"),
    (feedback(errors=[error(-1, 5)]), "the span -1–5 is empty, reversed or negative"),
    (feedback(errors=[error(7, 3)]), "the span 7–3 is empty, reversed or negative"),
    (feedback(errors=[error(5, 12), error(0, 6)]), "the span 5–12 overlaps the one that ends at 6"),
    (feedback(errors=[error(0, 6, "Boring")]),
     "unknown error type 'Boring'; there are Irrelevant, Redundant"),
    (feedback(errors=[error("0", 6)]), "an error must have a whole number as its start"),
    (feedback(errors=["x"]), "an error must have a whole number as its start"),
    (feedback(preference=[1, 1, 1]), "'preference' must be six of 0, 1, 2"),
    (feedback(preference=[1, 1, 1, 1, 1, 3]), "'preference' must be six of 0, 1, 2"),
    (feedback(question=None), "'question' must be text"),
    (feedback(passages=[["T", 3]]), "'passages' must be a list of"),
    (feedback(feedback={}), "'feedback' must have errors"),
    ([], "expected an object")])
def test_bad_feedback_is_refused_by_the_record_s_name(tmp_path, bad, message):
    with pytest.raises(SystemExit, match=message) as error:
        qa(tmp_path, feedback(), bad).spans("train")
    assert "small_feedback.json: record 1: " in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_feedback(tmp_path):
    for text, message in (("{", "cannot be read"), ("{}", "expected a list of records, found dict")):
        (tmp_path / "x_feedback.json").write_text(text)
        with pytest.raises(SystemExit, match=message):
            dataset(str(tmp_path / "x_feedback.json")).prompts("train")


@real
def test_segments_of_the_real_file_cover_every_annotated_span():
    tokenizer, n = get_tokenizer("gpt2"), 0
    for split in ("train", "validation", "test"):
        for _, response, spans in dataset(str(QA)).spans(split):
            for function in (segments, sentences):
                pieces = function(response)
                covered = {i for a, b in pieces for i in range(a, b)}
                for start, end, kind in spans:
                    assert {i for i in range(start, end) if not response[i].isspace()} <= covered
            n += len(spans)
            cuts = cut_response(tokenizer, tokenizer.encode_ordinary(response))
            labels = [segment_label(segment, spans) for segment in cuts if segment.axis == "relevance"]
            assert (0 in labels) == any(kind in AXES["relevance"] for _, _, kind in spans)
    assert n == 1373


@real
def test_an_iteration_on_real_questions(tmp_path, capsys):
    cfg = finegrained.Config(**TINY | dict(batch_size=4), recipe="qa_feedback", data=str(QA), init="scratch",
                             max_len=512, max_new_tokens=16, steps=1, minibatches=2, eval_n=0,
                             out=str(tmp_path / "a"), reward_models=str(tmp_path / "r"), reward_steps=3,
                             reward_batch_size=4)
    finegrained.train(cfg)
    assert len(log_of(tmp_path / "a")) == 1
    rows = json.load(open(tmp_path / "r/eval.json"))
    assert all(row["accuracy"] > 0 for row in rows) and rows[0]["majority"] > 0.5
