"""Options, help, schedule, checkpoints, the log."""
import ast
import copy
import io
import json
import math
import os
import random
import re
import subprocess
import sys
import typing
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, on_two_processes, random_groups

import common.batches
import common.dist
import dpo
import finegrained
import ppo
import reward
import sft
import simpo
from common.batches import micro_batches
from common.checkpoints import load_checkpoint, load_to_resume, save_checkpoint
from common.device import choose_device, wants_compile
from common.dist import sync_gradients
from common.log import Log
from common.models import load_model
from common.optim import lr_schedule, make_optimizer
from common.options import RunConfig, check_config, check_value, parse, split_type
from common.prerequisites import run_dir
from common.run import Run
from common.sharding import unshard_model
from data import get_tokenizer
from engine.packing import group_length
from model import GPT, GPTConfig

ROOT = Path(__file__).parents[1]
STAGES = [sft, reward, ppo, dpo, simpo, finegrained]


@dataclass
class Config:
    recipe: str = "animals"   # the positional argument
    data: str = "animals"     # what to train on
    lr: float = 1e-3          # peak learning rate
    steps: int = 10           # steps
    init: str | None = None   # where to start
    val: int | None = 5       # an optional number
    flag: bool = False        # a switch


RECIPES = {"big": dict(lr=1e-5, data="hh")}


@pytest.fixture
def recorders(monkeypatch):
    """wandb and torch.utils.tensorboard that note what they are told."""
    wandb, tensorboard = SimpleNamespace(inits=[], logs=[]), SimpleNamespace(inits=[], logs=[])

    def init(**settings):
        wandb.inits.append(settings)
        return SimpleNamespace(id=settings["id"] or f"run{len(wandb.inits)}", log=lambda values, step: wandb.logs.append((step, values)))

    def writer(folder, purge_step):
        tensorboard.inits.append((folder, purge_step))
        return SimpleNamespace(add_scalar=lambda key, value, step: tensorboard.logs.append((step, key, value)), flush=lambda: None)
    wandb.init, tensorboard.SummaryWriter = init, writer
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    return wandb, tensorboard


def test_options_override_the_recipe_and_the_recipe_the_defaults():
    assert parse(Config, RECIPES, []) == Config()
    assert parse(Config, RECIPES, ["big", "--steps=3"]) == Config("big", "hh", 1e-5, 3)
    assert parse(Config, RECIPES, ["--recipe=big"]) == parse(Config, RECIPES, ["big"])
    assert parse(Config, RECIPES, ["--lr=1", "big", "--flag"]) == Config("big", "hh", 1.0, flag=True)


@pytest.mark.parametrize("text, value", [("1e3", 1000), ("7", 7)])
def test_conversions(text, value):
    assert parse(Config, RECIPES, ["--steps=" + text]).steps == value
    assert type(parse(Config, RECIPES, ["--steps=" + text]).steps) is int
    assert parse(Config, RECIPES, ["--val=" + text]).val == value
    assert parse(Config, RECIPES, ["--lr=" + text]).lr == value
    assert parse(Config, RECIPES, ["--val=None", "--flag=false", "--init=a=b"]) == Config(val=None, init="a=b")


@pytest.mark.parametrize("argument, message", [
    ("--stpes=3", "unknown option 'stpes'; did you mean 'steps'?"),
    ("--recipe=bigg", "unknown recipe 'bigg'; did you mean 'big'?"),
    ("bigg", "unknown recipe 'bigg'; did you mean 'big'?"),
    ("--zzzzz=3", "unknown option 'zzzzz' (-h lists them all)"),
    ("--steps=many", "--steps=many: expected a whole number"),
    ("--steps=1.5", "--steps=1.5: expected a whole number"),
    ("--steps=inf", "--steps=inf: expected a whole number"),
    ("--lr=fast", "--lr=fast: expected a number"),
    ("--flag=maybe", "--flag=maybe: expected True or False"),
    ("--steps", "--steps needs a value: --steps=…"),
    ("-steps=3", "-steps=3: options are written --name=value"),
    ("--learning_rate=1e-3", "unknown option 'learning_rate': here it is --lr"),
    ("--num_train_epochs=1", "unknown option 'num_train_epochs': here it is --steps"),
    (__file__, f"a file of your own is named with --data={__file__}"),
])
def test_bad_arguments_get_one_line(argument, message):
    with pytest.raises(SystemExit) as error:
        parse(Config, RECIPES, [argument])
    assert message in str(error.value) and "\n" not in str(error.value)


