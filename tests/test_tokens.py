"""The page that shows RLHF token by token: its numbers are the stages' own, its text is escaped, and a browser shows it."""
import base64
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_model
from test_stages import TINY

import dpo
import finegrained
import ppo
import reward
import sample
import segment_reward
import sft
import simpo
from common import compared, grids
from common.checkpoints import load_checkpoint, load_weights, save_checkpoint
from common.models import load_model, load_reward_model
from common.optim import make_optimizer
from data import animals, decode, encode_groups, get_tokenizer
from data.schema import Comparison
from engine.packing import pack
from model import GPT
from tokens import numbers
from tokens.models import with_reference
from tokens.page import QUANTITIES, TEMPLATE, write_page

TOKENIZER = get_tokenizer("animals")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(not BROWSER, reason="no chromium is installed")
HOSTILE = "</script><script>document.title = 'run'</script> & <b>\x00\x1b\u202e\u2028\n"


def save(out, model, cfg, **more):
    os.makedirs(out)
    save_checkpoint(out, 1, model, make_optimizer(model, 1e-3), cfg, "animals", **more)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with tiny runs of all stages; every test is in it."""
    patch = pytest.MonkeyPatch()
    patch.chdir(tmp_path_factory.mktemp("runs"))
    patch.setattr(animals, "SIZES", {"train": 200, "validation": 40, "test": 40})
    model = make_model(vocab_size=TOKENIZER.n_vocab, block_size=256, n_layer=1, n_embd=16, scale=2.0)
    save("start", model, sft.Config())
    model.set_scalar_heads(1)
    save("rm", model, reward.Config(), score_std=2.0)
    shared = dict(**TINY, init="start", lr=1e-2, warmup=0, eval_n=0)
    of_ppo = dict(shared, reward_model="rm", steps=2, minibatches=1, max_new_tokens=12, missing_eos_penalty=0.5)
    ppo.train(ppo.Config(**of_ppo, out="ppo", kl_target=1.0, temperature=0.8, gamma=0.9, normalize_reward=True, reward_clip=0.3))
    ppo.train(ppo.Config(**of_ppo, out="rloo", advantage="rloo", k=4))
    ppo.train(ppo.Config(**of_ppo, out="shared", share_value=True))
    finegrained.train(finegrained.Config(**of_ppo, out="fine", w2=0.0, reward_models="rms", reward_steps=4, reward_batch_size=8))
    dpo.train(dpo.Config(**shared, out="dpo", steps=4, beta=0.5, max_len=256))
    dpo.train(dpo.Config(**shared, out="ipo", steps=4, loss_type="ipo", ipo_average=True))
    simpo.train(simpo.Config(**shared, out="simpo", steps=4, sample_n=0))
    yield
    patch.undo()


def read_page(path):
    """The data of a page, and the texts and numbers of its rows as in the JSON file."""
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*)</script>', open(path, encoding="utf-8").read())[1])

    def unpack(text, dtype="<f4"):
        return np.frombuffer(base64.b64decode(text), dtype=dtype)

    def texts(text):
        return [data["vocabulary"][i] for i in unpack(text, "<u2")]

    def unpack_row(row):
        row["tokens"] = texts(row["tokens"])
        row["quantities"] = {key: unpack(text).tolist() for key, text in row["quantities"].items()}
        others = row["alternatives"]
        flat = texts(others["tokens"])
        others["tokens"] = [flat[i:i + 3] for i in range(0, len(flat), 3)]
        for key in ("p", "ref_p"):
            others[key] = unpack(others[key]).reshape(-1, 3).tolist()

    for entry in data["prompts"]:
        for row in entry["answers"]:
            unpack_row(row)
    for entry in data["pairs"]:
        for pair in entry["models"]:
            unpack_row(pair["chosen"])
            unpack_row(pair["rejected"])
    return data


def make_page(*names, n=6, **options):
    """Runs sample.py -> the page's data, and the episodes of each model's answers."""
    episodes = []
    patch = pytest.MonkeyPatch()
    real = ppo.rollout
    patch.setattr(ppo, "rollout", lambda *args: episodes.append(real(*args)) or episodes[-1])
    try:
        sample.main([*names, f"--n={n}", "--page=page.html", "--json=page.json",
                     *(f"--{key}={value}" for key, value in options.items())])
    finally:
        patch.undo()
    page, file = read_page("page.html"), json.load(open("page.json", encoding="utf-8"))
    for key in ("models", "temperature", "prompts", "pairs"):
        assert page[key] == file[key]  # float32, so the same to the bit
    return page, episodes


def value_model_of(name, policy):
    value_model = GPT(replace(policy.config, n_scalars=1))
    load_weights(value_model, load_checkpoint(name)["value_model"], name)
    return value_model


def same(a, b):
    """Equal to six digits."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------- the numbers

