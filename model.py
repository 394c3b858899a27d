"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm before each sub-block, tanh-GELU, biases, a
tied head.

This file holds the textbook forms: the transformer, log-softmax and gather (`naive_logprobs`), sampling by
running the whole text again for each token (`naive_generate`). Training and rollouts call the fast forms,
which live in engine/ and give the same numbers, up to rounding. (On CUDA, states and log-probs use bfloat16
products by default; `generate` uses the dtype of the weights, and rollouts sample from a bfloat16 copy.)

    model.logprobs(batch)                    log π(y_t | x, y_<t) of every response token of a packed batch
    model.states(batch)                      the hidden states that those log-probs are read from
    model.score(batch), model.values(batch)  a scalar per response (reward model), or per state (value model)
    model.generate(prompts, …)               sampling with a key-value cache

Left out: dropout, and any architecture but GPT-2's.
"""
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from engine import devices
from engine.attention import BLOCK, block_at, call_block, compiled, packed_forward, packed_mask
from engine.decode import generate
from engine.logprobs import log_softmax, token_logprobs
from engine.onednn import Linear  # nn.Linear, with faster products while sampling on a CPU
from engine.weights import fit_weights, read_pretrained, write_pretrained


@dataclass
class GPTConfig:
    vocab_size: int = 50257
    block_size: int = 1024  # the longest sequence, prompt and response together
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_scalars: int = 0      # scalar heads: one for a value or a reward model, one per axis in finegrained.py
    norm_eps: float = 1e-5  # added to the variance in LayerNorm


# ------------------------------------------------------------------------------------------ the transformer

def causal_attention(q, k, v):
    """softmax(q kᵀ/√D) v, in which each position sees itself and those before it. All (B, H, T, D)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values of all heads
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, attend):
        return self.c_proj(self.heads(x, attend))

    def heads(self, x, attend):
        """The heads' outputs side by side: (B, T, C) -> (B, T, C).

        attend(q, k, v): causal_attention, or attention under another mask.
        """
        B, T, C = x.shape
        D = C // self.n_head
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, D).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_head, D).transpose(1, 2)
        v = v.view(B, T, self.n_head, D).transpose(1, 2)
        y = attend(q, k, v)
        return y.transpose(1, 2).reshape(B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = self.c_fc(x)
        x = F.gelu(x, approximate="tanh")
        return self.c_proj(x)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.norm_eps)
        self.attn = SelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, attend):
        x = x + self.attn(self.ln_1(x), attend)
        x = x + self.mlp(self.ln_2(x))
        return x

    def forward_at(self, x, attend, places):
        """Like `forward`, but only at `places`, indices (N,) into the flattened B·T: (B, T, C) -> (N, C).

        For the last block: attention still sees all places, but c_proj and the MLP run on these alone. (A
        method, because sharding and compiling act on a block's methods.)
        """
        return block_at(self, x, attend, places)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0
        self.config = config
        padded_vocab_size = (config.vocab_size + 63) // 64 * 64  # multiples of 64 multiply faster
        self.wte = nn.Embedding(padded_vocab_size, config.n_embd)  # also the head: the two are tied
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.norm_eps)
        self.init_weights()
        self.set_scalar_heads(config.n_scalars)

        # The dtype of matrix products; None: bfloat16 on CUDA, float32 elsewhere.
        self.dtype = None

        # How packed batches run: set by `prepare` and, for a sharded model, by common/device.py.
        self.compiled = False  # call_block is compiled; on CUDA, `generate` then replays a CUDA graph
        self.checkpoint_blocks = False
        self.mask_kind = None  # "flex", "dense" or "groups"; None: "dense", or on a CPU "groups" where faster
        self.call_block = call_block

    def init_weights(self):
        """Biases 0, matrices N(0, σ²) with σ = 0.02 √(768/C): GPT-2's 0.02 at its width of C = 768.

        For the 2·n_layer projections into the residual stream, σ/√(2·n_layer). A much narrower model with
        GPT-2's 0.02 learns slowly at first.
        """
        std = 0.02 * (768 / self.config.n_embd) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=std / (2 * self.config.n_layer) ** 0.5)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=std)

    def set_scalar_heads(self, n):
        """Replaces the scalar heads with n new ones: weights N(0, 1/(C+1)) as in arXiv:2009.01325 B.1."""
        self.config = replace(self.config, n_scalars=n)
        self.scalar_head = None
        if n:
            self.scalar_head = nn.Linear(self.config.n_embd, n, device=self.device)
            nn.init.normal_(self.scalar_head.weight, std=(self.config.n_embd + 1) ** -0.5)
            nn.init.zeros_(self.scalar_head.bias)

    def hidden(self, tokens, position, attend=causal_attention):
        """tokens, position (B, T) or (T,) -> (B, T, C): the hidden states, after the last LayerNorm."""
        x = self.wte(tokens) + self.wpe(position)
        for block in self.h:
            x = block(x, attend)
        return self.ln_f(x)

    def forward(self, tokens):
        """tokens (B, T) -> logits of the next token, (B, T, vocab_size) float32."""
        position = torch.arange(tokens.size(1), device=tokens.device)
        x = self.hidden(tokens, position)
        logits = x @ self.wte.weight.to(x.dtype).t()
        return logits[..., :self.config.vocab_size].float()

    # --------------------------------------------------------------------------------------- textbook forms

    def naive_logprobs(self, tokens):
        """log π(tokens[t+1] | tokens[:t+1]) of each token but the first: (B, T) -> (B, T-1).

        The reference for `logprobs`, at temperature 1.
        """
        logprobs = self(tokens[:, :-1]).log_softmax(-1)
        return logprobs.gather(2, tokens[:, 1:, None])[..., 0]

    @torch.no_grad()
    def naive_generate(self, prompt, noise, temperature=1.0, top_k=None, eos=None):
        """Samples a response to one prompt, a list of ids. The reference for `generate`.

        noise: numbers from [0, 1), one per new token; each picks the first token at which the CDF exceeds it.
        """
        tokens = list(prompt)
        for u in noise:
            logits = self(torch.tensor([tokens], device=self.device))[0, -1]
            if top_k is not None:
                smallest = logits.topk(min(top_k, len(logits))).values[-1]
                logits[logits < smallest] = -torch.inf
            if temperature == 0:
                token = logits.argmax()
            else:
                cdf = (logits / temperature).double().softmax(-1).cumsum(-1)
                token = (cdf <= u).sum()
            tokens.append(token.item())
            if token == eos:
                break
        return tokens[len(prompt):]

    # --------------------------------------------------------------------------------------- packed batches

    # A packed batch (engine/packing.py) holds prompts and S responses, end to end in B rows of T tokens:
    #   tokens, position (B, T)   each token, and its position in its own prompt and response
    #   state_index (N,)          for each response token, the place of the state that predicts it
    #   target (N,)               that token
    #   last (S,)                 the place of each response's last token
    # A place is an index into the flattened (B·T).

    @property
    def device(self):
        return self.wte.weight.device

    def autocast(self):
        """Matrix products in product_dtype(): by default in bfloat16 on CUDA, in float32 elsewhere."""
        dtype = self.product_dtype()
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype)

    def product_dtype(self):
        if self.dtype is not None:
            return self.dtype
        return torch.bfloat16 if devices.device_type(self.device) == "cuda" else torch.float32

    def prepare(self, compile, checkpoint_blocks):
        """Sets whether the blocks are compiled, and whether they are recomputed in the backward pass.

        Recomputing them saves memory. Once compiled, a model stays compiled.
        """
        self.checkpoint_blocks = checkpoint_blocks
        if compile and not self.compiled:
            self.compiled = True
            # One kind of mask, since torch.compile would compile again for each
            self.mask_kind = "flex" if devices.device_type(self.device) == "cuda" else "dense"
            self.call_block = compiled(call_block)

    def states(self, batch, places=None):
        """The hidden states (N, C), after ln_f, at `places`; None: those that predict the response tokens."""
        if places is None:
            places = batch.state_index
        if self.mask_kind == "flex":
            batch = batch.in_one_row(multiple=BLOCK)  # as flex_attention and the compiler want it
        mask = packed_mask(batch, self.mask_kind)
        with self.autocast():
            return packed_forward(self, batch.tokens, batch.position, mask, places)

    def token_logprobs(self, states, target, temperature=1.0):
        """log π(y_t | s_t) at temperature τ: states (N, C), target (N,) -> (N,) float32, in nats."""
        return token_logprobs(self, states, target, temperature)

    def log_softmax(self, states, temperature=1.0):
        """log π(· | s): states (n, C) -> (n, vocab_size) float32; n is at most CHUNK, to bound the memory."""
        return log_softmax(self, states, temperature)

    def logprobs(self, batch, temperature=1.0):
        """log π(y_t | x, y_<t) at temperature τ of a packed batch's N response tokens: (N,), in nats."""
        return self.token_logprobs(self.states(batch), batch.target, temperature)

    def scalars(self, states):
        """The scalar heads, in float32 also under a caller's autocast: (…, C) -> (…, n_scalars)."""
        with torch.autocast(self.device.type, enabled=False):
            return self.scalar_head(states.float())

    def score(self, batch):
        """A reward model's r(x, y) of each response of a packed batch, read at its last token: (S,)."""
        return self.scalars(self.states(batch, batch.last))[:, 0]

    def values(self, batch):
        """A value model's V(s_t) of the N response tokens of a packed batch: (N,)."""
        return self.scalars(self.states(batch))[:, 0]

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=None, eos=None, noise=None,
                 return_logprobs=False):
        """Samples one response per prompt. prompts: B lists of token ids -> B lists of new ids, EOS included.

        Temperature 0 is greedy. A response depends only on its prompt and its row of `noise`, (B,
        max_new_tokens) uniform on [0, 1), drawn here if it is not given. With return_logprobs, returns a
        second list: the log-prob of each new token under the distribution that it was drawn from. Raises
        ValueError if a prompt is empty or leaves no room for max_new_tokens in the model's context.
        """
        return generate(self, prompts, max_new_tokens, temperature, top_k, eos, noise, return_logprobs)

    # ----------------------------------------------------------------------------------- weights in and out

    @classmethod
    def from_pretrained(cls, name_or_dir):
        """Loads "gpt2" … "gpt2-xl", "hub:OWNER/NAME", or a folder in the Hugging Face format.

        Exits with a one-line message if a file is missing, cannot be fetched, or is not a GPT-2.
        """
        fields, weights = read_pretrained(name_or_dir)
        config = GPTConfig(**fields)
        with torch.device("meta"):  # shapes only, so a wrong config.json allocates nothing
            shapes = {name: weight.shape for name, weight in cls(config).state_dict().items()}
        weights = fit_weights(weights, shapes, config.vocab_size, name_or_dir)
        model = cls(config)
        for name, parameter in model.state_dict().items():
            parameter[:len(weights[name])].copy_(weights[name])  # the vocabulary's padding stays as it is
        return model

    def save_pretrained(self, dir):
        """Writes a folder in the Hugging Face format, which cannot hold scalar heads: they are left out."""
        write_pretrained(dir, self.config, self.state_dict())
