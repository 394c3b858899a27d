"""Models by name: new ones, runs' checkpoints, GPT-2, folders in the Hugging Face format."""
import torch

from common.checkpoints import load_checkpoint, load_weights
from data import dataset, get_tokenizer
from engine.weights import PRETRAINED, check_vocabulary, is_pretrained
from model import GPT, GPTConfig


def load_model(init, cfg=None, require_policy=True):
    """Returns a GPT on the CPU and its tokenizer.

    init: a run's folder or a ckpt.pt; a published name ("gpt2", …) or a folder in the Hugging Face format; or
    "scratch": new weights of cfg's shape, seeded by cfg.seed, with the tokenizer of cfg's data. Exits with a
    one-line message if there is no such model, if its context is shorter than cfg.max_len, or if it is a
    reward model although a policy is needed.
    """
    model, tokenizer_name = load_model_only(init, cfg, require_policy)
    return model, get_tokenizer(tokenizer_name)


def load_model_only(init, cfg=None, require_policy=False):
    """load_model with only the name of the tokenizer, which may have to be fetched."""
    if init == "scratch" and cfg is None:
        raise SystemExit("scratch: new weights, which only --init of a training run can name")
    if init == "scratch":
        model, tokenizer_name = new_model(cfg)
    elif is_pretrained(init):
        model = GPT.from_pretrained(init)
        tokenizer_name = "gpt2"
        if model.config.vocab_size != GPTConfig.vocab_size:
            raise SystemExit(f"{init}: a vocabulary of {model.config.vocab_size} is not GPT-2's, which has "
                             "50257 tokens; up to 50304, the rows beyond them are left out")
        if init not in PRETRAINED:
            check_vocabulary(init)
    else:
        checkpoint = load_checkpoint(init)
        if require_policy and ("score_std" in checkpoint or "axes" in checkpoint):
            raise SystemExit(f"{init}: a reward model, which scores text and cannot write it; "
                             "name it with --reward_model")
        model = GPT(GPTConfig(**checkpoint["model_config"]))
        tokenizer_name = checkpoint["tokenizer"]
        load_weights(model, checkpoint["model"], init)
    if cfg and cfg.max_len > model.config.block_size:
        raise SystemExit(f"--max_len={cfg.max_len}: the context of {init} is {model.config.block_size} tokens, "
                         "the most that --max_len can be")
    if cfg and cfg.dtype:
        model.dtype = getattr(torch, cfg.dtype)
    return model, tokenizer_name


def new_model(cfg):
    """A GPT with new weights, and the name of the tokenizer of cfg's data."""
    if cfg.n_embd % cfg.n_head:
        raise SystemExit(f"--n_embd={cfg.n_embd} is not a multiple of --n_head={cfg.n_head}")
    tokenizer = dataset(cfg.data, cfg.data_dir).tokenizer()
    torch.manual_seed(cfg.seed)
    config = GPTConfig(tokenizer.n_vocab, cfg.max_len, cfg.n_layer, cfg.n_head, cfg.n_embd)
    return GPT(config), tokenizer.name


def load_reward_model(path, tokenizer, cfg=None, normalize=False):
    """Loads a reward model, frozen.

    normalize: divide its scores by their standard deviation on demonstrations, where their mean is 0 already.
    Exits with a one-line message if it is not a reward model, or if its tokenizer is not `tokenizer`.
    """
    reward_model, its_tokenizer = load_model(path, cfg, require_policy=False)
    if reward_model.config.n_scalars != 1:
        raise SystemExit(f"{path}: not a reward model (reward.py trains one)")
    if its_tokenizer.name != tokenizer.name:
        raise SystemExit(f"{path}: this reward model has the tokenizer {its_tokenizer.name}, "
                         f"the other models have {tokenizer.name}")
    if normalize:
        score_std = load_checkpoint(path)["score_std"]
        with torch.no_grad():
            reward_model.scalar_head.weight /= score_std
            reward_model.scalar_head.bias /= score_std
    return reward_model.requires_grad_(False)


def template_of_checkpoint(init):
    """Returns "turns" if the model was trained on conversations (data/turns.py), else "plain"."""
    if init == "scratch" or is_pretrained(init):
        return "plain"
    return load_checkpoint(init).get("template", "plain")
