"""The page of tokens.py as HTML: docs/tokens_template.html with the numbers in it.

In the page a list of numbers is float32 in base64, and a token is an index into a list of texts, or it would be too
large: 20 prompts of 128 tokens and three models have over a hundred thousand numbers.
"""
import base64
import json
import os

import numpy as np

from common.files import write_atomically

TEMPLATE = os.path.join(os.path.dirname(__file__), os.pardir, "docs", "tokens_template.html")

# What colours a token: key, name, whether it adds up to a number of the answer, what it means and which equation it is.
QUANTITIES = [
    ("logratio", "log π/π_ref", True,
     "What this token costs in KL: log π(y_t|s_t)/π_ref(y_t|s_t), in nats, of which the reward subtracts β times "
     "(arXiv:1909.08593 eq. 2, ppo.dense_reward)."),
    ("implicit", "implicit reward", True,
     "The reward for which this policy is the optimum: β log π/π_ref, up to a constant of the prompt "
     "(arXiv:2305.18290 eq. 5, dpo.dpo_loss); of a SimPO run β/|y| log π (arXiv:2405.14734 eq. 4, simpo.simpo_loss)."),
    ("kl", "exact KL", True,
     "How far the whole distribution of the next token has moved: KL(π(·|s_t) ‖ π_ref(·|s_t)) = Σ_v π log π/π_ref, in "
     "nats (arXiv:1909.08593 §2.2, ppo.evaluate_batch)."),
    ("entropy", "entropy", False,
     "How undecided the policy is before this token: −Σ_v π(v|s_t) log π(v|s_t), in nats (ppo.evaluate_batch)."),
    ("value", "V(s_t)", False,
     "What the value model expects the rest of the answer to earn, before this token is chosen: V(s_t) = E Σ_l γ^l "
     "r_{t+l} (arXiv:1506.02438 §2, ppo.values_at)."),
    ("reward", "r_t", True,
     "The reward that PPO sees at this token: r(x, y) where the answer or a span ends, less β log π/π_ref, which is 0 "
     "in the reference's own answers (arXiv:1909.08593 eq. 2, ppo.dense_reward)."),
    ("delta", "δ_t", False,
     "How much better this token left things than V expected: δ_t = r_t + γ V(s_{t+1}) − V(s_t) "
     "(arXiv:1506.02438 eq. 11, ppo.compute_gae at λ = 0)."),
    ("advantage", "Â_t", False,
     "What PPO reinforces, before whitening: Â_t = Σ_l (γλ)^l δ_{t+l} (arXiv:1506.02438 eq. 16, ppo.compute_gae); "
     "without V, the answer's reward beside those of the other answers to its prompt (arXiv:2402.14740, "
     "ppo.group_advantages)."),
]


def write_page(path, content):
    """Writes what tokens.py has collected as one self-contained file of HTML."""
    vocabulary = {}  # text of a token -> its index
    prompts = []
    for entry in content["prompts"]:
        prompts.append(entry | {"answers": [compact(row, vocabulary) for row in entry["answers"]]})
    pairs = []
    for entry in content["pairs"]:
        models = []
        for pair in entry["models"]:
            models.append(pair | {side: compact(pair[side], vocabulary) for side in ("chosen", "rejected")})
        pairs.append(entry | {"models": models})
    keys = set()  # of the quantities that a model has
    for entry in prompts:
        for row in entry["answers"]:
            keys |= row["quantities"].keys()
    quantities = []
    for key, name, adds_up, legend in QUANTITIES:
        if key in keys:
            quantities.append({"key": key, "name": name, "adds_up": adds_up, "legend": legend})
    content = content | {"quantities": quantities, "prompts": prompts, "pairs": pairs, "vocabulary": list(vocabulary)}
    # Without any "<", no text can end the script element that the data stand in.
    data = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    with open(TEMPLATE, encoding="utf-8") as f:
        template = f.read()
    with write_atomically(path) as f:
        f.write(template.replace(">DATA<", f">{data}<"))


def compact(row, vocabulary):
    """A row of tokens.py with indices into the vocabulary, which grows, and base64."""
    def indices(texts):
        return [vocabulary.setdefault(text, len(vocabulary)) for text in texts]

    others = row["alternatives"]
    return row | {
        "tokens": indices(row["tokens"]),
        "quantities": {key: base64_float32(numbers) for key, numbers in row["quantities"].items()},
        "alternatives": {
            "tokens": [indices(texts) for texts in others["tokens"]],
            "p": [base64_float32(p) for p in others["p"]],
            "ref_p": [base64_float32(p) for p in others["ref_p"]],
        },
    }


def base64_float32(numbers):
    return base64.b64encode(np.array(numbers, dtype="<f4").tobytes()).decode()