OUT_OF_RANGE = [
    (sft, "--lr=nan", "--lr=nan: expected a finite number"),
    (ppo, "--value_lr=inf", "--value_lr=inf: expected a finite number"),
    (sft, "--lr=-1e-3", "--lr=-0.001: expected at least 0"),
    (sft, "--weight_decay=-1", "--weight_decay=-1.0: expected at least 0"),
    *((sft, f"--{name}=0", f"--{name}=0: expected at least 1") for name in (
        "n_head", "n_layer", "n_embd", "batch_size", "steps", "micro_tokens", "log_every", "ckpt_every", "val_every")),
    *((ppo, f"--{name}=0", f"--{name}=0: expected at least 1") for name in ("minibatches", "epochs", "max_new_tokens", "sample_every")),
    (sft, "--steps=-5", "--steps=-5: expected at least 1"),
    (sft, "--max_len=1", "--max_len=1: expected at least 2"),
    (sft, "--eval_n=-1", "--eval_n=-1: expected at least 0"),
    (sft, "--warmup=-1", "--warmup=-1: expected at least 0"),
    (sft, "--seed=-1", "--seed=-1: expected at least 0"),
    (sft, "--grad_clip=0", "--grad_clip=0.0: expected a number above 0"),
    (reward, "--k=1", "--k=1: expected at least 2"),
    (simpo, "--sample_n=-1", "--sample_n=-1: expected at least 0"),
    (dpo, "--beta=0", "--beta=0.0: expected a number above 0"),
    (ppo, "--temperature=0", "--temperature=0.0: expected a number above 0"),
    (ppo, "--kl_target=0", "--kl_target=0.0: expected a number above 0"),
    (ppo, "--kl_horizon=0", "--kl_horizon=0.0: expected a number above 0"),
    (dpo, "--label_smoothing=0.5", "--label_smoothing=0.5: expected a number from 0 below 0.5"),
    (simpo, "--label_smoothing=0.7", "--label_smoothing=0.7: expected a number from 0 below 0.5"),
    (ppo, "--clip=-0.2", "--clip=-0.2: expected a number above 0"),
    (ppo, "--lam=2", "--lam=2.0: expected a number from 0 up to 1"),
    (ppo, "--gamma=-1", "--gamma=-1.0: expected a number from 0 up to 1"),
    (ppo, "--kl_coef=-1", "--kl_coef=-1.0: expected at least 0"),
    (finegrained, "--reward_batch_size=3", "--reward_batch_size=3: expected at least 4"),
    (finegrained, "--w1=nan", "--w1=nan: expected a finite number"),
]


@pytest.mark.parametrize("stage, argument, message", OUT_OF_RANGE)
def test_numbers_that_no_run_can_be_made_with_get_one_line(stage, argument, message):
    with pytest.raises(SystemExit) as error:
        parse(stage.Config, stage.RECIPES, [argument])
    assert str(error.value) == message


@pytest.mark.parametrize("stage, argument, message", OUT_OF_RANGE)
def test_a_config_made_in_python_is_held_to_the_same_ranges(stage, argument, message, tmp_path):
    """The message is that of the command line, and nothing is written before it."""
    name, text = argument.removeprefix("--").split("=")
    kind = split_type(typing.get_type_hints(stage.Config, include_extras=True)[name])[0]
    with pytest.raises(SystemExit) as error:
        Run(stage.__name__, stage.Config(**{name: kind(text), "out": str(tmp_path / "run")}))
    assert str(error.value) == message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_each_range_of_each_field_is_checked_at_its_limits(stage):
    """On the command line and in Python: numbers at the limit and beyond it, not finite ones, unknown choices."""
    for name, annotation in typing.get_type_hints(stage.Config, include_extras=True).items():
        kind, limit, optional = split_type(annotation)
        good, bad = [], []
        if isinstance(limit, tuple):
            good, bad = [*limit], ["none of them"]
        elif kind is int:
            good, bad = [limit.limit], [limit.limit - 1]  # each whole number has a smallest value
        elif kind is float:
            bad = [math.nan, math.inf, -math.inf]
            if type(limit).__name__ == "Between":
                good, bad = [limit.low], [*bad, limit.low - 1e-9, limit.high + 1e-9]
                (bad if limit.exclude_high else good).append(limit.high)
            elif limit is not None:
                good, bad = [limit.limit + 1e-9], [*bad, limit.limit - 1e-9]
                (bad if type(limit).__name__ == "Above" else good).append(float(limit.limit))
        good += [None] * optional
        for value in good:
            check_config(stage.Config(**{name: value}))
            assert getattr(parse(stage.Config, {}, [f"--{name}={value}"]), name) == value
        for value in bad:
            in_python = one_line(check_config, stage.Config(**{name: value}))
            assert in_python == one_line(parse, stage.Config, {}, [f"--{name}={value}"])
            assert in_python.startswith((f"--{name}={value}: expected ", f"unknown {name} '{value}'"))


