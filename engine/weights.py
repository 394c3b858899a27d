"""GPT-2's weights: the published files, and folders in the Hugging Face format, both ways.

That format stores the four projections of a block as (in, out), where nn.Linear has (out, in). Its names
carry the prefix "transformer.", and it stores the tied head once more as lm_head.weight. Reading a file
never executes anything in it. "hub:OWNER/NAME" is such a folder that is fetched from the Hugging Face hub.
"""
import hashlib
import json
import logging
import os
from functools import cache

import torch

from engine.config_json import PRETRAINED, read_config
from engine.files import fetch, first_line, import_package, short_repr

log = logging.getLogger(__name__)

URL = "https://huggingface.co/openai-community/{}/resolve/main/pytorch_model.bin"
# sha256 of GPT-2's tokens as its vocab.json spells them, a line each, in the order of their ids
VOCABULARY_SHA256 = "e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f"
VOCAB_SIZE = 50257  # of GPT-2
MOST_ROWS = 50304   # the next multiple of 64: files may hold added or padded rows up to there
HUB = "hub:"
# What is fetched of a repository on the hub: the small files, and weights in one format.
HUB_FILES = ["config.json", "vocab.json", "tokenizer.json",
             "model*.safetensors", "model.safetensors.index.json"]
HUB_FILES_OF_TORCH = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


# ---------------------------------------------------------------------------------------------------- reading

def is_pretrained(name_or_dir):
    """Whether this names weights in the Hugging Face format: published, on the hub, or in a folder."""
    if name_or_dir in PRETRAINED or name_or_dir.startswith(HUB):
        return True
    return os.path.exists(os.path.join(name_or_dir, "config.json"))


def local_folder(name_or_dir):
    return fetch_from_hub(name_or_dir) if name_or_dir.startswith(HUB) else name_or_dir


@cache
def fetch_from_hub(name):
    """Returns the folder that holds hub:OWNER/NAME, fetched once; exits with one line if it cannot be had."""
    hub = import_package("huggingface_hub", name, "huggingface_hub safetensors")
    repository = name.removeprefix(HUB)
    try:
        folder = hub.snapshot_download(repository, allow_patterns=HUB_FILES)
        if not any(file.endswith(".safetensors") for file in os.listdir(folder)):
            folder = hub.snapshot_download(repository, allow_patterns=HUB_FILES + HUB_FILES_OF_TORCH)
    except Exception as error:  # its own, and those of its HTTP library
        raise SystemExit(f"{name}: cannot be fetched ({first_line(error)})")
    return folder


