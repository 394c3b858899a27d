"""The frontier of evaluate.py: the tilted reference by hand, best-of-n, and both against the exact optimum of an enumerable problem."""
import importlib.util
import json
import math
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import make_model

import dpo
import evaluate
import ppo
import sft
from common import plots
from common.checkpoints import save_checkpoint
from common.frontier import (MIN_ESS, best_of, best_of_kl, extrapolate, frontier, gap,
                             optimum_at, tilt)
from common.optim import make_optimizer
from common.curves import shrinking_means
from data import get_tokenizer
from engine.packing import pack, per_sequence

ROOT = Path(__file__).parents[1]


def test_tilt_by_hand():
    """Two samples, rewards 0 and β log 3: weights ¼ and ¾, Z = 2."""
    reward, kl, beta_log_z, ess = tilt(torch.tensor([[0.0, 0.5 * math.log(3)]]), 0.5)
    assert reward.item() == pytest.approx(0.75 * 0.5 * math.log(3))
    assert beta_log_z.item() == pytest.approx(0.5 * math.log(2))
    assert kl.item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert ess.item() == pytest.approx(1 / (0.25**2 + 0.75**2))


def test_tilt_at_its_limits():
    rewards = torch.tensor([[3.0, 1.0, 2.0, 2.0]])
    reward, kl, _, ess = tilt(rewards, 1e6)  # nothing is worth its KL: the reference
    assert reward.item() == pytest.approx(2) and abs(kl.item()) < 1e-6 and ess.item() == pytest.approx(4)
    reward, kl, beta_log_z, ess = tilt(rewards.double(), 1e-3)  # KL is free: the best sample
    assert reward.item() == pytest.approx(3) and kl.item() == pytest.approx(math.log(4)) and ess.item() == pytest.approx(1)
    assert beta_log_z.item() == pytest.approx(3, abs=2e-3)


def test_best_of_by_hand():
    """Of 1, 2, 4: the largest of each pair is 2, 4, 4. The order of the samples does not matter."""
    rewards = torch.tensor([[4.0, 1.0, 2.0], [1.0, 2.0, 4.0]])
    for k, expected in ((1, 7 / 3), (2, 10 / 3), (3, 4)):
        assert best_of(rewards, k).tolist() == pytest.approx([expected] * 2, rel=1e-6)


@pytest.fixture(scope="module")
def problem():
    """Nine responses of two tokens: log π_ref and the reward of each, and the rewards of 100 × 512 samples of π_ref."""
    policy = make_model(0, vocab_size=3, block_size=3, n_layer=1, n_head=2, n_embd=32, scale=8.0)
    every = pack([([0], [list(r) for r in product(range(3), repeat=2)])], 19)
    with torch.no_grad():
        logp = per_sequence(policy.logprobs(every), every).double()
    torch.manual_seed(3)
    reward = torch.randn(9, dtype=torch.float64)
    responses = policy.generate([[0]] * 51_200, 2)
    return logp, reward, reward[torch.tensor([3 * a + b for a, b in responses])].view(100, 512)


def exact(logp, reward, beta):
    """π*, its reward and its KL, by enumeration."""
    optimum = (logp + reward / beta).log_softmax(0)
    return optimum, (optimum.exp() * reward).sum().item(), (optimum.exp() * (optimum - logp)).sum().item()


def test_the_optimum_agrees_with_the_exact_one(problem):
    logp, reward, samples = problem
    optimum, _, _ = frontier(samples, "gold")
    assert len(optimum) > 20 and optimum[-1]["kl"] > 0.5
    for row in optimum:
        _, r, kl = exact(logp, reward, row["beta"])
        assert abs(row["gold"] - r) < 3 * row["gold_se"] + 1e-3 and abs(row["kl"] - kl) < 3 * row["kl_se"] + 1e-3
        assert row["ess"] >= MIN_ESS
    assert all(a["kl"] < b["kl"] and a["gold"] < b["gold"] for a, b in zip(optimum, optimum[1:]))


def columns(logp, reward, policy):
    """Reward and KL of a policy, exact, for each of 100 prompts."""
    return [(policy.exp() * reward).sum().item()] * 100, [(policy.exp() * (policy - logp)).sum().item()] * 100


