"""Talks to models: answers a prompt, ranks answers for training, shows them token by token, and exports.

    python sample.py out/sft-animals out/dpo-animals --prompt="Tell me about the owl: what it eats."
    python sample.py out/sft-hh                     a conversation: you write a line, the model answers
    python sample.py out/sft-animals --rank=gold --n=2500 --out=out/round1.jsonl
    python sample.py out/sft-imdb --rank=out/reward-imdb --n=25000 --out=out/imdb-pairs.jsonl
    python sample.py out/dpo-animals --export=dpo-for-transformers
    python sample.py out/sft-animals out/ppo-animals --page=tokens.html

--page shows where the reward goes, token by token, on a page for a browser; --json writes its numbers. It
has the answers of each model to --n held-out prompts; the first model is the reference (tokens/). A run that
is named alone is shown beside the model that it started from.

--rank makes on-policy preference data: it samples --k answers to each of --n training prompts, ranks them by
the true reward or by a reward model, and writes {"prompt": …, "responses": [the best first]} on a line for
each prompt. dpo.py, simpo.py and reward.py read that file with --data.
"""
import argparse
import importlib
import json
import os
import random
import sys

import torch

import evaluate
from common.compared import load_data, load_models
from common.dist import log_to_console
from common.files import append_to, write_atomically
from common.grids import repeat_each
from common.models import load_model_only, load_reward_model, template_of_checkpoint
from common.scoring import scores_of_responses
from common.sharding import sampling_copy
from data import decode, encode_groups, encode_prompts
from data.turns import apply_template, user_turn

SPARE = 8  # tokens sampled beyond max_len, because a text that is encoded again may take a few tokens fewer


def answer(model, prompt, tokenizer, args):
    """Samples one answer to a prompt; both are text."""
    ids = evaluate.encode_with_room([prompt], model.config.block_size, tokenizer)
    seed = torch.seed() % 2**32  # another answer each time
    responses = evaluate.respond(model, ids, tokenizer.eot_token, seed, args.max_new_tokens, args.temperature)
    return decode(tokenizer, responses[0])


def talk(models, lines, tokenizer, args):
    """Answers each line by every model, [(name, GPT), …].

    A model that was trained on conversations gets a line as the user's turn, after the turns before it. Any
    other model, and every model with --raw, gets each line alone and as it is.
    """
    history = {name: "" for name, _ in models}
    for line in lines:
        for name, model in models:
            prompt = line
            if not args.raw and template_of_checkpoint(name) == "turns":
                prompt = history[name] + apply_template("turns", [line])[0]
            response = answer(model, prompt, tokenizer, args)
            history[name] = prompt + response
            print(f"{name}: {response.strip()}", flush=True)


def typed_lines():
    """The lines that are typed or piped in, up to an empty one."""
    prompt = ""
    if sys.stdin.isatty():
        print("write a line; an empty one ends the conversation")
        prompt = "> "
    while True:
        try:
            line = input(prompt)
        except (EOFError, KeyboardInterrupt):
            return
        if not line.strip():
            return
        yield line


# --------------------------------------------------------------------------------------------- ranked answers

def complete(policy, tokenizer, prompts, k, max_new_tokens, max_len, temperature=1.0, batch_size=128):
    """Samples k responses to each prompt -> [(prompt, [response, …]), …], as text.

    Leaves out empty responses, repeated ones, and those that did not end although max_len has room for more,
    because whoever reads their text would take the place where sampling stopped for the end.
    """
    ids = [prompt.tolist() for prompt in encode_prompts(tokenizer, prompts)]
    examples = []
    for i in range(0, len(prompts), batch_size):
        print(f"{i} of {len(prompts)} prompts answered", flush=True)
        repeated = repeat_each(ids[i:i + batch_size], k)
        responses = policy.generate(repeated, max_new_tokens, temperature, eos=tokenizer.eot_token)
        for j, prompt in enumerate(prompts[i:i + batch_size]):
            texts = []
            for response in responses[k * j:k * (j + 1)]:
                text = decode(tokenizer, response)
                ended = response[-1] == tokenizer.eot_token
                fills_max_len = len(ids[i + j]) + len(response) >= max_len + SPARE
                if text and text not in texts and (ended or fills_max_len):
                    texts.append(text)
            examples.append((prompt, texts))
    return examples