def grids_of_ppo(name, written, is_reference, reward_fn):
    """All numbers of a batch of answers from the functions of ppo.py, a grid each."""
    policy, reference = load_model(name)[0], load_model("start")[0]
    checkpoint = load_checkpoint(name)
    cfg = SimpleNamespace(**checkpoint["config"])
    value_model = None
    if cfg.advantage == "gae":
        value_model = policy if cfg.share_value else value_model_of(name, policy)
    rewards = grids.check_reward(reward_fn(written.prompts, written.responses), written.responses, TOKENIZER)
    e = ppo.Episodes(written.prompts, written.responses, written.ended, written.mask, rewards, None, cfg.k)
    ppo.evaluate_tokens(e, ppo.Models(policy, reference, value_model, None), [list(range(len(e.groups)))], cfg)
    dense = ppo.dense_reward(rewards, e.ref_logprobs if is_reference else e.logprobs, e.ref_logprobs, e.ended, e.mask,
                             checkpoint["kl_coef"], cfg.reward_clip, cfg.missing_eos_penalty)
    grid = {"logprobs": e.logprobs, "logratio": e.logprobs - e.ref_logprobs, "kl": e.kl,
               "entropy": e.entropy, "implicit": checkpoint["kl_coef"] * (e.logprobs - e.ref_logprobs), "reward": dense}
    if value_model is None:
        return grid | {"advantage": ppo.group_advantages(dense, e.mask, ppo.rloo_advantages, cfg.k)}
    grid["value"] = e.values
    next_value = torch.cat([(e.values * e.mask)[:, 1:], torch.zeros(len(e.values), 1)], 1)
    grid["delta"] = dense + cfg.gamma * next_value - e.values
    grid["advantage"] = ppo.compute_gae(dense, e.values, e.mask, cfg.gamma, cfg.lam)[0]
    return grid


@pytest.mark.parametrize("name", ["ppo", "shared", "rloo", "fine"])
def test_the_numbers_of_ppo_are_those_of_its_functions(runs, name):
    page, episodes = make_page("start", name)
    config = load_checkpoint(name)["config"]
    reward_model = load_reward_model("rm", TOKENIZER, normalize=config["normalize_reward"])
    reward_fn = ppo.reward_model_reward(reward_model, SimpleNamespace(k=1, micro_tokens=1000))
    if name == "fine":
        cfg = finegrained.Config(**config)
        reward_fn = finegrained.finegrained_reward(finegrained.load_rewards(cfg, "start", TOKENIZER), TOKENIZER, cfg)
    assert page["temperature"] == config["temperature"] and len(page["prompts"]) == 6
    for i, written in enumerate(episodes):
        expected = grids_of_ppo(name, written, i == 0, reward_fn)
        for p, entry in enumerate(page["prompts"]):
            row = entry["answers"][i]
            response = written.responses[p * config["k"]]
            assert row["model"] == ["start", name][i] and row["numbers_of"] == name
            assert row["tokens"] == numbers.token_texts(TOKENIZER, response) and len(response) <= 12
            assert row["quantities"].keys() == expected.keys()
            for key, grid in expected.items():
                same(row["quantities"][key], grid[p * config["k"], :len(response)])
    logratios = [sum(entry["answers"][1]["quantities"]["logratio"]) for entry in page["prompts"]]
    assert any(abs(x) > 0.01 for x in logratios)  # the runs have moved


