"""What a page has while it trains: a device, a folder, a log, checkpoints and micro-batches."""
import ctypes
import importlib
import os
import re
import signal
import sys
import threading

import torch
import torch.distributed as dist

from common.batches import local_micro_batches, micro_batches, shuffled_batches
from common.checkpoints import (checkpoint_files, is_finished, load_model, load_optimizer, load_reward_model,
                                load_weights, resume, save_checkpoint)
from common.dist import all_reduce, join_processes, log_to_console, n_processes, print0
from common.files import append_to
from common.log import Log
from common.optim import lr_schedule
from common.options import check_config
from common.scoring import score_groups
from common.sharding import compile_blocks, is_sharded, shard_model
from data import dataset
from engine.packing import group_length


class Run:
    """The machinery of one run, which never calls the page's code.

    The loop, the loss and the optimizer step are the page's. Delete every line with `run.` from a page,
    and what is left still shows what the method does.

        run = Run("dpo", cfg)                        # makes out/dpo-animals, picks the device, sets the seed
        policy, tokenizer = run.load_model(init)     # a model to train, and its tokenizer
        policy = run.prepare(policy)                 # on the device, sharded or compiled if asked for
        checkpoint = run.start_or_resume(policy, optimizer)   # with --resume; sets run.start, and opens the log
        run.micro_batches(batch, groups)             # this process's share of a batch, in pieces that fit
        run.log(step, loss=…)                        # log.jsonl and the console
        run.save_if_due(step, policy, optimizer)     # ckpt.pt; ends the process if Ctrl-C asked for it
    """

    def __init__(self, stage, cfg):
        check_config(cfg)
        self.cfg = cfg
        self.data = dataset(cfg.data, cfg.data_dir)
        self.out = cfg.out or run_dir(stage, cfg)
        self.start = 0   # steps done before this run, if it resumes another
        self.tokens = 0  # handed out by micro_batches since the last log line
        self.stop_signal = StopSignal()
        self.tokenizer = None
        log_to_console()
        with append_to(os.path.join(self.out, "log.jsonl")):
            pass  # a folder that cannot be written is an error now, not after the first hundred steps
        self.device = choose_device(cfg.device)
        join_processes(self.device)
        torch.manual_seed(cfg.seed)

    # -------------------------------------------------------------------------------- models

    def train_if_missing(self, stage):
        """Returns the folder of another stage's run on the same data, training it first if unfinished."""
        cfg = self.cfg
        out = run_dir(stage, cfg)
        if not is_finished(out):
            page = importlib.import_module(stage)
            kind = {"sft": "SFT", "reward": "reward"}[stage]
            print0(f"no {kind} model in {out}: training it first")
            settings = {"recipe": cfg.recipe, **page.RECIPES.get(cfg.recipe, {})}
            for name in ("data", "data_dir", "device", "compile", "checkpoint_blocks", "fsdp", "max_len",
                         "n_layer", "n_head", "n_embd"):
                settings[name] = getattr(cfg, name)
            page.train(page.Config(**settings, resume=bool(checkpoint_files(out))))
            print0()
        torch.manual_seed(cfg.seed)  # the random state does not depend on whether anything was trained
        return out

    def load_model(self, init):
        """Loads the model that this run trains -> a GPT on the CPU, its tokenizer (named in checkpoints)."""
        model, self.tokenizer = load_model(init, self.cfg)
        return model, self.tokenizer

    def load_reward_model(self, path, normalize=False):
        """Loads a frozen reward model of this run's tokenizer; normalize: its scores get variance 1."""
        return load_reward_model(path, self.tokenizer, self.cfg, normalize)

    def prepare(self, model):
        """Moves a model to the device; --fsdp spreads it over the processes, and --compile compiles it."""
        cfg = self.cfg
        on_cuda = self.device.startswith("cuda")
        compile = cfg.compile if cfg.compile is not None else on_cuda
        n_head = model.config.n_head
        head_size = model.config.n_embd // n_head
        if compile and on_cuda and head_size < 16:
            raise SystemExit(f"--n_head={n_head}: flex_attention on CUDA needs heads of 16 dimensions "
                             f"or more, these have {head_size}; --compile=False runs without it")
        if n_processes() == 1 or not cfg.fsdp:
            model.to(self.device)
            model.prepare(compile, cfg.checkpoint_blocks)
        elif not is_sharded(model):
            shard_model(model, self.device)
            model.prepare(False, cfg.checkpoint_blocks)
            if compile:
                model.mask_kind = "flex" if on_cuda else "dense"
                compile_blocks(model)
        return model

    # -------------------------------------------------------------------------------- the loop

    def start_or_resume(self, model, optimizer, console=None):
        """Opens the log, and with --resume restores model, optimizer and random state first.

        Sets run.start, the number of steps done, and returns the last checkpoint; without --resume, 0 and
        an empty dict. console: the keys of the log that the console shows; None: all.
        """
        checkpoint = {}
        if self.cfg.resume:
            checkpoint = resume(self.out, self.cfg, model, optimizer)
            self.start = checkpoint["step"]
        self.logger = Log(self.out, self.cfg, self.start, console)
        return checkpoint

    def restore(self, model, optimizer, weights, state):
        """Restores a second model and its optimizer from what a checkpoint holds of them."""
        load_weights(model, weights, self.out)
        load_optimizer(optimizer, state)

    def shuffled_batches(self, examples, batch_size=None, steps=None, seed=None):
        """Which examples each step trains on: cfg.steps lists of indices, shuffled anew each epoch.

        batch_size, steps and seed are those of cfg unless given.
        """
        cfg = self.cfg
        return shuffled_batches(len(examples), batch_size or cfg.batch_size, steps or cfg.steps,
                                cfg.seed if seed is None else seed)

    def lr_schedule(self, step):
        """The learning rate at a step as a fraction of its peak: linear warm-up, then half a cosine to 0."""
        return lr_schedule(step, self.cfg)

    def micro_batches(self, batch, groups):
        """This process's share of a batch, as lists of at most cfg.micro_tokens tokens.

        The batch and the lists are indices into `groups`. A prompt counts once for all of its responses.
        Every process gets the same number of lists.
        """
        self.tokens += sum(group_length(groups[i]) for i in batch)
        return micro_batches(batch, groups, self.cfg.micro_tokens)

    def local_micro_batches(self, groups, model):
        """All groups of this process, as lists of indices; other processes may have other groups."""
        return local_micro_batches(groups, self.cfg.micro_tokens, model)

    def score_groups(self, reward_model, groups):
        """A reward model's score of every response of `groups`, in their order: (S,) on the CPU."""
        return score_groups(reward_model, groups, self.cfg.micro_tokens)

    def print0(self, text):
        """Prints in the main process only."""
        print0(text)

    def log(self, step, tokens=None, **values):
        """Logs the values of a step, counted from 1.

        tokens: how many the step took, for tokens_per_s; None: those of its micro-batches.
        """
        self.logger(step, self.tokens if tokens is None else tokens, **values)
        self.tokens = 0

    def save_if_due(self, step, model, optimizer, **more):
        """Saves a checkpoint every cfg.ckpt_every steps, at the last step, and after a signal to stop.

        After a signal, it also prints the command that continues the run, and ends the process.
        All processes must call this.
        """
        self.stop_signal.agree()
        if step % self.cfg.ckpt_every == 0 or step == self.cfg.steps or self.stop_signal.agreed:
            self.save(step, model, optimizer, **more)
        else:
            self.stop_signal.listen()

    def save(self, step, model, optimizer, **more):
        """Saves a checkpoint now, with `more` in it, and ends the process if a signal asked for that."""
        self.stop_signal.agree()
        save_checkpoint(self.out, step, model, optimizer, self.cfg, self.tokenizer.name, **more)
        if self.stop_signal.agreed:
            print0(f"stopped after step {step}; continue with: {resume_command(self.cfg)}")
            raise SystemExit(128 + self.stop_signal.agreed)
        if step == self.cfg.steps:
            self.stop_signal.ignore()
        else:
            self.stop_signal.listen()