def with_room(prompts, tokenizer, max_len):
    """The prompts that leave a quarter of max_len for an answer, and how many tokens the longest has.

    All answers are sampled with the room that the longest prompt leaves, so one prompt would cut them all.
    """
    most = 3 * max_len // 4
    lengths = [len(ids) for ids in encode_prompts(tokenizer, prompts)]
    if min(lengths) > most:
        raise SystemExit(f"--max_len={max_len} leaves no room for an answer: "
                         f"a prompt has {min(lengths)} tokens or more")
    n_long = sum(length > most for length in lengths)
    if n_long:
        print(f"left out {n_long} of {len(prompts)} prompts, which take more than three quarters of "
              f"--max_len={max_len}")
    kept = [prompt for prompt, length in zip(prompts, lengths) if length <= most]
    return kept, max(length for length in lengths if length <= most)


def labels(args, data, examples, tokenizer, reward_model):
    """How good each response of [(prompt, [response, …]), …] is: a list of numbers for each prompt.

    --rank=gold: the true reward, with a labeler's noise where the data set has one. --rank=RUN: the score of
    that reward model, given to what later stages will see of the response, cut to --max_len.
    """
    if args.rank == "gold":
        rng = random.Random(args.seed)
        result = []
        for prompt, responses in examples:
            if hasattr(data, "label"):
                result.append([data.label(prompt, response, rng) for response in responses])
            else:
                result.append([data.gold(prompt, response) for response in responses])
        return result
    scores = scores_of_responses(reward_model, encode_groups(tokenizer, examples, args.max_len))
    sizes = [len(responses) for _, responses in examples]
    return [list_of_scores.tolist() for list_of_scores in scores.split(sizes)]


def ranked(prompt, responses, its_labels):
    """A record of a prompt's responses, the best first, with "ranks" if some are equally good."""
    best_first = sorted(range(len(responses)), key=lambda i: its_labels[i], reverse=True)
    distinct = sorted(set(its_labels), reverse=True)
    ranks = [distinct.index(its_labels[i]) for i in best_first]
    record = {"prompt": prompt, "responses": [responses[i] for i in best_first]}
    if len(distinct) < len(responses):
        record["ranks"] = ranks
    return record


def write_ranked(args, policy, tokenizer, data):
    """Samples, ranks and writes: all of --rank."""
    block_size = policy.config.block_size
    if block_size < args.max_len:
        raise SystemExit(f"--max_len={args.max_len}: the context of {args.checkpoints[0]} is "
                         f"{block_size} tokens")
    reward_model = None
    if args.rank != "gold":
        reward_model = load_reward_model(args.rank, tokenizer).to(policy.device)
    prompts = data.prompts("train")
    if args.n < len(prompts):
        prompts = random.Random(args.seed).sample(prompts, args.n)
    prompts = apply_template(template_of_checkpoint(args.checkpoints[0]), prompts)
    prompts, longest = with_room(prompts, tokenizer, args.max_len)
    with append_to(args.out):
        pass  # a place that cannot be written is an error now, not after the work
    torch.manual_seed(args.seed)
    max_new_tokens = min(args.max_len + SPARE, block_size - longest)
    examples = complete(sampling_copy(policy), tokenizer, prompts, args.k, max_new_tokens, args.max_len,
                        args.temperature)
    examples = [(prompt, responses) for prompt, responses in examples if len(responses) > 1]
    if not examples:
        raise SystemExit("no prompt got two different answers that ended: there is nothing to rank")

    n_responses = 0
    all_labels = labels(args, data, examples, tokenizer, reward_model)
    with write_atomically(args.out) as f:
        for (prompt, responses), its_labels in zip(examples, all_labels):
            f.write(json.dumps(ranked(prompt, responses, its_labels)) + "\n")
            n_responses += len(responses)
    print(f"{n_responses} ranked answers to {len(examples)} of {len(prompts)} prompts -> {args.out}; "
          "left out: answers that are empty, repeated or did not end")


# ----------------------------------------------------------------------------------------------------- export

