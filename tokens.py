"""The page that shows RLHF token by token: `python sample.py RUN [RUN …] --page=FILE`, and --json=FILE.

It has the answers of each model to some held-out prompts. The first model is the reference π_ref; a run that is
named alone brings the model that it started from. Every number of a token is computed by the page of the stage:

    logprobs, ref_logprobs, kl, entropy, value    ppo.evaluate_tokens
    reward                                        ppo.dense_reward, with the β and the reward of the run
    delta, advantage                              ppo.compute_gae, at λ = 0 and at the run's λ; before whitening, since
                                                  that depends on a batch. Without V, ppo.group_advantages
    judgements of spans                           finegrained.finegrained_reward
    rewards of held-out pairs                     dpo.dpo_loss, simpo.simpo_loss

π is the model whose answer it is. What the reference answered is shown as the last model sees it: with itself as
π, every log-ratio would be 0. Only r_t, and so δ_t and Â_t, are those of a rollout of the reference, as in PPO's first
iteration: it pays no KL penalty.

common/token_page.py writes the page; the JSON file has the same numbers.
"""
import copy
import json
import os
from bisect import bisect_right
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import torch

import dpo
import evaluate
import finegrained
import ppo
import simpo
from common import grids
from common.batches import local_micro_batches
from common.checkpoints import (checkpoint_files, is_finished, load_checkpoint, load_model, load_reward_model,
                                load_weights, template_of_checkpoint)
from common.digests import weights_digest
from common.dist import print0
from common.files import append_to, write_atomically
from common.run import run_dir
from common.scoring import score_groups
from common.token_page import write_page
from data import encode_groups
from data.segments import decode_with_ends
from data.turns import apply_template
from engine.logprobs import CHUNK
from engine.packing import pack
from engine.weights import PRETRAINED
from model import GPT, GPTConfig

N_ALTERNATIVES = 3  # the likeliest tokens that stand beside the one that was taken


# --------------------------------------------------------------------------------------------------- the models

@dataclass
class Subject:
    """A model to look at, and what its checkpoint says about its training."""
    name: str
    policy: GPT
    stage: str                    # ppo, dpo, simpo, or "" for any other
    config: dict                  # the options of its run
    cfg: ppo.Config               # with what it samples, and for PPO its γ, λ, K and clipping
    label: str = ""               # the method and its settings, for the reader
    beta: float = 0.0             # β of PPO, DPO or SimPO
    value_model: GPT | None = None
    reward_fn: object = None      # PPO's r; None where it is not known
    span_rewards: finegrained.RewardModels | None = None


def no_reward(prompts, responses):
    return torch.zeros(grids.length_mask(responses).shape)


def load_subject(name, policy, config, sampling, tokenizer, data):
    """A Subject. sampling: the options of rollouts that all models share, as a dict."""
    subject = Subject(name, policy, "", config, ppo.Config(**sampling))
    if "kl_coef" in config:
        add_ppo(subject, sampling, tokenizer, data)
    elif "loss_type" in config or "gamma_beta_ratio" in config:
        subject.stage = "dpo" if "loss_type" in config else "simpo"
        subject.beta = config["beta"]
        subject.label = f"{'DPO' if subject.stage == 'dpo' else 'SimPO'}, β {subject.beta:g}"
    return subject


def add_ppo(subject, sampling, tokenizer, data):
    """Adds to the Subject of a run of ppo.py or finegrained.py its β, value model and reward."""
    config = subject.config
    checkpoint = load_checkpoint(subject.name)
    Config = finegrained.Config if "reward_models" in config else ppo.Config
    known = {field.name for field in fields(Config)}
    settings = {key: value for key, value in config.items() if key in known}
    subject.cfg = cfg = Config(**settings | sampling | {"k": config["k"]})
    subject.stage = "ppo"
    subject.beta = checkpoint["kl_coef"]
    subject.value_model = load_value_model(subject, checkpoint)
    method = "PPO" if cfg.advantage == "gae" else f"{cfg.advantage.upper()} of {cfg.k} answers"
    subject.label = f"{method}, β {subject.beta:.3g}"
    if cfg.advantage == "gae":
        subject.label += f", γ {cfg.gamma:g}, λ {cfg.lam:g}"
    if cfg.reward == "finegrained":
        subject.label += f", rewards for spans: w {cfg.w1:g}, {cfg.w2:g}, {cfg.w3:g}"
        subject.span_rewards = load_span_rewards(subject, tokenizer)
        subject.reward_fn = finegrained.finegrained_reward(subject.span_rewards, tokenizer, cfg)
    elif cfg.reward == "gold" and hasattr(data, "gold"):
        subject.reward_fn = ppo.text_reward(data.gold, tokenizer)
    elif cfg.reward == "rm" and cfg.reward_model:  # without one, train() was given a reward_fn of its own
        reward_model = load_reward_model(cfg.reward_model, tokenizer, normalize=cfg.normalize_reward)
        subject.reward_fn = ppo.reward_model_reward(reward_model.to(subject.policy.device), cfg)
    else:
        print0(f"{subject.name}: its reward is not known here: no r_t, δ_t and Â_t")


