"""Plumbing that every stage shares: options, device and precision, optimizer and schedule, checkpoints, the log.

No equation lives here. A stage calls, in this order: parse, setup, load_model, shard, make_optimizer, then in its loop
learning_rate, sum_over_ranks, Log, save_checkpoint.
"""
import atexit
import ctypes
import difflib
import gc
import importlib
import inspect
import json
import math
import os
import re
import signal
import sys
import threading
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, fields
from itertools import combinations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from data import dataset, group_length, micro_batches, pack
from data.files import RANK, say, shown
from model import GPT, GPTConfig, PRETRAINED, compiled

WORLD, LOCAL_RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
ASKED, STOP = [], []  # the signals that asked this process to stop; the one that all processes agreed to stop for
MESHES = []  # those that models are sharded over
PATIENCE = 10  # gradients in a row that may fail to be finite
LEAST = {"warmup": 0, "eval_n": 0, "sample_n": 0, "seed": 0, "max_len": 2, "k": 2, "reward_batch_size": 4}  # of whole numbers; else 1
ABOVE_0 = {"beta", "temperature", "kl_target", "kl_horizon", "grad_clip"}  # numbers that divide, or that nothing is learned with at 0


# ------------------------------------------------------------------------------------------------ options

def parse(Config, RECIPES, argv=None):
    """Command line -> Config: `[RECIPE] [--option=value …]`, the recipe's settings over Config's defaults, the options over both."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(usage(Config, RECIPES))
        raise SystemExit(0)
    recipes, kinds = ["animals", *RECIPES], {f.name: f.type.__name__ if isinstance(f.type, type) else str(f.type) for f in fields(Config)}
    recipe, given = None, {}
    for arg in argv:
        arg = arg.removeprefix("--recipe=")  # the positional argument by its name
        if not arg.startswith("-") and recipe is None:
            recipe = known("recipe", arg, recipes)
            continue
        name, equals, value = arg.removeprefix("--").partition("=")
        if not arg.startswith("--"):
            raise SystemExit(f"{shown(arg)[1:-1]}: options are written --name=value (-h lists them)")
        known("option", name, kinds)
        if not equals and kinds[name] != "bool":
            raise SystemExit(f"--{name} needs a value: --{name}=…")
        given[name] = convert(name, value if equals else "True", kinds[name])
    if recipe is None:  # a file of one's own is real text: settings for that, not those of a toy world
        recipe = ("hh" if "hh" in RECIPES else [*RECIPES][0]) if os.path.isfile(given.get("data", "")) else "animals"
    for option in filter(given.get, ("wandb", "tensorboard")):
        optional(option)  # missing, it is said before any work is done
    for name in ("lr", "value_lr", "reward_lr"):
        if given.get(name) == 0:
            say(f"--{name}=0: the weights that it is for stay as they are")
    return Config(**{"recipe": recipe, **RECIPES.get(recipe, {}), **given})


def known(kind, name, names):
    """`name`, if it is one of `names`; else one line with the nearest."""
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, 1, 0.4)
    raise SystemExit(f"unknown {kind} {shown(name)}" + (f"; did you mean {near[0]!r}?" if near else "") + " (-h lists them all)")


def convert(name, value, kind):
    """"3e-4" -> 3e-4 and so on, by the annotation of the option's field."""
    kind, _, optional = kind.partition(" | ")
    if optional and value == "None":
        return None
    try:
        if kind == "bool":
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        if kind == "int" and float(value) == int(float(value)):
            return in_range(name, int(float(value)))
        return in_range(name, float(value)) if kind == "float" else {"str": str}[kind](value)
    except (KeyError, ValueError, OverflowError):
        raise SystemExit(f"--{name}={shown(value)[1:-1]}: expected {dict(int='a whole number', float='a number', bool='True or False')[kind]}")