def test_the_ends_of_answers_and_the_alternatives(runs):
    page, episodes = make_page("start", "ppo", "--reward_model=rm")
    policy, reference = load_model("ppo")[0], load_model("start")[0]
    reward_model = load_reward_model("rm", TOKENIZER)  # not normalized: as in the final table
    for i, written in enumerate(episodes):
        groups = [(prompt, [response]) for prompt, response in zip(written.prompts, written.responses)]
        with torch.no_grad():
            scores = reward_model.score(pack(groups))
        for entry, prompt, response, score in zip(page["prompts"], written.prompts, written.responses, scores):
            text = entry["prompt"]
            end = {"score": score.item(), "gold": animals.gold(text, decode(TOKENIZER, response)),
                   **animals.axes(text, decode(TOKENIZER, response))}
            row = entry["answers"][i]
            assert row["end"] == pytest.approx(end, rel=1e-6, abs=1e-6)
            with torch.no_grad():
                p, ref_p = ((model(torch.tensor([prompt + response]))[0] / 0.8).softmax(-1) for model in (policy, reference))
            for t, token in enumerate(response):
                position = len(prompt) + t - 1
                others = p[position].clone()
                others[token] = -1
                top = others.topk(3).indices
                assert row["alternatives"]["tokens"][t] == numbers.token_texts(TOKENIZER, top.tolist())
                same(row["alternatives"]["p"][t], p[position, top])
                same(row["alternatives"]["ref_p"][t], ref_p[position, top])
                same(np.exp(row["quantities"]["logprobs"][t]), p[position, token].double())


def test_the_token_itself_is_no_alternative():
    """Of a greedy response, the alternatives are those from the second on."""
    policy, reference = make_model(0, vocab_size=TOKENIZER.n_vocab), make_model(1, vocab_size=TOKENIZER.n_vocab)
    prompt = [1, 2, 3]
    response, = policy.generate([prompt], 8, temperature=0)
    viewer = SimpleNamespace(policy=policy, cfg=ppo.Config())
    others = numbers.alternatives(viewer, numbers.Setting(reference, TOKENIZER, None, None), prompt, response)
    with torch.no_grad():
        p = policy(torch.tensor([prompt + response]))[0, 2:-1].softmax(-1)
    top = p.topk(4)
    assert top.indices[:, 0].tolist() == response
    assert others["tokens"] == [numbers.token_texts(TOKENIZER, ids) for ids in top.indices[:, 1:].tolist()]
    same(others["p"], top.values[:, 1:])


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo"])
def test_held_out_pairs_have_the_rewards_of_their_loss(runs, name):
    page, _ = make_page(name)
    assert [model["name"] for model in page["models"]] == ["start", name]  # a run alone brings its reference
    comparisons = animals.comparisons("validation")[:6]
    groups = encode_groups(TOKENIZER, [(c.prompt, c.responses) for c in comparisons], 64)
    policy, reference = load_model(name)[0], load_model("start")[0]
    with torch.no_grad():
        if name == "simpo":
            _, chosen, rejected = simpo.simpo_loss(*simpo.pair_logp(policy, groups), 2.0, 1.0)
        else:
            average = name == "ipo"
            logp, ref_logp = dpo.pair_logp(policy, groups, average), dpo.pair_logp(reference, groups, average)
            _, chosen, rejected = dpo.dpo_loss(*logp, *ref_logp, {"dpo": 0.5, "ipo": 1.0}[name])
    assert len(page["pairs"]) == 6
    orders = set()
    for entry, comparison, r_w, r_l in zip(page["pairs"], comparisons, chosen.tolist(), rejected.tolist()):
        pair, = entry["models"]
        assert entry["prompt"] == comparison.prompt and pair["model"] == name
        assert "".join(pair["chosen"]["tokens"]) == comparison.responses[0] + "<|endoftext|>"
        assert "".join(pair["rejected"]["tokens"]) == comparison.responses[1] + "<|endoftext|>"
        # The loss subtracts float32 sums of up to 100 nats, of which six digits are right to 1e-4.
        assert (pair["chosen_reward"], pair["rejected_reward"]) == pytest.approx((r_w, r_l), abs=1e-4)
        for side in ("chosen", "rejected"):
            assert sum(pair[side]["quantities"]["implicit"]) == pytest.approx(pair[side + "_reward"], abs=1e-4)
        assert pair["order"] == ("right" if r_w > r_l else "wrong")
        orders.add(pair["order"])
    assert orders == {"right", "wrong"}  # these runs are too short to have learned much