@pytest.mark.parametrize("stage", STAGES)
def test_every_default_and_every_recipe_is_in_range(stage):
    for settings in ({}, *stage.RECIPES.values()):
        check_config(stage.Config(**settings))
        for name, annotation in typing.get_type_hints(stage.Config, include_extras=True).items():
            value = getattr(stage.Config(**settings), name)
            if type(value) in (int, float):
                assert check_value(name, value, split_type(annotation)[1]) == value


def test_options_as_argparse_takes_them():
    assert parse(Config, RECIPES, ["--steps", "7", "big"]).steps == 7
    with pytest.raises(SystemExit, match="unknown option 'target_kl': here it is --stop_kl"):
        parse(ppo.Config, {}, ["--kl-coef", "0.5", "--target_kl=0.1"])
    assert parse(dpo.Config, {}, ["--resume", "--steps", "7"]).resume


def test_a_horizon_with_which_beta_could_become_negative_is_refused():
    with pytest.raises(SystemExit, match="--kl_horizon=20: must be above a fifth of --batch_size=128"):
        ppo.check_settings(ppo.Config(kl_target=1.0, kl_horizon=20.0), None, has_reward_fn=True)
    with pytest.raises(SystemExit, match="the KL controller multiplies β, so --kl_coef"):
        ppo.check_settings(ppo.Config(kl_target=1.0, kl_coef=0.0), None, has_reward_fn=True)
    ppo.check_settings(ppo.Config(kl_target=1.0, kl_horizon=26.0), None, has_reward_fn=True)


@pytest.mark.parametrize("command", [["dpo.py", "-h"], ["sample.py", "START", "--prompt=Été 🦉"]])
def test_everything_printed_is_utf8_whatever_the_code_page(command, start):
    command = [str(ROOT / command[0]), *(str(start / "start") if word == "START" else word for word in command[1:])]
    done = subprocess.run([sys.executable, *command], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}, cwd=start)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode("utf-8")


def test_files_are_utf8_whatever_the_code_page(tmp_path):
    code = ("from common.files import append_to, write_atomically\n"
            f"with write_atomically({str(tmp_path / 'a')!r}) as f: f.write('\\u03b2 \\U0001f989')\n"
            f"with append_to({str(tmp_path / 'b')!r}) as f: f.write('\\u03b2 \\U0001f989')\n")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == "β 🦉".encode()


