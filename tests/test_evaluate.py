"""evaluate.py beside the table, and sample.py: the curves of runs, and a checkpoint for transformers."""
import json
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model

import common.models
import evaluate
import ppo
import sample
import sft
from common.batches import cut_by_tokens
from common.checkpoints import save_checkpoint
from common.optim import make_optimizer
from common.curves import curve
from common.models import load_model
from common.preferences import preference_row
from common.standard_errors import clusters_of, mean_se
from data import animals, dataset, get_tokenizer
from engine.packing import pack

# ------------------------------------------------------------------------------------------------ curves

def write_log(folder, records, end=""):
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + end)
    return str(folder)


def test_a_curve_by_hand():
    log = [(step, {"loss": None if step == 3 else float(step)}) for step in (1, 2, 3, 4)]
    steps, values, means = curve(log, "loss")
    assert steps.tolist() == [1, 2, 3, 4] and torch.equal(values.isnan(), torch.tensor([False, False, True, False]))
    assert torch.equal(means.nan_to_num(-1), values.nan_to_num(-1))  # so few are not averaged


def test_a_long_curve_is_a_running_mean_with_its_gaps():
    log = [(step, {"loss": None if step == 50 else step % 2, "val_loss": 7.0 if step % 60 == 0 else None}) for step in range(1, 121)]
    steps, values, means = curve(log, "loss")
    assert means[:3].tolist() == pytest.approx([1 / 2, 2 / 3, 1 / 3])  # of what there is of three neighbours
    assert means[48].item() == 0.5 and means[49].isnan() and values[49].isnan() and means.isnan().sum() == 1
    steps, values, means = curve(log, "val_loss")
    assert steps.tolist() == [60, 120] and values.tolist() == means.tolist() == [7, 7]  # measured now and then: no gap
    assert curve(log, "gold") is None


def test_curves_of_several_stages(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    sft_log = [{"step": s, "loss": 1 / s, "val_loss": 1.0 if s == 150 else None, "gold": None} for s in range(1, 151)]
    dpo_log = [{"step": s, "loss": None if s == 2 else 0.7, "chosen_logp": -s} for s in range(1, 5)]
    a, b = write_log(tmp_path / "sft-a", sft_log), write_log(tmp_path / "dpo-b", dpo_log, '{"step": 5, "lo')
    evaluate.main(["--curves", a, b])
    assert capsys.readouterr().out == f"curves.png: 3 panels of {a}, {b}\n"  # loss, val_loss, chosen_logp; no gold is known
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    evaluate.main([b, "--curves", "--plot=b.png"])
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_logs_that_are_none_get_one_line(tmp_path):
    pytest.importorskip("matplotlib")
    good = write_log(tmp_path / "good", [{"step": 1, "loss": 1.0}])
    for name, content, message in [
            ("missing", None, "missing/log.jsonl: cannot be read .No such file"),
            ("empty", "", "empty: no steps are logged yet"),
            ("cut", '{"step": 1, "loss": 1.0}\n{"st\n',
             "cut/log.jsonl: line 2 is not a line of a run's log .JSONDecodeError"),
            ("list", "[1]\n", "list/log.jsonl: line 1 is not a line of a run's log .TypeError"),
            ("other", '{"loss": 1.0}\n', "other/log.jsonl: line 1 is not a line of a run's log .KeyError")]:
        (tmp_path / name).mkdir()
        if content is not None:
            (tmp_path / name / "log.jsonl").write_text(content)
        with pytest.raises(SystemExit, match=message) as error:
            evaluate.main(["--curves", str(tmp_path / name), *[good] * (name != "empty"), f"--plot={tmp_path}/x.png"])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("option, place", [("--plot", "file/x.png"), ("--json", "file/x.json"), ("--export", "file/x")])
def test_a_place_that_cannot_be_written_gets_one_line(option, place, tmp_path, monkeypatch, start):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    write_log(tmp_path / "run", [{"step": 1, "loss": 1.0}])
    main, *command = {"--plot": (evaluate.main, "run", "--curves"),
                      "--json": (evaluate.main, str(start / "start"), "--n=2"),
                      "--export": (sample.main, str(start / "start"))}[option]
    with pytest.raises(SystemExit, match=f"{place}: cannot be written") as error:
        main([*command, f"{option}={place}"])
    assert "\n" not in str(error.value)


def test_a_picture_is_a_png_a_pdf_or_an_svg(tmp_path):
    with pytest.raises(SystemExit, match="--plot=curves.jpeg2: name a .png, a .pdf or an .svg file"):
        evaluate.main([str(tmp_path), "--curves", "--plot=curves.jpeg2"])


# ------------------------------------------------------------------------------------------------ for transformers

def test_an_exported_reward_model_is_opened_by_transformers(start, capsys):
    transformers = pytest.importorskip("transformers")
    sample.main([str(start / "reward"), f"--export={start}/exported"])
    out = capsys.readouterr().out
    assert "that of data/animals.py" in out and "its scalar head is left out" in out
    ours, vocab_size = load_model(str(start / "reward"), require_policy=False)[0], get_tokenizer("animals").n_vocab
    theirs = transformers.GPT2LMHeadModel.from_pretrained(str(start / "exported")).eval()
    tokens = torch.randint(vocab_size, (3, 40))
    with torch.no_grad():
        mine, their = ours(tokens), theirs(tokens).logits
    torch.testing.assert_close(mine, their, atol=1e-4, rtol=0)
    assert ours.wte.weight.size(0) > theirs.transformer.wte.weight.size(0) == vocab_size  # the padding is cut
    assert theirs.config.eos_token_id == get_tokenizer("animals").eot_token


def test_an_export_with_the_vocabulary_of_gpt2_is_a_start(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common.models, "get_tokenizer",  # GPT-2's would have to be fetched
                        lambda name: SimpleNamespace(name=name))
    model = make_model(vocab_size=50257, n_layer=1, n_embd=8)
    save_checkpoint(str(tmp_path), 1, model, make_optimizer(model, 1e-3), sft.Config(), "gpt2")
    sample.main([str(tmp_path), f"--export={tmp_path}/exported"])
    assert 'its tokenizer: AutoTokenizer.from_pretrained("gpt2")\n' in capsys.readouterr().out
    again, tokenizer = load_model(f"{tmp_path}/exported", sft.Config())
    assert tokenizer.name == "gpt2" and again.config == model.config
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a[:50257], b[:50257]) if name == "wte.weight" else torch.equal(a, b), name