def test_judgements_of_spans_add_up_to_the_reward(runs):
    page, episodes = make_page("fine", n=12)
    cfg = finegrained.Config(**load_checkpoint("fine")["config"])
    rewards = finegrained.load_rewards(cfg, "start", TOKENIZER)
    axes = set()
    for i, written in enumerate(episodes):
        expected = finegrained.finegrained_reward(rewards, TOKENIZER, cfg)(written.prompts, written.responses)
        for entry, row_rewards, response in zip(page["prompts"], expected, written.responses):
            total = torch.zeros_like(row_rewards)
            spans = entry["answers"][i]["spans"]
            for span in spans:
                total[span["last"]] += span["weight"] * span["judgement"]
                assert span["axis"] == "completeness" or (span["judgement"] > 0) == (span["p_good"] > 0.5)
            same(total, row_rewards)
            axes |= {span["axis"] for span in spans}
            cuts = [(s.axis, s.token) for s in segment_reward.cut_response(TOKENIZER, response)]
            assert cuts == [(s["axis"], s["last"]) for s in spans] and all(s["first"] <= s["last"] for s in spans)
    assert axes == set(segment_reward.AXES)  # factuality has weight 0 and is shown all the same


def test_where_spans_begin():
    ids = TOKENIZER.encode_ordinary(" It eats mice. It can fly.") + [TOKENIZER.eot_token]
    viewer = SimpleNamespace(cfg=finegrained.Config(), span_rewards=finegrained.RewardModels(
        [make_model(vocab_size=TOKENIZER.n_vocab, n_scalars=3)], list(segment_reward.AXES), 0.0, 1.0))
    spans, = numbers.judge_spans(viewer, [[1, 2]], [ids], TOKENIZER)
    places = {(s["axis"], s["first"], s["last"]) for s in spans}
    assert places == {("relevance", 0, 3), ("relevance", 4, 7), ("factuality", 0, 3), ("factuality", 4, 7), ("completeness", 0, 8)}


def test_models_side_by_side(runs):
    """The reference's answers have the numbers of the last model, the others their own; one noise for all."""
    page, episodes = make_page("start", "dpo", "rloo", "shared")
    for entry in page["prompts"]:
        assert [(row["model"], row["numbers_of"]) for row in entry["answers"]] == \
            [("start", "shared"), ("dpo", "dpo"), ("rloo", "rloo"), ("shared", "shared")]
        assert "delta" not in entry["answers"][2]["quantities"] and "value" not in entry["answers"][1]["quantities"]
    assert [q["key"] for q in page["quantities"]] == [key for key, *_ in QUANTITIES]
    assert [pair["model"] for pair in page["pairs"][0]["models"]] == ["dpo"]


def test_a_reward_that_is_not_known_is_left_out(runs, capsys):
    cfg = ppo.Config(**TINY, init="start", out="own", steps=1, minibatches=1, max_new_tokens=8, eval_n=0)
    ppo.train(cfg, lambda prompts, responses: torch.zeros(grids.length_mask(responses).shape))
    page, _ = make_page("own", n=2)
    assert "own: its reward is not known here: no r_t, δ_t and Â_t" in capsys.readouterr().out
    assert [q["key"] for q in page["quantities"]] == ["logratio", "implicit", "kl", "entropy", "value"]


# ------------------------------------------------------------------------------------------------ the command

def test_the_report_ends_with_the_command(runs, capsys):
    dpo.train(dpo.Config(**TINY, init="start", out="reported", steps=1, warmup=0, eval_n=4))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "token by token: python sample.py reported --page=tokens.html"
    sample.main(last.split()[5:])
    assert capsys.readouterr().out == "20 prompts, 2 models -> tokens.html\n"