def run_dir(stage, cfg):
    """out/STAGE-RECIPE, or out/STAGE-FILE for your own data file."""
    name = cfg.recipe
    if os.path.isfile(cfg.data):
        name = os.path.basename(cfg.data).split(".")[0]
    return f"out/{stage}-{name}"


# ------------------------------------------------------------------------------------------------- the device

def choose_device(device):
    """Picks the device to run on ("cpu", "cuda", "cuda:1") and sets torch up for it.

    Exits with one line if there is no such device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise SystemExit(f"--device={device}: expected cpu, cuda, or one of several as cuda:1")
    if device == "cuda" and n_processes() > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if device.startswith("cuda"):
        index = torch.device(device).index or 0
        count = torch.cuda.device_count()
        if index >= count:
            raise SystemExit(f"--device={device}: torch sees {count or 'no'} CUDA devices here")
        torch.cuda.set_device(index)  # CUDA graphs are recorded on the current device
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        # cuDNN's attention makes a new plan for each shape, and each batch of prompts has another shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
    elif sys.platform == "linux":
        keep_freed_memory()
    return device


def keep_freed_memory():
    """Tells glibc's malloc to keep freed memory instead of returning it to the kernel.

    Tensors of 100 MB come and go, and the kernel would zero the memory of each one again.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)          # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-2, 2**28)      # M_TOP_PAD


# ----------------------------------------------------------------------------------------------------- Ctrl-C

class StopSignal:
    """Ends training after the current step, with a checkpoint, on Ctrl-C (SIGINT) or SIGTERM.

    A second signal ends the process at once.
    """

    def __init__(self):
        self.received = None  # the signal that this process got
        self.agreed = None    # the signal that all processes stop for, after `agree`

    def listen(self):
        """Handles signals from now on: called after a step, since only then is there anything to lose."""
        self.set_handlers(self.on_signal, self.on_signal)

    def ignore(self):
        """Gives signals their usual meaning again: called after the last step."""
        self.set_handlers(signal.default_int_handler, signal.SIG_DFL)

    def set_handlers(self, on_int, on_term):
        if threading.current_thread() is threading.main_thread():  # Python allows this in no other thread
            signal.signal(signal.SIGINT, on_int)
            signal.signal(signal.SIGTERM, on_term)

    def on_signal(self, number, frame):
        self.received = number
        signal.signal(number, signal.SIG_DFL)
        print0("\nstopping after this step (once more: at once)")

    def agree(self):
        """Finds out whether any process got a signal; one that comes meanwhile counts the next time."""
        self.agreed = self.received
        if n_processes() > 1:
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            total = all_reduce(torch.tensor(self.agreed or 0, device=device))
            self.agreed = signal.SIGTERM if total.item() else None


def resume_command(cfg):
    """The command line that continues this run."""
    python = "python"
    if n_processes() > 1:
        python = f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', n_processes())}"
    command = f"{python} {' '.join(sys.argv)}"
    # A stage that another page trains first needs no --resume: that page continues it by itself.
    is_called_page = type(cfg).__module__ == "__main__"
    if is_called_page and "--resume" not in sys.argv:
        command += " --resume"
    return command
