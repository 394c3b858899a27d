"""Writes template.html with the numbers of a page in it: one file that needs nothing else.

In the page a list of numbers is base64 of float32, and a list of tokens is base64 of indices (uint16) into a
list of texts: 20 prompts and three models may have 100,000 numbers, and a page is to stay below a megabyte.
"""
import base64
import json
import os

import numpy as np

from common.files import write_atomically

TEMPLATE = os.path.join(os.path.dirname(__file__), "template.html")

# What a token can be coloured by: its key, its name, whether it adds up to a number of the answer, and one
# sentence on what it means and which equation it is.
QUANTITIES = [
    ("logratio", "log π/π_ref", True,
     "What this token costs in KL: log π(y_t|s_t)/π_ref(y_t|s_t), in nats, which the reward subtracts β "
     "times (arXiv:1909.08593 eq. 2, ppo.dense_reward)."),
    ("implicit", "implicit reward", True,
     "The reward for which this policy is the optimum: β log π/π_ref, up to a constant of the prompt "
     "(arXiv:2305.18290 eq. 5, dpo.dpo_loss); of a SimPO run β/|y| log π (arXiv:2405.14734 eq. 4, "
     "simpo.simpo_loss)."),
    ("kl", "exact KL", True,
     "How far the whole distribution of the next token has moved: KL(π(·|s_t) ‖ π_ref(·|s_t)) = "
     "Σ_v π log π/π_ref, in nats (arXiv:1909.08593 §2.2, ppo.evaluate_batch)."),
    ("entropy", "entropy", False,
     "How undecided the policy is before this token: −Σ_v π(v|s_t) log π(v|s_t), in nats "
     "(ppo.evaluate_batch)."),
    ("value", "V(s_t)", False,
     "What the value model expects the rest of the answer to earn, before this token is chosen: "
     "V(s_t) = E Σ_l γ^l r_{t+l} (arXiv:1506.02438 §2, ppo.values_at)."),
    ("reward", "r_t", True,
     "The reward that PPO sees at this token: r(x, y) where the answer or a span ends, less β log π/π_ref, "
     "which is 0 in the reference's own answers (arXiv:1909.08593 eq. 2, ppo.dense_reward)."),
    ("delta", "δ_t", False,
     "How much better this token left things than V expected: δ_t = r_t + γ V(s_{t+1}) − V(s_t) "
     "(arXiv:1506.02438 eq. 11, ppo.compute_gae at λ = 0)."),
    ("advantage", "Â_t", False,
     "What PPO reinforces, before whitening: Â_t = Σ_l (γλ)^l δ_{t+l} (arXiv:1506.02438 eq. 16, "
     "ppo.compute_gae); without V, the answer's reward beside those of the other answers to its prompt "
     "(arXiv:2402.14740, ppo.group_advantages)."),
]


def write_page(path, content):
    """Writes the page. content: what tokens.write collects, a dict."""
    vocabulary = {}  # the text of a token -> its index
    keys = set()     # of the quantities that there are
    prompts = []
    for entry in content["prompts"]:
        for row in entry["answers"]:
            keys |= row["quantities"].keys()
        prompts.append(entry | {"answers": [compact(row, vocabulary) for row in entry["answers"]]})
    pairs = []
    for entry in content["pairs"]:
        models = []
        for pair in entry["models"]:
            models.append(pair | {side: compact(pair[side], vocabulary) for side in ("chosen", "rejected")})
        pairs.append(entry | {"models": models})
    quantities = []
    for key, name, adds_up, legend in QUANTITIES:
        if key in keys:
            quantities.append({"key": key, "name": name, "adds_up": adds_up, "legend": legend})
    content = content | {
        "prompts": prompts, "pairs": pairs, "quantities": quantities, "vocabulary": list(vocabulary)}

    # Without any "<", no text can end the script element in which the data stand.
    data = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    with open(TEMPLATE, encoding="utf-8") as f:
        template = f.read()
    with write_atomically(path) as f:
        f.write(template.replace(">DATA<", f">{data}<"))


def compact(row, vocabulary):
    """A row of numbers.py with its lists in base64; the vocabulary gets the texts that it lacks."""
    def packed_texts(texts):
        return packed([vocabulary.setdefault(text, len(vocabulary)) for text in texts], "<u2")

    others = row["alternatives"]  # a few for each token; packed one after the other
    return row | {
        "tokens": packed_texts(row["tokens"]),
        "quantities": {key: packed(numbers, "<f4") for key, numbers in row["quantities"].items()},
        "alternatives": {
            "tokens": packed_texts(sum(others["tokens"], [])),
            "p": packed(others["p"], "<f4"),
            "ref_p": packed(others["ref_p"], "<f4"),
        },
    }


def packed(numbers, dtype):
    return base64.b64encode(np.array(numbers, dtype=dtype).tobytes()).decode()
