"""Talks to models: answers a prompt, ranks answers for training, shows them token by token, and exports.

    python sample.py out/sft-animals out/dpo-animals --prompt="Tell me about the owl: what it eats."
    python sample.py out/sft-hh                     a conversation: you write a line, the model answers
    python sample.py out/sft-imdb --pairs=out/imdb-pairs.jsonl --reward_model=out/reward-imdb
    python sample.py out/dpo-animals --export=dpo-for-transformers
    python sample.py out/sft-animals out/ppo-animals --page=tokens.html

--page shows where the reward goes, token by token, on a page for a browser; --json writes its numbers. It
has the answers of each model to --n held-out prompts; the first model is the reference (tokens/). A run that
is named alone is shown beside the model that it started from.

--pairs makes on-policy preference pairs: for each of --n training prompts it samples --k responses from the
checkpoint, has the reward model score them, and writes all pairs of unequal score as {"prompt", "chosen",
"rejected"}. dpo.py, simpo.py and reward.py read that file with --data. A response is scored as those stages
will see it, cut to --max_len.
"""
import argparse
import importlib
import json
import os
import sys
from itertools import combinations

import torch

import evaluate
from common.checkpoints import load_model_only, load_reward_model, template_of_checkpoint
from common.dist import log_to_console
from common.files import write_atomically
from common.scoring import score_groups
from common.sharding import sampling_copy
from data import encode_groups, encode_prompts
from data.turns import apply_template, user_turn

SPARE = 8  # tokens sampled beyond max_len, because a text that is encoded again may take a few tokens fewer


def answer(model, prompt, tokenizer, args):
    """Samples one answer to a prompt; both are text."""
    ids = evaluate.encode_cut([prompt], model, tokenizer)
    seed = torch.seed() % 2**32  # another answer each time
    responses = evaluate.respond(model, ids, tokenizer.eot_token, seed, args.max_new_tokens, args.temperature)
    return evaluate.decode(responses[0], tokenizer)


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


# ------------------------------------------------------------------------------------------- preference pairs

def complete(policy, tokenizer, prompts, k, max_new_tokens, batch_size=128):
    """Samples k responses to each prompt at temperature 1 -> [(prompt, [response, …]), …], as text."""
    torch.manual_seed(0)
    ids = [prompt.tolist() for prompt in encode_prompts(tokenizer, prompts)]
    examples = []
    for i in range(0, len(prompts), batch_size):
        print(f"{i} of {len(prompts)} prompts completed", flush=True)
        repeated = []
        for prompt in ids[i:i + batch_size]:
            repeated += [prompt] * k
        responses = policy.generate(repeated, max_new_tokens, eos=tokenizer.eot_token)
        texts = [evaluate.decode(response, tokenizer) for response in responses]
        for j, prompt in enumerate(prompts[i:i + batch_size]):
            examples.append((prompt, texts[k * j:k * (j + 1)]))
    return examples


def ordered_pairs(prompt, responses, scores):
    """All pairs of non-empty responses of unequal score, the better one chosen, as a list of dicts."""
    best_first = sorted(zip(scores, responses), key=lambda pair: -pair[0])
    pairs = []
    for (high, chosen), (low, rejected) in combinations(best_first, 2):
        if high > low and chosen and rejected:
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return pairs


def write_pairs(args, policy, tokenizer, data):
    """Writes the preference pairs of --pairs."""
    reward_model = load_reward_model(args.reward_model, tokenizer).to(policy.device)
    new_tokens = args.max_len + SPARE
    template = template_of_checkpoint(args.checkpoints[0])
    prompts = apply_template(template, data.prompts("train")[:args.n])
    longest = max(len(ids) for ids in encode_prompts(tokenizer, prompts))
    if policy.config.block_size < longest + new_tokens:
        raise SystemExit(f"{args.checkpoints[0]}: its context is {policy.config.block_size} tokens, "
                         f"--max_len={args.max_len} needs {longest + new_tokens}")
    examples = complete(sampling_copy(policy), tokenizer, prompts, args.k, new_tokens)
    groups = encode_groups(tokenizer, examples, args.max_len)
    scores = score_groups(reward_model, groups).view(-1, args.k).tolist()
    pairs = []
    for (prompt, responses), its_scores in zip(examples, scores):
        pairs += ordered_pairs(prompt, responses, its_scores)
    with write_atomically(args.pairs) as f:
        for pair in pairs:
            f.write(json.dumps(pair) + "\n")
    n_possible = len(examples) * args.k * (args.k - 1) // 2
    left_out = n_possible - len(pairs)
    print(f"{len(pairs)} pairs of {len(examples)} prompts -> {args.pairs}; "
          f"left out {left_out} that tie or have an empty response")


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
    add("--temperature", type=float, default=1.0, help="of the answers; 0: the likeliest (default 1)")
    add("--max_new_tokens", type=int, default=128, help="the longest answer (default 128)")
    add("--pairs", metavar="FILE", help="write preference pairs there, made of samples of the checkpoint")
    add("--reward_model", metavar="RUN", 
        help="for --pairs: the reward model that ranks the responses; for --page: for scores (default PPO's)")
    add("--k", type=int, default=4, help="for --pairs: responses per prompt (default 4)")
    add("--page", metavar="FILE", help="write a page there that shows answers token by token")
    add("--json", metavar="FILE", help="write the numbers of that page there")
    add("--n", type=int, help="at most this many prompts (default for --pairs 25000, for --page 20)")
    add("--max_len", type=int, default=136,
        help="for --pairs: tokens of prompt and response (default 136, as imdb's recipes)")
    add("--export", metavar="DIR",
        help="write the checkpoint there for transformers; a scalar head is left out")
    add("--data",
        help="for --pairs and --page: where prompts come from; default: what the checkpoint was trained on")
    add("--data_dir", help="likewise")
    args = parser.parse_args(argv)
    if args.n is None:
        args.n = 25_000 if args.pairs else 20
    page = args.json if args.page is None else args.page
    tasks = [task for task in (args.prompt, args.pairs, args.export, page) if task is not None]
    if len(tasks) > 1:
        raise SystemExit("sample.py does one thing at a time: --prompt=TEXT, --pairs=FILE, --export=DIR or "
                         "--page=FILE, with or without --json=FILE")
    for name, least in (("n", 1), ("k", 2), ("max_len", 2), ("temperature", 0), ("max_new_tokens", 1)):
        value = getattr(args, name)
        if value < least:
            raise SystemExit(f"--{name}={value}: expected at least {least}")
    if (args.pairs or args.export) and len(args.checkpoints) != 1:
        raise SystemExit("--pairs and --export take one checkpoint")
    if args.pairs and not args.reward_model:
        raise SystemExit("--pairs needs a --reward_model to rank the responses")
    return args


def main(argv=None):
    log_to_console()
    args = arguments(argv)
    if args.export:
        return export(args.checkpoints[0], args.export)
    if args.page is not None or args.json is not None:
        # By name, and only here: the page needs the numbers of the stages, which stand above this file.
        return importlib.import_module("tokens").write(args)
    # data="any": the models need not have been trained on the same data.
    models, tokenizer, configs = evaluate.load_models(args.checkpoints, data="any")
    if args.pairs:
        write_pairs(args, models[0][1], tokenizer, evaluate.load_data(args, configs))
    else:
        lines = typed_lines() if args.prompt is None else [args.prompt]
        talk(models, lines, tokenizer, args)


if __name__ == "__main__":
    main()