def in_range(name, number):
    """The number of an option, if a run can be made with it; else one line."""
    least = LEAST.get(name, 1) if isinstance(number, int) else 0 if name.endswith("lr") or name == "weight_decay" else -math.inf
    if not math.isfinite(number):
        raise SystemExit(f"--{name}={number}: expected a finite number")
    if number < least or name in ABOVE_0 and number <= 0:
        raise SystemExit(f"--{name}={number}: expected {'a number above 0' if name in ABOVE_0 else f'at least {least}'}")
    return number


def usage(Config, RECIPES):
    """-h: every option, its default in each recipe, and its comment in the source."""
    comments = {}
    for base in reversed(Config.__mro__[:-1]):  # finegrained.py adds its options to ppo.py's
        comments |= re.findall(r"^    (\w+):.*?#\s*(.*)$", inspect.getsource(base), re.M)
    recipes = {"animals": {}, **RECIPES}
    rows = [("option", *recipes, "")]
    for f in fields(Config):
        rows.append(("--" + f.name, *(str(settings.get(f.name, f.default if f.name != "recipe" else name))
                                      for name, settings in recipes.items()), comments[f.name]))
    width = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    script = os.path.basename(inspect.getfile(Config))
    return "\n".join([f"python {script} [RECIPE] [--option=value …]       recipes: {', '.join(recipes)}", ""] +
                     ["  ".join([cell.ljust(w) for cell, w in zip(row, width)] + [row[-1]]).rstrip() for row in rows])


def run_dir(stage, cfg):
    """out/STAGE-RECIPE, or out/STAGE-FILE for a data file of one's own."""
    return f"out/{stage}-" + (os.path.basename(cfg.data).split(".")[0] if os.path.isfile(cfg.data) else cfg.recipe)


# ------------------------------------------------------------------------------------------------ files

@contextmanager
def writing(path, mode="w"):
    """A file to write, whole or not at all: aside, flushed to disk, renamed; with mode "a" at the end of what is there.

    The folder is made where it is missing. SystemExit with one line where anything fails: what was there before stands.
    """
    aside, size = path + ".tmp" * (mode != "a"), None
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(aside, mode) as f:
            size = f.tell()
            yield f
            f.flush()
            if mode != "a":
                os.fsync(f.fileno())
        if mode != "a":
            os.replace(aside, path)
    except (OSError, RuntimeError) as error:
        problem = error if isinstance(error, OSError) else error.__context__  # torch.save covers what went wrong with an error of its own
        if not isinstance(problem, OSError):
            raise
        with suppress(OSError):
            if size is not None:
                os.truncate(aside, size) if mode == "a" else os.remove(aside)
        raise SystemExit(f"{path}: cannot be written ({problem}); what was there before stands: "
                         "make room, or name another place; a run goes on with --resume")


def open_run(out):
    """Makes the run's folder; SystemExit with one line, before any work is done, where nothing can be written there."""
    with writing(os.path.join(out, "log.jsonl"), "a"):
        pass


# ------------------------------------------------------------------------------------------------ device, precision, processes

