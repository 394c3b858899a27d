"""The numbers of the page: of each token and each span of an answer, and of a pair of answers."""
from bisect import bisect_right
from dataclasses import dataclass, replace

import torch

import dpo
import evaluate
import finegrained
import ppo
import segment_reward
import simpo
from common import grids
from common.batches import all_micro_batches
from common.scoring import scores_of_responses
from data import decode, encode_groups
from data.segments import decode_with_ends
from engine.logprobs import CHUNK
from engine.packing import pack
from model import GPT

N_ALTERNATIVES = 3  # the likeliest tokens that stand beside the one that was taken
WEIGHTS = {"relevance": "w1", "factuality": "w2", "completeness": "w3"}  # of finegrained.py's axes


@dataclass
class Setting:
    """What all rows have in common."""
    ref_policy: GPT
    tokenizer: object
    data: object
    reward_model: GPT | None


# ------------------------------------------------------------------------------------------ answers and pairs

def answer_rows(writer, viewer, prompts, setting):
    """The rows of `writer`'s answers to prompts (lists of ids), with the numbers of `viewer`; see `rows`."""
    torch.manual_seed(evaluate.ANSWER_SEED)
    k = viewer.cfg.k
    episodes = ppo.rollout(
        writer.policy, prompts, viewer.reward_fn or no_reward, setting.tokenizer, viewer.cfg)
    is_reference = writer.policy is setting.ref_policy
    numbers = evaluate_episodes(episodes, viewer, setting.ref_policy, is_reference)
    first = range(0, len(episodes.responses), k)  # of each prompt's K answers, one is shown
    return rows(first, episodes, numbers, viewer, setting)


def no_reward(prompts, responses):
    return torch.zeros(grids.length_mask(responses).shape)


def held_out_pairs(data, n, max_len, tokenizer):
    """The best and the worst response of n validation comparisons, as ids: [(prompt, [best, worst]), …]"""
    examples = []
    comparisons = data.comparisons("validation") if hasattr(data, "comparisons") else []
    for prompt, responses, ranks in comparisons:
        best = ranks.index(min(ranks))
        worst = ranks.index(max(ranks))
        if ranks[best] < ranks[worst]:
            examples.append((prompt, [responses[best], responses[worst]]))
    groups = encode_groups(tokenizer, examples[:n], max_len)
    return [(prompt.tolist(), [response.tolist() for response in pair]) for prompt, pair in groups]


def pair_rows(viewer, groups, setting):
    """What a run of dpo.py or simpo.py makes of pairs (prompt_ids, [chosen_ids, rejected_ids]): dicts."""
    prompts = grids.repeat_each([prompt for prompt, _ in groups], 2)
    responses = []
    for _, pair in groups:
        responses += pair
    mask = grids.length_mask(responses)
    ended = torch.tensor([response[-1] == setting.tokenizer.eot_token for response in responses])
    rewards = no_reward(prompts, responses)
    episodes = ppo.Episodes(prompts, responses, ended, mask, rewards, sampler_logprobs=None, k=2)
    numbers = evaluate_episodes(episodes, viewer, setting.ref_policy)
    all_rows = rows(range(len(responses)), episodes, numbers, viewer, setting)

    logp = episodes.logprobs.sum(1)          # (2B,): chosen, rejected, chosen, …
    ref_logp = episodes.ref_logprobs.sum(1)
    length = mask.sum(1)
    if viewer.stage == "dpo":
        if viewer.config.get("ipo_average"):
            logp = logp / length
            ref_logp = ref_logp / length
        _, chosen_reward, rejected_reward = dpo.dpo_loss(
            logp[0::2], logp[1::2], ref_logp[0::2], ref_logp[1::2], viewer.beta)
    else:
        _, chosen_reward, rejected_reward = simpo.simpo_loss(  # γ is in the loss, not in the rewards
            logp[0::2], logp[1::2], length[0::2], length[1::2], viewer.beta, gamma=0.0)

    pairs = []
    for i in range(len(groups)):
        pair = {
            "model": viewer.name,
            "chosen": all_rows[2 * i],
            "rejected": all_rows[2 * i + 1],
            "chosen_reward": chosen_reward[i].item(),
            "rejected_reward": rejected_reward[i].item(),
        }
        pair["order"] = order(pair["chosen_reward"], pair["rejected_reward"])
        pairs.append(pair)
    return pairs


def order(chosen_reward, rejected_reward):
    if chosen_reward == rejected_reward:
        return "a tie"
    return "right" if chosen_reward > rejected_reward else "wrong"


def rows(indices, episodes, numbers, viewer, setting):
    """A dict for some responses of the episodes: tokens, quantities, alternatives, end and spans.

    numbers: those of evaluate_episodes, a grid each.
    """
    tokenizer, data = setting.tokenizer, setting.data
    prompts = [episodes.prompts[i] for i in indices]
    responses = [episodes.responses[i] for i in indices]
    result = []
    for i, prompt, response in zip(indices, prompts, responses):
        texts = tokenizer.decode(prompt), decode(tokenizer, response)
        end = {}  # what is known at the response's end
        if hasattr(data, "gold"):
            end["gold"] = data.gold(*texts)
        if hasattr(data, "axes"):
            end |= data.axes(*texts)
        result.append({
            "numbers_of": viewer.name,
            "tokens": token_texts(tokenizer, response),
            "quantities": {key: grid[i, :len(response)].tolist() for key, grid in numbers.items()},
            "alternatives": alternatives(viewer, setting, prompt, response),
            "end": end,
        })
    if setting.reward_model is not None:
        groups = [(prompt, [response]) for prompt, response in zip(prompts, responses)]
        scores = scores_of_responses(setting.reward_model, groups)
        for row, score in zip(result, scores.tolist()):
            row["end"]["score"] = score
    if viewer.span_rewards is not None:
        for row, spans in zip(result, judge_spans(viewer, prompts, responses, tokenizer)):
            row["spans"] = spans
    return result