def test_an_export_overwrites_nothing(start):
    folder = str(start / "start")
    (start / "file").write_text("")
    before = os.listdir(folder)
    for where in (folder, folder + "/", str(start / "reward"), str(start / "file")):
        with pytest.raises(SystemExit, match=f"--export={where}: something is there already; name a new folder"):
            sample.main([folder, f"--export={where}"])
    with pytest.raises(SystemExit, match="--export take one checkpoint"):
        sample.main([folder, folder, f"--export={start}/new"])
    assert os.listdir(folder) == before and not (start / "new").exists()


def test_prompts_that_lose_their_beginning_are_counted_once(start, capsys):
    (start / "mine.jsonl").write_text("".join(json.dumps({"prompt": f"{i} no " * (40 if i == 21 else 2), "completion": " yes"}) + "\n" for i in range(60)))
    data, models = dataset(str(start / "mine.jsonl")), [(name, load_model(str(start / "start"))[0]) for name in "ab"]
    evaluate.compare(models, data, get_tokenizer("animals"), 10)
    assert capsys.readouterr().out == "1 of 3 prompts lost their beginning: they take more than half of the context\n"


@pytest.mark.parametrize("argument", ["--n=0", "--n=-3", "--samples=0"])
def test_numbers_that_nothing_can_be_made_with(argument):
    with pytest.raises(SystemExit, match=f"^{argument}: expected at least 1$"):
        evaluate.main(["gpt2", argument])


# ------------------------------------------------------------------------------------------------ memory

def test_responses_and_kl_do_not_depend_on_how_much_memory_they_may_take(monkeypatch):
    """In slices that fit into the limits, each prompt has the same random numbers and gets the same response."""
    policy, ref_policy = make_model(0), make_model(1)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8], [9, 10], [11], [12, 13]]
    responses = evaluate.respond(policy, prompts, eos=3)
    kl = evaluate.exact_kl(policy, ref_policy, prompts, responses)
    rows = []
    real = policy.generate
    monkeypatch.setattr(policy, "generate", lambda part, *a, **k: rows.append(len(part)) or real(part, *a, **k))
    one_row = 2 * policy.config.n_layer * policy.config.n_embd * 4 * policy.config.block_size
    for name, value in (("CACHE_BYTES", 2 * one_row), ("KL_TOKENS", 70), ("KL_LOGITS", 128 * 10)):
        monkeypatch.setattr(evaluate, name, value)
    assert evaluate.respond(policy, prompts, eos=3) == responses and rows == [2, 2, 2]
    torch.testing.assert_close(evaluate.exact_kl(policy, ref_policy, prompts, responses), kl, atol=1e-5, rtol=1e-5)
    groups = [(prompt, [response]) for prompt, response in zip(prompts, responses)]
    pieces = cut_by_tokens(range(len(groups)), groups, 70)
    assert len(pieces) > 1 and sum(map(len, pieces)) == len(prompts)