def load_value_model(subject, checkpoint):
    """The value model of a PPO checkpoint; None for a run without one."""
    cfg = subject.cfg
    if cfg.advantage != "gae":
        return None
    if cfg.share_value:
        return subject.policy
    shape = checkpoint["model_config"]
    if cfg.value_init == "reward" and cfg.reward == "rm" and cfg.reward_model:  # it began as the reward model
        shape = load_checkpoint(cfg.reward_model)["model_config"]
    value_model = GPT(GPTConfig(**shape | {"n_scalars": 1}))
    load_weights(value_model, checkpoint["value_model"], subject.name)
    return value_model.to(subject.policy.device)


def load_span_rewards(subject, tokenizer):
    """The reward models of a run of finegrained.py. Exits with one line if they are missing."""
    cfg = subject.cfg
    folder = cfg.reward_models or run_dir("rewards", cfg)
    parts = [folder]
    if not cfg.share_trunk:
        parts = [os.path.join(folder, axis) for axis in finegrained.AXES]
    for part in parts:  # finegrained.load_rewards would train them
        if not is_finished(part):
            raise SystemExit(f"{subject.name}: its reward models are not in {part}, or not finished")
    rewards = finegrained.load_rewards(cfg, subject.config["init"], tokenizer)
    rewards.models = [model.to(subject.policy.device) for model in rewards.models]
    return rewards


def is_run(name):
    return name not in PRETRAINED and not os.path.exists(os.path.join(name, "config.json"))


def with_reference(names):
    """The models to show, the reference first: a run that is named alone brings the one that it started from."""
    name = names[0]
    if len(names) > 1 or not is_run(name):
        return names
    load_model(name)  # a reward model, or no model at all, is the first thing to report
    config = load_checkpoint(name)["config"]
    init = config["init"] or run_dir("sft", SimpleNamespace(**config))
    if init == "scratch":  # it is its own reference: random weights tell nothing
        return names
    if is_run(init) and not checkpoint_files(init):
        raise SystemExit(f"{name}: the model that it started from, {init}, is not there; name a reference before it")
    return [init, name]


def check_references(subjects):
    """Prints for which runs the first model is not what they started from, so that their numbers differ."""
    digest = weights_digest(copy.deepcopy(subjects[0].policy).cpu())
    for subject in subjects[1:]:
        digests = load_checkpoint(subject.name).get("digests", {}) if subject.config else {}
        if digests.get("init", digest) != digest:
            print0(f"{subject.name} did not start from {subjects[0].name} as it is now: its KL, and with it r_t, "
                   "is not that of its training")


# -------------------------------------------------------------------------------------------------- the numbers

