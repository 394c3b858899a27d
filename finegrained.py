"""Fine-Grained RLHF (Wu et al. 2023, arXiv:2306.01693): a reward for each segment, along each of three axes.

Instead of one reward for the whole response, three reward models (relevance, factuality, completeness)
score it segment by segment, each at its own granularity. With the response y cut into L_k segments for the
k-th reward model, the reward at token t is

    r_t = Σ_k Σ_{j ≤ L_k} 1(t = T_j^k) · w_k · R_k(x, y, j)                                         (§2)

where T_j^k is the last token of the j-th segment. R_1, relevance, judges sub-sentences; R_2, factuality,
judges sentences; both give +1 or −1 (with --soft, a number in between). R_3, completeness, judges the whole
response: it is the normalized score of a model trained on comparisons. In the paper, r_t also contains the
KL penalty, −β log π(y_t|s_t)/π_ref(y_t|s_t). Here ppo.py subtracts it, after clipping each token's sum to
±reward_clip, if that is set.

This page computes r_t and hands it to PPO. segment_reward.py cuts responses into segments, and trains the
reward models that judge them.

    python finegrained.py                          the animals world, from scratch
    python finegrained.py --reward=rm              the baseline: one reward per response
    python finegrained.py qa_feedback              the paper's data, with GPT-2

By default the three reward models are three heads on one trunk; the paper trains three models, as
--share_trunk=False does.

The authors' code differs: it samples at τ = 0.7 from the 20 likeliest tokens, draws four responses to a
prompt, whitens rewards, weights the value loss by 1, does not clip gradients, runs SFT on other questions
than RL, and finds sentences with spaCy. segment_reward.py lists what its reward models leave out.
"""
import os
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch

import ppo
import reward
from common import checkpoints
from common.dist import print0
from common.models import load_model
from common.options import AtLeast, NonNegativeFloat, PositiveInt, parse
from common.prerequisites import run_dir
from common.run import Run
from segment_reward import AXES, Mark, cut_response, judge_all, train_rewards


@dataclass
class Config(ppo.Config):
    reward: Literal["finegrained", "rm", "gold"] = "finegrained"  # rm, gold: one scalar per response (ppo.py)
    reward_models: str | None = None  # their folder; None: out/rewards-RECIPE. Trained first if missing
    share_trunk: bool = True          # three heads on one trunk; False: three models
    value_init: Literal["reward", "sft"] = "sft"  # the value model's start; "reward" needs --reward=rm
    w1: float = 0.3                   # weight of relevance: ±w1 for each sub-sentence
    w2: float = 0.3                   # weight of factuality: ±w2 for each sentence
    w3: float = 0.3                   # weight of completeness: ±w3 for a score one std from the mean
    soft: bool = False                # 2p − 1 instead of ±1, with p the probability that the segment is good
    reward_steps: PositiveInt = 2000  # optimizer steps of the reward models
    reward_batch_size: Annotated[int, AtLeast(4)] = 64  # responses with spans a step; ¼ as many comparisons
    reward_lr: NonNegativeFloat = 2e-3  # peak learning rate of the reward models


RECIPES = {
    # w1 to w3 and kl_coef are those of the authors' code; the rest is our choice, for GPT-2
    "qa_feedback": dict(data="qa_feedback", w1=0.3, w2=0.5, w3=0.3, kl_coef=0.3, max_new_tokens=200,
                        steps=500, batch_size=64, max_len=1024, lr=3e-6, value_lr=1e-5, warmup=10,
                        ckpt_every=50, eval_n=64, reward_steps=700, reward_lr=1e-5),
}


# ------------------------------------------------------------------------------------------- the reward of §2

@dataclass
class RewardModels:
    models: list              # one with three heads, or three with one
    axes: list                # what each head judges, in the order of the heads
    completeness_mean: float  # of the completeness scores on training comparisons
    completeness_std: float


def finegrained_reward(reward_models, tokenizer, cfg):
    """A reward_fn for ppo.train: r_t of §2. reward_models: RewardModels."""
    weights = {"relevance": cfg.w1, "factuality": cfg.w2, "completeness": cfg.w3}  # w_k

    def reward_of(axis, score):
        """R_k of a segment, from its score."""
        if axis == "completeness":
            return (score - reward_models.completeness_mean) / reward_models.completeness_std
        if cfg.soft:
            return 2 * score.sigmoid() - 1
        return score.sign()

    def reward_fn(prompts, responses):
        """B prompts and responses (token ids) -> r_t of every response token, 0 on padding: (B, R)."""
        # Segment: cut each response, differently for each axis. A Mark is the axis of a segment and T_j^k,
        # its last token, counted in the response: the reward model is read there, and the reward paid there.
        marks = []  # marks[i] are those of responses[i]
        for response in responses:
            # Segments of an axis of weight 0 are left out.
            segments = cut_response(tokenizer, response)
            marks.append([Mark(s.axis, s.token) for s in segments if weights[s.axis]])

        # Judge: scores[i] has a score for each of marks[i], a logit for relevance and factuality. (A group is
        # a prompt with a list of responses; in training there can be several, here it is one.)
        groups = [(prompt, [response]) for prompt, response in zip(prompts, responses)]
        scores = judge_all(reward_models.models, groups, marks, reward_models.axes, cfg.micro_tokens)

        # Weigh and place.
        longest = max(map(len, responses))
        r = torch.zeros(len(responses), longest)  # (B, R)
        for i in range(len(responses)):
            for mark, score in zip(marks[i], scores[i]):
                # Add w_k R_k at T_j^k. Segments of different axes can end at the same token.
                r[i, mark.token] += weights[mark.axis] * reward_of(mark.axis, score)
        return r

    return reward_fn


