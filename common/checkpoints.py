"""Saving and loading. A run's folder holds ckpt.pt and, in case that is damaged, the checkpoint before it."""
import difflib
import os
from dataclasses import asdict

import torch
import torch.distributed as dist

from common.dist import is_main, n_processes, print0
from common.files import write_atomically
from common.sharding import gather_state, shard_like
from data import dataset, get_tokenizer
from engine.weights import PRETRAINED, check_vocabulary, is_pretrained
from model import GPT, GPTConfig


def load_model(init, cfg=None, require_policy=True):
    """Returns a GPT on the CPU and its tokenizer.

    init: a run's folder or a ckpt.pt; a published name ("gpt2", …) or a folder in the Hugging Face format; or
    "scratch": new weights of cfg's shape, seeded by cfg.seed, with the tokenizer of cfg's data. Exits with a
    one-line message if there is no such model, if its context is shorter than cfg.max_len, or if it is a
    reward model although a policy is needed.
    """
    model, tokenizer_name = load_model_only(init, cfg, require_policy)
    return model, get_tokenizer(tokenizer_name)


def load_model_only(init, cfg=None, require_policy=False):
    """load_model with only the name of the tokenizer, which may have to be fetched."""
    if init == "scratch" and cfg is None:
        raise SystemExit("scratch: new weights, which only --init of a training run can name")
    if init == "scratch":
        model, tokenizer_name = new_model(cfg)
    elif is_pretrained(init):
        model = GPT.from_pretrained(init)
        tokenizer_name = "gpt2"
        if model.config.vocab_size != GPTConfig.vocab_size:
            raise SystemExit(f"{init}: a vocabulary of {model.config.vocab_size} is not GPT-2's, which has "
                             "50257 tokens; up to 50304, the rows beyond them are left out")
        if init not in PRETRAINED:
            check_vocabulary(init)
    else:
        checkpoint = load_checkpoint(init)
        if require_policy and ("score_std" in checkpoint or "axes" in checkpoint):
            raise SystemExit(f"{init}: a reward model, which scores text and cannot write it; "
                             "name it with --reward_model")
        model = GPT(GPTConfig(**checkpoint["model_config"]))
        tokenizer_name = checkpoint["tokenizer"]
        load_weights(model, checkpoint["model"], init)
    if cfg and cfg.max_len > model.config.block_size:
        raise SystemExit(f"--max_len={cfg.max_len}: the context of {init} is {model.config.block_size} tokens, "
                         "the most that --max_len can be")
    if cfg and cfg.dtype:
        model.dtype = getattr(torch, cfg.dtype)
    return model, tokenizer_name


def new_model(cfg):
    """A GPT with new weights, and the name of the tokenizer of cfg's data."""
    if cfg.n_embd % cfg.n_head:
        raise SystemExit(f"--n_embd={cfg.n_embd} is not a multiple of --n_head={cfg.n_head}")
    tokenizer = dataset(cfg.data, cfg.data_dir).tokenizer()
    torch.manual_seed(cfg.seed)
    config = GPTConfig(tokenizer.n_vocab, cfg.max_len, cfg.n_layer, cfg.n_head, cfg.n_embd)
    return GPT(config), tokenizer.name


def load_reward_model(path, tokenizer, cfg=None, normalize=False):
    """Loads a reward model, frozen.

    normalize: divide its scores by their standard deviation on demonstrations, where their mean is 0 already.
    Exits with a one-line message if it is not a reward model, or if its tokenizer is not `tokenizer`.
    """
    reward_model, its_tokenizer = load_model(path, cfg, require_policy=False)
    if reward_model.config.n_scalars != 1:
        raise SystemExit(f"{path}: not a reward model (reward.py trains one)")
    if its_tokenizer.name != tokenizer.name:
        raise SystemExit(f"{path}: this reward model has the tokenizer {its_tokenizer.name}, "
                         f"the other models have {tokenizer.name}")
    if normalize:
        score_std = load_checkpoint(path)["score_std"]
        with torch.no_grad():
            reward_model.scalar_head.weight /= score_std
            reward_model.scalar_head.bias /= score_std
    return reward_model.requires_grad_(False)


def checkpoint_files(path):
    """The checkpoints in a run's folder, newest first, or the one file at `path`; empty if there is none."""
    files = [path]
    if os.path.isdir(path):
        files = [os.path.join(path, name) for name in ("ckpt.pt", "ckpt-previous.pt")]
    return [file for file in files if os.path.exists(file)]


def template_of_checkpoint(init):
    """Returns "turns" if the model was trained on conversations (data/turns.py), else "plain"."""
    if init == "scratch" or is_pretrained(init):
        return "plain"
    return load_checkpoint(init).get("template", "plain")


def remove_checkpoints(path):
    """Removes the checkpoints in a run's folder, in the main process."""
    if is_main():
        for file in checkpoint_files(path):
            os.remove(file)


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
    stored = checkpoint.get("digests", digests)
    problems = {"data": f"--data={cfg.data} holds other data", "init": "--init names other weights",
                "ref": "--ref names other weights"}
    for key, problem in problems.items():
        if stored.get(key) != digests.get(key):
            raise SystemExit(f"--resume: {problem} than when {out} was started")
    load_weights(model, checkpoint["model"], out)
    load_optimizer(optimizer, checkpoint["optimizer"])
    torch.set_rng_state(checkpoint["rng"])  # the CPU's: everything random is drawn there


def is_finished(out):
    """Whether the run in this folder has done all of its steps."""
    if not checkpoint_files(out):
        return False
    checkpoint = load_checkpoint(out)
    return checkpoint["step"] == checkpoint["config"]["steps"]