def evaluate_episodes(episodes, viewer, ref_policy, of_reference):
    """Steps 2 to 4 of ppo.py with `viewer` as the policy -> {key of common/token_page.py and more: (B, R)}

    of_reference: the responses are those of the reference.
    """
    cfg = viewer.cfg
    models = ppo.Models(viewer.policy, ref_policy, viewer.value_model, None)
    pieces = local_micro_batches(episodes.groups, cfg.micro_tokens, viewer.policy)
    ppo.evaluate_tokens(episodes, models, pieces, cfg)
    numbers = {
        "logprobs": episodes.logprobs,
        "ref_logprobs": episodes.ref_logprobs,
        "logratio": episodes.logprobs - episodes.ref_logprobs,
        "kl": episodes.kl,
        "entropy": episodes.entropy,
    }
    if viewer.beta:
        numbers["implicit"] = implicit_reward(episodes, viewer)
    if episodes.values is not None:
        numbers["value"] = episodes.values
    if viewer.reward_fn is None:
        return numbers

    # 3. and 4. The rewards are those before --whiten_rewards, the advantages those before whitening. The KL penalty is
    # that of the model that sampled, as in a rollout: the reference pays none.
    mask = episodes.mask
    sampler_logprobs = episodes.ref_logprobs if of_reference else episodes.logprobs
    numbers["reward"] = ppo.dense_reward(
        episodes.rewards, sampler_logprobs, episodes.ref_logprobs, episodes.ended, mask, viewer.beta,
        cfg.reward_clip, cfg.missing_eos_penalty)
    if cfg.advantage == "gae":
        # With λ = 0, Â_t = δ_t.
        numbers["delta"], _ = ppo.compute_gae(numbers["reward"], episodes.values, mask, cfg.gamma, lam=0.0)
        numbers["advantage"], _ = ppo.compute_gae(numbers["reward"], episodes.values, mask, cfg.gamma, cfg.lam)
    else:
        estimator = ppo.rloo_advantages if cfg.advantage == "rloo" else ppo.grpo_advantages
        numbers["advantage"] = ppo.group_advantages(numbers["reward"], mask, estimator, cfg.k)
    return numbers


def implicit_reward(episodes, viewer):
    """Each token's part of the reward that dpo_loss or simpo_loss gives a response: (B, R)"""
    length = episodes.mask.sum(1, keepdim=True)
    if viewer.stage == "simpo":
        return viewer.beta / length * episodes.logprobs
    reward = viewer.beta * (episodes.logprobs - episodes.ref_logprobs)
    return reward / length if viewer.config.get("ipo_average") else reward


@torch.no_grad()
def alternatives(policy, ref_policy, prompt, response, tokenizer, temperature):
    """The likeliest tokens beside each token of a response: their texts, π and π_ref, a list for each token."""
    result = {"tokens": [], "p": [], "ref_p": []}
    batch = pack([(prompt, [response])]).to(policy.device)
    pieces = zip(policy.states(batch).split(CHUNK), ref_policy.states(batch).split(CHUNK),
                 batch.target[:, None].split(CHUNK))
    for s, ref_s, y in pieces:
        p = policy.log_softmax(s, temperature).exp()
        ref_p = ref_policy.log_softmax(ref_s, temperature).exp()
        others = p.scatter(1, y, -1.0)  # the token itself is no alternative
        top = others.topk(N_ALTERNATIVES).indices
        result["tokens"] += [token_texts(tokenizer, ids) for ids in top.tolist()]
        result["p"] += p.gather(1, top).tolist()
        result["ref_p"] += ref_p.gather(1, top).tolist()
    return result


def token_texts(tokenizer, tokens):
    """The text of each token; bytes that are not a whole character are written as \\xe2."""
    return [tokenizer.decode_single_token_bytes(token).decode("utf-8", "backslashreplace") for token in tokens]


def judge_spans(viewer, prompts, responses, tokenizer):
    """What finegrained.py's reward models say of each segment: a list of dicts for each response."""
    weights = {"relevance": "w1", "factuality": "w2", "completeness": "w3"}
    R, soft = {}, {}  # of each axis (B, R): R_k on the last token of each segment, and 2p − 1 there
    for axis, weight in weights.items():
        cfg = replace(viewer.cfg, **dict.fromkeys(weights.values(), 0.0) | {weight: 1.0})
        R[axis] = finegrained.finegrained_reward(viewer.span_rewards, tokenizer, cfg)(prompts, responses)
        soft_cfg = replace(cfg, soft=True)
        soft[axis] = finegrained.finegrained_reward(viewer.span_rewards, tokenizer, soft_cfg)(prompts, responses)
    result = []
    for i, response in enumerate(responses):
        _, ends = decode_with_ends(tokenizer, response)
        spans = []
        for segment in finegrained.cut_response(tokenizer, response):
            axis, last = segment.axis, segment.token
            span = {"axis": axis, "first": min(bisect_right(ends, segment.start), last), "last": last,
                    "judgement": R[axis][i, last].item(), "weight": getattr(viewer.cfg, weights[axis]), "p_good": None}
            if axis != "completeness":
                span["p_good"] = (soft[axis][i, last].item() + 1) / 2
            spans.append(span)
        result.append(spans)
    return result


