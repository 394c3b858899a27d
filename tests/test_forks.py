"""Forks stay green: a page of one's own, an option without a comment, lines inserted at the top of a page."""
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_stages import TINY

ROOT = Path(__file__).parents[1]

# What somebody adds for ORPO (arXiv:2403.07691 eq. 6 and 7): no reference, an SFT term and an odds ratio.
ORPO_LOSS = '''
def orpo_loss(chosen_logp, rejected_logp, chosen_len, rejected_len, lam):
    """−log π(y_w)/|y_w| − λ log σ(log odds(y_w) − log odds(y_l)), with odds = p/(1 − p) of the mean log-prob."""
    chosen_mean = chosen_logp / chosen_len
    rejected_mean = rejected_logp / rejected_len
    chosen_odds = chosen_mean - torch.log1p(-chosen_mean.exp())
    rejected_odds = rejected_mean - torch.log1p(-rejected_mean.exp())
    return -chosen_mean - lam * F.logsigmoid(chosen_odds - rejected_odds)


'''


def add_option(page, option):
    """An option without a comment, at the top of a page's Config."""
    return re.sub(r"(class Config\(RunConfig\):.*\n)", rf"\1    {option}\n", page, count=1)


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """A copy of the repository with an ORPO page made from simpo.py, and changes at the top of ppo.py."""
    fork = tmp_path_factory.mktemp("fork") / "repository"
    ignored = shutil.ignore_patterns(".git", "out", "__pycache__", ".pytest_cache", "files")
    shutil.copytree(ROOT, fork, ignore=ignored)

    page = (fork / "simpo.py").read_text()
    page = page.replace('Run("simpo", cfg)', 'Run("orpo", cfg)')
    page = page.replace("import torch.nn.functional", "import torch\nimport torch.nn.functional", 1)
    page = page.replace("def simpo_loss(", ORPO_LOSS.lstrip("\n") + "def simpo_loss(", 1)
    before, after = page.split("            losses, chosen_reward, rejected_reward = simpo_loss(\n", 1)
    _, after = after.split("\n\n", 1)
    call = """            losses = orpo_loss(chosen_logp, rejected_logp, chosen_len, rejected_len, cfg.lam)
            chosen_reward = chosen_logp.detach()
            rejected_reward = rejected_logp.detach()

"""
    page = before + call + after
    page = add_option(page, "lam: float = 0.1")
    (fork / "orpo.py").write_text(page)

    ppo = (fork / "ppo.py").read_text()
    lines = "".join(f"# {i}: a note of somebody who reads this page\n" for i in range(10))
    ppo = add_option(ppo, "entropy_bonus: float = 0.0")
    (fork / "ppo.py").write_text(lines + ppo)
    return fork


def run(fork, folder, *command):
    result = subprocess.run([sys.executable, *map(str, command)], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def test_help_shows_options_without_a_comment(fork, tmp_path):
    for page, option in (("orpo.py", "--lam"), ("ppo.py", "--entropy_bonus")):
        lines = run(fork, tmp_path, fork / page, "-h").splitlines()
        line, = [line for line in lines if line.startswith(option + " ")]
        assert len(line.split()) >= 3  # its name, and its default in each recipe


def test_a_page_of_ones_own_runs(fork, start, tmp_path):
    options = [*(f"--{name}={value}" for name, value in TINY.items()), "--max_len=64", "--warmup=0"]
    data = [f"--data={start}/mine.jsonl", f"--init={start}/start"]
    orpo = ["--steps=3", "--eval_n=0", "--sample_n=0", "--lam=0.2"]
    run(fork, tmp_path, fork / "orpo.py", *options, *data, *orpo)
    log = [json.loads(line) for line in open(tmp_path / "out/orpo-mine/log.jsonl")]
    assert [record["step"] for record in log] == [1, 2, 3] and all(record["loss"] > 0 for record in log)
    run(fork, tmp_path, fork / "ppo.py", *options, *data, f"--reward_model={start}/reward", "--steps=1",
        "--minibatches=2", "--max_new_tokens=8", "--eval_n=0", "--entropy_bonus=0.1", "--out=ppo")
    assert len(open(tmp_path / "ppo/log.jsonl").readlines()) == 1


def test_the_equations_of_a_fork_still_stand_in_their_functions(fork):
    """No line number and no line count of the pages is pinned."""
    spec = importlib.util.spec_from_file_location("fork_equations", fork / "tests" / "test_equations.py")
    equations = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(equations)
    assert equations.ROOT == fork
    for row in equations.ROWS:
        equations.test_the_quoted_line_stands_in_its_function(*row)
    equations.test_every_row_quotes_a_line_and_every_stage_has_a_row()


def test_a_loss_of_ones_own_in_the_three_steps_of_the_readme(fork, start, tmp_path):
    readme = (fork / "README.md").read_text(encoding="utf-8")
    assert 'cp dpo.py mine.py' in readme and 'Run("dpo", cfg) to Run("mine", cfg)' in readme
    assert 'evaluate.py out/sft-animals out/mine-animals --frontier --beside=docs/frontier.json --plot=' in readme
    page = (fork / "dpo.py").read_text(encoding="utf-8")
    page = page.replace('Run("dpo", cfg)', 'Run("mine", cfg)')
    changed = page.replace("losses = F.relu(1 - beta * h)", "losses = torch.exp(-beta * h)")  # another loss of the margin
    assert changed != page
    (fork / "mine.py").write_text(changed, encoding="utf-8")
    options = [*(f"--{name}={value}" for name, value in TINY.items()), "--max_len=64", "--warmup=0", "--lr=1e-3", "--loss_type=hinge"]
    run(fork, tmp_path, fork / "mine.py", *options, f"--data={start}/mine.jsonl", f"--init={start}/start", "--steps=3", "--eval_n=0")
    log = [json.loads(line) for line in open(tmp_path / "out/mine-mine/log.jsonl")]
    assert log[0]["loss"] == 1.0 and log[2]["loss"] < 1.0  # exp(0) at the reference
    out = run(fork, tmp_path, fork / "evaluate.py", f"{start}/start", "out/mine-mine", f"--data={start}/mine.jsonl",
              f"--reward_model={start}/reward", "--frontier", "--n=3", "--samples=64")
    assert "out/mine-mine" in out and "gap" in out