def test_the_optimum_has_no_gap_and_no_policy_has_a_negative_one(problem):
    logp, reward, samples = problem
    _, _, dual = frontier(samples, "gold")
    for beta in (2.0, 1.0, 0.5):
        mean, se, is_bound = gap(dual, *columns(logp, reward, exact(logp, reward, beta)[0]))
        assert abs(mean) < 2 * se + 1e-3 and not is_bound
    g = torch.Generator().manual_seed(1)
    for _ in range(20):
        mean, se, _ = gap(dual, *columns(logp, reward, (logp + torch.randn(9, generator=g, dtype=torch.float64)).log_softmax(0)))
        assert mean > -2 * se
    assert gap(dual, *columns(logp, reward, (logp - reward).log_softmax(0)))[0] > 0.5  # tilted the wrong way


def test_the_gap_is_beta_times_the_kl_to_the_optimum(problem):
    """β KL(π‖π*) = β log Z + β KL(π‖π_ref) − E[r], at the β where π* has the policy's KL."""
    logp, reward, _ = problem
    policy = (logp + 0.7 * torch.randn(9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).log_softmax(0)
    kl = (policy.exp() * (policy - logp)).sum().item()
    betas = torch.logspace(-1, 1.5, 2000, dtype=torch.float64).tolist()
    dual = {b: b * (logp + reward / b).logsumexp(0)[None].expand(2) for b in betas}
    beta = min(betas, key=lambda b: abs(exact(logp, reward, b)[2] - kl))
    optimum = exact(logp, reward, beta)[0]
    mean, _, _ = gap(dual, [(policy.exp() * reward).sum().item()] * 2, [kl] * 2)
    assert mean == pytest.approx(beta * (policy.exp() * (policy - optimum)).sum().item(), rel=1e-3)


def test_best_of_n_lies_below_the_optimum(problem):
    _, _, samples = problem
    optimum, best, dual = frontier(samples, "gold")
    assert [row["checkpoint"] for row in best] == [f"best of {2**i}" for i in range(8)] and best[0]["kl"] == 0
    for row in best[:5]:
        bound = min(beta * row["kl"] + z.mean().item() for beta, z in dual.items())
        assert row["gold"] < bound + 2 * row["gold_se"]


# ------------------------------------------------------------------------------------------------ bias

def test_extrapolation_takes_off_a_bias_of_1_over_n_and_of_1_over_n_squared():
    def biased_mean(rewards):
        n = rewards.size(1)
        return rewards.mean(1) + 3 / n - 50 / n**2
    rewards = torch.arange(16, dtype=torch.float64).view(2, 8)
    assert extrapolate(biased_mean, rewards).tolist() == pytest.approx([3.5, 11.5])
    assert extrapolate(lambda x: x.mean(1), rewards).tolist() == pytest.approx([3.5, 11.5])


LEVELS = {  # rewards of π_ref and their probabilities
    "discrete": ([-1, -0.5, -0.3, 0, 0.2, 0.5, 0.67, 1], [0.05, 0.1, 0.1, 0.15, 0.15, 0.15, 0.13, 0.17]),
    "a rare best": ([0, 0.3, 1], [0.58, 0.4, 0.02]),
}


def toy(name, kl):
    """The β at which π* has this KL, E_π*[r], and a function that draws (P, n) rewards of π_ref."""
    if name == "normal":  # π* is N(1/β, 1), its KL ½/β²
        beta = (2 * kl) ** -0.5
        return beta, 1 / beta, lambda P, n, g: torch.randn(P, n, dtype=torch.float64, generator=g)
    values, p = (torch.tensor(x, dtype=torch.float64) for x in LEVELS[name])
    low, high = 0.01, 100.0
    for _ in range(60):
        beta = math.sqrt(low * high)
        low, high = (beta, high) if exact(p.log(), values, beta)[2] > kl else (low, beta)

    def draw(P, n, g):
        return values[torch.multinomial(p, P * n, True, generator=g)].view(P, n)
    return beta, exact(p.log(), values, beta)[1], draw


@pytest.mark.parametrize("kl", [0.05, 0.3, 1, 1.5])
@pytest.mark.parametrize("name", ["normal", *LEVELS])
def test_the_exact_optimum_has_a_gap_of_0_with_an_honest_error(name, kl):
    """Of 300 estimates, the mean is 0 within 0.002, and at most 4% lie below −2 standard errors.

    From 256 samples a prompt, and at 1.5 nats from 512: there too few of 256 count to be on the curve.
    """
    beta, reward, draw = toy(name, kl)
    g = torch.Generator().manual_seed(0)
    P, n, gaps, n_below = 100, 512 if kl == 1.5 else 256, [], 0
    assert 1 / (1 / tilt(draw(P, n, g), beta)[3]).mean() > MIN_ESS
    for _ in range(300):
        rewards = draw(P, n, g)
        dual = {b: optimum_at(rewards, b)[2] for b in (1.08 * beta, beta, beta / 1.08)}
        mean, se, _ = gap(dual, [reward] * P, [kl] * P)
        gaps.append(mean)
        n_below += mean < -2 * se
    assert abs(sum(gaps)) / 300 < 0.002 and n_below <= 12, (sum(gaps) / 300, n_below)


# ------------------------------------------------------------------------------------------------ best-of-n with ties

def test_the_kl_of_best_of_n_by_hand():
    """Of the rewards 0, 0, 0, 1, best of 2 has the level 1 with probability 1 − (3/4)²; without ties it is log k − (k−1)/k."""
    rewards = torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    expected = 7 / 16 * math.log(7 / 16 / (1 / 4)) + 9 / 16 * math.log(9 / 16 / (3 / 4))
    assert best_of_kl(rewards, 2).tolist() == pytest.approx([expected, 0])
    assert best_of_kl(rewards, 1).tolist() == [0, 0]
    assert best_of_kl(rewards, 1000)[0].item() == pytest.approx(math.log(4))  # surely the best level, of share ¼


def best_of_kl_without_ties(k):
    """The KL of best-of-k where no two rewards tie, the most it can be where some do (arXiv:2401.01879)."""
    return math.log(k) - (k - 1) / k


@pytest.mark.parametrize("k", [1, 2, 8, 64])
def test_without_ties_the_kl_of_best_of_n_tends_to_its_formula(k):
    errors = []
    for n in (256, 1024, 4096):
        kl = best_of_kl(torch.randperm(n, generator=torch.Generator().manual_seed(0)).double()[None], k)
        errors.append(best_of_kl_without_ties(k) - kl.item())
    assert all(error >= -1e-9 for error in errors) and errors[2] < 1e-4  # from below: ties only ever lower it
    assert errors[0] >= errors[1] >= errors[2] - 1e-9


def test_best_of_n_is_drawn_at_its_kl():
    """Three in ten answers are perfect, as ties are: best of 16 has a KL of about −log 0.3, not of log 16 − 15/16 = 1.84."""
    values, p = torch.tensor([0, 0.5, 1], dtype=torch.float64), torch.tensor([0.4, 0.3, 0.3], dtype=torch.float64)
    samples = values[torch.multinomial(p, 500 * 64, True, generator=torch.Generator().manual_seed(0))].view(500, 64)
    _, best, _ = frontier(samples, "gold")
    F = p.cumsum(0)
    for row, k in zip(best, (1, 2, 4, 8, 16)):
        q = F**k - (F - p) ** k
        assert row["kl"] == pytest.approx((q * (q / p).log()).sum().item(), abs=0.005)
        assert row["gold"] == pytest.approx((q * values).sum().item(), abs=0.01)
    assert best[-1]["checkpoint"] == "best of 16" and best[-1]["kl_se"] > 0


# ------------------------------------------------------------------------------------------------ where it ends

def test_rewards_that_are_all_equal_have_a_frontier():
    optimum, best, dual = frontier(torch.full((3, 32), 0.1, dtype=torch.float64), "gold")
    for row in optimum + best:
        assert row["gold"] == pytest.approx(0.1) and row["kl"] == pytest.approx(0, abs=1e-12)
    mean, se, _ = gap(dual, [0.1] * 3, [0.0] * 3)
    assert mean == pytest.approx(0) and se == pytest.approx(0)


def test_beyond_the_last_beta_the_gap_is_a_bound(problem):
    logp, reward, samples = problem
    _, _, dual = frontier(samples, "gold")
    best = reward.max().item()
    far = [best - 0.1] * 100, [5.0] * 100  # no policy has a KL of 5 here that is worth it
    mean, _, is_bound = gap(dual, *far)
    farther, _, _ = gap(dual, far[0], [10.0] * 100)
    assert is_bound and farther > mean + 0.1  # it grows with the KL
    mean, _, is_bound = gap(dual, *far, max_reward=best)
    assert is_bound and mean == pytest.approx(0.1)
    near = columns(logp, reward, exact(logp, reward, 1.0)[0])
    assert gap(dual, *near, max_reward=-100.0) == gap(dual, *near) and not gap(dual, *near)[2]


def test_errors_of_the_frontier_and_the_gap_are_clustered(problem):
    """Every prompt twice is no new information: the errors stay what they are."""
    logp, reward, samples = problem
    policy = columns(logp, reward, exact(logp, reward, 1.0)[0])
    clusters = list(range(100)) * 2
    optimum, best, dual = frontier(samples, "gold")
    twice, best_twice, dual_twice = frontier(torch.cat([samples, samples]), "gold", clusters)
    assert twice[20]["beta"] == pytest.approx(optimum[20]["beta"], rel=1e-3)
    for a, b in ((optimum[20], twice[20]), (best[3], best_twice[3])):
        assert b["gold_se"] == pytest.approx(a["gold_se"], rel=1e-3) and b["kl_se"] == pytest.approx(a["kl_se"], rel=1e-3)
    assert gap(dual_twice, policy[0] * 2, policy[1] * 2, clusters)[1] == pytest.approx(gap(dual, *policy)[1], rel=1e-2)

# ------------------------------------------------------------------------------------------------ the command

def test_frontier_command(start, small_world, capsys):
    folder = str(start / "start")
    far = make_model(1, vocab_size=get_tokenizer("animals").n_vocab, n_layer=1, n_embd=16)
    save_checkpoint(str(start / "far"), 1, far, make_optimizer(far, 1e-3), sft.Config(), "animals")
    evaluate.main([folder, str(start / "far"), "--n=12", "--frontier", "--samples=48", f"--json={start}/rows.json"])
    out = capsys.readouterr().out
    assert "from 48 samples per prompt" in out and "gap" in out and "best of 8" in out and "best of 16" not in out
    rows = json.load(open(start / "rows.json"))
    assert len({tuple(row) for row in rows}) == 1 and {"gap", "gap_se", "beta", "ess", "gold", "kl_se"} <= set(rows[0])
    assert rows[0]["kl"] == 0 and rows[0]["gap"] > -2 * rows[0]["gap_se"] and rows[2]["beta"] > rows[3]["beta"]
    assert rows[0]["gap_at_most"] is None and rows[1]["kl"] > 4  # further than any sample shows
    assert rows[1]["gap"] is None and rows[1]["gap_at_most"] <= 1 - rows[1]["gold"] + 1e-9  # gold is 1 at most


def test_no_checkpoint_lies_above_the_optimum(tmp_path, small_world, capsys):
    """PPO on the true reward, cheap and dear in KL, and DPO: their gaps are at least −2 standard errors."""
    tiny = dict(n_layer=1, n_head=2, n_embd=32, device="cpu", eval_n=0)
    sft.train(sft.Config(**tiny, out=str(tmp_path / "sft"), steps=100, lr=1e-2))
    tiny |= dict(init=str(tmp_path / "sft"), lr=3e-3)
    for kl_coef in (0.05, 0.5):
        ppo.train(ppo.Config(**tiny, reward="gold", kl_coef=kl_coef, steps=8, batch_size=64, out=str(tmp_path / f"ppo{kl_coef}")))
    dpo.train(dpo.Config(**tiny, steps=6, batch_size=32, out=str(tmp_path / "dpo")))
    folders = [str(tmp_path / name) for name in ("sft", "ppo0.05", "ppo0.5", "dpo")]
    evaluate.main([*folders, "--n=40", "--frontier", "--samples=128", "--mean", f"--json={tmp_path}/rows.json"])
    *rows, mean = json.load(open(tmp_path / "rows.json"))[:5]
    gaps = [row["gap"] for row in rows[1:]]
    assert mean["checkpoint"] == "mean of 3" and mean["gap"] == (None if None in gaps else pytest.approx(sum(gaps) / 3))
    assert rows[1]["gold"] > rows[0]["gold"] + 0.1 and rows[1]["kl"] > 0.1
    for row in rows:
        if row["gap"] is None:
            assert row["gap_at_most"] > 0
        else:
            assert row["gap"] > -2 * row["gap_se"], row


def test_frontier_by_the_reward_model_where_nobody_knows_gold(start, capsys):
    evaluate.main([str(start / "start"), "--n=2", "--frontier", "--samples=48", f"--data={start}/mine.jsonl", f"--reward_model={start}/reward"])
    out = capsys.readouterr().out
    assert "the reward model's score is used instead" in out and "the most score that any policy" in out


def test_pictures(start, small_world, capsys):
    pytest.importorskip("matplotlib")
    folder, run = str(start / "start"), start / "ppo-run"
    evaluate.main([folder, "--n=5", "--frontier", "--samples=48", f"--plot={start}/frontier.png"])
    run.mkdir()
    (run / "log.jsonl").write_text("".join(json.dumps({"step": k, "kl": k / 10, "score": k / 5, "gold": 1 - k / 9}) + "\n" for k in range(12)))
    evaluate.main([str(run), "--overoptimization", f"--plot={start}/over.png"])
    assert all((start / name).read_bytes().startswith(b"\x89PNG") for name in ("frontier.png", "over.png"))


def test_another_tables_rows_are_drawn_beside(start, small_world, monkeypatch):
    """The points of docs/frontier.json, and those that --json wrote, without the optimum's."""
    drawn = []
    monkeypatch.setattr(plots, "import_pyplot", lambda: None)
    monkeypatch.setattr(plots, "plot_frontier", lambda path, key, rows, optimum, best: drawn.append([row["checkpoint"] for row in rows]))
    folder, rows = str(start / "start"), f"{start}/beside.json"
    command = [folder, "--n=5", "--frontier", "--samples=48"]
    evaluate.main([*command, f"--json={rows}"])
    published = json.loads((ROOT / "docs/frontier.json").read_text())
    for beside, names in ((rows, [folder]), (str(ROOT / "docs/frontier.json"), [row["checkpoint"] for row in published])):
        evaluate.main([*command, "--plot=x.png", f"--beside={beside}"])
        assert drawn.pop() == [folder, *names]
    assert {"sft", "dpo-beta1.0", "simpo", "ppo-kl0.1", "finegrained"} <= {row["checkpoint"] for row in published}
    (start / "no-table.json").write_text('{"gold": 1}')
    (start / "scores.json").write_text('[{"checkpoint": "a", "kl": 1.0, "score": 1.0}]')
    for beside, message in (("missing.json", "cannot be read"), ("no-table.json", "not a table that"), ("scores.json", "no row has both kl and gold")):
        with pytest.raises(SystemExit, match=f"--beside=.*{beside}: {message}") as error:
            evaluate.main([*command, "--plot=x.png", f"--beside={start}/{beside}"])
        assert "\n" not in str(error.value)
    with pytest.raises(SystemExit, match="--beside adds to the picture"):
        evaluate.main([*command, f"--beside={rows}"])


def test_a_label_covers_no_error_bar(tmp_path, monkeypatch):
    """The label beside a point would lie on a wide bar, so it moves off it."""
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    row = {"checkpoint": "out/ppo-a", "gold": 0.5, "gold_se": 0.01, "kl": 1.0, "kl_se": 0.5}
    optimum = [{"gold": x / 10, "gold_se": 0.01, "kl": x / 5, "kl_se": 0.01} for x in range(11)]
    plots.plot_frontier(str(tmp_path / "x.png"), "gold", [row], optimum, optimum)
    figure, = figures
    label, = [text for text in figure.axes[0].texts if text.get_text() == "ppo-a"]
    box = label.get_window_extent()
    height = figure.axes[0].transData.transform((1.0, 0.5))[1]
    assert not box.y0 < height < box.y1


def test_what_cannot_be_drawn_gets_one_line(start, small_world, monkeypatch):
    folder = str(start / "start")
    checkpoint = torch.load(start / "start/ckpt.pt", weights_only=True)
    for name, change in (("nameless", lambda c: c.pop("tokenizer")), ("other", lambda c: c["config"].update(data="hh"))):
        (start / name).mkdir()
        changed = checkpoint | {"config": dict(checkpoint["config"])}
        change(changed)
        torch.save(changed, start / name / "ckpt.pt")
    (start / "one.jsonl").write_text('{"prompt": "a", "completion": " b"}\n')
    for argv, message in [
            ([folder, "--frontier", "--n=1"], "--frontier needs at least two prompts, for its standard errors"),
            ([folder, "--frontier", "--samples=50"], "--frontier needs 48 --samples or more, a multiple of 4"),
            ([folder, "--plot=x.png"], "--plot draws --frontier, --overoptimization or --curves: say which"),
            ([folder, f"--data={start}/one.jsonl", "--n=2"], "no held-out prompts: nothing to evaluate"),
            ([folder, "--overoptimization"], "takes runs of ppo.py and --plot=FILE"),
            ([folder, str(start / "nameless")], "nameless/ckpt.pt: not a checkpoint of this repository, or damaged"),
            ([folder, str(start / "other")], "trained on different data .*start: animals, .*other: hh.: say which to compare them on with --data"),
            ([folder, f"--data={start}/mine.jsonl", "--frontier", "--n=2"],
             "the true reward of this data is not known; name a --reward_model")]:
        with pytest.raises(SystemExit, match=message) as error:
            evaluate.main(argv)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="drawing needs a package that is not installed: pip install matplotlib"):
        evaluate.main([folder, "--frontier", f"--plot={start}/x.png"])