def test_a_run_on_other_data_than_its_reference_is_shown_on_its_own(runs, capsys):
    """The command at the end of `dpo.py --data=mine.jsonl --init=RUN`: the prompts are those of the run's data."""
    with open("mine.jsonl", "w") as f:
        for i in range(40):
            f.write(json.dumps({"prompt": f"The owl {i}:", "chosen": " It eats mice.", "rejected": " It is a fish."}) + "\n")
    dpo.train(dpo.Config(**TINY, data="mine.jsonl", init="start", out="on-mine", steps=1, warmup=0, eval_n=0))
    page, _ = make_page("on-mine")
    assert [entry["prompt"] for entry in page["prompts"]] == ["The owl 1:", "The owl 21:"]
    with pytest.raises(SystemExit, match="these models were trained on different data"):
        make_page("start", "on-mine")


def test_another_reference_than_that_of_the_training_is_pointed_out(runs, capsys):
    make_page("ppo", "shared", temperature=1)
    assert "shared did not start from ppo as it is now: its KL, and with it r_t, is not that of its training" in capsys.readouterr().out
    make_page("start", "shared")
    assert "did not start" not in capsys.readouterr().out


@pytest.mark.parametrize("argv, message", [
    (["rm"], "rm: a reward model, which scores text and cannot write it; name it with --reward_model"),
    (["start", "rms"], "rms: a reward model"),
    (["start", "small-gpt2"], "these models have different tokenizers: start animals, small-gpt2 gpt2"),
    (["start", "ppo", "rloo"], "these policies were trained at different temperatures"),
    (["start", "--data=nothing"], "--data=nothing: no such file"),
    (["start", "--n=0"], "--n=0: expected at least 1"),
    (["start", "--prompt=x"], "one thing at a time"),
    (["missing"], "missing: no checkpoint there"),
    (["lost"], "lost: its reference, gone, is not there; name a reference before it"),
    (["lost-fine"], "lost-fine: its reward models are not in gone, or not finished"),
    (["start", "--page=start"], "start: cannot be written"),
    (["start", "--page=start/ckpt.pt/x.html"], "cannot be written"),
    (["start", "--json=start/ckpt.pt/x.json"], "cannot be written")])
def test_bad_input_gets_one_line(runs, argv, message, monkeypatch):
    if "small-gpt2" in argv:
        make_model(vocab_size=50257, n_layer=1, n_embd=16).save_pretrained("small-gpt2")
        real = compared.load_model  # without the published encoding, which may not be here
        fake = SimpleNamespace(name="gpt2")
        monkeypatch.setattr(compared, "load_model", lambda name: (real(name) if name == "start" else (load_gpt2(), fake)))
    for name, changes in (("lost", {"init": "gone"}), ("lost-fine", {"reward_models": "gone"})):
        if argv == [name]:
            checkpoint = load_checkpoint("fine")
            checkpoint["config"] |= changes
            os.makedirs(name)
            torch.save(checkpoint, f"{name}/ckpt.pt")
    if not any(arg.startswith(("--page", "--json")) for arg in argv):
        argv = [*argv, "--page=never.html"]
    with pytest.raises(SystemExit) as error:
        sample.main(argv)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not os.path.exists("never.html")


def load_gpt2():
    return GPT.from_pretrained("small-gpt2")


def test_the_reference_of_a_run_may_be_a_model_of_the_hub(runs):
    checkpoint = load_checkpoint("dpo")
    checkpoint["config"] |= {"init": "hub:someone/gpt2"}
    os.makedirs("from-hub")
    torch.save(checkpoint, "from-hub/ckpt.pt")
    assert with_reference(["from-hub"]) == ["hub:someone/gpt2", "from-hub"]
    assert with_reference(["hub:someone/gpt2"]) == ["hub:someone/gpt2"]


def test_nothing_held_out_gets_one_line(runs, monkeypatch, capsys):
    monkeypatch.setattr(animals, "comparisons", lambda split, k=2: [])
    page, _ = make_page("dpo", n=2)
    assert page["pairs"] == [] and "no held-out pairs to show" in capsys.readouterr().out
    monkeypatch.setattr(animals, "prompts", lambda split: [])
    with pytest.raises(SystemExit, match="^--page shows answers to held-out prompts, and there are none in these data$"):
        sample.main(["start", "--page=never.html"])


