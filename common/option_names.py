"""Names of options: those of other libraries, and what was probably meant."""
import difflib

from engine.files import short_repr

# What an option is called in TRL, transformers, cleanrl or nanoGPT -> its name here.
OTHER_NAMES = {
    "learning_rate": "lr", "per_device_train_batch_size": "batch_size", "batch": "batch_size",
    "rollout_batch_size": "batch_size", "gradient_accumulation_steps": "micro_tokens",
    "max_length": "max_len", "max_seq_length": "max_len", "max_prompt_length": "max_len",
    "block_size": "max_len", "num_train_epochs": "steps", "epochs": "steps", "max_iters": "steps",
    "max_steps": "steps", "warmup_steps": "warmup", "warmup_ratio": "warmup", "warmup_iters": "warmup",
    "max_grad_norm": "grad_clip", "logging_steps": "log_every", "log_interval": "log_every",
    "save_steps": "ckpt_every", "eval_interval": "val_every", "eval_steps": "val_every",
    "output_dir": "out", "out_dir": "out", "model_name_or_path": "init", "model": "init",
    "init_from": "init", "dataset": "data", "dataset_name": "data", "report_to": "wandb",
    "wandb_project": "wandb", "gradient_checkpointing": "checkpoint_blocks", "torch_compile": "compile",
    "torch_dtype": "dtype",
    "resume_from_checkpoint": "resume", "response_length": "max_new_tokens", "max_tokens": "max_new_tokens",
    "cliprange": "clip", "clip_range": "clip", "cliprange_value": "value_clip", "init_kl_coef": "kl_coef",
    "num_ppo_epochs": "epochs", "ppo_epochs": "epochs", "num_mini_batches": "minibatches",
    "reward_model_path": "reward_model", "simpo_gamma": "gamma", "lambda": "lam", "target": "kl_target",
    "target_kl": "stop_kl", "num_generations": "k", "adv_estimator": "advantage",
}


def check_option(name, types):
    """Exits with one line if there is no such option; a name from elsewhere is answered with ours."""
    ours = OTHER_NAMES.get(name)
    if name not in types and ours in types:
        raise SystemExit(f"unknown option {name!r}: here it is --{ours} (-h describes it)")
    check_choice("option", name, types)


def check_choice(kind, name, choices):
    """Returns `name` if it is one of `choices`; otherwise exits with one line that suggests the nearest."""
    if name in choices:
        return name
    nearest = difflib.get_close_matches(name, choices, 1, 0.4)
    suggestion = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise SystemExit(f"unknown {kind} {short_repr(name)}{suggestion} (-h lists them all)")