def export(name, dir):
    """Writes a checkpoint as a folder in the Hugging Face format, and prints what is not part of it."""
    if os.path.isfile(dir) or os.path.isdir(dir) and os.listdir(dir):
        raise SystemExit(f"--export={dir}: something is there already; name a new folder")
    model, tokenizer_name = load_model_only(name)
    try:
        model.save_pretrained(dir)
    except (OSError, RuntimeError) as error:  # torch.save hides an OSError in a RuntimeError
        raise SystemExit(f"--export={dir}: cannot be written ({error})")
    print(f"{name} -> {dir}, which transformers' GPT2LMHeadModel.from_pretrained opens")
    if tokenizer_name == "gpt2":
        print('its tokenizer: AutoTokenizer.from_pretrained("gpt2")')
    else:
        print("its tokenizer: that of data/animals.py, which transformers cannot open")
    if template_of_checkpoint(name) == "turns":
        print(f"its prompts are turns, such as {user_turn('Hi')!r}")
    if model.config.n_scalars:
        print("its scalar head is left out: the format has no place for one")


# ------------------------------------------------------------------------------------------- the command line

def arguments(argv):
    """The command line, as at the top of this page."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CKPT",
        help="a run's folder, a ckpt.pt, a Hugging Face folder, or gpt2 …")
    add("--prompt", metavar="TEXT", help="print each model's answer to TEXT, instead of asking for lines")
    add("--raw", action="store_true", help="prompts as they are, not as turns of a conversation")
    add("--temperature", type=float, default=1.0,
        help="of the answers (--page uses that of the runs); 0: the likeliest (default 1)")
    add("--max_new_tokens", type=int, default=128, help="the longest answer, not for --rank (default 128)")
    add("--rank", metavar="gold|RUN",
        help="sample answers and rank them by the true reward, or by this reward model")
    add("--out", metavar="FILE", help="for --rank: write the ranked answers there")
    add("--k", type=int, default=4, help="for --rank: answers to each prompt (default 4)")
    add("--seed", type=int, default=0, help="for --rank: of prompts, answers and labels (default 0)")
    add("--max_len", type=int,
        help="for --rank: tokens of prompt and answer that training will use; default: the checkpoint's")
    add("--page", metavar="FILE", help="write a page there that shows answers token by token")
    add("--json", metavar="FILE", help="write the numbers of that page there")
    add("--reward_model", metavar="RUN", help="for --page: for scores; default: that of a run of ppo.py")
    add("--n", type=int, help="at most this many prompts (default for --rank 2500, for --page 20)")
    add("--export", metavar="DIR",
        help="write the checkpoint there for transformers; a scalar head is left out")
    add("--data",
        help="for --rank and --page: where prompts come from; default: what the checkpoint was trained on")
    add("--data_dir", help="likewise")
    args = parser.parse_args(argv)
    if args.n is None:
        args.n = 2500 if args.rank else 20
    page = args.json if args.page is None else args.page
    tasks = [task for task in (args.prompt, args.rank, args.export, page) if task is not None]
    if len(tasks) > 1:
        raise SystemExit("sample.py does one thing at a time: --prompt=TEXT, --rank=…, --export=DIR or "
                         "--page=FILE, with or without --json=FILE")
    for name in ("rank", "export"):
        if getattr(args, name) == "":
            raise SystemExit(f"--{name}=: a value is missing")
    for name, least in (("n", 1), ("k", 2), ("max_len", 2), ("temperature", 0), ("max_new_tokens", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise SystemExit(f"--{name}={value}: expected at least {least}")
    if (args.rank or args.export) and len(args.checkpoints) != 1:
        raise SystemExit("--rank and --export take one checkpoint")
    if args.rank and not args.out:
        raise SystemExit("--rank needs --out=FILE, to write the ranked answers to")
    return args


def main(argv=None):
    log_to_console()
    args = arguments(argv)
    if args.export:
        return export(args.checkpoints[0], args.export)
    if args.page is not None or args.json is not None:
        # By name, and only here: the page needs the numbers of the stages, which stand above this file.
        return importlib.import_module("tokens").write(args)
    models, tokenizer, configs = load_models(args.checkpoints, need_same_data=False)
    if args.rank:
        data = load_data(args, configs)
        if args.rank == "gold" and not hasattr(data, "gold"):
            raise SystemExit("--rank=gold: the true reward of this data is not known; name a reward model, "
                             "or the data that the prompts come from with --data")
        if args.max_len is None:
            args.max_len = configs[0].get("max_len", models[0][1].config.block_size)
        write_ranked(args, models[0][1], tokenizer, data)
    else:
        lines = typed_lines() if args.prompt is None else [args.prompt]
        talk(models, lines, tokenizer, args)


if __name__ == "__main__":
    main()
