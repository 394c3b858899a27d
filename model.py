"""GPT-2 (Radford et al. 2019), exactly: learned positions, pre-LN, tanh-GELU, biases, tied head. Weights in and out.

The ways through the same blocks:

    model(batch), model.logprobs(batch)     log π(y_t | x, y_<t) of every response token of a packed batch (data/packing.py)
    model.states(batch)                     the hidden states those log-probs are read from, for whoever needs distributions
    model.logits(states)                    the vocabulary projection; model.log_softmax(states) the distributions
    model.score(batch), model.values(batch) a scalar head, read at each response's end (reward model) or at each state (value model)
    model.generate(prompts, …)              sampling with a static KV cache

Left out: dropout (none is used in preference or policy training), and any architecture but GPT-2's.
"""
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from data.files import fetch, shown
from data.packing import GroupMask

PRETRAINED = {  # n_layer, n_head, n_embd
    "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
URL = "https://huggingface.co/openai-community/{}/resolve/main/pytorch_model.bin"
SIZES = {  # of a config.json, in GPTConfig's order, and the most that is believed
    "vocab_size": 2**20, "n_positions": 2**20, "n_layer": 1000, "n_head": 2**10, "n_embd": 2**20}
CHUNK = 1024  # response tokens whose (tokens, vocabulary) logits exist at one time


@dataclass
class GPTConfig:
    vocab_size: int = 50257
    block_size: int = 1024  # the longest sequence, prompt and response together
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_scalars: int = 0  # scalar heads: none for a language model, one for a reward or a value model


class KVCache:
    """Keys and values of every layer, (n_layer, B, n_head, max_len, head_dim), written in place. Rows are in order of length.

    length (B,) is what each row holds by now. A step reads no more columns than the longest row needs, rounded up to a whole block: of all rows
    on CUDA, where a block more is another graph; of each of four pieces of the rows on the CPU.
    """
    PIECES = {"cuda": 1, "cpu": 4}
    BLOCK = {"cuda": 128, "cpu": 1}

    def __init__(self, config, lengths, new_tokens, like):
        self.block = self.BLOCK[like.device.type]
        self.pieces = [(rows, lengths[rows][-1]) for rows in slices(len(lengths), self.PIECES[like.device.type])]  # and the longest row of each
        align = min(self.block, 16)  # CUDA's attention would copy a mask whose rows are not a multiple of 16
        max_len = -(-(lengths[-1] + new_tokens) // align) * align
        shape = (config.n_layer, len(lengths), config.n_head, max_len, config.n_embd // config.n_head)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)  # masked is not unread: no garbage that may be NaN
        self.rows, self.columns = torch.arange(len(lengths), device=like.device), torch.arange(max_len, device=like.device)
        self.length = torch.tensor(lengths, device=like.device)

    def prefill(self, rows, layer, q, k, v):
        self.k[layer, rows, :, :k.size(2)], self.v[layer, rows, :, :v.size(2)] = k, v
        return attention(q, k, v, None)  # causal: no token sees the padding to its right

    def reach(self, t):
        """The columns that each piece reads in the t-th step after the prompts."""
        return [min(-(-(longest + t) // self.block) * self.block, len(self.columns)) for _, longest in self.pieces]

    def mask(self):
        """(B, 1, 1, max_len): 0 where a row may look, −inf where it may not; of a boolean, each attention would make that anew."""
        return self.k.new_zeros(1).where(self.columns <= self.length[:, None], -torch.inf)[:, None, None]

    def append(self, reach, mask, layer, q, k, v):
        """Writes each row's one new key and value at its own place and attends to what is there by then."""
        self.k[layer, self.rows, :, self.length], self.v[layer, self.rows, :, self.length] = k[:, :, 0], v[:, :, 0]
        return torch.cat([attention(q[rows], self.k[layer, rows, :, :n], self.v[layer, rows, :, :n], mask[rows, ..., :n])
                          for (rows, _), n in zip(self.pieces, reach)])


class CUDAGraph:
    """Calls step(key), which works in place: the first time with a new key as it stands, the second time recording it, then replaying that."""

    def __init__(self, step):
        self.step, self.key = step, None

    def __call__(self, key):
        if key != self.key:
            self.key, self.graph = key, None
            return self.step(key)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # recorded, not run
                self.step(key)
        self.graph.replay()


def slices(n, pieces):
    """0 … n-1 cut into at most so many slices, of like size."""
    return [slice(i, min(i + -(-n // pieces), n)) for i in range(0, n, -(-n // pieces))]


def compiled(function):
    """For any shape at once: the second shape is the last one that compiles, for each kind of call."""
    torch._dynamo.config.recompile_limit = 32  # kinds, of PPO's four models: with gradients or not, frozen or not, one row or more
    return torch.compile(function, dynamic=True)


@cache
def fused_flex_attention():
    """On CUDA one kernel, which skips what the mask rules out. Made when it is needed: the compiler's import alone takes seconds."""
    return compiled(flex_attention)


def attention(q, k, v, mask):
    """softmax(q kᵀ/√d) v, (B, H, T, D) each, under `mask`.

    That is a flex_attention BlockMask, a GroupMask, a boolean (True = may look), what is added to q kᵀ/√d, or None = causal.
    """
    if isinstance(mask, GroupMask):
        return group_attention(q, k, v, mask)
    if isinstance(mask, BlockMask):
        flex = fused_flex_attention() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
        return flex(q, k, v, block_mask=mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def group_attention(q, k, v, mask):
    """Each group of the rows by itself: of what no token may see, nothing is computed."""
    groups = zip(*(x.transpose(1, 2).flatten(0, 1).split(mask.lengths) for x in (q, k, v)))  # (n, H, D)
    y = [attention(*(x.transpose(0, 1)[None] for x in qkv), visible)[0].transpose(0, 1) for qkv, visible in zip(groups, mask.visible)]
    return torch.cat(y).unflatten(0, (q.size(0), q.size(2))).transpose(1, 2)


def blocked(weight):
    """A copy of a float32 matrix (out, in) in the layout in which oneDNN multiplies few rows fast; None where that is no gain: a small one, or no MKL."""
    gain = not weight.is_cuda and weight.dtype == torch.float32 and weight.numel() >= 2**17 and torch.backends.mkl.is_available()
    return torch.ops.mkldnn._reorder_linear_weight(weight) if gain else None


def onednn(x, blocked, bias=None):
    """x Wᵀ + b of a `blocked` W, without a gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, blocked, bias, "none", [], "")


class Linear(nn.Linear):
    """nn.Linear, by way of oneDNN while GPT.blocked_weights() lasts."""
    blocked = None

    def forward(self, x):
        return super().forward(x) if self.blocked is None else onednn(x, self.blocked, self.bias)


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, attend):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        return attend(q, k, v).transpose(1, 2).reshape(B, T, C)  # c_proj is the block's to apply


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = SelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, attend, at=None):
        """(B, T, C) -> (B, T, C); or, of the places `at` in B·T alone, (N, C)."""
        y = self.attn(self.ln_1(x), attend)
        if at is not None:
            x, y = (z.flatten(0, 1).index_select(0, at) for z in (x, y))  # unlike [], its backward adds in one order
        x = x + self.attn.c_proj(y)
        return x + self.mlp(self.ln_2(x))


def product(states, weight):
    """s Wᵀ, (N, C) and (V, C) -> (N, V) float32. Not by way of bfloat16, whose neighbours near 100, where GPT-2's logits often are, lie 0.5 apart."""
    if states.dtype == torch.float32:
        return states @ weight.t()
    if states.is_cuda:
        return torch.mm(states, weight.t(), out_dtype=torch.float32)
    return states.float() @ weight.float().t()


class TokenLogprobs(torch.autograd.Function):
    """log softmax(s Wᵀ/τ)[y] for N states, without ever holding (N, V): chunk by chunk, all but the last recomputed in the backward pass.

    states (N, C), weight (V, C) of which the first vocab_size rows are real, target (N,) -> (N,) float32.
    With p the softmax and g the incoming gradient, ∂/∂logits = g · (onehot(y) − p)/τ.
    """

    @staticmethod
    def logits(states, weight, vocab_size, temperature):
        logits = product(states, weight)  # (n, V)
        logits[:, vocab_size:] = -torch.inf
        return logits if temperature == 1 else logits.div_(temperature)

    @staticmethod
    def logsumexp(logits):
        """(n, V) -> (n,); the logits are overwritten by exp(logits − the largest of a row)."""
        largest = logits.amax(-1, keepdim=True)
        return logits.sub_(largest).exp_().sum(-1).log_() + largest[:, 0]

    @staticmethod
    def forward(ctx, states, weight, target, vocab_size, temperature):
        logprobs, logsumexp = [], []
        for s, y in zip(states.split(CHUNK), target.split(CHUNK)):
            logits = TokenLogprobs.logits(s, weight, vocab_size, temperature)
            chosen = logits.gather(1, y[:, None])[:, 0]
            logsumexp.append(TokenLogprobs.logsumexp(logits))
            logprobs.append(chosen - logsumexp[-1])
        ctx.save_for_backward(states, weight, target, torch.cat(logsumexp), logits)  # the last chunk's, now exp(logits − …)
        ctx.vocab_size, ctx.temperature = vocab_size, temperature
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx, grad):
        states, weight, target, logsumexp, last = ctx.saved_tensors
        grad_states, grad_weight = [], torch.zeros_like(weight, dtype=torch.float32)
        chunks = list(zip(*(a.split(CHUNK) for a in (states, target, logsumexp, grad / ctx.temperature))))
        for i, (s, y, z, g) in enumerate(chunks, 1):
            if i < len(chunks):
                p = TokenLogprobs.logits(s, weight, ctx.vocab_size, ctx.temperature).sub_(z[:, None]).exp_()
            else:
                p = last.div_(last.sum(-1, keepdim=True))
            dlogits = p.mul_(-g[:, None]).scatter_add_(1, y[:, None], g[:, None]).to(states.dtype)
            grad_states.append(dlogits @ weight)
            grad_weight += dlogits.t() @ s
        return torch.cat(grad_states), grad_weight.to(weight.dtype), None, None, None


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0
        self.config = config
        self.wte = nn.Embedding(-(-config.vocab_size // 64) * 64, config.n_embd)  # padded; also the head, tied
        self.wte.blocked = None
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:  # the residual stream sums 2·n_layer projections: their share is scaled down
                std = 0.02 / (2 * config.n_layer) ** 0.5 if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(parameter, std=std)
        self.set_scalar_heads(config.n_scalars)

    def set_scalar_heads(self, n):
        """n fresh scalar heads in place of what was there, started as in Stiennon et al. 2020: std 1/√(d+1), bias 0."""
        self.config, self.scalar_head = replace(self.config, n_scalars=n), None
        if n:
            self.scalar_head = nn.Linear(self.config.n_embd, n, device=self.device)
            nn.init.normal_(self.scalar_head.weight, std=(self.config.n_embd + 1) ** -0.5)
            nn.init.zeros_(self.scalar_head.bias)

    @property
    def device(self):
        return self.wte.weight.device

    def hidden(self, tokens, position, mask=None, attend=None, at=None):
        """tokens, position (B, T) -> (B, T, C) after the last LayerNorm. attend(layer, q, k, v), where given, in place of `mask`.

        With `at`, places in B·T: (N, C), and the last block's projection and MLP run on these alone.
        """
        attend = attend or (lambda layer, q, k, v: attention(q, k, v, mask))
        x = self.wte(tokens) + self.wpe(position)
        for i, block in enumerate(self.h):
            if self.checkpoint_blocks and torch.is_grad_enabled():
                block = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)  # nothing in it is random
            x = block(x, partial(attend, i), at if i == len(self.h) - 1 else None)
        return self.ln_f(x)

    checkpoint_blocks = False
    packed_hidden, packed_mask = hidden, None  # --compile puts a compiled one in its place, and a mask it can take; generation stays as it is

    def states(self, batch, at=None):
        """(N, C): the state s_t = (x, y_<t) that each response token of the packed batch is predicted from; or those `at`."""
        return self.packed_hidden(batch.tokens, batch.position, batch.mask(self.packed_mask), at=batch.source if at is None else at)

    def logits(self, states):
        """(…, C) -> (…, vocab_size) float32."""
        return (states @ self.wte.weight.to(states.dtype).t())[..., :self.config.vocab_size].float()

    def next_logits(self, states):
        """(B, C) -> (B, V/64, 64) float32: the padded vocabulary in blocks, −inf on the padding."""
        logits = product(states, self.wte.weight) if self.wte.blocked is None else onednn(states, self.wte.blocked)
        logits = logits.unflatten(1, (-1, 64))
        logits[:, -1, self.config.vocab_size - self.wte.num_embeddings + 64:] = -torch.inf
        return logits

    def projection(self, states):
        """The states and the padded vocabulary matrix, in the precision that their product is to be taken in."""
        device = self.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        return states.to(dtype), self.wte.weight.to(dtype)

    def token_logprobs(self, states, target, temperature=1.0):
        """log π(y_t | s_t) at temperature τ; states (N, C), target (N,) -> (N,) float32, in nats."""
        states, weight = self.projection(states)
        with torch.autocast(self.device.type, enabled=False):
            return TokenLogprobs.apply(states, weight, target, self.config.vocab_size, temperature)

    def log_softmax(self, states, temperature=1.0):
        """log π(· | s) of at most CHUNK states: (n, vocab_size) float32, the numbers of token_logprobs to the bit."""
        states, weight = self.projection(states)
        with torch.autocast(self.device.type, enabled=False):
            logits = TokenLogprobs.logits(states, weight, self.config.vocab_size, temperature)
            return (logits - TokenLogprobs.logsumexp(logits.clone())[:, None])[:, :self.config.vocab_size]

    def logprobs(self, batch, temperature=1.0):
        """log π(y_t | x, y_<t) at temperature τ for the N response tokens of a packed batch: (N,) float32, in nats."""
        return self.token_logprobs(self.states(batch), batch.target, temperature)

    def scalars(self, states):
        """(…, C) -> (…, n_scalars), in float32 throughout."""
        with torch.autocast(self.device.type, enabled=False):
            return self.scalar_head(states.float())

    def score(self, batch):
        """A reward model's score of each response of a packed batch, read at its last token: (S,)."""
        return self.scalars(self.states(batch, batch.last))[:, 0]

    def values(self, batch):
        """A value model's V(s_t) for the N response tokens of a packed batch: (N,)."""
        return self.scalars(self.states(batch))[:, 0]

    forward = logprobs

    def prefill(self, cache, rows, prompts):
        """Writes these prompts, right-padded, into these rows of the cache; -> the state at the end of each, (len(prompts), C)."""
        P = max(map(len, prompts))
        tokens = torch.tensor([p + [0] * (P - len(p)) for p in prompts], device=self.device)
        last = torch.tensor([i * P + len(p) - 1 for i, p in enumerate(prompts)], device=self.device)
        return self.hidden(tokens, torch.arange(P, device=self.device), attend=partial(cache.prefill, rows), at=last)

    @contextmanager
    def blocked_weights(self):
        """Within, on an x86 CPU, oneDNN multiplies copies of the large matrices: with the few rows of a decoding step, faster than MKL."""
        modules = [self.wte] + [module for module in self.modules() if isinstance(module, Linear)]
        try:
            for module in modules:
                module.blocked = blocked(module.weight)
            yield
        finally:
            for module in modules:
                module.blocked = None

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=None, eos=None, noise=None):
        """Samples one response a prompt. prompts: B lists of token ids -> B lists of new ids, EOS included where met.

        temperature 0 is greedy. Prompts are prefilled in a few passes, those of like length together; then every row writes
        its new key and value at its own position. Stops when every row has met `eos`. A row's response depends on its prompt and its
        row of `noise`, (B, max_new_tokens) uniform on [0, 1), drawn here where it is not given.
        Raises ValueError where a prompt is empty or leaves no room for max_new_tokens in the model's context.
        """
        length = [len(prompt) for prompt in prompts]
        if min(length) == 0:
            raise ValueError("generate: a prompt is empty; begin it with the EOS token")
        if max(length) + max_new_tokens > self.config.block_size:
            raise ValueError(f"generate: a prompt of {max(length)} tokens and {max_new_tokens} new ones "
                             f"do not fit the model's context of {self.config.block_size}")
        order = sorted(range(len(prompts)), key=length.__getitem__)
        noise = torch.rand(len(prompts), max_new_tokens) if noise is None else noise  # drawn on the CPU: one seed, one response
        with self.blocked_weights():
            response = self.decode([prompts[i] for i in order], noise[order].to(self.device), temperature, top_k, -1 if eos is None else eos)
        rows = [row for _, row in sorted(zip(order, response.tolist()))]
        return [row[:row.index(eos) + 1] if eos in row else row for row in rows]

    def decode(self, prompts, noise, temperature, top_k, eos):
        """generate() of prompts in order of length: (B, T) tokens, T where every row has met `eos`, or a few later; noise (B, max_new_tokens)."""
        cache = KVCache(self.config, list(map(len, prompts)), noise.size(1), self.wte.weight)
        response, t = torch.zeros_like(noise, dtype=torch.long), torch.zeros(1, dtype=torch.long, device=self.device)
        done = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)

        def choose(state):
            token = sample(self.next_logits(state), noise.index_select(1, t)[:, 0], temperature, top_k)
            response.index_copy_(1, t, token[:, None])
            done.logical_or_(token == eos)

        def step(reach):  # in place, and nothing asked of the device: CUDA can replay it
            state = self.hidden(response.index_select(1, t), cache.length[:, None], attend=partial(cache.append, reach, cache.mask()))
            cache.length.add_(1)
            t.add_(1)
            choose(state[:, 0])

        choose(torch.cat([self.prefill(cache, rows, prompts[rows]) for rows in slices(len(prompts), 8)]))
        step = CUDAGraph(step) if self.device.type == "cuda" else step
        for i in range(1, noise.size(1)):
            if i % 4 == 0 and done.all():  # on a GPU, asking makes the host wait
                return response[:, :i]
            step(cache.reach(i))
        return response

    @classmethod
    def from_pretrained(cls, name_or_dir):
        """GPT-2's published weights by name ("gpt2" … "gpt2-xl", fetched once), or a folder that `transformers` wrote.

        Raises SystemExit with one line where the file is missing, unreachable, or not a GPT-2.
        """
        if name_or_dir in PRETRAINED:
            config, weights = GPTConfig(50257, 1024, *PRETRAINED[name_or_dir]), download(name_or_dir)
        else:
            config, weights = read_folder(name_or_dir)
        with torch.device("meta"):  # shapes alone: nothing is allocated for a config.json that is not these weights'
            own = cls(config).state_dict()
        missing = own.keys() - weights.keys()
        if missing:
            raise SystemExit(f"{name_or_dir}: not GPT-2 weights: {min(missing)} is missing")
        for name, parameter in own.items():
            w = weights[name] = weights[name].mT if is_conv1d(name) and weights[name].dim() == 2 else weights[name]
            shape = (config.vocab_size, config.n_embd) if name == "wte.weight" else tuple(parameter.shape)
            if tuple(w.shape) != shape:
                raise SystemExit(f"{name_or_dir}: {name} has shape {tuple(w.shape)}, config.json says {shape}")
        model = cls(config)
        for name, parameter in model.state_dict().items():
            parameter[:len(weights[name])].copy_(weights[name])
        return model

    def save_pretrained(self, dir):
        """Writes config.json and pytorch_model.bin, a folder that transformers' GPT2LMHeadModel.from_pretrained opens.

        Scalar heads are not part of that format and stay behind.
        """
        os.makedirs(dir, exist_ok=True)
        c = self.config
        config = dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], vocab_size=c.vocab_size, n_positions=c.block_size,
                      n_ctx=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head, tie_word_embeddings=True,
                      activation_function="gelu_new", layer_norm_epsilon=1e-5, torch_dtype="float32",
                      bos_token_id=c.vocab_size - 1, eos_token_id=c.vocab_size - 1)
        weights = {}
        for name, w in self.state_dict().items():
            if name.startswith("scalar_head"):
                continue
            w = w[:c.vocab_size] if name == "wte.weight" else w.t() if is_conv1d(name) else w
            weights["transformer." + name] = w.detach().float().cpu().contiguous().clone()
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
        torch.save(weights, os.path.join(dir, "pytorch_model.bin"))
        with open(os.path.join(dir, "config.json"), "w") as f:
            json.dump(config, f, indent=2)


def sample(logits, noise, temperature=1.0, top_k=None):
    """Logits of a vocabulary in K blocks of n, (B, K, n), and noise (B,) uniform on [0, 1) -> token (B,) ~ softmax(logits/τ) over the top_k largest.

    By inverting its CDF, which tells the block and then, within it, the token. Temperature 0 takes the largest. The logits are overwritten.
    """
    if temperature == 0:
        return logits.flatten(1).argmax(-1)
    if top_k is not None:
        flat = logits.flatten(1)
        logits = logits.masked_fill(logits < flat.topk(min(top_k, flat.size(1))).values[:, -1:, None], -torch.inf)
    p = logits.sub_(logits.amax((1, 2), keepdim=True)).div_(temperature).exp_()  # not normalised
    edge = F.pad(p.sum(2).cumsum(1, dtype=torch.float64), (1, 0))  # (B, K + 1): the CDF where blocks begin and end
    u = noise[:, None].double() * edge[:, -1:]
    block = torch.searchsorted(edge[:, 1:].contiguous(), u, right=True)  # the first that ends above the noise: never one of probability 0
    begin, end = edge.gather(1, block), edge.gather(1, block + 1)
    cdf = p.take_along_dim(block[..., None], 1)[:, 0].cumsum(1, dtype=torch.float64)
    within = torch.searchsorted(cdf, (u - begin) / (end - begin) * cdf[:, -1:], right=True)
    return (block * p.size(2) + within)[:, 0]


def is_conv1d(name):
    """The published GPT-2 keeps its four projections as (in, out); nn.Linear as (out, in)."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def download(name):
    """The published state dict of `name`, fetched once into torch.hub's cache."""
    return read_weights(fetch(os.path.join(torch.hub.get_dir(), "checkpoints", name + ".bin"), URL.format(name)))


def read_folder(dir):
    """GPTConfig and state dict of a folder in the Hugging Face format."""
    config = read_config(os.path.join(dir, "config.json"))
    for name in ("pytorch_model.bin", "model.safetensors"):
        if os.path.exists(os.path.join(dir, name)):
            return config, read_weights(os.path.join(dir, name))
    raise SystemExit(f"{dir}: neither pytorch_model.bin nor model.safetensors is there")


def read_config(path):
    """The GPTConfig of a config.json; SystemExit where it is none of a GPT-2."""
    if not os.path.exists(path):
        raise SystemExit(f"{path}: no config.json there; expected a folder in the Hugging Face format, or one of {', '.join(PRETRAINED)}")
    try:
        with open(path, "rb") as f:
            c = dict(json.load(f))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise SystemExit(f"{path}: not the config.json of a model ({error})")
    if c.get("model_type") != "gpt2":
        raise SystemExit(f"{path}: model_type is {shown(c.get('model_type'))}, only 'gpt2' can be read")
    for key, most in SIZES.items():
        if type(c.get(key)) is not int or not 0 < c[key] <= most:
            raise SystemExit(f"{path}: {key} is {shown(c.get(key))}, expected a whole number from 1 to {most}")
    if c["n_embd"] % c["n_head"]:
        raise SystemExit(f"{path}: n_embd {c['n_embd']} is not a multiple of n_head {c['n_head']}")
    return GPTConfig(*(c[key] for key in SIZES))


def read_weights(path):
    """{name: tensor} of a file of torch.save or safetensors, of which nothing is executed; SystemExit where it is none."""
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        return {name.removeprefix("transformer."): w for name, w in weights.items() if torch.is_tensor(w)}
    except ImportError:
        raise SystemExit(f"{path}: reading it needs the safetensors package: pip install safetensors")
    except Exception as error:  # half a dozen kinds, for a file that is cut short, flipped or foreign
        raise SystemExit(f"{path}: not a model's weights, or damaged ({type(error).__name__}): delete it, and fetch or copy it again")
