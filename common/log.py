"""The log of a run: OUT/log.jsonl, the console, and on request Weights & Biases and TensorBoard."""
import json
import math
import os
import re
import sys
import time
from dataclasses import asdict

import torch

from common.dist import all_reduce, is_main, print0
from common.files import append_to, write_atomically
from engine.devices import float64_device
from engine.files import import_package


class Metrics:
    """Sums of quantities over the micro-batches of a step and over the processes.

        metrics.add(loss=losses, accuracy=right)     once per micro-batch
        metrics.mean(cfg.batch_size)                 {"loss": …, "accuracy": …}
    """

    def __init__(self):
        self.sums = {}

    def add(self, **values):
        """Adds up each tensor, without its gradient."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().sum()

    def sum_over_processes(self):
        """Each sum, over all processes: a dict of floats."""
        totals = [total.to(float64_device(total.device)).double() for total in self.sums.values()]
        totals = torch.stack(totals)
        all_reduce(totals)
        return dict(zip(self.sums, totals.tolist()))

    def mean(self, n):
        """Each sum, over all processes, divided by n: a dict of floats."""
        return {name: total / n for name, total in self.sum_over_processes().items()}


class Progress:
    """A line at the bottom of a terminal that rewrites itself every second; nothing in a file or a pipe."""

    def __init__(self):
        self.shown_at = 0.0

    def show(self, text):
        now = time.time()
        if is_main() and sys.stdout.isatty() and now - self.shown_at >= 1:
            # The cursor goes back to the line's beginning, so that what is printed next replaces the line.
            print("\033[K" + text[:100], end="\r", flush=True)
            self.shown_at = now


class Log:
    """Writes a JSON object per step to OUT/log.jsonl, and a line to the console every cfg.log_every steps.

    In between, a terminal shows how far the run is. A number that is not finite becomes null. Only the main
    process writes.
    """

    def __init__(self, out, cfg, start=0, console=None):
        """start: the steps done before, if this run is resumed. console: at most six keys; None: the first."""
        self.path = os.path.join(out, "log.jsonl")
        self.cfg = cfg
        self.start = start
        self.console = console
        self.begin = time.time()
        self.tokens = 0  # since the last line on the console
        self.since = self.begin
        self.has_header = False
        self.progress = Progress()
        self.others = []  # functions (step, values)
        if is_main():
            if cfg.wandb:
                self.others.append(wandb_log(out, cfg, start))
            if cfg.tensorboard:
                self.others.append(tensorboard_log(out, start))
            self.keep_steps_until(start)

    def keep_steps_until(self, start):
        """Drops what was logged after the checkpoint that a resumed run starts from: it will happen again."""
        kept = []
        if start and os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as f:
                for line in f:
                    is_complete = line.endswith("\n")  # a killed run may have left half a line
                    if is_complete and json.loads(line)["step"] <= start:
                        kept.append(line)
        with write_atomically(self.path) as f:
            f.writelines(kept)

    def __call__(self, step, tokens, **values):
        """Logs a step, counted from 1. tokens: the step's, without padding, each prompt counted once."""
        if not is_main():
            return
        now = time.time()
        self.tokens += tokens
        tokens_per_s = round(self.tokens / max(now - self.since, 1e-9))
        record = {"step": step}
        for key, value in values.items():
            is_bad = isinstance(value, float) and not math.isfinite(value)
            record[key] = None if is_bad else value
        record["tokens_per_s"] = tokens_per_s
        record["time_s"] = round(now - self.begin, 3)
        with append_to(self.path) as f:
            f.write(json.dumps(record) + "\n")
        numbers = {key: value for key, value in record.items() if value is not None and key != "step"}
        for other in self.others:
            other(step, numbers)

        seconds_per_step = (now - self.begin) / (step - self.start)
        seconds_left = seconds_per_step * (self.cfg.steps - step)
        left = f"{int(seconds_left // 60)}:{int(seconds_left % 60):02d}"
        if step % self.cfg.log_every == 0 or step == self.cfg.steps:
            columns = {"step": step}
            for key in self.console or [*values][:6]:
                columns[key] = values.get(key)
            columns["tokens/s"] = tokens_per_s
            columns["left"] = left
            self.print_line(columns)
            self.tokens = 0
            self.since = now
        else:
            loss = format_value(values.get("loss"))
            self.progress.show(f"step {step} of {self.cfg.steps}   loss {loss}   {tokens_per_s} tokens/s   "
                               f"{left} left")

    def print_line(self, columns):
        widths = {name: max(len(name), 9) for name in columns}
        widths |= {"step": 6, "tokens/s": 8, "left": 6}
        if not self.has_header:
            print0("  ".join(name.rjust(width) for name, width in widths.items()))
            self.has_header = True
        print0("  ".join(format_value(columns[name]).rjust(width) for name, width in widths.items()))