# ---------------------------------------------------------------------- loading or training the reward models

def reward_folders(cfg):
    """A dict: the folder of each reward model -> the axes of its heads."""
    out = cfg.reward_models or run_dir("rewards", cfg)
    if cfg.share_trunk:
        return {out: list(AXES)}
    return {os.path.join(out, axis): [axis] for axis in AXES}


def load_rewards(cfg, init, tokenizer):
    """Loads the frozen reward models, on the CPU; those that are missing are trained first."""
    loaded = RewardModels([], [], 0.0, 1.0)
    for folder, axes in reward_folders(cfg).items():
        checkpoint = load_or_train(folder, axes, init, cfg)
        model, its_tokenizer = load_model(folder, cfg, require_policy=False)
        if its_tokenizer.name != tokenizer.name:
            raise SystemExit(f"{folder}: this reward model has the tokenizer {its_tokenizer.name}, "
                             f"but the policy {init} has {tokenizer.name}")
        loaded.models.append(model.requires_grad_(False))
        loaded.axes += axes
        if "completeness" in axes:  # what R_3 is normalized with
            loaded.completeness_mean = checkpoint["completeness_mean"]
            loaded.completeness_std = checkpoint["completeness_std"]
    return loaded


def load_or_train(folder, axes, init, cfg):
    """The checkpoint of a reward model for these axes, which is trained first if missing or unfinished."""
    checkpoint = None
    if checkpoints.checkpoint_files(folder):
        checkpoint = checkpoints.load_checkpoint(folder)
        if checkpoint.get("axes") != axes:
            raise SystemExit(f"{folder}: not a reward model for {', '.join(axes)} "
                             "(--reward_models=FOLDER trains them elsewhere)")
        if checkpoint["step"] == checkpoint["config"]["steps"]:
            return checkpoint  # finished: used as it is, whatever this run's options say
    print0(f"no finished reward model for {', '.join(axes)} in {folder}: training it first")
    # Settings; later ones win. First those of reward.py's recipe, then this run's --reward_steps and so on.
    settings = {"recipe": cfg.recipe, **reward.RECIPES.get(cfg.recipe, {})}
    settings |= {"steps": cfg.reward_steps, "batch_size": cfg.reward_batch_size, "lr": cfg.reward_lr}
    # Last, the settings that are the same as for PPO. The seed is not among them, so runs of PPO with other
    # seeds share their reward models.
    for name in ("data", "data_dir", "device", "compile", "dtype", "checkpoint_blocks", "fsdp", "max_len",
                 "micro_tokens", "n_layer", "n_head", "n_embd"):
        settings[name] = getattr(cfg, name)
    train_rewards(reward.Config(**settings, out=folder, resume=checkpoint is not None), init, axes)
    return checkpoints.load_checkpoint(folder)


# ---------------------------------------------------------------------------------------------------- the run

def train(cfg):
    """Runs the stage, after training the models it needs if they are missing. Returns the trained policy."""
    if cfg.reward != "finegrained":  # the baselines: PPO as it is
        stage = "holistic" if cfg.reward == "rm" else cfg.reward
        return ppo.train(replace(cfg, out=cfg.out or run_dir(stage, cfg)))

    run = Run("finegrained", cfg)
    data = run.data
    if not hasattr(data, "spans"):
        raise SystemExit(f"--data={cfg.data} has no span feedback")
    ppo.check_settings(cfg, data, has_reward_fn=True)  # now, and not after the reward models are trained
    init = cfg.init or run.train_if_missing("sft")

    # The three reward models, then PPO from their rewards.
    tokenizer = run.load_model(init)[1]  # the model is not kept: ppo.train loads its own
    reward_models = load_rewards(cfg, init, tokenizer)
    reward_models.models = [run.prepare(model) for model in reward_models.models]
    reward_fn = finegrained_reward(reward_models, tokenizer, cfg)
    cfg = replace(cfg, out=run.out)
    del run  # frees the checkpoint that --resume loaded; ppo.train opens a Run of its own in this folder
    return ppo.train(cfg, reward_fn)  # without --init, it finds the same SFT model


if __name__ == "__main__":
    train(parse(Config, RECIPES))
