"""The tokenizers, which are tiktoken encodings known by name, and functions that encode text as token ids."""
import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tiktoken

from data import animals

log = logging.getLogger(__name__)
LONGEST = 2**19  # characters that tiktoken gets in one call
CHUNK = 512      # texts that a thread encodes at a time


def get_tokenizer(name):
    """Returns the tiktoken.Encoding of that name: "animals", or "gpt2", which tiktoken downloads once."""
    if name == "animals":
        return animals.tokenizer()
    assert name == "gpt2", name
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken passes on whatever `requests` raises
        raise SystemExit(f"cannot fetch the GPT-2 encoding ({type(error).__name__}); "
                         "on a machine without a network, set TIKTOKEN_CACHE_DIR to a folder that holds it")


def encode_text(tokenizer, text):
    """Encodes one text as an int32 array. "<|endoftext|>" in the text becomes ordinary tokens, never the EOS.

    A very long text is encoded in parts: a million spaces at once overflow the stack of tiktoken's regex.
    """
    ids = []
    for start in range(0, len(text), LONGEST):
        ids += tokenizer.encode_ordinary(text[start:start + LONGEST])
    return np.array(ids, dtype=np.int32)


def encode(tokenizer, texts):
    """Encodes a list of texts as a list of int32 arrays; see encode_text."""
    def encode_chunk(start):
        return [encode_text(tokenizer, text) for text in texts[start:start + CHUNK]]

    if len(texts) <= CHUNK:
        return encode_chunk(0)
    result = []
    # tiktoken releases the GIL, so threads help. Its encode_ordinary_batch would start a task for every text.
    with ThreadPoolExecutor() as pool:
        for chunk in pool.map(encode_chunk, range(0, len(texts), CHUNK)):
            result += chunk
    return result


def encode_prompts(tokenizer, texts):
    """Encodes prompts. An empty one becomes the EOS token, after which GPT-2 learned to begin a new text."""
    eos = np.array([tokenizer.eot_token], dtype=np.int32)
    return [ids if len(ids) else eos for ids in encode(tokenizer, texts)]


def encode_groups(tokenizer, examples, max_len):
    """Encodes [(prompt, [response, …]), …] as [(prompt_ids, [response_ids, …]), …]; EOS ends each response.

    If the prompt and its longest response exceed max_len, the prompt loses its beginning, but keeps at least
    max_len / 2 tokens. A response that is still too long loses its end, including the EOS. The number of cut
    texts is logged.
    """
    eos = np.array([tokenizer.eot_token], dtype=np.int32)
    prompts = encode_prompts(tokenizer, [prompt for prompt, _ in examples])
    response_texts = []
    for _, texts in examples:
        response_texts += texts
    encoded_responses = iter(encode(tokenizer, response_texts))

    groups = []
    n_cut_prompts = 0
    n_cut_responses = 0
    for prompt, (_, texts) in zip(prompts, examples):
        responses = [np.concatenate([next(encoded_responses), eos]) for _ in texts]
        longest = max(len(response) for response in responses)
        prompt_room = max(max_len - longest, max_len // 2)
        if len(prompt) > prompt_room:
            n_cut_prompts += 1
            prompt = prompt[-prompt_room:]
        response_room = max_len - len(prompt)
        for i, response in enumerate(responses):
            if len(response) > response_room:
                n_cut_responses += 1
                responses[i] = response[:response_room]
        groups.append((prompt, responses))
    if n_cut_prompts or n_cut_responses:
        log.info(f"cut to max_len={max_len}: the beginning of {n_cut_prompts} prompts, "
                 f"the end of {n_cut_responses} responses, of {len(examples)} examples")
    return groups


def decode(tokenizer, ids):
    """Token ids as text, without the special token that ends a response and stands for an empty prompt."""
    return tokenizer.decode([token for token in ids if token != tokenizer.eot_token])