# --------------------------------------------------------------------------------------------------- the page

@pytest.fixture
def hostile(runs, monkeypatch):
    """A page of prompts, answers and pairs that would run as a script if they were not text."""
    prompt = "Tell me about the owl: what it eats. " + HOSTILE
    monkeypatch.setattr(animals, "prompts", lambda split: [prompt])
    pair = Comparison(prompt, [" It eats mice." + HOSTILE, "<script>"], [0, 1])
    monkeypatch.setattr(animals, "comparisons", lambda split, k=2: [pair])
    ids = TOKENIZER.encode_ordinary(HOSTILE)
    real = ppo.rollout

    def rollout(*args):
        e = real(*args)
        return replace(e, responses=[ids], mask=torch.ones(1, len(ids)).bool(), ended=torch.tensor([False]), rewards=torch.zeros(1, len(ids)))
    monkeypatch.setattr(ppo, "rollout", rollout)
    sample.main(["start", "dpo", "--page=hostile.html", "--max_new_tokens=4"])
    return prompt


def test_texts_stay_texts(hostile):
    source = open("hostile.html", encoding="utf-8").read()
    template = open(TEMPLATE, encoding="utf-8").read()
    assert source.count("<script") == template.count("<script") == 2 and source.count("</script") == 2
    block = re.search(r'id="data">(.*)</script>\n<script>', source)[1]
    assert "<" not in block and block.isascii() and "\x00" not in source
    pair = read_page("hostile.html")["pairs"][0]["models"][0]
    assert "script" in "".join(pair["chosen"]["tokens"]) and pair["rejected"]["tokens"][0] == "<"


def test_the_page_stands_alone():
    source = open(TEMPLATE, encoding="utf-8").read()
    assert not re.search(r"https?:|//\w+\.|\bsrc=|\bhref=|@import|url\(|fetch\(|innerHTML|insertAdjacentHTML|eval\(", source)
    assert "default-src 'none'" in source and "prefers-color-scheme: dark" in source and "tabIndex" in source
    assert max(map(len, source.splitlines())) <= 140


def test_a_page_of_20_prompts_is_below_a_megabyte(tmp_path):
    """Three models, 128 tokens an answer, all quantities of PPO, and 20 pairs of HH's lengths."""
    rng = np.random.default_rng(0)
    words = [f" word{i}" for i in range(8000)]  # a text of this length has about 2000 different tokens

    def row(n, keys):
        x = rng.normal(size=(len(keys), n)).astype(np.float32).tolist()
        some = rng.integers(0, 8000, (n, 4)).tolist()
        p = rng.random((n, 3)).astype(np.float32).tolist()
        return {"model": "out/ppo-hh", "numbers_of": "out/ppo-hh", "tokens": [words[ids[0]] for ids in some],
                "quantities": dict(zip(keys, x)), "end": {"score": 0.123456789},
                "alternatives": {"tokens": [[words[i] for i in ids[1:]] for ids in some], "p": p, "ref_p": p}}

    keys = ["logprobs", *(key for key, *_ in QUANTITIES)]
    prompts = [{"prompt": "word " * 120, "answers": [row(128, keys) for _ in range(3)]} for _ in range(20)]
    pairs = [{"prompt": "word " * 120, "models": [{"model": "out/dpo-hh", "chosen": row(46, keys[:5]), "rejected": row(46, keys[:5]),
                                                  "chosen_reward": 0.1, "rejected_reward": 0.2, "order": "wrong"}]} for _ in range(20)]
    path = str(tmp_path / "page.html")
    write_page(path, {"models": [], "temperature": 1.0, "prompts": prompts, "pairs": pairs})
    assert os.path.getsize(path) < 1_000_000


# ------------------------------------------------------------------------------------------------- in a browser