def test_a_mistyped_model_is_answered_with_the_nearest(tmp_path):
    (tmp_path / "tiny-gpt2").mkdir()
    with pytest.raises(SystemExit, match="no checkpoint there .*did you mean '.*tiny-gpt2'"):
        load_model(str(tmp_path / "tiny-gpt"))
    (tmp_path / "tiny-gpt2" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(SystemExit, match="tiny-gpt2: holds pytorch_model.bin, but its config.json is missing"):
        load_model(str(tmp_path / "tiny-gpt2"))


def test_a_file_of_ones_own_takes_the_settings_for_real_text(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("")
    assert parse(Config, RECIPES | {"hh": dict(lr=1e-6)}, [f"--data={path}"]).lr == 1e-6
    assert run_dir("dpo", Config(data=str(path))) == "out/dpo-mine"
    assert run_dir("dpo", Config(recipe="big", data="hh")) == "out/dpo-big"


def test_a_whole_model_in_another_precision_is_a_copy():
    model = make_model(n_scalars=1)
    state, half = torch.get_rng_state(), unshard_model(model, torch.bfloat16)
    assert torch.equal(state, torch.get_rng_state()) and unshard_model(model) is model
    for name, weight in copy.deepcopy(model).to(torch.bfloat16).state_dict().items():
        assert torch.equal(half.state_dict()[name], weight) and model.state_dict()[name].dtype == torch.float32
    assert len(half.generate([[1, 2], [3]], 4)) == 2


def test_the_device_asked_for_is_made_the_current_one(monkeypatch):
    """As it must be where a CUDA graph is recorded."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: None)
    for device in ("cuda", "cuda:0", "cuda:1"):
        assert choose_device(device) == device
    assert chosen == [0, 0, 1]
    with pytest.raises(SystemExit, match="--device=cuda:2: torch sees 2 CUDA devices here"):
        choose_device("cuda:2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("cuda") == "cuda:1" and chosen[3:] == [1]  # each of several processes has its own


def test_heads_that_are_too_narrow_for_cuda():
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=700, n_head=4, n_embd=32))
    for compile in (None, True):  # None: on CUDA, because it has 10M parameters
        run = SimpleNamespace(device="cuda", cfg=SimpleNamespace(compile=compile))
        message = one_line(Run.prepare, run, model)
        assert message == "--n_head=4: flex_attention on CUDA needs heads of 16 dimensions or more, " \
                          "these have 8; --compile=False runs without it"


def test_by_default_a_model_is_compiled_on_cuda_if_it_is_large():
    with torch.device("meta"):
        small, large = (GPT(GPTConfig(n_layer=12, n_embd=n_embd)) for n_embd in (48, 768))
    default = SimpleNamespace(compile=None)
    assert [wants_compile(model, default, device) for model in (small, large) for device in ("cuda:1", "cpu", "mps")] == \
        [False, False, False, True, False, False]
    assert all(wants_compile(model, SimpleNamespace(compile=setting), device) == setting
               for model in (small, large) for device in ("cuda", "cpu") for setting in (True, False))


def test_a_stage_starts_without_the_compiler():
    """Its import takes as long as all the rest."""
    code = "import ppo, sys; assert 'torch._inductor.compile_fx' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(ppo.__file__).parent, check=True)


@pytest.mark.parametrize("stage", STAGES)
def test_help_lists_every_option_its_default_in_each_recipe_and_its_meaning(stage, capsys):
    with pytest.raises(SystemExit) as error:
        parse(stage.Config, stage.RECIPES, ["-h"])
    assert error.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for f in fields(stage.Config):
        line, = [x for x in lines if x.startswith(f"--{f.name} ")]
        cells = re.split(r"\s{2,}", line)
        if f.name != "recipe":
            assert cells[1] == str(f.default)
            assert cells[2] == str(next(iter(stage.RECIPES.values())).get(f.name, f.default))
        assert len(cells) == 3 + len(stage.RECIPES) and len(cells[-1]) > 3, f"{f.name} has no comment"


@pytest.mark.parametrize("stage", STAGES)
def test_every_option_is_read(stage):
    pages = {ROOT / f"{base.__module__}.py" for base in stage.Config.__mro__[:-2]}  # finegrained's, ppo's too
    files = [*pages, *(ROOT / "common").glob("*.py"), ROOT / "evaluate.py"]
    read = set()
    for node in ast.walk(ast.parse("\n".join(file.read_text() for file in files))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("cfg", "self.cfg", "run.cfg"):
            read.add(node.attr)
    assert {f.name for f in fields(stage.Config)} <= read
    assert all(set(r) <= {f.name for f in fields(stage.Config)} for r in stage.RECIPES.values())


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "docs/using.md", "docs/data.md", "docs/first-gpu-run.md"])
def test_every_stage_command_of_a_page_is_understood(page, recorders):
    commands = re.findall(r"(?:python|torchrun \S+) (sft|reward|ppo|dpo|simpo|finegrained)\.py([^`\n#;&]*)", (ROOT / page).read_text())
    assert len(commands) >= 3
    for stage, options in commands:
        module = {stage.__name__: stage for stage in STAGES}[stage]
        if "-h" not in options.split():
            options = options.replace(" --resume", "")  # which with --out would look for a run
            parse(module.Config, module.RECIPES, re.sub(r"\$\w+|…", "1", options).split())


def test_schedule():
    @dataclass
    class C:
        lr: float = 2.0
        warmup: int = 4
        steps: int = 104
    assert [2.0 * lr_schedule(s, C) for s in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert lr_schedule(4, C) == 1.0 and math.isclose(lr_schedule(54, C), 0.5) and 0 < lr_schedule(103, C) < 5e-4


def test_decay_groups():
    model = make_model()
    matrices, vectors = make_optimizer(model, 1e-3, weight_decay=0.1).param_groups
    assert matrices["weight_decay"] == 0.1 and vectors["weight_decay"] == 0
    assert sum(len(g["params"]) for g in (matrices, vectors)) == len(list(model.parameters()))
    assert all(p.dim() == 1 for p in vectors["params"])


# ------------------------------------------------------------------------------------ several processes

def sum_gradients_of_two_processes():
    """What both processes of the next test run: each knows all gradients, and they are added up in three ways."""
    common.dist.join_processes("cpu")
    exchanges = []
    real = common.dist.all_reduce
    common.dist.all_reduce = lambda tensor: (exchanges.append(tensor.numel()), real(tensor))[1]
    model = make_model()
    n_parameters = len(list(model.parameters()))
    n_numbers = sum(p.numel() for p in model.parameters())
    for bucket, least, most in ((2**25, 1, 1), (5000, 3, n_parameters - 1), (1, n_parameters, n_parameters)):
        common.dist.BUCKET = bucket
        exchanges.clear()
        gradients = []
        for process in (0, 1):
            generator = torch.Generator().manual_seed(process)
            gradients.append([torch.randn(p.shape, generator=generator) for p in model.parameters()])
        for parameter, gradient in zip(model.parameters(), gradients[common.dist.process()]):
            parameter.grad = gradient.clone()
        sync_gradients(model)
        assert least <= len(exchanges) <= most and sum(exchanges) == n_numbers
        for parameter, a, b in zip(model.parameters(), *gradients):
            assert torch.equal(parameter.grad, a + b)


def test_gradients_of_two_processes_are_added_up_in_one_bucket_or_in_many(server, tmp_path):
    on_two_processes(server, tmp_path, sum_gradients_of_two_processes)


def test_all_processes_get_as_many_micro_batches_and_each_example_once(monkeypatch):
    """Whatever the lengths, and without asking each other."""
    monkeypatch.setattr(common.batches, "all_reduce", lambda *args: pytest.fail("the processes communicate"))
    rng = random.Random(0)
    halved = 0
    for case in range(200):
        n = rng.choice([1, 2, 3, 4, 8])
        groups = random_groups(case, n=rng.randrange(n, 60), responses=(1, rng.choice([2, 12])))
        batch = rng.sample(range(len(groups)), len(groups) // n * n)
        max_tokens = rng.choice([1, 20, 50, 200, 10_000])
        monkeypatch.setenv("WORLD_SIZE", str(n))
        pieces = []
        for process in range(n):
            monkeypatch.setenv("RANK", str(process))
            pieces.append(micro_batches(batch, groups, max_tokens))
            assert sorted(i for piece in pieces[-1] for i in piece) == sorted(batch[process::n])
        assert len({len(lists) for lists in pieces}) == 1
        assert Counter(i for lists in pieces for piece in lists for i in piece) == Counter(batch)
        for piece in (piece for lists in pieces for piece in lists):
            assert len(piece) == 1 or piece and sum(group_length(groups[i]) for i in piece) <= max_tokens
        alone = {len(common.batches.cut_by_tokens(batch[i::n], groups, max_tokens)) for i in range(n)}
        halved += len(alone) > 1
    assert halved > 20  # so many cases would have had unequal numbers of lists


# ------------------------------------------------------------------------------------------------ checkpoints

@pytest.fixture
def saved(tmp_path):
    model = make_model(vocab_size=get_tokenizer("animals").n_vocab)
    save_checkpoint(str(tmp_path), 3, model, make_optimizer(model, 1e-3), sft.Config(), "animals")
    return tmp_path


def test_a_checkpoint_comes_back_by_folder_and_by_file(saved):
    for path in (saved, saved / "ckpt.pt"):
        model, tokenizer = load_model(str(path), sft.Config())
        assert tokenizer.name == "animals"
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), make_model(vocab_size=model.config.vocab_size).state_dict().values()))
    assert os.listdir(saved) == ["ckpt.pt"]


def one_line(f, *args):
    with pytest.raises(SystemExit) as error:
        f(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_checkpoints_that_are_none(saved, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    assert "no checkpoint there" in one_line(load_model, str(empty))
    assert "no checkpoint there" in one_line(load_model, "gpt3")
    whole = (saved / "ckpt.pt").read_bytes()
    for content in (whole[:len(whole) // 2], b"", b"not a checkpoint at all"):
        (empty / "ckpt.pt").write_bytes(content)
        assert "not a checkpoint of this repository, or damaged" in one_line(load_model, str(empty))
    torch.save({"weights": torch.zeros(3)}, empty / "ckpt.pt")
    assert "not a checkpoint of this repository, or damaged (KeyError)" in one_line(load_model, str(empty))


def test_no_pickle_is_executed(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)
    torch.save({"model": Malicious(), "model_config": {}}, tmp_path / "ckpt.pt")
    assert "damaged (UnpicklingError)" in one_line(load_checkpoint, str(tmp_path))
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_of_another_shape(saved):
    checkpoint = load_checkpoint(str(saved))
    checkpoint["model_config"]["n_embd"] = 64
    torch.save(checkpoint, saved / "ckpt.pt")
    message = one_line(load_model, str(saved))
    assert "the weights have another shape than the model: size mismatch for wte.weight" in message
    assert "max_len=100: the context" in one_line(load_model, str(save_again(saved)), sft.Config(max_len=100))


def save_again(folder):
    model = make_model(vocab_size=get_tokenizer("animals").n_vocab)
    save_checkpoint(str(folder), 3, model, make_optimizer(model, 1e-3), sft.Config(), "animals")
    return folder


def test_a_folder_without_a_tokenizer(tmp_path):
    make_model(vocab_size=97).save_pretrained(str(tmp_path))
    assert "a vocabulary of 97 is not GPT-2's, which has 50257 tokens; up to 50304, " in one_line(load_model, str(tmp_path))


def test_resume_wants_the_options_of_the_run(saved):
    cfg = sft.Config(resume=True, log_every=7, wandb="p", tensorboard=True, eval_n=3, compile=False, dtype="bfloat16")
    assert load_to_resume(str(saved), cfg)["step"] == 3
    assert f"was started with --lr={sft.Config().lr}, not 1.0" in one_line(load_to_resume, str(saved), sft.Config(lr=1.0))
    message = one_line(load_to_resume, str(saved), dpo.Config())
    assert "is not a run of this stage, or is one of another version" in message and "option beta" in message


def test_a_resumed_run_may_take_more_steps(saved, capsys):
    assert load_to_resume(str(saved), sft.Config(steps=7))["step"] == 3
    assert f"--steps=7, not {sft.Config().steps} as before: from here on, the learning rate follows" in capsys.readouterr().out
    assert "--steps=2: " in (message := one_line(load_to_resume, str(saved), sft.Config(steps=2)))
    assert message.endswith("has done 3 steps already")


def test_a_resumed_run_takes_its_settings_from_its_folder(saved):
    given = [f"--out={saved}", "--resume"]
    checkpoint = load_checkpoint(str(saved))
    checkpoint["config"] |= {"lr": 0.5, "recipe": "hh", "batch_size": 3}
    torch.save(checkpoint, saved / "ckpt.pt")
    cfg = parse(sft.Config, sft.RECIPES, [*given, "--eval_n=9"])
    assert (cfg.lr, cfg.recipe, cfg.batch_size, cfg.eval_n, cfg.resume, cfg.out) == (0.5, "hh", 3, 9, True, str(saved))
    load_to_resume(str(saved), cfg)
    message = one_line(load_to_resume, str(saved), parse(sft.Config, sft.RECIPES, [*given, "--lr=1"]))
    assert "was started with --lr=0.5, not 1.0" in message


# ------------------------------------------------------------------------------------------------ the log

def test_log_holds_a_line_a_step_and_forgets_what_a_resumed_run_repeats(tmp_path, capsys):
    cfg = sft.Config(steps=6, log_every=3)
    log = Log(str(tmp_path), cfg)
    for step in range(1, 5):
        log(step, tokens=10, loss=0.5)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 5, "lo')  # killed while writing
    log = Log(str(tmp_path), cfg, start=3)
    for step in range(4, 7):
        log(step, tokens=10, loss=0.25, val_loss=0.1 if step == 6 else None)
    records = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert [(r["step"], r["loss"]) for r in records] == [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.25), (5, 0.25), (6, 0.25)]
    assert {"step", "loss", "tokens_per_s", "time_s"} == set(records[0])
    assert [r["val_loss"] for r in records[3:]] == [None, None, 0.1]
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out] == ["step", "3", "step", "6"] and len(out[0]) == len(out[1]) and len(out[2]) == len(out[3])


def test_wandb_and_tensorboard_get_what_the_log_gets(tmp_path, recorders, monkeypatch, capsys):
    wandb, tensorboard = recorders
    cfg, out = sft.Config(steps=4, wandb="rlhf", tensorboard=True), str(tmp_path / "sft-run")
    os.mkdir(out)
    for start in (0, 2, 0):  # begun, resumed, begun anew
        wandb.logs.clear(), tensorboard.logs.clear()
        log = Log(out + "/", cfg, start)
        for step in range(start + 1, 5):
            log(step, tokens=10, loss=math.nan if step == 3 else 0.5, val_loss=0.1 if step == 4 else None, gold=math.inf)
        records = [json.loads(line) for line in open(out + "/log.jsonl")][start:]
        said = [(r.pop("step"), {k: v for k, v in r.items() if v is not None}) for r in records]
        assert wandb.logs == said and [step for step, _ in said] == list(range(start + 1, 5))
        assert tensorboard.logs == [(step, key, value) for step, values in said for key, value in values.items()]
        assert [set(values) - {"tokens_per_s", "time_s"} for _, values in said][-2:] == [set(), {"loss", "val_loss"}]
    assert [settings.pop("id") for settings in wandb.inits] == [None, "run1", None]  # the resumed run is the first one
    assert wandb.inits == [dict(project="rlhf", dir=out + "/", name="sft-run", config=asdict(cfg), resume="allow")] * 3
    assert tensorboard.inits == [(out + "/tensorboard", 1), (out + "/tensorboard", 3), (out + "/tensorboard", 1)]
    monkeypatch.setenv("RANK", "1")
    Log(out, cfg)(1, tokens=10, loss=0.5)
    assert len(wandb.inits) == len(tensorboard.inits) == 3


@pytest.mark.parametrize("option, module", [("--wandb=p", "wandb"), ("--tensorboard", "torch.utils.tensorboard")])
def test_what_is_not_installed_is_named_only_where_it_is_asked_for(option, module, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    package = module.split(".")[-1]
    assert one_line(parse, sft.Config, sft.RECIPES, [option]) == f"--{package} needs a package that is not installed: pip install {package}"
    Log(str(tmp_path), parse(sft.Config, sft.RECIPES, []))(1, tokens=10, loss=0.5)
    assert os.listdir(tmp_path) == ["log.jsonl"]


def test_a_terminal_shows_how_far_the_run_is(tmp_path, monkeypatch):
    """A line that rewrites itself between those of the log; a file or a pipe gets none of it."""
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stream)
        log = Log(str(tmp_path), RunConfig(steps=20, log_every=5))
        for step in range(1, 11):
            log.progress.shown_at = 0.0  # as if a second had passed
            log(step, 100, loss=0.5)
        text = stream.getvalue()
        assert text.count("loss") >= 1 and len([line for line in text.splitlines() if line.lstrip("\x1b[K ").startswith("10 ")]) == 1
        if stream.isatty():
            assert "step 3 of 20   loss 0.5000   " in text and " left\r" in text and text.count("\r") == 8
            assert max(len(line) for line in re.split("[\r\n]", text)) <= 103
        else:
            assert "step 3 of" not in text and "\r" not in text and "\x1b" not in text