# ------------------------------------------------------------------------------------------------ win rate

WORDS = SimpleNamespace(eot_token=4, decode=lambda ids: "".join(map(str, ids)), encode_ordinary=lambda text: [0])


def first_token(prompt, response):
    """A true reward: the first token, and −1 for nothing."""
    return float(response[0]) if response else -1.0


def test_the_win_rate_is_that_of_independent_answers():
    """Against the exact probability of a win, over the first tokens; a model against itself wins and loses alike."""
    reference, policy = (make_model(seed, vocab_size=5, block_size=6, n_layer=1, scale=6.0) for seed in (0, 3))
    data = SimpleNamespace(prompts=lambda split: ["?"] * 3000, gold=first_token, axes=lambda *_: {}, grammatical=lambda _: (0, 0))
    rows, _, _, columns = evaluate.compare(
        [("reference", reference), ("its copy", reference), ("policy", policy)], data, WORDS, 3000)
    with torch.no_grad():  # the EOS, token 4, is worth −1: it goes first
        p, q = (model(torch.tensor([[0]]))[0, 0].softmax(-1).roll(1) for model in (reference, policy))
    below = p.cumsum(0) - p
    for row, column, exact_p in zip(rows, columns, (p, p, q)):
        expected = (exact_p * (below + p / 2)).sum().item()
        assert row["win_rate_se"] > 0.004 and abs(row["win_rate"] - expected) < 3.5 * row["win_rate_se"]
        ties = sum(win == 0.5 for win in column["win_rate"]) / 3000
        assert abs(ties - (exact_p * p).sum().item()) < 0.035
    assert abs(rows[0]["win_rate"] - 0.5) < 3.5 * rows[0]["win_rate_se"] and p.max() < 0.9


# ------------------------------------------------------------------------------------------------ standard errors

def test_mean_and_standard_error_by_hand():
    assert mean_se([1.0, 2.0, 3.0, 6.0]) == pytest.approx((3.0, (14 / 3 / 4) ** 0.5))
    assert mean_se([2.0]) == (2.0, None) and mean_se([]) == mean_se(None) == (None, None)
    # Deviations −2, 0 and −1, 3: the clusters' sums are −2 and 2, so se² = 2/1 · (4 + 4) / 4².
    assert mean_se([1.0, 3.0, 2.0, 6.0], ["a", "a", "b", "b"]) == pytest.approx((3.0, 1.0))
    assert mean_se([1.0, None, 3.0, 2.0, 6.0], ["a", "c", "a", "b", "b"]) == pytest.approx((3.0, 1.0))


