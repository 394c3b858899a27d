"""Supervised fine-tuning: the first stage of InstructGPT (Ouyang et al. 2022, arXiv:2203.02155 §3.5).

The language-model loss on demonstrations, taken over the tokens of the response only:

    L(θ) = −Σ_(x,y) Σ_t log π_θ(y_t | x, y_<t) / Σ_(x,y) |y|

where Σ_(x,y) runs over the demonstrations of a batch, and |y| is the number of tokens of y. This is a mean
over tokens, so long responses weigh more than short ones.

The EOS at the end of a response is one of its tokens, so the model learns when to stop. (A response that was
cut at max_len has none.)

The result is π_SFT. By default every later stage starts from it, and PPO and DPO keep a copy as the reference
π_ref.

    python sft.py                                the animals world, from scratch
    python sft.py hh --init=gpt2-medium          the chosen answers of Anthropic's HH-RLHF
    python sft.py tldr                           Reddit posts and their TL;DRs (also: qa_feedback, imdb)
    python sft.py --data=mine.jsonl              your own file (data/jsonl.py), with the settings of recipe hh

Left out: dropout, and picking the checkpoint by a reward model's score (the paper has both, App. C.1). The
paper trains for 16 epochs without warm-up and decays the learning rate to 10% of its peak; we warm up, and
decay to 0.
"""
from dataclasses import dataclass

import evaluate
from common.dist import sync_gradients
from common.log import Metrics
from common.optim import make_optimizer, optimizer_step
from common.options import NonNegativeFloat, NonNegativeInt, PositiveInt, RunConfig, parse
from common.run import Run
from data import encode_groups
from engine.packing import pack


@dataclass
class Config(RunConfig):  # all other options: common/options.py
    init: str = "scratch"           # scratch, gpt2[-medium|-large|-xl], hub:OWNER/NAME, or a folder
    steps: PositiveInt = 700        # optimizer steps
    batch_size: PositiveInt = 16    # groups per step; a group is a prompt with up to four responses
    lr: NonNegativeFloat = 6e-3     # peak learning rate; 6e-3 suits a tiny new model, not GPT-2
    warmup: NonNegativeInt = 20     # steps of linear warm-up, before the cosine to 0
    val_every: PositiveInt = 200    # steps between validation losses
    log_every: PositiveInt = 50     # steps between lines on the console
    ckpt_every: PositiveInt = 100   # steps between checkpoints


RECIPES = {
    # hh and qa_feedback: our own settings, for GPT-2
    "hh": dict(data="hh", init="gpt2", steps=2000, batch_size=64, max_len=512, lr=2e-5, warmup=100,
               val_every=200, log_every=10, ckpt_every=500, eval_n=64),
    "qa_feedback": dict(data="qa_feedback", init="gpt2", steps=300, batch_size=32, max_len=1024, lr=2e-5,
                        warmup=20, val_every=100, log_every=10, ckpt_every=100, eval_n=64),
    # From arXiv:2009.01325 B.1: batches of 128, about one epoch (of 116,722 demonstrations), and the
    # learning rate of its 1.3B model. The warm-up is ours. max_len: about 512 for a post, 128 for its summary
    "tldr": dict(data="tldr", init="gpt2", steps=910, batch_size=128, max_len=640, lr=6.35e-5, warmup=50,
                 val_every=200, log_every=10, ckpt_every=200, eval_n=64),
    # From arXiv:2305.18290 C.1: gpt2-large, about one epoch. Batch size, lr and warm-up are ours. max_len:
    # 8 tokens for a prefix, 128 for its response
    "imdb": dict(data="imdb", init="gpt2-large", steps=350, batch_size=64, max_len=136, lr=2e-5, warmup=20,
                 val_every=100, log_every=10, ckpt_every=100, eval_n=64),
}

MAX_RESPONSES = 4  # per group; a prompt with more responses gets several groups


def group_by_prompt(demonstrations):
    """[(prompt, response), …] -> groups [(prompt, [response, …]), …].

    The model reads a prompt once for all responses of its group. A micro-batch never splits a group;
    MAX_RESPONSES keeps a prompt with many responses from making a group too large.
    """
    responses_to = {}
    for prompt, response in demonstrations:
        responses_to.setdefault(prompt, []).append(response)
    groups = []
    for prompt, responses in responses_to.items():
        for i in range(0, len(responses), MAX_RESPONSES):
            groups.append((prompt, responses[i:i + MAX_RESPONSES]))
    return groups


def sft_loss(logprobs, n_tokens):
    """What a micro-batch adds to the batch's mean loss: −Σ log π(y_t | x, y_<t) / n_tokens.

    logprobs (N,): one per response token of this micro-batch. n_tokens: response tokens in the whole batch.
    """
    return -logprobs.sum() / n_tokens