def dom(path, fragment="", script=""):
    """The page after its script has run in a browser, and after another script."""
    path = os.path.abspath(path)
    if script:
        with open(path, encoding="utf-8") as f:
            source = f.read()
        path += ".scripted.html"
        with open(path, "w", encoding="utf-8") as f:
            f.write(source.replace("</body>", f"<script>{script}</script></body>"))
    result = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={path}.profile", "--dump-dom",
                             f"file://{path}#{fragment}"], capture_output=True, text=True, timeout=120)
    return re.sub(r'<script type="application/json".*?</script>', "", result.stdout, flags=re.S)


def shown_numbers(html):
    """The numbers of each row's boxes, as the page shows them."""
    rows = html.split('class="tokens"')[1:]
    return [re.findall(r"<small>(.*?)</small>", row) for row in rows]


def as_shown(numbers, digits=2):
    texts = [f"{abs(x):.{digits}f}" for x in numbers]
    return [("−" if x < 0 and float(text) else "") + text for x, text in zip(numbers, texts)]


@needs_browser
def test_each_quantity_can_be_read_in_a_browser(runs):
    page, _ = make_page("start", "shared", n=2)
    rows = [row for entry in page["prompts"] for row in entry["answers"]]
    assert len(page["quantities"]) == 8
    for quantity in page["quantities"]:
        html = dom("page.html", quantity["key"])
        assert shown_numbers(html) == [as_shown(row["quantities"][quantity["key"]]) for row in rows]
        legend = re.search(r'<p id="legend".*?>(.*?)</p>', html)[1]
        assert legend == quantity["legend"].replace("&", "&amp;") and "eq." in legend or "ppo." in legend
        ticks = re.findall(r"<span>(.*?)</span>", re.search(r'id="ticks">(.*?)</span></div>', html + "</span></div>")[0])
        assert float(ticks[2]) == 0 and ticks[0] == "−" + ticks[4]


@needs_browser
def test_choosing_pointing_and_the_keyboard(runs):
    page, _ = make_page("fine", n=2)
    row = page["prompts"][0]["answers"][0]
    choose = "byId('quantity').value = 'kl'; byId('quantity').dispatchEvent(new Event('change'));"
    assert shown_numbers(dom("page.html", script=choose))[0] == as_shown(row["quantities"]["kl"])

    point = "document.querySelectorAll('.token')[1].querySelector('b').dispatchEvent(new MouseEvent('mouseover', {bubbles: true}));"
    press = """const first = document.querySelector('.token'); first.focus();
               first.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}));"""
    for script in (point, press):
        html = dom("page.html", script=script)
        panel = re.search(r'<div id="panel".*?</div>\s*(?=<script)', html, re.S)[0]
        assert "hidden" not in panel.split(">")[0]
        for key, name, *_ in QUANTITIES:
            assert f"<span>{name}</span><span>{as_shown([row['quantities'][key][1]], 4)[0]}</span>" in panel
        for span in row["spans"]:
            if span["first"] <= 1 <= span["last"]:
                assert f"<td>{span['axis']}</td><td>R {as_shown([span['judgement']])[0]} × w {span['weight']:.2f}" in panel
        assert panel.count("<code>") == 4  # the token and three alternatives


@needs_browser
def test_pairs_in_a_browser(runs):
    page, _ = make_page("dpo", n=3)
    html = dom("page.html", "implicit,pairs")
    rows = [pair[side] for entry in page["pairs"] for pair in entry["models"] for side in ("chosen", "rejected")]
    assert shown_numbers(html) == [as_shown(row["quantities"]["implicit"]) for row in rows]
    for entry in page["pairs"]:
        pair, = entry["models"]
        assert f"implicit reward {as_shown([pair['chosen_reward']])[0]}" in html
    orders = re.findall(r"ordered (\w+)", html.split('id="main"')[1].split("<script")[0])
    assert orders == [entry["models"][0]["order"] for entry in page["pairs"]]


@needs_browser
def test_a_browser_runs_no_text(hostile):
    for fragment in ("logratio", "logratio,pairs"):
        html = dom("hostile.html", fragment)
        assert "<title>RLHF, token by token</title>" in html and html.count("<script>") == 1
        shown = re.search(r"<h2>(.*?)</h2>", html)[1]
        assert "&lt;/script&gt;&lt;script&gt;document.title" in shown
        assert r"\u{0}\u{1b}\u{202e}\u{2028}⏎" in shown
