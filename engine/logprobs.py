"""log π(y_t | x, y_<t) without ever holding the (tokens, vocabulary) matrix of logits.

Definition, for hidden states s (N, C), the vocabulary matrix W (V, C), targets y (N,) and a temperature τ:

    logprobs = log_softmax(s Wᵀ / τ)[range(N), y]

The logits over GPT-2's 50,257 tokens are the largest tensor of a training step. Here they exist for CHUNK
tokens at a time, in float32; the backward pass recomputes them, except for the last chunk, which is kept.
"""
import torch

CHUNK = 1024  # response tokens whose logits exist at one time


def vocab_product(states, weight):
    """The logits s Wᵀ: (N, C) and (V, C) -> (N, V) float32.

    They are never rounded to bfloat16: near 100, where GPT-2's logits often are, its numbers lie 0.5 apart.
    """
    if states.dtype == torch.float32:
        return states @ weight.t()
    if states.is_cuda:
        return torch.mm(states, weight.t(), out_dtype=torch.float32)
    return states.float() @ weight.float().t()


def scaled_logits(states, weight, vocab_size, temperature):
    """s Wᵀ/τ (n, V), with −∞ on the padding of the vocabulary, so that it never gets probability."""
    logits = vocab_product(states, weight)
    logits[:, vocab_size:] = -torch.inf
    if temperature != 1:
        logits.div_(temperature)
    return logits


def logsumexp_(logits):
    """log Σ exp(logits) of each row, (n, V) -> (n,); leaves exp(logits − the row's largest) in the logits."""
    largest = logits.amax(-1, keepdim=True)
    return logits.sub_(largest).exp_().sum(-1).log_() + largest[:, 0]


class TokenLogprobs(torch.autograd.Function):
    """The logprobs defined at the top of this file, chunk by chunk.

    states (N, C), weight (V, C) of which the first vocab_size rows are real, target (N,) -> (N,) float32.
    With p the softmax and g the incoming gradient, the gradient of s Wᵀ is g · (onehot(y) − p)/τ.
    """

    @staticmethod
    def forward(ctx, states, weight, target, vocab_size, temperature):
        logprobs, logsumexp = [], []
        for s, y in zip(states.split(CHUNK), target.split(CHUNK)):
            logits = scaled_logits(s, weight, vocab_size, temperature)
            chosen = logits.gather(1, y[:, None])[:, 0]
            logsumexp.append(logsumexp_(logits))
            logprobs.append(chosen - logsumexp[-1])
        # `logits` are those of the last chunk, by now as exp(logits − the row's largest).
        ctx.save_for_backward(states, weight, target, torch.cat(logsumexp), logits)
        ctx.vocab_size = vocab_size
        ctx.temperature = temperature
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx, grad):
        states, weight, target, logsumexp, last = ctx.saved_tensors
        grad_states = []
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad = grad / ctx.temperature
        pieces = zip(states.split(CHUNK), target.split(CHUNK), logsumexp.split(CHUNK), grad.split(CHUNK))
        chunks = list(pieces)
        for i, (s, y, z, g) in enumerate(chunks):
            if i == len(chunks) - 1:
                p = last.div_(last.sum(-1, keepdim=True))
            else:
                p = scaled_logits(s, weight, ctx.vocab_size, ctx.temperature).sub_(z[:, None]).exp_()
            grad_logits = p.mul_(-g[:, None]).scatter_add_(1, y[:, None], g[:, None])  # g · (onehot(y) − p)
            grad_logits = grad_logits.to(states.dtype)
            grad_states.append(grad_logits @ weight)
            grad_weight += grad_logits.t() @ s
        return torch.cat(grad_states), grad_weight.to(weight.dtype), None, None, None


def product_operands(model, states):
    """The states and the vocabulary matrix, in the dtype in which they are multiplied."""
    dtype = model.product_dtype()
    return states.to(dtype), model.wte.weight.to(dtype)


def token_logprobs(model, states, target, temperature):
    """log π(y_t | s_t) at temperature τ: states (N, C), target (N,) -> (N,) float32, in nats."""
    states, weight = product_operands(model, states)
    with torch.autocast(model.device.type, enabled=False):  # a caller's autocast would round the logits
        return TokenLogprobs.apply(states, weight, target, model.config.vocab_size, temperature)


def log_softmax(model, states, temperature):
    """log π(· | s) of at most CHUNK states: (n, vocab_size) float32, bit for bit those of token_logprobs."""
    vocab_size = model.config.vocab_size
    states, weight = product_operands(model, states)
    with torch.autocast(model.device.type, enabled=False):
        logits = scaled_logits(states, weight, vocab_size, temperature)
        logsumexp = logsumexp_(logits.clone())
        return (logits - logsumexp[:, None])[:, :vocab_size]
