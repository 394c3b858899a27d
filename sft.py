"""Supervised fine-tuning: the first stage of InstructGPT (Ouyang et al. 2022, arXiv:2203.02155 §3.5).

The language-model loss on demonstrations, over the response tokens alone:

    L(θ) = − Σ_t log π_θ(y_t | x, y_<t) / number of response tokens in the batch

What comes out is π_SFT: the policy that every later stage starts from, and the reference π_ref that its KL is measured to.

    python sft.py                                  the animals world, from nothing
    python sft.py hh --init=gpt2-medium            the chosen answers of Anthropic's HH-RLHF
    python sft.py tldr                             Reddit posts and their TL;DRs; qa_feedback and imdb likewise
    python sft.py --data=mine.jsonl --init=gpt2    your own file (data/jsonl.py has the schemas)

Left out: dropout, loss on prompts.
"""
from dataclasses import dataclass

import torch

import evaluate
from common import (Log, Metrics, clip_and_step, configure, due, lr_schedule, level, load_model, make_optimizer, open_run, parse, resume,
                    run_dir, save_checkpoint, say, setup, shard, share, sum_over_ranks)
from data import batch_order, dataset, encode_groups, get_tokenizer, group_length, micro_batches, pack


@dataclass
class Config:
    recipe: str = "animals"         # the positional argument
    data: str = "animals"           # animals, hh, hh/SUBSET, qa_feedback, tldr, imdb, a .jsonl[.gz] or a _feedback.json file
    data_dir: str = "data/files"    # where published files are looked for before they are fetched
    init: str = "scratch"           # scratch, gpt2[-medium|-large|-xl], a run's folder, or a folder in the Hugging Face format
    out: str | None = None          # the run's folder; None: out/sft-RECIPE, or out/sft-FILE
    steps: int = 1500               # optimizer steps
    batch_size: int = 16            # prompts a step, each with up to four of its demonstrations, over all processes
    micro_tokens: int = 16384       # tokens a forward pass at most; a larger batch is accumulated
    max_len: int = 64               # prompt and response together, in tokens
    lr: float = 4e-3                # peak learning rate
    warmup: int = 20                # steps of linear warm-up, before the cosine to 0
    weight_decay: float = 0.0       # on matrices
    grad_clip: float = 1.0          # largest norm of the gradient
    n_layer: int = 4                # with --init=scratch
    n_head: int = 4                 # with --init=scratch
    n_embd: int = 64                # with --init=scratch
    seed: int = 0                   # of weights, data order and sampling
    device: str | None = None       # cpu, cuda, cuda:1 …; None: cuda where there is one
    compile: bool | None = None     # torch.compile; None: on CUDA
    checkpoint_blocks: bool = False  # recompute each block in the backward pass: a third more work, the activations of one block at a time
    fsdp: bool = False              # shard the model's weights, gradients and optimizer over the processes (torchrun)
    val_every: int = 100            # steps between validation losses
    log_every: int = 50             # steps between lines on the console
    ckpt_every: int = 100           # steps between checkpoints
    wandb: str | None = None        # the project of Weights & Biases that gets the log too
    tensorboard: bool = False       # the log also for TensorBoard, in OUT/tensorboard
    eval_n: int = 500               # prompts in the closing table
    resume: bool = False            # go on from the run's last checkpoint


RECIPES = {
    "hh": dict(data="hh", init="gpt2", steps=2000, batch_size=64, max_len=512, lr=2e-5, warmup=100, val_every=200,
               log_every=10, ckpt_every=500, eval_n=64),
    "qa_feedback": dict(data="qa_feedback", init="gpt2", steps=300, batch_size=32, max_len=1024, lr=2e-5, warmup=20, val_every=100,
                        log_every=10, ckpt_every=100, eval_n=64),
    # arXiv:2009.01325 B.1, its 1.3B model: batch 128, one epoch of 116,722, 6.35e-5. Posts have up to 512 tokens
    "tldr": dict(data="tldr", init="gpt2", steps=910, batch_size=128, max_len=640, lr=6.35e-5, warmup=50, val_every=200,
                 log_every=10, ckpt_every=200, eval_n=64),
    # arXiv:2305.18290 C.1: gpt2-large, about one epoch; a prefix of up to 8 tokens and 128 more
    "imdb": dict(data="imdb", init="gpt2-large", steps=350, batch_size=64, max_len=136, lr=2e-5, warmup=20, val_every=100,
                 log_every=10, ckpt_every=100, eval_n=64),
}