def read_pretrained(name_or_dir):
    """Reads "gpt2", …, hub:OWNER/NAME or a folder -> the fields of a GPTConfig, a state dict.

    Exits with a one-line message if a file is missing, cannot be fetched, or is not a GPT-2.
    """
    if name_or_dir in PRETRAINED:
        n_layer, n_head, n_embd = PRETRAINED[name_or_dir]
        config = dict(vocab_size=50257, block_size=1024, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        path = os.path.join(torch.hub.get_dir(), "checkpoints", name_or_dir + ".bin")
        return config, read_weights(fetch(path, URL.format(name_or_dir)))
    dir = local_folder(name_or_dir)
    config = read_config(os.path.join(dir, "config.json"))
    weights = read_folder(dir)
    cut_vocabulary(config, weights, name_or_dir)
    return config, weights


def read_folder(dir):
    """Reads {name: tensor} from the files of a folder, which are one or several ("shards" with an index)."""
    for file in ("pytorch_model.bin", "model.safetensors"):
        path = os.path.join(dir, file)
        if os.path.exists(path):
            return read_weights(path)
    for file in ("pytorch_model.bin.index.json", "model.safetensors.index.json"):
        index = os.path.join(dir, file)
        if os.path.exists(index):
            weights = {}
            for shard in shards(index):
                weights |= read_weights(os.path.join(dir, shard))
            return weights
    raise SystemExit(f"{dir}: neither pytorch_model.bin nor model.safetensors is there")


def shards(index):
    """The files that an index lists, {"weight_map": {tensor: file}}; exits with one line if one is wrong."""
    try:
        with open(index, "rb") as f:
            files = sorted(set(json.load(f)["weight_map"].values()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SystemExit(f"{index}: not the index of a model's weights ({type(error).__name__})")
    for file in files:
        is_name = isinstance(file, str) and os.path.basename(file) == file
        if not is_name or not file.endswith((".bin", ".safetensors")):
            raise SystemExit(f"{index}: {short_repr(file)} does not name a file of weights in this folder")
        if not os.path.exists(os.path.join(os.path.dirname(index), file)):
            raise SystemExit(f"{index}: lists {file[:100]!r}, which is missing")
    return files


def cut_vocabulary(config, weights, name):
    """Drops the rows that a file has beyond GPT-2's 50,257 tokens, added or padded, in place; logs how many.

    Our own padding takes their place, which can neither be sampled nor take probability.
    """
    wte = weights.get("wte.weight")
    n_rows = config["vocab_size"]
    if not VOCAB_SIZE < n_rows <= MOST_ROWS:
        return
    if wte is None or wte.dim() != 2 or len(wte) != n_rows:
        return  # fit_weights refuses this file
    config["vocab_size"] = VOCAB_SIZE
    weights["wte.weight"] = wte[:VOCAB_SIZE]
    log.info(f"{name}: left out {n_rows - VOCAB_SIZE} rows of its vocabulary, beyond GPT-2's {VOCAB_SIZE} "
             "tokens: they are never sampled and take no probability")


def check_vocabulary(name_or_dir):
    """Exits with one line if a folder has a tokenizer of its own that is not GPT-2's.

    Tokens may have been added to it.
    """
    dir = local_folder(name_or_dir)
    for file in ("vocab.json", "tokenizer.json"):
        path = os.path.join(dir, file)
        if not os.path.exists(path):
            continue
        try:
            with open(path, "rb") as f:
                vocabulary = json.load(f)
            if file == "tokenizer.json":
                vocabulary = vocabulary["model"]["vocab"]
            tokens = sorted(vocabulary, key=vocabulary.get)[:VOCAB_SIZE]
            digest = hashlib.sha256("\n".join(tokens).encode()).hexdigest()
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise SystemExit(f"{path}: not the vocabulary of a tokenizer ({type(error).__name__})")
        if digest != VOCABULARY_SHA256:
            raise SystemExit(f"{path}: not GPT-2's vocabulary, the only one that can be read")


def read_weights(path):
    """Reads {name: tensor} from a file of torch.save or safetensors; exits with one line if it cannot."""
    if path.endswith(".safetensors"):
        load_file = import_package("safetensors.torch", path, "safetensors").load_file
    try:
        if path.endswith(".safetensors"):
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        return {name.removeprefix("transformer."): w for name, w in weights.items() if torch.is_tensor(w)}
    except Exception as error:  # for a damaged or foreign file, torch.load raises half a dozen types
        raise SystemExit(f"{path}: not a model's weights, or damaged ({type(error).__name__}): "
                         "delete it, and fetch or copy it again")


def fit_weights(weights, shapes, vocab_size, name_or_dir):
    """Transposes the projections and checks every shape.

    shapes: those of our state dict, in which the vocabulary is padded.
    Exits with a one-line message if a tensor is missing or has another shape than config.json says.
    """
    missing = shapes.keys() - weights.keys()
    if missing:
        raise SystemExit(f"{name_or_dir}: not GPT-2 weights: {min(missing)} is missing")
    fitted = {}
    for name, expected in shapes.items():
        weight = weights[name]
        if is_projection(name) and weight.dim() == 2:
            weight = weight.mT
        if name == "wte.weight":
            expected = (vocab_size, expected[1])
        if tuple(weight.shape) != tuple(expected):
            raise SystemExit(f"{name_or_dir}: {name} has shape {tuple(weight.shape)}, "
                             f"config.json says {tuple(expected)}")
        fitted[name] = weight
    return fitted


def is_projection(name):
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


# ---------------------------------------------------------------------------------------------------- writing

def write_pretrained(dir, config, state_dict):
    """Writes config.json and pytorch_model.bin, which transformers' GPT2LMHeadModel.from_pretrained opens.

    Scalar heads are not part of that format and are left out.
    """
    os.makedirs(dir, exist_ok=True)
    weights = {}
    for name, weight in state_dict.items():
        if name.startswith("scalar_head"):
            continue
        if name == "wte.weight":
            weight = weight[:config.vocab_size]
        elif is_projection(name):
            weight = weight.t()
        weights["transformer." + name] = weight.detach().float().cpu().contiguous().clone()
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    torch.save(weights, os.path.join(dir, "pytorch_model.bin"))

    content = dict(
        model_type="gpt2", architectures=["GPT2LMHeadModel"], vocab_size=config.vocab_size,
        n_positions=config.block_size, n_ctx=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer,
        n_head=config.n_head, tie_word_embeddings=True, activation_function="gelu_new",
        layer_norm_epsilon=config.norm_eps, torch_dtype="float32",
        bos_token_id=config.vocab_size - 1, eos_token_id=config.vocab_size - 1)
    with open(os.path.join(dir, "config.json"), "w", encoding="utf-8") as f:
        json.dump(content, f, indent=2)