# ----------------------------------------------------------------------------------------------------- the rows

@dataclass
class Setting:
    """What all rows have in common."""
    ref_policy: GPT
    tokenizer: object
    data: object
    reward_model: GPT | None


def rows_of(episodes, viewer, setting, every=1, of_reference=False):
    """A dict for every `every`-th response of the episodes: its tokens and all of their numbers."""
    tokenizer, data = setting.tokenizer, setting.data
    numbers = evaluate_episodes(episodes, viewer, setting.ref_policy, of_reference)
    rows = []
    prompts, responses = episodes.prompts[::every], episodes.responses[::every]
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        row = {"numbers_of": viewer.name, "tokens": token_texts(tokenizer, response), "quantities": {}, "end": {}}
        for key, grid in numbers.items():
            row["quantities"][key] = grid[i * every, :len(response)].tolist()
        row["alternatives"] = alternatives(
            viewer.policy, setting.ref_policy, prompt, response, tokenizer, viewer.cfg.temperature)
        rows.append(row)

    # At the response's end: the reward model's score, the true reward and its axes.
    if setting.reward_model is not None:
        groups = [(prompt, [response]) for prompt, response in zip(prompts, responses)]
        for row, score in zip(rows, score_groups(setting.reward_model, groups).tolist()):
            row["end"]["score"] = score
    for row, prompt, response in zip(rows, prompts, responses):
        texts = tokenizer.decode(prompt), evaluate.decode(response, tokenizer)
        if hasattr(data, "gold"):
            row["end"]["gold"] = data.gold(*texts)
        if hasattr(data, "axes"):
            row["end"] |= data.axes(*texts)
    if viewer.span_rewards is not None:
        for row, spans in zip(rows, judge_spans(viewer, prompts, responses, tokenizer)):
            row["spans"] = spans
    return rows


def answer_rows(writer, viewer, prompts, setting):
    """The rows of `writer`'s answers to prompts (lists of ids), with the numbers of `viewer`."""
    torch.manual_seed(evaluate.ANSWER_SEED)
    cfg = viewer.cfg
    episodes = ppo.rollout(writer.policy, prompts, viewer.reward_fn or no_reward, setting.tokenizer, cfg)
    return rows_of(episodes, viewer, setting, cfg.k, of_reference=writer.policy is setting.ref_policy)


def pair_rows(viewer, groups, setting):
    """A run of dpo.py or simpo.py on pairs (prompt_ids, [chosen_ids, rejected_ids]): a dict for each."""
    prompts, responses = [], []
    for prompt, pair in groups:
        prompts += [prompt.tolist()] * 2
        responses += [response.tolist() for response in pair]
    mask = grids.length_mask(responses)
    ended = torch.tensor([response[-1] == setting.tokenizer.eot_token for response in responses])
    episodes = ppo.Episodes(prompts, responses, ended, mask, torch.zeros(mask.shape), None, k=2)
    rows = rows_of(episodes, viewer, setting)
    logp, ref_logp, length = episodes.logprobs.sum(1), episodes.ref_logprobs.sum(1), mask.sum(1)  # (2B,) each
    if viewer.stage == "dpo":
        if viewer.config["ipo_average"]:
            logp, ref_logp = logp / length, ref_logp / length
        _, chosen, rejected = dpo.dpo_loss(logp[0::2], logp[1::2], ref_logp[0::2], ref_logp[1::2], viewer.beta)
    else:
        _, chosen, rejected = simpo.simpo_loss(
            logp[0::2], logp[1::2], length[0::2], length[1::2], viewer.beta, gamma=0.0)  # no part of the rewards
    pairs = []
    for i, (r_w, r_l) in enumerate(zip(chosen.tolist(), rejected.tolist())):
        order = "right" if r_w > r_l else "wrong" if r_w < r_l else "a tie"
        pairs.append({"model": viewer.name, "chosen": rows[2 * i], "rejected": rows[2 * i + 1],
                      "chosen_reward": r_w, "rejected_reward": r_l, "order": order})
    return pairs