def by_prompt(demonstrations, most=4):
    """[(prompt, response), …] -> [(prompt, [response, …]), …]: answers to one prompt share a group, which computes it once."""
    answers = {}
    for prompt, response in demonstrations:
        answers.setdefault(prompt, []).append(response)
    return [(prompt, rs[i:i + most]) for prompt, rs in answers.items() for i in range(0, len(rs), most)]


def sft_loss(logprobs, n_tokens):
    """−Σ log π(y_t | x, y_<t) over n_tokens. logprobs (N,), those of a part of the batch; n_tokens of the whole batch."""
    return -logprobs.sum() / n_tokens


def response_tokens(groups):
    """How many tokens the loss is taken over."""
    return sum(len(response) for _, responses in groups for response in responses)


@torch.no_grad()
def validation_loss(policy, groups, cfg, device, amp):
    """Mean over response tokens, in nats; None without validation data."""
    total, lengths = 0.0, list(map(group_length, groups))
    for micro in micro_batches(range(len(groups)), lengths, cfg.micro_tokens):
        batch = pack([groups[i] for i in micro]).to(device)
        with amp:
            total += policy.logprobs(batch).sum().item()
    return -total / response_tokens(groups) if groups else None


def train(cfg):
    """Runs the stage; returns the trained policy."""
    out = cfg.out or run_dir("sft", cfg)
    open_run(out)
    device, amp = setup(cfg)
    data = dataset(cfg.data, cfg.data_dir)
    policy, tokenizer_name = load_model(cfg.init, cfg)
    tokenizer, policy = get_tokenizer(tokenizer_name), shard(policy, cfg, device)
    say(f"sft: {sum(p.numel() for p in policy.parameters()) / 1e6:.1f}M parameters on {device}, {cfg.data} -> {out}")

    groups, validation = [encode_groups(tokenizer, by_prompt(data.demonstrations(split)), cfg.max_len) for split in ("train", "validation")]
    lengths = list(map(group_length, groups))
    order = batch_order(len(groups), cfg.batch_size, cfg.steps, cfg.seed)
    optimizer = make_optimizer(policy, cfg.lr, cfg.weight_decay)
    start = resume(out, cfg, policy, optimizer)["step"] if cfg.resume else 0
    log = Log(out, cfg, start)
    configure(policy, cfg)

    for step in range(start, cfg.steps):
        n_tokens = response_tokens([groups[i] for i in order[step]])  # over all processes
        stats, metrics = {"tokens": 0}, Metrics()
        for micro in level(micro_batches(share(order[step]), lengths, cfg.micro_tokens), policy):
            batch = pack([groups[i] for i in micro]).to(device)
            with amp:
                logprobs = policy(batch)  # (N,)
            loss = sft_loss(logprobs, n_tokens)
            loss.backward()
            metrics.add(loss=-logprobs)
            stats["tokens"] += sum(lengths[i] for i in micro)
        stats = metrics.mean(n_tokens) | sum_over_ranks(policy, stats)
        lr = cfg.lr * lr_schedule(step, cfg)
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr
        grad_norm = clip_and_step(policy, optimizer, cfg)

        done = step + 1
        val_loss = validation_loss(policy, validation, cfg, device, amp) if done % cfg.val_every == 0 or done == cfg.steps else None
        log(done, stats["tokens"], loss=stats["loss"], val_loss=val_loss, lr=lr, grad_norm=grad_norm)
        if due(done, cfg):
            save_checkpoint(out, done, policy, optimizer, cfg, tokenizer_name)

    evaluate.report(out, cfg, [(cfg.init, load_model(cfg.init, cfg)[0]), (out, policy)], data, tokenizer)
    return policy


if __name__ == "__main__":
    train(parse(Config, RECIPES))
