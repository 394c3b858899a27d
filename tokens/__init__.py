"""RLHF token by token: the page of `python sample.py RUN [RUN …] --page=FILE`, and --json=FILE.

It shows the answers of each model to some held-out prompts, and how runs of dpo.py and simpo.py score some
held-out pairs. The first model is the reference π_ref. Every number is computed by the page of its stage:

    logprobs, logratio, kl, entropy, value    ppo.evaluate_tokens
    reward                                    ppo.dense_reward, with the β and the reward of the run
    delta, advantage                          ppo.compute_gae, at λ = 0 and at the run's λ, before whitening,
                                              which depends on the batch; without V, ppo.group_advantages
    judgements of spans                       finegrained.finegrained_reward
    rewards of pairs                          dpo.dpo_loss, simpo.simpo_loss

π is the model that wrote the answer. The reference's answers are shown as the last model sees them: beside
itself, all of its log-ratios would be 0. Only r_t, and so δ_t and Â_t, are those of a rollout of the
reference, as in PPO's first iteration: it pays no KL penalty.

This folder stands above the stages, like bench.py: models.py loads what a run's checkpoint holds, numbers.py
has the numbers of each answer and pair, page.py writes template.html with them.
"""
import json

import evaluate
from common.compared import load_data, load_models, named_reward_model, table_temperature
from common.dist import print0
from common.files import append_to, write_atomically
from common.models import load_reward_model, template_of_checkpoint
from data.turns import apply_template
from tokens.models import check_reference, load_subject, with_reference
from tokens.numbers import Setting, answer_rows, held_out_pairs, pair_rows
from tokens.page import write_page


def write(args):
    """Does what --page and --json of sample.py ask for; args are its arguments."""
    names = with_reference(args.checkpoints)
    # A run's own reference may have been trained on other data; the prompts are those of what was named.
    need_same_data = args.data is None and len(names) == len(args.checkpoints)
    models, tokenizer, configs = load_models(names, need_same_data)
    data = load_data(args, configs[-len(args.checkpoints):])
    prompts = held_out_prompts(names, models, data, args.n, tokenizer)
    sampling = shared_sampling(names, models, configs, prompts, args.max_new_tokens)
    subjects = []
    for (name, policy), config in zip(models, configs):
        subjects.append(load_subject(name, policy, config, sampling, tokenizer, data))
    reward_model = named_reward_model(args.reward_model, configs)  # a run's folder
    if reward_model is not None:
        reward_model = load_reward_model(reward_model, tokenizer).to(models[0][1].device)
    setting = Setting(models[0][1], tokenizer, data, reward_model)

    places = [path for path in (args.page, args.json) if path is not None]
    for path in places:
        with append_to(path):
            pass  # a place that cannot be written is an error now, not after the work
    for subject in subjects[1:]:
        check_reference(subject, subjects[0])

    content = {
        "models": [{"name": subject.name, "label": subject.label} for subject in subjects],
        "temperature": sampling["temperature"],
        "prompts": answers(subjects, prompts, setting),
        "pairs": pairs(subjects, args.n, setting),
    }
    if args.json is not None:
        with write_atomically(args.json) as f:
            json.dump(content, f, indent=1)
    if args.page is not None:
        write_page(args.page, content)
    print0(f"{len(prompts)} prompts, {len(subjects)} models -> {' and '.join(places)}")


def held_out_prompts(names, models, data, n, tokenizer):
    """The first n held-out prompts as ids; they are turns if one of the models was trained on turns."""
    texts = data.prompts("test")[:n]
    if not texts:
        raise SystemExit("--page shows answers to held-out prompts, and there are none in these data")
    templates = [template_of_checkpoint(name) for name in names]
    template = "turns" if "turns" in templates else "plain"
    context = min(policy.config.block_size for _, policy in models)
    return evaluate.encode_with_room(apply_template(template, texts), context, tokenizer)


def shared_sampling(names, models, configs, prompts, max_new_tokens):
    """The options that all models sample with, a dict: PPO's, if there is a run of PPO among them."""
    context = min(policy.config.block_size for _, policy in models)
    limits = [max_new_tokens, context - max(map(len, prompts))]
    limits += [config["max_new_tokens"] for config in configs if "max_new_tokens" in config]
    return {"max_new_tokens": min(limits), "temperature": table_temperature(names, configs)}


def answers(subjects, prompts, setting):
    """For each prompt, the answers of all models."""
    entries = [{"prompt": setting.tokenizer.decode(prompt), "answers": []} for prompt in prompts]
    for writer in subjects:
        viewer = subjects[-1] if writer is subjects[0] else writer
        for entry, row in zip(entries, answer_rows(writer, viewer, prompts, setting)):
            entry["answers"].append({"model": writer.name} | row)
    return entries


def pairs(subjects, n, setting):
    """For each of n held-out pairs, what the models make of it that were trained on pairs."""
    viewers = [subject for subject in subjects if subject.stage in ("dpo", "simpo")]
    if not viewers:
        return []
    max_len = min(subject.config["max_len"] for subject in viewers)
    groups = held_out_pairs(setting.data, n, max_len, setting.tokenizer)
    if not groups:
        print0("no held-out pairs to show")
        return []
    entries = [{"prompt": setting.tokenizer.decode(prompt), "models": []} for prompt, _ in groups]
    for viewer in viewers:
        for entry, pair in zip(entries, pair_rows(viewer, groups, setting)):
            entry["models"].append(pair)
    return entries