def format_value(value):
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:.0f}"
    if abs(value) >= 1e-3 or value == 0:
        return f"{value:.4f}"
    return f"{value:.1e}"


CONSOLE_CHARACTERS = 160  # of a text on the console: about two lines
FILE_CHARACTERS = 4000    # of a text in samples.txt


def printable(text, most=CONSOLE_CHARACTERS):
    """The text on one line, without control characters; a long text loses its beginning."""
    text = " ".join(text.split())
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return text if len(text) <= most else "… " + text[-most:]


class SampleFile:
    """Shows sampled responses on the console, and appends them to OUT/samples.txt."""

    def __init__(self, out, start):
        """start: the steps done before, if this run is resumed; later samples will be written again."""
        self.path = os.path.join(out, "samples.txt")
        if is_main() and os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as f:
                blocks = re.split(r"^(?=step \d)", f.read(), flags=re.M)
            with write_atomically(self.path) as f:
                f.writelines(block for block in blocks if block and int(block.split()[1]) <= start)

    def show(self, step, tokenizer, prompts, responses, n=3, **values):
        """Shows the first n responses with their prompts, both lists of token ids.

        values: named tensors (B,), a number per response, shown beside it.
        """
        def text(most):
            lines = [f"step {step}"]
            for i in range(min(n, len(prompts))):
                numbers = "  ".join(f"{name} {value[i].item():7.3f}" for name, value in values.items())
                lines.append(f"  {printable(tokenizer.decode(prompts[i]), most)}")
                lines.append(f"    {numbers} | {printable(tokenizer.decode(responses[i]), most)}")
            return "\n".join(lines) + "\n"

        print0("\n" + text(CONSOLE_CHARACTERS))
        if is_main():
            with append_to(self.path) as f:
                f.write(text(FILE_CHARACTERS))


# ------------------------------------------------------------------------------------------------- other logs

OTHER_LOGS = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}  # option: the module it needs


def wandb_log(out, cfg, start):
    path = os.path.join(out, "wandb_id")
    run_id = None
    if start and os.path.exists(path):  # a resumed run continues its record, a new one gets its own
        with open(path) as f:
            run_id = f.read()
    name = os.path.basename(os.path.normpath(out))
    wandb = import_package(OTHER_LOGS["wandb"], "--wandb", "wandb")
    run = wandb.init(project=cfg.wandb, dir=out, name=name, config=asdict(cfg), id=run_id, resume="allow")
    with write_atomically(path) as f:
        f.write(run.id)
    return lambda step, values: run.log(values, step=step)


def tensorboard_log(out, start):
    folder = os.path.join(out, "tensorboard")
    tensorboard = import_package(OTHER_LOGS["tensorboard"], "--tensorboard", "tensorboard")
    writer = tensorboard.SummaryWriter(folder, purge_step=start + 1)

    def log(step, values):
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()  # so that a killed run has the same steps here as in log.jsonl
    return log