def test_running_means_shrink_towards_both_ends():
    points = torch.arange(7.0)[:, None] ** 2
    assert shrinking_means(points, 2)[:, 0].tolist() == pytest.approx([0, 5 / 3, (0 + 1 + 4 + 9 + 16) / 5, 11, (4 + 9 + 16 + 25 + 36) / 5, 77 / 3, 36])


def test_overoptimization_needs_a_run_of_ppo(start):
    pytest.importorskip("matplotlib")
    message = "start/log.jsonl: cannot be read .No such file or directory.; expected a run's folder"
    with pytest.raises(SystemExit, match=message):
        evaluate.main([str(start / "start"), "--overoptimization", "--plot=x.png"])
    (start / "start" / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "kl": null, "score": 0.1, "gold": 0.2}\n')
    with pytest.raises(SystemExit, match="start: --overoptimization reads the log of a run of ppo.py"):
        evaluate.main([str(start / "start"), "--overoptimization", "--plot=x.png"])


def test_the_frontier_script_finds_the_rows_of_a_seed_that_once_was_the_first(tmp_path, monkeypatch):
    """Then its table holds more points than are asked for; if it holds fewer, it is made again."""
    spec = importlib.util.spec_from_file_location("frontier_script", ROOT / "docs" / "frontier.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/frontier/1").mkdir(parents=True)
    made = []

    def evaluate_py(command, **options):
        folders = [word for word in command if str(word).startswith("out/")]
        made.append(folders)
        rows = [{"checkpoint": name} for name in [*folders, "optimum, beta 1", "best of 2"]]
        (tmp_path / "out/frontier/1/frontier.json").write_text(json.dumps(rows))
    monkeypatch.setattr(script.subprocess, "run", evaluate_py)
    points = [script.Point(name, "") for name in ("sft", "dpo", "ppo")]
    for asked, n_made in ((points[::2], 1), (points, 2), (points[::2], 2)):
        rows, frontier = script.evaluate("1", asked)
        assert rows == {point.name: {"checkpoint": f"out/frontier/1/{point.name}"} for point in asked}
        assert [row["checkpoint"] for row in frontier] == ["optimum, beta 1", "best of 2"] and len(made) == n_made
