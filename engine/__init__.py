"""What stands under model.py: the fast forms of ideas that model.py states in their textbook form.

    packing.py     the packed batch: a prompt and all of its responses in one row
    attention.py   who may look at whom in a packed batch, and how that is computed
    logprobs.py    log π(y_t | x, y_<t) without the (tokens, vocabulary) matrix of logits
    decode.py      sampling with a key-value cache
    kvcache.py     that cache, and CUDA graphs
    onednn.py      faster matrix products for sampling on a CPU
    weights.py     GPT-2's published weights and the Hugging Face format
    config_json.py what that format says of a model's shape
    devices.py     what differs between cpu, cuda and mps
    files.py       downloads, and packages that only some need

Each fast form opens with the definition that it equals, and a test holds the two to the same numbers.
"""