# -------------------------------------------------------------------------------------------- of each token

def evaluate_episodes(episodes, viewer, ref_policy, of_reference=False):
    """Steps 2 to 4 of ppo.py with `viewer` as the policy -> {key: (B, R)}, with the keys of page.py.

    of_reference: the responses are samples of the reference.
    """
    # 2. Evaluate every token.
    cfg = viewer.cfg
    models = ppo.Models(viewer.policy, ref_policy, viewer.value_model, reward_model=None)
    micro_batches = all_micro_batches(episodes.groups, cfg.micro_tokens, viewer.policy)
    ppo.evaluate_tokens(episodes, models, micro_batches, cfg)
    numbers = {
        "logprobs": episodes.logprobs,
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

    # 3. The reward minus the KL penalty of the model that sampled, before --whiten_rewards.
    mask = episodes.mask
    sampler_logprobs = episodes.ref_logprobs if of_reference else episodes.logprobs
    rewards = ppo.dense_reward(
        episodes.rewards, sampler_logprobs, episodes.ref_logprobs, episodes.ended, mask,
        viewer.beta, cfg.reward_clip, cfg.missing_eos_penalty)
    numbers["reward"] = rewards

    # 4. Advantages, before they are whitened. At λ = 0, Â_t is δ_t.
    if cfg.advantage == "gae":
        numbers["delta"], _ = ppo.compute_gae(rewards, episodes.values, mask, cfg.gamma, lam=0.0)
        numbers["advantage"], _ = ppo.compute_gae(rewards, episodes.values, mask, cfg.gamma, cfg.lam)
    else:
        estimator = ppo.rloo_advantages if cfg.advantage == "rloo" else ppo.grpo_advantages
        numbers["advantage"] = ppo.group_advantages(rewards, mask, estimator, cfg.k)
    return numbers


def implicit_reward(episodes, viewer):
    """Each token's part of the reward that dpo_loss or simpo_loss gives a response: (B, R)"""
    length = episodes.mask.sum(1, keepdim=True)
    if viewer.stage == "simpo":
        return viewer.beta / length * episodes.logprobs
    reward = viewer.beta * (episodes.logprobs - episodes.ref_logprobs)
    if viewer.config.get("ipo_average"):
        reward = reward / length
    return reward


@torch.no_grad()
def alternatives(viewer, setting, prompt, response):
    """The likeliest other tokens at each token of a response: their texts, π and π_ref, lists of lists."""
    policy, ref_policy = viewer.policy, setting.ref_policy
    temperature = viewer.cfg.temperature
    result = {"tokens": [], "p": [], "ref_p": []}
    batch = pack([(prompt, [response])]).to(policy.device)
    states = policy.states(batch).split(CHUNK)
    ref_states = ref_policy.states(batch).split(CHUNK)
    for s, ref_s, y in zip(states, ref_states, batch.target[:, None].split(CHUNK)):
        p = policy.log_softmax(s, temperature).exp()              # (n, V)
        ref_p = ref_policy.log_softmax(ref_s, temperature).exp()  # (n, V)
        others = p.scatter(1, y, -1.0)  # the token itself is no alternative
        likeliest = others.topk(N_ALTERNATIVES).indices  # (n, N_ALTERNATIVES)
        result["tokens"] += [token_texts(setting.tokenizer, ids) for ids in likeliest.tolist()]
        result["p"] += p.gather(1, likeliest).tolist()
        result["ref_p"] += ref_p.gather(1, likeliest).tolist()
    return result


def token_texts(tokenizer, tokens):
    """The text of each token; a byte that is only a part of a character is written like \\xe2."""
    texts = []
    for token in tokens:
        texts.append(tokenizer.decode_single_token_bytes(token).decode("utf-8", "backslashreplace"))
    return texts


# --------------------------------------------------------------------------------------------- of each span

def judge_spans(viewer, prompts, responses, tokenizer):
    """What the reward models of finegrained.py say of each segment: for each response a list of dicts.

    A segment from token `first` to `last` has the judgement R_k, and the axis has the weight w_k in the run.
    p_good: the probability that the segment is good; None for completeness.
    """
    def on_last_tokens(axis, soft):
        """R_k of every segment of an axis, on its last token: (B, R)"""
        weights = dict.fromkeys(WEIGHTS.values(), 0.0) | {WEIGHTS[axis]: 1.0}
        cfg = replace(viewer.cfg, soft=soft, **weights)
        return finegrained.finegrained_reward(viewer.span_rewards, tokenizer, cfg)(prompts, responses)

    judgements = {axis: on_last_tokens(axis, viewer.cfg.soft) for axis in WEIGHTS}
    soft = {axis: on_last_tokens(axis, True) for axis in ("relevance", "factuality")}  # 2p − 1
    result = []
    for i, response in enumerate(responses):
        _, ends = decode_with_ends(tokenizer, response)  # characters complete after each token
        spans = []
        for axis, last, start, _ in segment_reward.cut_response(tokenizer, response):
            p_good = None
            if axis in soft:
                p_good = (soft[axis][i, last].item() + 1) / 2
            spans.append({
                "axis": axis,
                "first": min(bisect_right(ends, start), last),
                "last": last,
                "judgement": judgements[axis][i, last].item(),
                "weight": getattr(viewer.cfg, WEIGHTS[axis]),
                "p_good": p_good,
            })
        result.append(spans)
    return result
