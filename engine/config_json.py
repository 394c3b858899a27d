"""The shape of a GPT-2: of the published models, and of a Hugging Face folder, from its config.json."""
import json
import os

from engine.files import short_repr

PRETRAINED = {  # n_layer, n_head, n_embd
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
CONFIG_KEYS = {  # what is read of a config.json: under which name here, and the largest value accepted
    "vocab_size": ("vocab_size", 2**20),
    "n_positions": ("block_size", 2**20),
    "n_layer": ("n_layer", 1000),
    "n_head": ("n_head", 2**10),
    "n_embd": ("n_embd", 2**20),
}
# Keys of transformers' GPT2Config that change what the model computes, with the values that model.py has.
FIXED_KEYS = {
    "n_inner": (None,),  # or 4 * n_embd, which is the same
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
    "quantization_config": (None,),
}
# Its other keys are ignored: for training, generation and classification, or of the precision of a product.


def read_config(path):
    """Reads the fields of a GPTConfig from a config.json; exits with one line if it describes no GPT-2."""
    if not os.path.exists(path):
        raise SystemExit(f"{path}: no config.json there; expected a folder in the Hugging Face format, "
                         f"or one of {', '.join(PRETRAINED)}")
    try:
        with open(path, "rb") as f:
            content = dict(json.load(f))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise SystemExit(f"{path}: not the config.json of a model ({error})")
    model_type = content.get("model_type")
    if model_type != "gpt2":
        raise SystemExit(f"{path}: model_type is {short_repr(model_type)}, only 'gpt2' can be read")
    config = {}
    for key, (field, largest) in CONFIG_KEYS.items():
        value = content.get(key)
        if type(value) is not int or not 0 < value <= largest:
            raise SystemExit(f"{path}: {key} is {short_repr(value)}, "
                             f"expected a whole number from 1 to {largest}")
        config[field] = value
    if config["n_embd"] % config["n_head"]:
        raise SystemExit(f"{path}: n_embd {config['n_embd']} is not a multiple of n_head {config['n_head']}")
    epsilon = content.get("layer_norm_epsilon", 1e-5)
    if type(epsilon) is not float or not 0 < epsilon < 1:
        raise SystemExit(f"{path}: layer_norm_epsilon is {short_repr(epsilon)}, "
                         "expected a number between 0 and 1")
    config["norm_eps"] = epsilon
    for key, values in FIXED_KEYS.items():
        value = content.get(key, values[0])
        same_width = key == "n_inner" and value == 4 * config["n_embd"]
        if value not in values and not same_width:
            raise SystemExit(f"{path}: {key} is {short_repr(value)}, "
                             f"only {short_repr(values[0])} can be read")
    return config
