"""What a page has while it trains: a device, a folder, a log, checkpoints and micro-batches."""
import os

import torch

from common.batches import micro_batches, shuffled_batches
from common.checkpoints import (check_digests, checkpoint_files, load_optimizer, load_to_resume, load_weights,
                                no_checkpoint, resume, save_checkpoint)
from common.device import choose_device, describe_device, prepare_model
from common.digests import examples_digest, file_digest, weights_digest
from common.dist import is_main, join_processes, log_to_console, print0
from common.examine import first_example, warnings
from common.files import append_to
from common.log import Log, Progress
from common.models import load_model, load_reward_model, template_of_checkpoint
from common.optim import lr_schedule
from common.options import check_config
from common.prerequisites import run_dir, train_if_missing
from common.scoring import logp_of_responses, precompute_logp, scores_of_responses
from common.stop import StopSignal, resume_command
from data import check_contract, dataset, encode_groups, encode_pairs, encode_prompts
from data.turns import apply_template, template_of
from engine import devices
from engine.packing import group_length


MANY_EPOCHS = 20  # more passes than this over the examples get a warning


class Run:
    """The machinery of one run, which never calls the code of the page that made it.

    The loop, the loss and the optimizer step are the page's. Skip the lines with `run.` on a first reading:
    what is left is the method.

        run = Run("dpo", cfg)                      # makes out/dpo-animals, picks the device, sets the seed
        policy, tokenizer = run.load_model(init)   # a model to train, and its tokenizer
        batches = run.shuffled_batches(pairs)      # for each step, which examples it trains on
        policy = run.prepare(policy)               # on the device, sharded or compiled if asked for
        run.start_or_resume(policy, optimizer)     # opens the log; with --resume, loads the last checkpoint
        run.micro_batches(batch, groups)           # this process's share of a batch, in pieces that fit
        run.log(step, loss=…)                      # log.jsonl and the console
        run.save_if_due(step, policy, optimizer)   # ckpt.pt; ends the process if Ctrl-C asked for it

    What has to come first: load_model, before anything is encoded; adopt_template, before rollout_prompts;
    every load_…, shuffled_batches and precompute_logp, in the same order each time, before start_or_resume,
    which compares digests of the data and weights loaded so far with those in the checkpoint.

    Under torchrun every process runs the whole page and calls every method, with the same arguments: some
    wait for the other processes. All have the same batches and the same random state; of these methods, only
    micro_batches (and precompute_logp, inside) gives each of them a part of its own.
    """

    def __init__(self, stage, cfg):
        check_config(cfg)
        log_to_console()
        self.cfg = cfg
        self.data = dataset(cfg.data, cfg.data_dir)
        check_contract(self.data, stage, cfg.data)
        for split in ("train", "validation", "test"):
            self.data.prompts(split)  # a bad record is an error now, not after training
        self.out = cfg.out or run_dir(stage, cfg)
        is_used = os.path.isdir(self.out) and len(checkpoint_files(self.out)) > 0
        if is_used and not cfg.resume:
            if not cfg.overwrite:
                raise SystemExit(f"{self.out}: holds a run already; --resume continues it, --overwrite starts "
                                 "it again, --out=FOLDER starts another")
            if cfg.init and os.path.isdir(cfg.init) and os.path.samefile(cfg.init, self.out):
                raise SystemExit(f"--init={cfg.init}: --overwrite would delete it; "
                                 "name another --out=FOLDER")
        if cfg.warmup > cfg.steps / 2:
            print0(f"warning: --warmup={cfg.warmup} takes most of --steps={cfg.steps}, so the learning rate "
                   "is hardly ever near its peak")
        reward_model = getattr(cfg, "reward_model", None)
        if reward_model and not checkpoint_files(reward_model):
            raise SystemExit(no_checkpoint(reward_model))
        # The checkpoint that this run goes on from, or an empty dict.
        self.checkpoint = load_to_resume(self.out, cfg) if cfg.resume else {}
        # What this run is made of (common/digests.py): kept in its checkpoints. --resume compares data and
        # weights, train_if_missing compares the file.
        self.digests = {"file": file_digest(cfg.data), "data": "", "init": ""}
        self.start = 0   # steps already done, when a run is resumed
        self.tokens = 0  # of the batches that micro_batches shared out, since the last call of log
        # For the line that start_or_resume prints on a GPU: about how many tokens a step has, if responses
        # that are yet to be sampled become as long as they may
        self.tokens_per_step = 0
        self.stop_signal = StopSignal()
        self.progress = Progress()
        self.tokenizer = None
        self.template = template_of(self.data.prompts("train"))  # how prompts are written: data/turns.py
        with append_to(os.path.join(self.out, "log.jsonl")):
            pass  # a folder that cannot be written is an error now, not after the first hundred steps
        self.device = choose_device(cfg.device)
        join_processes(self.device)
        torch.manual_seed(cfg.seed)

    # -------------------------------------------------------------------------------- models

    def train_if_missing(self, stage):
        """Returns the folder of another stage's run on the same data, training it here first if unfinished.

        Sets the seed again, so that what follows does not depend on whether anything was trained.
        """
        return train_if_missing(stage, self.cfg)

    def load_model(self, init, require_policy=True):
        """Loads the model that this run trains -> a GPT on the CPU, its tokenizer.

        Exits with one line if a policy is required and `init` is a reward model. The run's checkpoints keep
        the tokenizer's name and a digest of the model's weights.
        """
        model, self.tokenizer = load_model(init, self.cfg, require_policy)
        self.digests["init"] = weights_digest(model)
        return model, self.tokenizer

    def load_reference(self, name, policy):
        """Loads the frozen reference policy that --ref names, on the CPU; pass it to `prepare`.

        Exits with one line if its tokenizer or its shape is not that of `policy`.
        """
        reference, tokenizer = load_model(name, self.cfg)
        if tokenizer.name != self.tokenizer.name:
            raise SystemExit(f"--ref={name}: its tokenizer is {tokenizer.name}, the policy's is "
                             f"{self.tokenizer.name}")
        if reference.config != policy.config:
            raise SystemExit(f"--ref={name}: a model of another shape than the policy")
        self.digests["ref"] = weights_digest(reference)
        return reference.requires_grad_(False)

    def load_frozen(self, name):
        """Loads the initial policy or the reference again, frozen and prepared, to compare with.

        Warns if it is not what it was when this run began.
        """
        model, _ = load_model(name, self.cfg)
        if weights_digest(model) not in (self.digests["init"], self.digests.get("ref")):
            print0(f"warning: {name} has changed since this run began: the tables compare with what it is")
        return self.prepare(model.requires_grad_(False))

    def adopt_template(self, init):
        """If the model `init` was trained on turns, this run's prompts are written as turns too."""
        if template_of_checkpoint(init) == "turns":
            self.template = "turns"

    def rollout_prompts(self, max_new_tokens):
        """The training prompts in this run's template, as lists of ids.

        Where needed, the beginning is cut off, to leave room for max_new_tokens in cfg.max_len.
        """
        room = self.cfg.max_len - max_new_tokens
        texts = apply_template(self.template, self.data.prompts("train"))
        prompts = [ids.tolist() for ids in encode_prompts(self.tokenizer, texts)]
        n_cut = sum(len(ids) > room for ids in prompts)
        if n_cut:
            print0(f"{n_cut} prompts lost their beginning, to leave room for {max_new_tokens} new tokens")
        return [ids[-room:] for ids in prompts]

    def load_reward_model(self, path, normalize=False):
        """Loads a frozen reward model of this run's tokenizer, on the CPU; pass it to `prepare`.

        normalize: divide its scores by their standard deviation on demonstrations.
        """
        return load_reward_model(path, self.tokenizer, self.cfg, normalize)

    def prepare(self, model):
        """Moves a model to the device; --fsdp spreads it over the processes, and --compile compiles it.

        It does so in place, and returns the model. A second call changes nothing.
        """
        return prepare_model(model, self.cfg, self.device)

    # -------------------------------------------------------------------------------- the loop

    def start_or_resume(self, model, optimizer, console=None):
        """Opens the log. With --resume, restores model, optimizer and random state first; without it, removes
        the checkpoints of an earlier run (--overwrite).

        Sets run.start, the number of steps done, and returns the last checkpoint; without --resume, 0 and
        an empty dict. console: the keys of the log that the console shows, beside the step and the speed.
        """
        checkpoint = self.checkpoint
        self.checkpoint = {}  # so that only the page still holds it, and can free it
        if self.cfg.resume:
            resume(checkpoint, self.out, self.cfg, model, optimizer, self.digests)
            self.start = checkpoint["step"]
        elif is_main():
            for file in checkpoint_files(self.out):  # with --overwrite; a later --resume must not find them
                os.remove(file)
        if devices.device_type(self.device) != "cpu":
            print0(describe_device(model, self.cfg, self.device, self.tokens_per_step))
        self.logger = Log(self.out, self.cfg, self.start, console)
        return checkpoint

    def restore(self, model, optimizer, weights, state):
        """Restores a second model and its optimizer from what a checkpoint holds of them."""
        load_weights(model, weights, self.out)
        load_optimizer(optimizer, state)

    def shuffled_batches(self, examples, batch_size=None, steps=None, seed=None):
        """The examples of each step: cfg.steps lists of batch_size indices, shuffled anew each epoch.

        At the end of an epoch, examples that do not fill a batch are skipped. Exits with one line if there
        are fewer than batch_size. batch_size, steps and seed are those of cfg unless given. The
        run's checkpoints keep a digest of the examples.
        """
        cfg = self.cfg
        self.digests["data"] = examples_digest(examples, self.digests["data"])
        batch_size = batch_size or cfg.batch_size
        n_epochs = (steps or cfg.steps) * batch_size / len(examples)
        if n_epochs > MANY_EPOCHS:
            print0(f"warning: --steps={cfg.steps} goes through the {len(examples)} examples "
                   f"{n_epochs:.0f} times")
        self.tokens_per_step += tokens_of_batch(examples, batch_size, cfg)
        return shuffled_batches(len(examples), batch_size, steps or cfg.steps,
                                cfg.seed if seed is None else seed)

    def lr_schedule(self, step):
        """The learning rate at a step as a fraction of its peak: linear warm-up, then half a cosine to 0.

        Steps count from 0, which already has a rate above 0.
        """
        return lr_schedule(step, self.cfg)

    def micro_batches(self, batch, groups):
        """This process's share of a batch, as lists of at most cfg.micro_tokens tokens.

        The batch and the lists are indices into `groups`. A prompt counts once for all of its responses; a
        group of more than cfg.micro_tokens tokens gets a list of its own, and the shortest groups come first.
        Every process gets the same number of lists, none of them empty, because a sharded model's forward
        pass needs all processes at once. Exits with one line if the batch cannot be shared evenly.
        """
        self.tokens += sum(group_length(groups[i]) for i in batch)
        return micro_batches(batch, groups, self.cfg.micro_tokens)

    def show_data(self, groups, labels=("response",), loss_tokens=None):
        """Prints the first example with its loss marked, and warns of what is probably wrong with the data.

        groups, labels and loss_tokens: see common/examine.py.
        """
        _, responses = groups[0]
        if responses:
            print0("the first example (a | ends each token that carries loss):")
        else:
            print0("the first prompt:")
        print0(first_example(self.tokenizer, groups[0], labels, loss_tokens))
        for line in warnings(self.tokenizer, groups):
            print0(f"warning: {line}")

    def encode_pairs(self, comparisons):
        """Every pair of responses of different ranks: [(prompt_ids, [chosen_ids, rejected_ids]), …].

        Cut to cfg.max_len. Exits with one line if all comparisons tie, or if all pairs hold equal responses.
        """
        return encode_pairs(self.tokenizer, comparisons, self.cfg.max_len, source=self.cfg.data)

    def validation_comparisons(self, k=2):
        """The first cfg.eval_n validation comparisons, and their groups (prompt_ids, [response_ids, …]).

        k: responses per comparison, for data that can make them (animals, qa_feedback).
        """
        comparisons = self.data.comparisons("validation", k)[:self.cfg.eval_n]
        examples = [(comparison.prompt, comparison.responses) for comparison in comparisons]
        return comparisons, encode_groups(self.tokenizer, examples, self.cfg.max_len)

    def logp_of_responses(self, policy, groups, average=False):
        """log π(y|x) of every response of `groups`, in their order: (S,) on the CPU, without gradient.

        Summed over the response's tokens or, with `average`, averaged. Not shared out: every process
        computes all of the groups.
        """
        return logp_of_responses(policy, groups, self.cfg.micro_tokens, average)

    def precompute_logp(self, policy, pairs, batches, average=False):
        """log π of both responses of every pair in the batches: (len(pairs), 2), without gradient.

        Row i is that of pairs[i], computed in the micro-batch in which training first meets it; pairs in no
        batch have 0. Summed over the response's tokens or, with `average`, averaged. Each process computes
        its share of every batch, and gets all of the result. Call it before start_or_resume.
        """
        check_digests(self.checkpoint, self.out, self.cfg, self.digests)  # an error now, not after this work
        return precompute_logp(policy, pairs, batches, self.cfg.micro_tokens, self.progress, average)

    def scores_of_responses(self, reward_model, groups):
        """A reward model's score of every response of `groups`, in their order: (S,) on the CPU.

        Not shared out: every process computes all of the groups.
        """
        return scores_of_responses(reward_model, groups, self.cfg.micro_tokens)

    def print0(self, text):
        """Prints in the main process only."""
        print0(text)

    def log(self, step, tokens=None, **values):
        """Logs the values of a step, counted from 1: numbers that are the same in all processes.

        tokens: how many the step took, for tokens_per_s; None: those of the batch that was shared out.
        """
        self.logger(step, self.tokens if tokens is None else tokens, **values)
        self.tokens = 0

    def save_if_due(self, step, model, optimizer, **more):
        """Saves a checkpoint every cfg.ckpt_every steps, at the last step, and after Ctrl-C or SIGTERM.

        After a signal, it also prints the command that continues the run, and ends the process. step: how
        many are done, as in `log`. more: further entries of the checkpoint, which start_or_resume returns.
        """
        is_due = step % self.cfg.ckpt_every == 0 or step == self.cfg.steps
        # Has any process got a signal? All ask together, so all take the same branch.
        if is_due or self.stop_signal.agree():
            self.save(step, model, optimizer, **more)
        else:
            # From the first step on there is work to lose, so a signal waits for the end of the next one.
            self.stop_signal.catch_signals()

    def save(self, step, model, optimizer, **more):
        """Saves a checkpoint now, with `more` in it, and ends the process if a signal asked for that."""
        save_checkpoint(self.out, step, model, optimizer, self.cfg, self.tokenizer.name,
                        template=self.template, digests=self.digests, **more)
        if self.stop_signal.agree():  # asked again: one may have come while saving
            print0(f"stopped after step {step}; continue with: {resume_command(self.cfg)}")
            raise SystemExit(128 + self.stop_signal.agreed)  # a shell's exit code for that signal
        if step == self.cfg.steps:
            self.stop_signal.release_signals()  # training is over: Ctrl-C ends what follows at once
        else:
            self.stop_signal.catch_signals()


def tokens_of_batch(examples, batch_size, cfg):
    """About how many tokens a batch has. Prompts alone (ppo.py) get cfg.batch_size responses in all."""
    if isinstance(examples[0], tuple):
        return batch_size * sum(map(group_length, examples)) / len(examples)
    prompt_tokens = batch_size * sum(map(len, examples)) / len(examples)
    return prompt_tokens + cfg.batch_size * cfg.max_new_tokens