def count_response_tokens(groups):
    """The number of response tokens in these groups, EOS included: what the loss divides by."""
    total = 0
    for _, responses in groups:
        total += sum(map(len, responses))
    return total


def validation_loss(policy, groups, run):
    """The mean loss per token on held-out demonstrations, without gradient; None if there are none.

    Every process computes the loss of the whole split: simpler than splitting it among them.
    """
    if not groups:
        return None
    logp = run.logp_of_responses(policy, groups)  # log π(y|x) of each response, without gradient
    return -logp.double().sum().item() / count_response_tokens(groups)


def train(cfg):
    """Runs the stage. Returns the trained policy."""
    run = Run("sft", cfg)  # the data, the device, the folder, the log and the checkpoints
    policy, tokenizer = run.load_model(cfg.init)
    policy = run.prepare(policy)  # moved to the device; sharded or compiled if asked for
    n_parameters = sum(p.numel() for p in policy.parameters())
    run.print0(f"sft: {n_parameters / 1e6:.1f}M parameters on {run.device}, {cfg.data} -> {run.out}")

    # Groups: a prompt x and one to four responses y, as token ids with the EOS at the end of y.
    # If a prompt and the longest response of its group together exceed max_len tokens, the prompt is cut at
    # its start, down to max_len // 2 tokens at the least. A response that is still too long is cut at its
    # end, and loses its EOS.
    groups = encode_groups(tokenizer, group_by_prompt(run.data.demonstrations("train")), cfg.max_len)
    validation = encode_groups(tokenizer, group_by_prompt(run.data.demonstrations("validation")), cfg.max_len)
    # For each step of the run, a list of batch_size indices into groups. Each epoch is shuffled anew, from
    # the seed, and drops its last, incomplete batch.
    batches = run.shuffled_batches(groups)
    run.show_data(groups)  # prints the first example, and warns if the data look wrong
    optimizer = make_optimizer(policy, cfg.lr, cfg.weight_decay)
    run.start_or_resume(policy, optimizer)  # with --resume, continues from the last checkpoint

    for step in range(run.start, cfg.steps):
        metrics = Metrics()
        n_tokens = count_response_tokens([groups[i] for i in batches[step]])  # of the whole batch

        # 1. The gradients of the micro-batches add up to the gradient of the batch. A micro-batch is a list
        # of indices into groups, at most cfg.micro_tokens tokens in total (a longer group goes alone). Under
        # torchrun, each process takes its own share of the batch. All processes get the same number of
        # micro-batches, none of them empty, because a sharded model's processes must run forward and backward
        # together.
        for indices in run.micro_batches(batches[step], groups):
            # Packed into rows, so that a prompt is computed once and padding is rare: prompt, y1, y2, the
            # next prompt, … Attention is causal, and a token of a response sees only its prompt and its own
            # response. Each response's positions go on from the end of its prompt, and its first token is
            # predicted from the prompt's last.
            micro_batch = pack([groups[i] for i in indices]).to(run.device)
            logprobs = policy.logprobs(micro_batch)  # log π(y_t | x, y_<t) of every response token: (N,)
            loss = sft_loss(logprobs, n_tokens)
            loss.backward()
            metrics.add(loss=-logprobs)  # detached and summed; divided by n_tokens in step 5

        # 2. Sum the gradients over the processes: a sum, not a mean, since each loss was divided by the
        # tokens of the whole batch. (A sharded model has already summed them, in its backward pass.)
        sync_gradients(policy)

        # 3. One optimizer step on the whole batch: clip the gradients, step, zero them. If a gradient is not
        # finite, the weights stay as they are.
        lr = cfg.lr * run.lr_schedule(step)  # a factor: up to 1 in cfg.warmup steps, then half a cosine to 0
        grad_norm = optimizer_step(policy, optimizer, lr, cfg.grad_clip)

        # 4. Every val_every steps, and after the last, the loss on the validation split.
        val_loss = None
        if (step + 1) % cfg.val_every == 0 or step + 1 == cfg.steps:
            val_loss = validation_loss(policy, validation, run)

        # 5. Log; the mean loss is the sum over all processes, divided by n_tokens.
        run.log(step + 1, **metrics.mean(n_tokens), val_loss=val_loss, lr=lr, grad_norm=grad_norm)

        # 6. Save a checkpoint every ckpt_every steps and after the last one. On Ctrl-C, save_if_due saves one
        # too, and exits, skipping the table below.
        run.save_if_due(step + 1, policy, optimizer)

    # Print the final table: answers to prompts of the test split before and after training, with their reward
    # where one is known. The initial model is loaded again; with scratch, the same seed gives the same
    # weights.
    del optimizer  # frees memory for the evaluation
    evaluate.report(run, policy, cfg.init)
    return policy


if __name__ == "__main__":
    train(parse(Config, RECIPES))
