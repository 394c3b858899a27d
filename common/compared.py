"""Models that are compared: loaded together, with the data, temperature and reward model they share."""
import torch

from common.checkpoints import load_checkpoint
from common.models import load_model
from data import dataset
from engine.weights import is_pretrained


def load_models(names, need_same_data=True):
    """Loads checkpoints to compare -> [(name, GPT), …], their tokenizer, each one's config ({} if not a run).

    Exits with one line if one of them is a reward model, if their tokenizers differ, or if they were trained
    on different data and need_same_data is set.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models, tokenizers, configs = [], [], []
    trained_on = {}  # {data: the first checkpoint trained on it}
    for name in names:
        model, tokenizer = load_model(name)
        models.append((name, model.to(device)))
        tokenizers.append(tokenizer)
        if is_pretrained(name):
            configs.append({})  # weights in the Hugging Face format have no run's config
            continue
        checkpoint = load_checkpoint(name)
        configs.append(checkpoint["config"])
        trained_on.setdefault(checkpoint["config"]["data"], name)
    if len({tokenizer.name for tokenizer in tokenizers}) > 1:
        listed = ", ".join(f"{name} {tokenizer.name}" for name, tokenizer in zip(names, tokenizers))
        raise SystemExit(f"these models have different tokenizers: {listed}")
    if len(trained_on) > 1 and need_same_data:
        listed = ", ".join(f"{name}: {its_data}" for its_data, name in trained_on.items())
        raise SystemExit(f"these models were trained on different data ({listed}): "
                         "say which to compare them on with --data")
    return models, tokenizers[0], configs


def load_data(args, configs):
    """The data that --data names, or else those of the first run, or else the animals world."""
    of_runs = [config for config in configs if config]
    config = of_runs[0] if of_runs else {"data": "animals", "data_dir": "data/files"}
    return dataset(args.data or config["data"], args.data_dir or config["data_dir"])


def table_temperature(names, configs):
    """The temperature τ at which policies are compared: that of their runs of ppo.py, 1 for other models.

    The reference, which comes first, is measured at the temperature of the others. Exits with one line if
    these differ: a table has one.
    """
    runs = list(zip(names, configs))
    compared = runs[1:] or runs  # without the reference, unless it is alone
    temperatures = {}  # {temperature: the first checkpoint trained at it}
    for name, config in compared:
        temperatures.setdefault(config.get("temperature", 1.0), name)
    if len(temperatures) > 1:
        listed = ", ".join(f"{name}: {temperature:g}" for temperature, name in temperatures.items())
        raise SystemExit(f"these policies were trained at different temperatures ({listed}): "
                         "compare each with the reference in a table of its own")
    return list(temperatures)[0]


def named_reward_model(path, configs):
    """The reward model that --reward_model names, or else the first that a run names; None if none does."""
    named = [config["reward_model"] for config in configs if config.get("reward_model")]
    return path or (named[0] if named else None)