def setup(cfg):
    """Seeds, joins the other processes under torchrun, and returns the device and the autocast context of the forward passes."""
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise SystemExit(f"--device={device}: expected cpu, cuda, or one of several as cuda:1")
    if device == "cuda" and WORLD > 1:
        device = f"cuda:{LOCAL_RANK}"
    if device.startswith("cuda"):
        index = torch.device(device).index or 0
        if index >= torch.cuda.device_count():
            raise SystemExit(f"--device={device}: torch sees {torch.cuda.device_count() or 'no'} CUDA devices here")
        torch.cuda.set_device(index)  # on which streams, and so graphs, are made
        torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for every new shape, and prompts bring one each time
    if device == "cpu" and sys.platform == "linux":
        keep_memory()
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        atexit.register(leave)
    torch.manual_seed(cfg.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return device, torch.autocast("cuda", torch.bfloat16) if device.startswith("cuda") else nullcontext()


def leave():
    """Ends the process group's threads before the interpreter ends, which else may abort: what still holds the group lets go of it first."""
    gc.collect()  # sharded models, in cycles
    for mesh in MESHES:  # DTensor's caches keep them
        vars(mesh).get("_pg_registry", {}).clear()
    dist.destroy_process_group()


def keep_memory():
    """Tells glibc's malloc to keep freed memory: tensors come and go by the 100 MB, and each would be zeroed by the kernel anew."""
    libc = ctypes.CDLL(None)
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
        getattr(libc, "mallopt", lambda *_: 0)(option, value)


def share(batch):
    """This process's part of a global batch (a list that the number of processes divides)."""
    if len(batch) % WORLD:
        raise SystemExit(f"--batch_size={len(batch)}: {WORLD} processes cannot share it evenly")
    return batch[RANK::WORLD]


def all_reduce(tensor):
    """The sum of `tensor` over the processes, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_over_ranks(model, stats):
    """Sums gradients over the processes, and a dict of scalars -> dict of floats. Scale losses and stats by the global batch."""
    if WORLD > 1 and not isinstance(model, FSDPModule):  # a sharded model's are summed in its backward pass
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
    values = [torch.as_tensor(value, dtype=torch.float64, device=model.device) for value in stats.values()]
    return dict(zip(stats, all_reduce(torch.stack(values)).tolist()))


def configure(model, cfg):
    """How this model's passes over packed batches are run: cfg.checkpoint_blocks, and cfg.compile (None: on CUDA).

    Raises SystemExit where the heads are too narrow for CUDA's attention.
    """
    head = model.config.n_embd // model.config.n_head
    if model.device.type == "cuda" and head < 16:
        raise SystemExit(f"--n_head={model.config.n_head}: flex_attention on CUDA needs heads of 16 dimensions or more, these have {head}")
    model.checkpoint_blocks = cfg.checkpoint_blocks
    if cfg.compile or cfg.compile is None and model.device.type == "cuda":
        model.packed_mask = "flex" if model.device.type == "cuda" else "dense"  # groups would be compiled anew for each batch's lengths
        if not isinstance(model, FSDPModule):
            model.packed_hidden = compiled(model.hidden)
        else:  # a graph ends where weights are gathered: one for all blocks
            for block in model.h:
                block.forward = compiled(block.forward)


# ------------------------------------------------------------------------------------------------ sharded models (FSDP2, arXiv:2304.11277)

def shard(model, cfg, device):
    """Puts a model on the device; with cfg.fsdp this process's part of each tensor, and a block's whole while the block runs.

    What is outside the blocks (embeddings and tied head, ln_f, scalar heads) is gathered by `states` and stays until a backward pass.
    """
    if WORLD == 1 or not cfg.fsdp:
        return model.to(device)
    mesh = init_device_mesh(torch.device(device).type, (WORLD,))
    MESHES.append(mesh)
    for module in [*model.h, model]:
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)  # the sum, not the mean: losses are scaled by the global batch
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other kind
    register_fsdp_forward_method(model, "states")
    return model


def full(x):
    """A tensor in one piece; of a sharded one on every process, and all must call."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole(model, dtype=torch.float32):
    """The model in one piece, in this dtype. Of a sharded one that is a copy on every process; all must call."""
    if not isinstance(model, FSDPModule) and model.wte.weight.dtype == dtype:
        return model
    with torch.device("meta"):
        copy = GPT(model.config)
    copy.load_state_dict({name: full(weight.to(dtype)) for name, weight in model.state_dict().items()}, assign=True)
    return copy


def level(micros, model):
    """This process's micro-batches; a sharded model runs on all processes at once, so the largest are halved until all have as many."""
    if isinstance(model, FSDPModule):
        most = torch.tensor(len(micros), device=model.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        while len(micros) < most:
            i = max(range(len(micros)), key=lambda i: len(micros[i]))
            half = len(micros[i]) // 2
            micros[i:i + 1] = micros[i][:half], micros[i][half:]
    return micros


def gathered(x):
    """A dict, or one in a dict, with its sharded tensors in one piece: on rank 0, on the CPU. All processes must call."""
    if isinstance(x, dict):
        return {key: gathered(value) for key, value in x.items()}
    if not isinstance(x, DTensor):
        return x
    x = full(x)  # one at a time
    return x.cpu() if RANK == 0 else None


def sharded(x, like):
    """A tensor in one piece -> as `like` is held, a parameter of its shape."""
    if not isinstance(like, DTensor) or x.shape != like.shape:
        return x
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None).clone()  # else a view, that holds all of it


# ------------------------------------------------------------------------------------------------ models and checkpoints

def load_model(init, cfg=None):
    """-> GPT on the CPU, the name of its tokenizer.

    init: a run's folder or its ckpt.pt; a published name ("gpt2", …) or a folder in its format; "scratch", with cfg's
    n_layer, n_head, n_embd, max_len and the tokenizer of cfg's data, seeded by cfg.seed.
    """
    if init == "scratch":
        if cfg.n_embd % cfg.n_head:
            raise SystemExit(f"--n_embd={cfg.n_embd} is not a multiple of --n_head={cfg.n_head}")
        tokenizer = dataset(cfg.data, cfg.data_dir).tokenizer()
        torch.manual_seed(cfg.seed)
        return GPT(GPTConfig(tokenizer.n_vocab, cfg.max_len, cfg.n_layer, cfg.n_head, cfg.n_embd)), tokenizer.name
    if init in PRETRAINED or os.path.exists(os.path.join(init, "config.json")):
        model, tokenizer = GPT.from_pretrained(init), "gpt2"
        if model.config.vocab_size != GPTConfig.vocab_size:
            raise SystemExit(f"{init}: a vocabulary of {model.config.vocab_size} is not GPT-2's, and no tokenizer comes with it")
    else:
        checkpoint = load_checkpoint(init)
        model, tokenizer = GPT(GPTConfig(**checkpoint["model_config"])), checkpoint["tokenizer"]
        fit(model, checkpoint["model"], init)
    if cfg and cfg.max_len > model.config.block_size:
        raise SystemExit(f"--max_len={cfg.max_len}: the context of {init} is {model.config.block_size} tokens")
    return model, tokenizer


def check_pairs(groups, cfg, ranks=None):
    """Says how many pairs of responses are identical, token by token; SystemExit where all are, or where none is ranked.

    ranks: for each group those of its responses, 0 best; None: in the order in which they stand.
    """
    same = []
    for i, (_, responses) in enumerate(groups):
        rank, ids = ranks[i] if ranks else range(len(responses)), [r.tobytes() for r in responses]
        same += [a == b for (a, m), (b, n) in combinations(zip(ids, rank), 2) if m != n]
    if all(same):
        why = f"all {len(same)} pairs are identical, as cut to --max_len={cfg.max_len}" if same else "all responses tie"
        raise SystemExit(f"--data={cfg.data}: {why}: there is nothing to learn from them")
    if any(same):
        say(f"{sum(same)} of {len(same)} pairs are identical, as cut to max_len={cfg.max_len}: no loss can order them")


@torch.no_grad()
def score_groups(reward_model, groups, micro_tokens=16384, amp=nullcontext()):
    """The reward model's score of every response of every group, in order: (S,) on the CPU."""
    lengths, scores = list(map(group_length, groups)), {}
    for micro in level(micro_batches(range(len(groups)), lengths, micro_tokens), reward_model):
        batch = pack([groups[i] for i in micro]).to(reward_model.device)
        with amp:
            score = reward_model.score(batch).cpu()
        scores |= zip(micro, score.split([len(groups[i][1]) for i in micro]))
    return torch.cat([scores[i] for i in range(len(groups))])


def fit(model, weights, where):
    """load_state_dict, with one line where the shapes differ."""
    own = model.state_dict()
    try:
        model.load_state_dict({name: sharded(weight, own.get(name)) for name, weight in weights.items()})
    except RuntimeError as error:
        raise SystemExit(f"{where}: the weights are of another shape than the model: " + str(error).splitlines()[1].strip())


def checkpoint_files(path):
    """The checkpoints of a run's folder, newest first; or the one file of that path. Empty where there is none."""
    files = [os.path.join(path, name) for name in ("ckpt.pt", "ckpt-previous.pt")] if os.path.isdir(path) else [path]
    return list(filter(os.path.exists, files))


def load_checkpoint(path):
    """The dict that save_checkpoint wrote, of two the newest that is whole; SystemExit with one line where there is none or it is not one."""
    files = checkpoint_files(path)
    if not files:
        path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
        raise SystemExit(f"{path}: no checkpoint there (a run's folder, a ckpt.pt, scratch, or {', '.join(PRETRAINED)})")
    for file in files:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            GPTConfig(**checkpoint["model_config"]), checkpoint["model"]["wte.weight"].shape, checkpoint["tokenizer"]
            return checkpoint
        except Exception as error:  # torch.load raises half a dozen kinds for a file that is cut short, flipped or foreign
            problem = f"{file}: not a checkpoint of this repository, or damaged ({type(error).__name__})"
            if file != files[-1]:
                say(f"{problem}; taking the one before it, {files[-1]}")
    raise SystemExit(problem)


def restore(optimizer, state):
    """load_state_dict of an optimizer, whose parameters may be sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {i: {name: sharded(x, parameters[i]) for name, x in each.items()} for i, each in state["state"].items()}
    optimizer.load_state_dict(state | {"state": moments})


def ask_to_stop(number, frame):
    """SIGINT and SIGTERM: the loop ends after this step with a checkpoint; a second one ends it at once."""
    ASKED.append(number)
    signal.signal(number, signal.SIG_DFL)
    say("\nstopping after this step (once more: at once)")


def due(step, cfg):
    """Whether a checkpoint follows this step: each cfg.ckpt_every-th, the last, and the one in which a signal asked any process to stop."""
    STOP[:] = ASKED[:1]
    if WORLD > 1:  # a signal that comes while they are asked counts at the next step
        asked = torch.tensor(sum(STOP), device="cuda" if dist.get_backend() == "nccl" else "cpu")
        STOP[:] = [signal.SIGTERM] if all_reduce(asked).item() else []
    if threading.current_thread() is threading.main_thread():  # from the first step to the last there is something to lose
        signal.signal(signal.SIGINT, signal.default_int_handler if step == cfg.steps else ask_to_stop)
        signal.signal(signal.SIGTERM, signal.SIG_DFL if step == cfg.steps else ask_to_stop)
    return step % cfg.ckpt_every == 0 or step == cfg.steps or bool(STOP)


def save_checkpoint(out, step, model, optimizer, cfg, tokenizer, **more):
    """out/ckpt.pt, whole or not at all: written aside, flushed to disk, renamed; the one before it becomes ckpt-previous.pt.

    `step` is the number of steps done. Where a signal asked the run to stop, it ends here.
    """
    path = os.path.join(out, "ckpt.pt")
    checkpoint = gathered(dict(step=step, model=model.state_dict(), model_config=asdict(model.config), tokenizer=tokenizer,
                               optimizer=optimizer.state_dict(), config=asdict(cfg), rng=torch.get_rng_state(), **more))
    if RANK == 0:
        with writing(path, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
            if os.path.exists(path):  # not before the new one is whole
                os.replace(path, os.path.join(out, "ckpt-previous.pt"))
    if WORLD > 1:  # rank 0 writes, all may read it next
        dist.barrier()
    if STOP:
        own = type(cfg).__module__ == "__main__" and "--resume" not in sys.argv  # else a stage that comes before the one called: it goes on by itself
        python = "python" if WORLD == 1 else f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', WORLD)}"
        say(f"stopped after step {step}; go on with: {python} {' '.join(sys.argv)}" + " --resume" * own)
        ASKED.clear()
        raise SystemExit(128 + STOP.pop())


def resume(out, cfg, model, optimizer):
    """Puts a run back where its checkpoint left it and returns the checkpoint; the run must have been started alike."""
    checkpoint = load_checkpoint(out)
    free = {"resume", "out", "device", "compile", "checkpoint_blocks", "fsdp", "log_every", "ckpt_every", "wandb", "tensorboard", "data_dir"}
    for name, value in asdict(cfg).items():
        if name not in free and checkpoint["config"].get(name) != value:
            raise SystemExit(f"--resume: {out} was started with --{name}={checkpoint['config'].get(name)}, not {value}")
    fit(model, checkpoint["model"], out)
    restore(optimizer, checkpoint["optimizer"])
    torch.set_rng_state(checkpoint["rng"])  # everything random is drawn on the CPU
    return checkpoint


def finished(out):
    """Whether the run in folder `out` has made all its steps."""
    if not checkpoint_files(out):
        return False
    checkpoint = load_checkpoint(out)
    return checkpoint["step"] == checkpoint["config"]["steps"]


def require(stage, cfg, given):
    """`given`, or where that is None the folder of the stage's run on cfg's data, which is trained first (or finished) if missing."""
    if given:
        return given
    out = run_dir(stage, cfg)
    if not finished(out):
        module = importlib.import_module(stage)
        say(f"no {dict(sft='SFT', reward='reward')[stage]} model in {out}: training it first")
        settings = {"recipe": cfg.recipe, **module.RECIPES.get(cfg.recipe, {})}
        settings |= {k: getattr(cfg, k) for k in ("data", "data_dir", "device", "compile", "checkpoint_blocks", "fsdp", "max_len", "n_layer", "n_head", "n_embd")}
        module.train(module.Config(**settings, resume=bool(checkpoint_files(out))))
        say()
    return out


# ------------------------------------------------------------------------------------------------ optimizer and schedule

def make_optimizer(model, lr, weight_decay=0.0, betas=(0.9, 0.95)):
    """AdamW (arXiv:1711.05101); matrices decay, biases and LayerNorms do not."""
    if isinstance(model, FSDPModule):
        model.reshard()  # after a pass without a backward one, its parameters outside the blocks are whole still
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
                             lr=lr, betas=betas, fused=True)


def lr_schedule(step, cfg):
    """The share of the peak learning rate at a step: a linear warm-up over cfg.warmup steps, then half a cosine from 1 down to 0."""
    if step < cfg.warmup:
        return (step + 1) / cfg.warmup
    progress = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


class Metrics:
    """Sums of quantities over a step's micro-batches, and over the processes."""

    def __init__(self):
        self.sums = {}

    def add(self, **values):
        """Adds the sum of each tensor, without its gradient."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().sum()

    def mean(self, n):
        """Each sum, over all processes, divided by n: a dict of floats."""
        totals = all_reduce(torch.stack([value.double() for value in self.sums.values()]))
        return {name: total / n for name, total in zip(self.sums, totals.tolist())}


def clip_and_step(model, optimizer, cfg):
    """Clips the gradient to cfg.grad_clip, takes the step, zeroes the gradient, and returns its norm, a float.

    A gradient that is not finite is thrown away, and said; SystemExit after PATIENCE of them in a row.
    """
    grad_norm = full(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)).item()
    if math.isfinite(grad_norm):
        optimizer.step()
        optimizer.skipped = 0
    else:
        optimizer.skipped = getattr(optimizer, "skipped", 0) + 1
        say(f"skipped a step: its gradient is not finite ({optimizer.skipped} in a row)")
        if optimizer.skipped == PATIENCE:
            raise SystemExit(f"{PATIENCE} gradients in a row were not finite: lower --lr (now {cfg.lr}) or --grad_clip (now {cfg.grad_clip}); "
                             "the last checkpoint stands, but a resumed run does the same again")
    optimizer.zero_grad(set_to_none=True)
    return grad_norm


# ------------------------------------------------------------------------------------------------ the log

def optional(package):
    """The module of an option's package, imported only where it is asked for."""
    try:
        return importlib.import_module({"tensorboard": "torch.utils.tensorboard"}.get(package, package))
    except ImportError:
        raise SystemExit(f"--{package} needs a package that is not installed: pip install {package}")


def copies(out, cfg, start):
    """-> [f(step, values), …]: who gets the log too, by --wandb and --tensorboard."""
    result = []
    if cfg.wandb:
        path = os.path.join(out, "wandb_id")  # a resumed run goes on there; one begun anew in this folder is another
        known_as = open(path).read() if start and os.path.exists(path) else None
        run = optional("wandb").init(project=cfg.wandb, dir=out, name=os.path.basename(os.path.normpath(out)), config=asdict(cfg),
                                     id=known_as, resume="allow")
        with writing(path) as f:
            f.write(run.id)
        result.append(lambda step, values: run.log(values, step=step))
    if cfg.tensorboard:
        writer = optional("tensorboard").SummaryWriter(os.path.join(out, "tensorboard"), purge_step=start + 1)

        def write(step, values):
            for key, value in values.items():
                writer.add_scalar(key, value, step)
            writer.flush()  # a killed run has there what it has in log.jsonl
        result.append(write)
    return result


class Log:
    """OUT/log.jsonl, a JSON object a step, null what is not finite, and every cfg.log_every steps an aligned line on the console."""

    def __init__(self, out, cfg, start=0, console=None):
        """console: the keys that the console shows; None: all."""
        self.console, self.copies = console, copies(out, cfg, start) if RANK == 0 else []
        self.steps, self.every, self.start, self.begin = cfg.steps, cfg.log_every, start, time.time()
        self.tokens, self.since, self.headed = 0, self.begin, False
        if RANK != 0:
            return
        self.path, kept = os.path.join(out, "log.jsonl"), []
        if start and os.path.exists(self.path):  # a resumed run: what was logged after the checkpoint happens again
            with open(self.path) as f:
                kept = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= start]
        with writing(self.path) as f:
            f.writelines(kept)

    def __call__(self, step, tokens, **values):
        """step counts from 1; tokens: useful tokens of this step (no padding, prompts once)."""
        if RANK != 0:
            return
        now = time.time()
        self.tokens += tokens
        values = {"step": step, **values}
        rate = self.tokens / max(now - self.since, 1e-9)
        record = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in values.items()}
        record |= {"tokens_per_s": round(rate), "time_s": round(now - self.begin, 3)}
        with writing(self.path, "a") as f:
            f.write(json.dumps(record) + "\n")
        for copy in self.copies:
            copy(step, {k: v for k, v in record.items() if v is not None and k != "step"})
        if step % self.every == 0 or step == self.steps:
            left = (now - self.begin) / (step - self.start) * (self.steps - step)
            shown = {k: values.get(k) for k in ["step", *self.console]} if self.console else values
            self.line({**shown, "tokens/s": round(rate), "left": f"{int(left // 60)}:{int(left % 60):02d}"})
            self.tokens, self.since = 0, now

    def line(self, values):
        if not self.headed:
            print("  ".join(name.rjust(9) for name in values))
            self.headed = True
        print("  ".join(show(value).rjust(max(len(name), 9)) for name, value in values.items()), flush=True)


def show(value):
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"
    return str(value)
