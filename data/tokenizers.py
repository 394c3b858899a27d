"""Tokenizers are tiktoken encodings, known by name, so that a checkpoint can say which one it speaks; text to groups of tokens."""
import logging
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import tiktoken

from data import animals

log = logging.getLogger(__name__)
LONGEST = 2**19  # characters that tiktoken is given at once


def get_tokenizer(name):
    """The tiktoken.Encoding called `name`: "gpt2", which tiktoken fetches once, or "animals", made here."""
    if name == "animals":
        return animals.tokenizer()
    assert name == "gpt2", name
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever requests raises comes through tiktoken as it is
        raise SystemExit(f"cannot fetch the GPT-2 encoding ({type(error).__name__}); "
                         "on a machine without network set TIKTOKEN_CACHE_DIR to a folder that holds it")


def encode(tokenizer, texts):
    """List of str -> list of int32 arrays. Special-token text inside is text, never a control token."""
    def ids(text):  # in parts, where it is endless: a million spaces overflow the stack of tiktoken's regular expression
        parts = (text[i:i + LONGEST] for i in range(0, len(text), LONGEST))
        return np.array(sum(map(tokenizer.encode_ordinary, parts), []), dtype=np.int32)
    pieces = [texts[i:i + 512] for i in range(0, len(texts), 512)]
    with ThreadPoolExecutor() as pool:  # tiktoken lets go of the GIL; its own encode_ordinary_batch makes a task of every text
        return list(chain.from_iterable(pool.map(lambda piece: list(map(ids, piece)), pieces)))


def encode_prompts(tokenizer, texts):
    """Prompts as arrays; an empty one becomes the EOS token, which GPT-2 was trained to take for a beginning."""
    eos = np.array([tokenizer.eot_token], dtype=np.int32)
    return [ids if len(ids) else eos for ids in encode(tokenizer, texts)]


def encode_groups(tokenizer, examples, max_len):
    """examples: list of (prompt, [response, …]) -> groups: list of (prompt_ids, [response_ids, …]), EOS ending each response.

    Where prompt and longest response exceed max_len, the prompt loses its beginning, down to max_len / 2; a response that
    is still too long loses its end, and with it the EOS. How many were cut is printed.
    """
    eos = np.array([tokenizer.eot_token], dtype=np.int32)
    prompts = encode_prompts(tokenizer, [prompt for prompt, _ in examples])
    flat = iter(encode(tokenizer, [r for _, responses in examples for r in responses]))
    groups, cut_prompts, cut_responses = [], 0, 0
    for prompt, (_, texts) in zip(prompts, examples):
        responses = [np.concatenate([next(flat), eos]) for _ in texts]
        room = max(max_len - max(map(len, responses)), max_len // 2)
        cut_prompts += len(prompt) > room
        prompt = prompt[-room:]
        cut_responses += sum(len(prompt) + len(r) > max_len for r in responses)
        groups.append((prompt, [r[:max_len - len(prompt)] for r in responses]))
    if cut_prompts or cut_responses:
        log.info(f"cut to max_len={max_len}: the beginning of {cut_prompts} prompts, the end of {cut_responses} responses, "
            f"of {len(examples)} examples")
    return groups