def test_standard_errors_do_not_depend_on_order_or_on_copies():
    x = torch.randn(30, generator=torch.Generator().manual_seed(0)).tolist()
    alone = mean_se(x)
    assert mean_se(x, list(range(30))) == pytest.approx(alone)  # the limit: each its own cluster
    assert mean_se(x, ["one"] * 30) == pytest.approx(alone)     # draws from one cluster
    assert mean_se(x * 3, list(range(30)) * 3) == pytest.approx(alone)  # copies are no new information
    assert mean_se(x[::-1], [i // 3 for i in range(30)][::-1]) == pytest.approx(mean_se(x, [i // 3 for i in range(30)]))


def test_a_clustered_error_is_the_spread_of_the_mean():
    """100 clusters of 5 that share most of their value: the error over prompts is half of what it should be."""
    g = torch.Generator().manual_seed(0)
    clusters = [i // 5 for i in range(500)]
    means, errors, plain = [], [], []
    for _ in range(300):
        x = (torch.randn(100, 1, generator=g) + 0.5 * torch.randn(100, 5, generator=g)).flatten().tolist()
        mean, se = mean_se(x, clusters)
        means.append(mean)
        errors.append(se)
        plain.append(mean_se(x)[1])
    spread = torch.tensor(means).std().item()
    assert sum(errors) / 300 == pytest.approx(spread, rel=0.1) and sum(plain) / 300 < 0.6 * spread


def test_a_table_of_animals_is_clustered_by_question(start):
    owl = ["Tell me about the owl: what it eats and how it moves.", "Describe the owl: how it moves and what it eats.",
           "Describe the owl: how it moves and where it lives."]
    assert animals.cluster(owl[0]) == animals.cluster(owl[1]) == ("owl", ("food", "movement")) != animals.cluster(owl[2])
    prompts = animals.prompts("test")[:500]
    clusters = clusters_of(animals, prompts)
    assert len(set(clusters)) == 100 and clusters_of(SimpleNamespace(), prompts) == prompts
    model = load_model(str(start / "start"))[0]
    rows, setting, _, columns = evaluate.compare([("a", model)], animals, get_tokenizer("animals"), 60)
    assert setting.clusters == clusters[:60]
    for key in ("gold", "length", "win_rate"):
        assert rows[0][key + "_se"] == mean_se(columns[0][key], clusters[:60])[1] != mean_se(columns[0][key])[1]
    comparisons = animals.comparisons("test")[:200]
    scores = torch.randn(400, generator=torch.Generator().manual_seed(0))
    right = (scores[0::2] > scores[1::2]).double().tolist()
    row = preference_row("a", scores, comparisons, animals)
    by_question = mean_se(right, clusters_of(animals, [c.prompt for c in comparisons]))
    assert (row["accuracy"], row["accuracy_se"]) == pytest.approx(by_question) and by_question[1] != mean_se(right)[1]


# ------------------------------------------------------------------------------------------------ what PPO trained

def test_the_closing_table_of_ppo_and_evaluate_measure_the_policy_that_was_trained(start, small_world, monkeypatch):
    """At the run's temperature, and with the reward model's own scores; both tables are the same."""
    asked = []
    for name, place in (("respond", 5), ("exact_kl", 4)):
        def watched(*args, real=getattr(evaluate, name), place=place, **options):
            asked.append((*args, *[1.0] * 9)[place] if len(args) > place else options.get("temperature", 1.0))
            return real(*args, **options)
        monkeypatch.setattr(evaluate, name, watched)
    cfg = ppo.Config(init=str(start / "start"), reward_model=str(start / "reward"), out=str(start / "ppo"), temperature=0.5, normalize_reward=True,
                     steps=2, batch_size=4, minibatches=1, max_new_tokens=8, lr=0.01, eval_n=12, device="cpu")
    ppo.train(cfg)
    assert set(asked) == {0.5}
    evaluate.main([str(start / "start"), str(start / "ppo"), "--n=12", f"--json={start}/rows.json"])
    assert set(asked) == {0.5}
    closing, again = json.load(open(start / "ppo/eval.json")), json.load(open(start / "rows.json"))
    assert closing == again and closing[1]["kl"] > 0 and closing[1]["score"] is not None
    evaluate.main([str(start / "start"), "--n=12"])
    assert asked[-1] == 1.0
    cfg.temperature, cfg.out = 2.0, str(start / "hot")
    ppo.train(cfg)
    with pytest.raises(SystemExit, match="trained at different temperatures .*ppo: 0.5, .*hot: 2.: compare each with the reference in a table") as error:
        evaluate.main([str(start / "start"), str(start / "ppo"), str(start / "hot")])
    assert "\n" not in str(error.value)


def test_the_kl_at_a_temperature_and_never_below_0():
    policy, reference = make_model(0), make_model(1)
    prompts, responses = [[1, 2, 3]] * 40, torch.randint(100, (40, 20), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        tokens = torch.tensor([[1, 2, 3, *response] for response in responses])
        logp, ref_logp = ((model(tokens)[:, 2:-1] / 0.5).log_softmax(-1) for model in (policy, reference))
        expected = (logp.exp() * (logp - ref_logp)).sum((1, 2))
        torch.testing.assert_close(evaluate.exact_kl(policy, reference, prompts, responses, 0.5), expected, atol=1e-4, rtol=1e-4)
        near = make_model(0)
        for a, b in zip(near.parameters(), policy.parameters()):
            a.copy_(b * (1 + 1e-7 * torch.randn(b.shape, generator=torch.Generator().manual_seed(1))))
    kl = evaluate.exact_kl(near, policy, prompts, responses)
    assert (kl >= 0).all() and kl.max() < 1e-3
    models = ppo.Models(near, policy, near, None)
    near.set_scalar_heads(1)
    with torch.no_grad():
        assert (ppo.evaluate_batch(models, pack([(p, [r]) for p, r in zip(prompts, responses)]), 1.0)["kl"] >= 0).all()
