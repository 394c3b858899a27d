"""Where a run lies, and the runs that another stage starts from: an SFT model, a reward model."""
import importlib
import os

import torch

from common.checkpoints import checkpoint_files, is_finished, load_checkpoint
from common.digests import file_digest
from common.dist import print0

NAMES = {"sft": "SFT", "reward": "reward"}  # of the models that other stages need, as printed
# A model that is trained because another stage needs it is evaluated on at most this many held-out prompts or
# comparisons, to save time. (The SFT table's first row is an untrained model, whose answers seldom end; the
# reward model scores eight responses to a prompt, before, during and after training.)
EVAL_N = {"sft": 100, "reward": 250}


def run_dir(stage, cfg):
    """out/STAGE-RECIPE; the name of the data instead, if the recipe does not say which data they are."""
    name = cfg.recipe
    base, slash, subset = cfg.data.partition("/")
    if os.path.isfile(cfg.data):
        name = os.path.basename(cfg.data).split(".")[0]
    elif base.startswith("hub:"):
        path = cfg.data.removeprefix("hub:").partition(":")[0]  # hub:OWNER/NAME:SPLIT
        name = os.path.basename(path)
    elif slash:
        name = f"{name}-{subset}"  # hh/SUBSET
    elif name == "animals":
        name = base
    return f"out/{stage}-{name}"


def train_if_missing(stage, cfg):
    """Returns the folder of a stage's run on cfg's data, training it first if it is not finished."""
    out = run_dir(stage, cfg)
    if is_finished(out):
        checkpoint = load_checkpoint(out)
        check_prerequisite(checkpoint, out, stage, cfg)
        source = checkpoint["config"]["init"]
        trained_from = f", trained from {source}" if source else ""
        print0(f"the {NAMES[stage]} model is that of {out}{trained_from}")
    else:
        page = importlib.import_module(stage)
        print0(f"no {NAMES[stage]} model in {out}: training it first")
        settings = {"recipe": cfg.recipe, **page.RECIPES.get(cfg.recipe, {})}
        for name in ("data", "data_dir", "device", "compile", "dtype", "checkpoint_blocks", "fsdp",
                     "max_len", "n_layer", "n_head", "n_embd"):
            settings[name] = getattr(cfg, name)
        page_cfg = page.Config(**settings, resume=bool(checkpoint_files(out)))
        page_cfg.eval_n = min(page_cfg.eval_n, EVAL_N[stage])
        page.train(page_cfg)
        print0()
    torch.manual_seed(cfg.seed)  # the random state does not depend on whether anything was trained
    return out


def check_prerequisite(checkpoint, out, stage, cfg):
    """Exits with one line if the finished run in `out` had other data than this run would give it."""
    theirs = checkpoint["config"]
    both_are_files = os.path.isfile(theirs["data"]) and os.path.isfile(cfg.data)
    problem = None
    if theirs["data"] != cfg.data and not both_are_files:  # what files hold is compared below
        problem = f"--data={theirs['data']}, not {cfg.data}"
    elif "digests" in checkpoint and checkpoint["digests"]["file"] != file_digest(cfg.data):
        problem = f"another file than {cfg.data} is now"
    elif theirs["max_len"] < cfg.max_len:
        problem = f"--max_len={theirs['max_len']}, not {cfg.max_len}"
    if problem:
        option = {"sft": "--init", "reward": "--reward_model"}[stage]
        raise SystemExit(f"{out}: this model was trained on {problem}; to use it all the same, name it with "
                         f"{option}={out}; or train another: python {stage}.py --out=FOLDER …")
