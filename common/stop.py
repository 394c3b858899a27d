"""Ctrl-C and SIGTERM: a run ends after its step, with a checkpoint and the command that continues it."""
import os
import signal
import sys
import threading

import torch
import torch.distributed as dist

from common.dist import all_reduce, n_processes, print0


class StopSignal:
    """Ends training after the current step, with a checkpoint, on Ctrl-C (SIGINT) or SIGTERM.

    A second signal ends the process at once.
    """

    def __init__(self):
        self.received = None  # the signal that this process got
        self.agreed = None    # the signal that all processes stop for, after `agree`

    def catch_signals(self):
        """From now on a signal waits for the end of the step: called after one, when there is one to lose."""
        self.set_handlers(self.on_signal, self.on_signal)

    def release_signals(self):
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
        """Returns the signal to stop for, if any process got one; one that comes meanwhile counts next time.

        All processes must call this.
        """
        self.agreed = self.received
        if n_processes() > 1:
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            total = all_reduce(torch.tensor(self.agreed or 0, device=device))
            self.agreed = signal.SIGTERM if total.item() else None
        return self.agreed


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
