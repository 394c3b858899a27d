"""The models of the page: what a checkpoint says about its training, and where its reference is."""
from dataclasses import dataclass, fields
from types import SimpleNamespace

import finegrained
import ppo
from common.checkpoints import checkpoint_files, is_finished, load_checkpoint, load_weights
from common.digests import weights_digest
from common.dist import print0
from common.models import load_model, load_reward_model
from common.prerequisites import run_dir
from engine.weights import is_pretrained
from model import GPT, GPTConfig


@dataclass
class Subject:
    """A model to look at, and what its numbers are computed with."""
    name: str
    policy: GPT
    config: dict                    # the options of its run; {} if it is none
    cfg: ppo.Config                 # how it samples; of a run of PPO also γ, λ, K and what changes the reward
    stage: str = ""                 # ppo, dpo, simpo, or "" for any other
    label: str = ""                 # the method and its settings, for the reader
    beta: float = 0.0               # β of PPO, DPO or SimPO
    value_model: GPT | None = None  # V
    reward_fn: object = None        # PPO's r; None where it is not known
    span_rewards: finegrained.RewardModels | None = None


def load_subject(name, policy, config, sampling, tokenizer, data):
    """A Subject. sampling: the options of rollouts that all models share, as a dict."""
    subject = Subject(name, policy, config, ppo.Config(**sampling))
    if "kl_coef" in config:
        add_ppo(subject, sampling, tokenizer, data)
    elif "precompute_ref" in config:  # dpo.py, or a copy of it with another loss
        subject.stage = "dpo"
        subject.beta = config["beta"]
        subject.label = f"DPO, β {subject.beta:g}"
        if config.get("loss_type", "sigmoid") != "sigmoid":
            subject.label += f", {config['loss_type']}"
    elif "gamma_beta_ratio" in config:
        subject.stage = "simpo"
        subject.beta = config["beta"]
        subject.label = f"SimPO, β {subject.beta:g}"
    return subject


def add_ppo(subject, sampling, tokenizer, data):
    """Adds to a run of ppo.py or finegrained.py its β, value model and reward."""
    checkpoint = load_checkpoint(subject.name)
    Config = finegrained.Config if "reward_models" in subject.config else ppo.Config
    names = {field.name for field in fields(Config)}
    settings = {name: value for name, value in subject.config.items() if name in names}
    cfg = Config(**settings | sampling)
    subject.cfg = cfg
    subject.stage = "ppo"
    subject.beta = checkpoint["kl_coef"]
    if cfg.advantage == "gae":
        subject.value_model = load_value_model(subject, checkpoint)
        subject.label = f"PPO, β {subject.beta:.3g}, γ {cfg.gamma:g}, λ {cfg.lam:g}"
    else:
        subject.label = f"{cfg.advantage.upper()} of {cfg.k} answers, β {subject.beta:.3g}"
    if cfg.reward == "finegrained":
        subject.label += f", rewards for spans: w {cfg.w1:g}, {cfg.w2:g}, {cfg.w3:g}"
        subject.span_rewards = load_span_rewards(subject, tokenizer)
        subject.reward_fn = finegrained.finegrained_reward(subject.span_rewards, tokenizer, cfg)
    elif cfg.reward == "gold" and hasattr(data, "gold"):
        subject.reward_fn = ppo.text_reward(data.gold, tokenizer)
    elif cfg.reward == "rm" and cfg.reward_model:
        reward_model = load_reward_model(cfg.reward_model, tokenizer, normalize=cfg.normalize_reward)
        subject.reward_fn = ppo.reward_model_reward(reward_model.to(subject.policy.device), cfg)
    else:  # somebody called ppo.train with a reward_fn
        print0(f"{subject.name}: its reward is not known here: no r_t, δ_t and Â_t")


def load_value_model(subject, checkpoint):
    """The value model of a run of PPO, which may be its policy."""
    cfg = subject.cfg
    if cfg.share_value:
        return subject.policy
    shape = checkpoint["model_config"]
    if cfg.value_init == "reward" and cfg.reward == "rm" and cfg.reward_model:  # it began as the reward model
        shape = load_checkpoint(cfg.reward_model)["model_config"]
    value_model = GPT(GPTConfig(**shape | {"n_scalars": 1}))
    load_weights(value_model, checkpoint["value_model"], subject.name)
    return value_model.to(subject.policy.device)


def load_span_rewards(subject, tokenizer):
    """The reward models of a run of finegrained.py; exits with one line if they are missing."""
    cfg = subject.cfg
    for folder in finegrained.reward_folders(cfg):
        if not is_finished(folder):  # finegrained.load_rewards would train it
            raise SystemExit(f"{subject.name}: its reward models are not in {folder}, or not finished")
    rewards = finegrained.load_rewards(cfg, cfg.init, tokenizer)
    rewards.models = [model.to(subject.policy.device) for model in rewards.models]
    return rewards


# ------------------------------------------------------------------------------------------------ references

def with_reference(names):
    """The models to show, the reference first: a run named alone brings the one that it had in training."""
    name = names[0]
    if len(names) > 1 or is_pretrained(name):
        return names
    load_model(name)  # a reward model, or no model at all, is an error of its own
    config = load_checkpoint(name)["config"]
    init = config.get("ref") or config["init"] or run_dir("sft", SimpleNamespace(**config))
    if init == "scratch":  # random weights are no reference: it is its own
        return names
    if not is_pretrained(init) and not checkpoint_files(init):
        raise SystemExit(f"{name}: its reference, {init}, is not there; name a reference before it")
    return [init, name]


def check_reference(subject, reference):
    """Prints a warning if the reference is not the model that a run started from, and had no other."""
    if not subject.config or subject.config.get("ref"):
        return
    digests = load_checkpoint(subject.name).get("digests", {})
    if "init" in digests and digests["init"] != weights_digest(reference.policy):
        print0(f"{subject.name} did not start from {reference.name} as it is now: its KL, and with it r_t, "
               "is not that of its training")
