"""Digests of what a run is made of, which its checkpoint keeps: the encoded data and the initial weights.

A resumed run compares them, because a file or folder of the same name may hold something else by then.
"""
import hashlib
import os

import numpy as np


def file_digest(path):
    """The digest of a file. What is not a file is the name of a dataset, and is returned as it is."""
    if not os.path.isfile(path):
        return path
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "blake2b").hexdigest()


def examples_digest(examples, before=""):
    """The digest of prompts (token ids) or of groups (prompt_ids, [response_ids, …]).

    before: the digest of other examples, if they belong to the same data.
    """
    digest = hashlib.blake2b(before.encode())
    for example in examples:
        parts = [example]
        if isinstance(example, tuple):
            prompt, responses = example
            parts = [prompt, *responses]
        for ids in parts:
            ids = np.asarray(ids, dtype=np.int32)
            digest.update(len(ids).to_bytes(4, "little"))
            digest.update(ids.tobytes())
    return digest.hexdigest()


def weights_digest(model):
    """The digest of a model's weights."""
    digest = hashlib.blake2b()
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
