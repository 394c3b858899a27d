"""Saving and loading. A run's folder holds ckpt.pt and, in case that is damaged, the checkpoint before it."""
import difflib
import os
from dataclasses import asdict

import torch
import torch.distributed as dist

from common.dist import is_main, n_processes, print0
from common.files import write_atomically
from common.sharding import gather_state, shard_like
from engine.weights import PRETRAINED
from model import GPTConfig


def checkpoint_files(path):
    """The checkpoints in a run's folder, newest first, or the one file at `path`; empty if there is none."""
    files = [path]
    if os.path.isdir(path):
        files = [os.path.join(path, name) for name in ("ckpt.pt", "ckpt-previous.pt")]
    return [file for file in files if os.path.exists(file)]


def load_checkpoint(path):
    """Loads the newest readable checkpoint, current or previous; exits with one line if there is none."""
    files = checkpoint_files(path)
    if not files:
        raise SystemExit(no_checkpoint(path))
    for file in files:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            # Each of these lines raises if what makes a file a checkpoint is missing or of another type.
            GPTConfig(**checkpoint["model_config"])
            checkpoint["model"]["wte.weight"].shape
            checkpoint["tokenizer"]
            return checkpoint
        except Exception as error:  # for a damaged or foreign file, torch.load raises half a dozen types
            problem = f"{file}: not a checkpoint of this repository, or damaged ({type(error).__name__})"
            if file != files[-1]:
                print0(f"{problem}; using the one before it, {files[-1]}")
    raise SystemExit(problem)


def no_checkpoint(path):
    """The error message for a path without a checkpoint."""
    for file in ("pytorch_model.bin", "model.safetensors"):
        if os.path.exists(os.path.join(path, file)):
            return f"{path}: holds {file}, but its config.json is missing"
    folder, name = os.path.split(os.path.normpath(path))
    candidates = [*PRETRAINED]
    if os.path.isdir(folder or "."):
        candidates += [other for other in os.listdir(folder or ".") if other != name]
    nearest = difflib.get_close_matches(name, candidates, 1, 0.6)
    suggestion = f"; did you mean {os.path.join(folder, nearest[0])!r}?" if nearest else ""
    if os.path.isdir(path):
        path = os.path.join(path, "ckpt.pt")
    return (f"{path}: no checkpoint there (expected a run's folder, a ckpt.pt, a folder in the Hugging Face "
            f"format, hub:OWNER/NAME, scratch, or one of {', '.join(PRETRAINED)}){suggestion}")


def save_checkpoint(out, step, model, optimizer, cfg, tokenizer, **more):
    """Writes OUT/ckpt.pt; the checkpoint before it becomes ckpt-previous.pt.

    step: the number of steps done. tokenizer: its name. `more` is saved beside the rest.
    The file is written completely or not at all. All processes must call this.
    """
    checkpoint = gather_state(dict(
        step=step, model=model.state_dict(), model_config=asdict(model.config), tokenizer=tokenizer,
        optimizer=optimizer.state_dict(), config=asdict(cfg), rng=torch.get_rng_state(), **more))
    if is_main():
        path = os.path.join(out, "ckpt.pt")
        with write_atomically(path, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
            if os.path.exists(path):  # only now that the new one is complete does the old one move
                os.replace(path, os.path.join(out, "ckpt-previous.pt"))
    if n_processes() > 1:
        dist.barrier()  # the other processes may read the file next


def load_weights(model, weights, where):
    """Loads a state dict into a model, sharded as the model is; exits with one line if the shapes differ."""
    own = model.state_dict()
    try:
        model.load_state_dict({name: shard_like(weight, own.get(name)) for name, weight in weights.items()})
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()  # line 0 is a title; the first problem follows it
        raise SystemExit(f"{where}: the weights have another shape than the model: {first}")


def load_optimizer(optimizer, state):
    """Loads a state dict into an optimizer whose parameters may be sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {}
    for i, tensors in state["state"].items():
        moments[i] = {name: shard_like(x, parameters[i]) for name, x in tensors.items()}
    optimizer.load_state_dict(state | {"state": moments})


# The options that a resumed run may change.
FREE_ON_RESUME = {"resume", "out", "device", "compile", "dtype", "checkpoint_blocks", "fsdp", "steps",
                  "eval_n", "log_every", "ckpt_every", "wandb", "tensorboard", "data_dir", "overwrite"}


def load_to_resume(out, cfg):
    """Loads the checkpoint that a run goes on from.

    Exits with a one-line message if it is another stage's, or was started with other settings.
    """
    checkpoint = load_checkpoint(out)
    settings_before = checkpoint["config"]
    different = asdict(cfg).keys() ^ settings_before.keys()
    if different:
        raise SystemExit(f"--resume: {out} is not a run of this stage, or is one of another version of the "
                         f"code: the option {min(different)} exists only in one of them")
    free = set(FREE_ON_RESUME)
    if getattr(cfg, "reward_model", None) is None:
        free.add("reward_model")  # ppo.py has yet to find it; `resume` compares it then
    compare_settings(out, cfg, settings_before, free)
    if cfg.steps < checkpoint["step"]:
        raise SystemExit(f"--steps={cfg.steps}: {out} has done {checkpoint['step']} steps already")
    if cfg.steps != settings_before["steps"]:
        print0(f"--steps={cfg.steps}, not {settings_before['steps']} as before: from here on, the learning rate "
               "follows the schedule of the new number")
    return checkpoint


def compare_settings(out, cfg, settings_before, free):
    """Exits with a one-line message if an option that is not `free` has another value than before."""
    for name, value in asdict(cfg).items():
        if name not in free and settings_before[name] != value:
            raise SystemExit(f"--resume: {out} was started with --{name}={settings_before[name]}, not {value}")


def resume(checkpoint, out, cfg, model, optimizer, digests):
    """Restores model, optimizer and random state from the checkpoint of load_to_resume.

    Exits with a one-line message if the run in `out` was started with another reward model, other data, other
    initial weights or another reference. `digests` are those of this run (common/digests.py).
    """
    compare_settings(out, cfg, checkpoint["config"], FREE_ON_RESUME)
    check_digests(checkpoint, out, cfg, digests)
    load_weights(model, checkpoint["model"], out)
    load_optimizer(optimizer, checkpoint["optimizer"])
    torch.set_rng_state(checkpoint["rng"])  # the CPU's: everything random is drawn there


def check_digests(checkpoint, out, cfg, digests):
    """Exits with a one-line message if the run in `out` was started with other data or weights than these."""
    stored = checkpoint.get("digests", digests)
    problems = {"data": f"--data={cfg.data} holds other data", "init": "--init names other weights",
                "ref": "--ref names other weights"}
    for key, problem in problems.items():
        if stored.get(key) != digests.get(key):
            raise SystemExit(f"--resume: {problem} than when {out} was started")


def is_finished(out):
    """Whether the run in this folder has done all of its steps."""
    if not checkpoint_files(out):
        return False
    checkpoint = load_checkpoint(out)
    return checkpoint["step"] == checkpoint["config"]["steps"]