def held_out_pairs(data, n, max_len, tokenizer):
    """The best and the worst response of n validation comparisons, as ids: [(prompt, [chosen, rejected]), …]"""
    examples = []
    comparisons = data.comparisons("validation") if hasattr(data, "comparisons") else []
    for prompt, responses, ranks in comparisons:
        best, worst = ranks.index(min(ranks)), ranks.index(max(ranks))
        if ranks[best] < ranks[worst]:
            examples.append((prompt, [responses[best], responses[worst]]))
    return encode_groups(tokenizer, examples[:n], max_len)


# ----------------------------------------------------------------------------------------------------- the page

def write(args):
    """Does what --page and --json of sample.py ask for; args are its arguments."""
    names = with_reference(args.checkpoints)
    models, tokenizer, configs = evaluate.load_models(names, args.data)
    data = evaluate.load_data(args, configs)
    prompts = held_out_prompts(names, models, data, args.n, tokenizer)
    sampling = shared_sampling(names, models, configs, prompts, args.max_new_tokens)
    subjects = []
    for (name, policy), config in zip(models, configs):
        subjects.append(load_subject(name, policy, config, sampling, tokenizer, data))
    named = [args.reward_model, *(config.get("reward_model") for config in configs)]
    path = next(filter(None, named), None)
    reward_model = load_reward_model(path, tokenizer).to(models[0][1].device) if path else None
    setting = Setting(models[0][1], tokenizer, data, reward_model)
    places = [path for path in (args.page, args.json) if path is not None]
    for path in places:
        with append_to(path):
            pass  # a place that cannot be written is an error now, not after the work
    check_references(subjects)

    content = {
        "models": [{"name": subject.name, "label": subject.label} for subject in subjects],
        "temperature": sampling["temperature"],
        "prompts": answers(subjects, prompts, setting),
        "pairs": pairs_of(subjects, args.n, setting),
    }
    if args.json is not None:
        with write_atomically(args.json) as f:
            json.dump(content, f, indent=1)
    if args.page is not None:
        write_page(args.page, content)
    print0(f"{len(prompts)} prompts, {len(subjects)} models -> {' and '.join(places)}")


def held_out_prompts(names, models, data, n, tokenizer):
    """The first n held-out prompts as ids. They are turns if one of the models was trained on turns."""
    texts = data.prompts("test")[:n]
    if not texts:
        raise SystemExit("--page shows answers to held-out prompts, and there are none in these data")
    templates = [template_of_checkpoint(name) for name in names]
    template = "turns" if "turns" in templates else "plain"
    shortest = min((model for _, model in models), key=lambda model: model.config.block_size)
    return evaluate.encode_cut(apply_template(template, texts), shortest, tokenizer)


def shared_sampling(names, models, configs, prompts, max_new_tokens):
    """The options that all models sample with: PPO's, if one of them is a run of PPO."""
    context = min(model.config.block_size for _, model in models)
    limits = [max_new_tokens, context - max(map(len, prompts))]
    limits += [config["max_new_tokens"] for config in configs if "max_new_tokens" in config]
    return {"max_new_tokens": min(limits), "temperature": evaluate.table_temperature(names, configs)}


def answers(subjects, prompts, setting):
    """For each prompt, the answers of all models."""
    entries = [{"prompt": setting.tokenizer.decode(prompt), "answers": []} for prompt in prompts]
    for writer in subjects:
        # The reference beside itself would be all zeros: show what the last model makes of its answers.
        viewer = subjects[-1] if writer is subjects[0] else writer
        for entry, row in zip(entries, answer_rows(writer, viewer, prompts, setting)):
            entry["answers"].append({"model": writer.name} | row)
    return entries


def pairs_of(subjects, n, setting):
    """For each of n held-out pairs, what the models say that were trained on pairs."""
    viewers = [subject for subject in subjects if subject.stage in ("dpo", "simpo")]
    if not viewers:
        return []
    max_len = min(subject.config["max_len"] for subject in viewers)
    groups = held_out_pairs(setting.data, n, max_len, setting.tokenizer)
    if not groups:
        print0("no held-out pairs to show")
        return []
    entries = [{"prompt": setting.tokenizer.decode(prompt.tolist()), "models": []} for prompt, _ in groups]
    for viewer in viewers:
        for entry, pair in zip(entries, pair_rows(viewer, groups, setting)):
            entry["models"].append(pair)
    return entries
