"""GPT-2: against transformers if it is installed; the fast forms against the textbook's; by hand."""
import copy
import hashlib
import json
import math
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from conftest import SHARED, make_model, random_groups
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import model as model_module
from common.models import load_model_only, template_of_checkpoint
from data import get_tokenizer
from engine import config_json, decode, files, logprobs, weights
from engine.decode import next_logits, sample
from engine.logprobs import CHUNK, TokenLogprobs
from engine.onednn import onednn_weights
from engine.packing import pack
from model import GPT, GPTConfig

ROOT = Path(__file__).parents[1]


def naive_generate(model, prompts, noise, **options):
    """The textbook's responses, one prompt after the other."""
    return [model.naive_generate(prompt, row, **options) for prompt, row in zip(prompts, noise)]


def test_importing_the_model_brings_no_tokenizer_no_data_and_no_machinery():
    program = "import model, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    packages = set(subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True).split())
    assert {"model", "engine", "torch"} <= packages
    assert not packages & {"tiktoken", "common", "data"}


# ------------------------------------------------------------------------------------------------- sampling

@pytest.mark.parametrize("options", [
    dict(temperature=0), dict(temperature=1.0), dict(temperature=0.7, top_k=5), dict(eos=3, temperature=2.0)])
def test_cached_generation_equals_the_textbooks_token_for_token(model, options):
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12], [4]]
    noise = torch.rand(5, 20, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    cached = model.generate(prompts, 20, noise=noise, **options)
    assert cached == naive_generate(model, prompts, noise, **options)
    assert "eos" not in options or {len(r) for r in cached} != {20}
    # whoever else is sampled beside it
    assert cached[1:3] == model.generate(prompts[1:3], 20, noise=noise[1:3], **options)
    torch.manual_seed(5)
    assert cached == model.generate(prompts, 20, **options)


@pytest.mark.parametrize("temperature, eos", [(1.0, None), (0.7, None), (0.7, 3)])
def test_generation_returns_the_logprobs_of_its_tokens_under_the_model(model, temperature, eos):
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12], [4]]
    noise = torch.rand(5, 20, generator=torch.Generator().manual_seed(1))
    options = dict(temperature=temperature, eos=eos, noise=noise)
    responses, found = model.generate(prompts, 20, return_logprobs=True, **options)
    assert responses == model.generate(prompts, 20, **options)
    assert eos is None or {len(response) for response in responses} != {20}
    for prompt, response, its_logprobs in zip(prompts, responses, found):
        tokens = torch.tensor([prompt + response])
        if temperature == 1:
            expected = model.naive_logprobs(tokens)[0, len(prompt) - 1:]
        else:
            logp = (model(tokens[:, :-1]) / temperature).log_softmax(-1)
            expected = logp.gather(2, tokens[:, 1:, None])[0, len(prompt) - 1:, 0]
        torch.testing.assert_close(torch.tensor(its_logprobs), expected, atol=1e-5, rtol=0)


def test_the_logprobs_of_generation_are_those_of_the_distribution_it_draws_from(model):
    """The greedy token has all of the probability; with top_k, the k largest logits share it."""
    noise = torch.rand(1, 20, generator=torch.Generator().manual_seed(1))
    _, (found,) = model.generate([[1, 2, 3]], 20, temperature=0, noise=noise, return_logprobs=True)
    assert found == [0.0] * 20
    (response,), (found,) = model.generate([[1, 2, 3]], 20, 0.7, top_k=5, noise=noise, return_logprobs=True)
    logits = model(torch.tensor([[1, 2, 3] + response[:-1]]))[0, 2:] / 0.7  # (20, V)
    expected = logits.gather(1, torch.tensor(response)[:, None])[:, 0] - logits.topk(5).values.logsumexp(-1)
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("block", [32, 128])
def test_decoding_as_on_cuda_gives_the_same_tokens(model, monkeypatch, block):
    """There one slice of all rows reads the cache by blocks of columns."""
    prompts, noise = [[1, 2, 3], [4], list(range(30)), [11, 12], [4]], torch.rand(5, 30)
    here = model.generate(prompts, 30, noise=noise)
    monkeypatch.setattr(decode.KVCache, "SLICES", {"cpu": 1})
    monkeypatch.setattr(decode.KVCache, "BLOCK", {"cpu": block})
    assert here == model.generate(prompts, 30, noise=noise)


@pytest.mark.parametrize("n", [1, 3, 12])
def test_a_prompt_with_several_responses_is_run_once(model, monkeypatch, n):
    """Whatever the number of prompts: n times two of the same length and one that is longer."""
    prompts = []
    for i in range(n):
        prompts += [[i, 2, 3]] * 4 + [[i, 5, 6]] * 2 + [list(range(i, i + 9))] * 3
    noise = torch.rand(len(prompts), 12)
    ran, real = [], decode.hidden_at

    def watched(model, tokens, *rest):
        ran.append(len(tokens))
        return real(model, tokens, *rest)
    monkeypatch.setattr(decode, "hidden_at", watched)
    assert model.generate(prompts, 1, noise=noise[:, :1]) == naive_generate(model, prompts, noise[:, :1])
    assert sum(ran) == 3 * n and len(ran) <= 8
    monkeypatch.undo()
    assert model.generate(prompts, 12, noise=noise) == naive_generate(model, prompts, noise)


@torch.no_grad()
def test_decoding_with_copied_matrices_gives_the_same_tokens():
    """The large ones: the vocabulary's and the MLP's, not the attention's."""
    model, noise = make_model(vocab_size=700, n_embd=192), torch.rand(3, 20)
    prompts = [[1, 2, 3], [4], list(range(30))]
    x, fc = torch.randn(3, 192), model.h[0].mlp.c_fc
    has_mkl = torch.backends.mkl.is_available()

    def copied():
        return [module for module in model.modules() if getattr(module, "onednn_copy", None) is not None]
    plain = next_logits(model, x), fc(x)
    with onednn_weights(model) as vocabulary:
        assert (vocabulary is not None) == has_mkl
        assert len(copied()) == has_mkl * 4 and model.h[0].attn.c_attn.onednn_copy is None
        for before, after in zip(plain, (next_logits(model, x, vocabulary), fc(x))):
            torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    assert model.generate(prompts, 20, noise=noise) == naive_generate(model, prompts, noise)
    assert not copied()  # they are gone, for the next step of training


def test_a_step_asks_nothing_of_the_device(model):
    """Tensors without numbers raise where the host wants to know one."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        model = copy.deepcopy(model)
        model.load_state_dict({k: fake.from_tensor(v) for k, v in model.state_dict().items()}, assign=True)
        tokens, found = decode.decode(model, [[4], [1, 2, 3]], torch.rand(2, 4), 0.7, 5, 3)
        assert tokens.shape == found.shape == (2, 4)
        with pytest.raises(DataDependentOutputException):  # every fourth step: has every row met EOS?
            decode.decode(model, [[4], [1, 2, 3]], torch.rand(2, 6), 0.7, 5, 3)


def test_a_graph_is_recorded_at_the_second_call_and_replayed_from_then_on(monkeypatch):
    calls = []

    @contextmanager
    def record(graph):
        calls.append("record")
        yield
    graph = SimpleNamespace(replay=lambda: calls.append("replay"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    step = decode.CUDAGraph(calls.append)
    for key in ([128], [128], [128], [256], [256]):
        step(key)
    assert calls == [[128], "record", [128], "replay", "replay", [256], "record", [256], "replay"]


def test_generation_stops_when_every_row_has_met_eos(model, monkeypatch):
    calls = []

    def certain(model, state, vocabulary):
        calls.append(1)
        return torch.eye(128)[[3] * len(state)].view(-1, 2, 64) * 1e4
    monkeypatch.setattr(decode, "next_logits", certain)
    assert model.generate([[1], [2, 4]], 40, eos=3) == [[3], [3]]
    assert len(calls) == 4


def test_generate_says_what_does_not_fit(model):
    with pytest.raises(ValueError, match="60 tokens and 5 new ones do not fit the model's context of 64"):
        model.generate([[1] * 60, [1]], 5)
    with pytest.raises(ValueError, match="a prompt is empty"):
        model.generate([[1], []], 5)


def test_sample_follows_its_distribution():
    torch.manual_seed(0)
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])

    def count(**options):
        token, _ = sample(logits.view(2, 2).repeat(40_000, 1, 1), torch.rand(40_000), **options)
        return token.bincount(minlength=4) / 40_000
    torch.testing.assert_close(count(), logits.softmax(0), atol=0.01, rtol=0)
    torch.testing.assert_close(count(temperature=2.0), (logits / 2).softmax(0), atol=0.01, rtol=0)
    assert count(top_k=2)[1:3].tolist() == [0, 0] and count(temperature=0)[3] == 1


def test_sample_inverts_the_cdf():
    logits = torch.tensor([0, 0.25, 0, 0.5, 0, 0.25, 0, 0]).log()
    noise = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-53], dtype=torch.float64)
    for blocks in (1, 2, 4):  # never a token, or a block, of probability 0
        token, logprob = sample(logits.view(blocks, -1).repeat(6, 1, 1), noise)
        assert token.tolist() == [1, 1, 3, 3, 5, 5]
        torch.testing.assert_close(logprob, logits[token])
    torch.manual_seed(0)
    logits, noise = torch.randn(5000, 6, 64), torch.rand(5000)
    logp = logits.flatten(1).double().log_softmax(-1)
    cdf = logits.flatten(1).double().softmax(-1).cumsum(-1)
    token, logprob = sample(logits, noise)
    expected = (cdf <= noise[:, None]).sum(1)
    assert (token == expected).float().mean() > 0.999  # but for the last digits of float32
    torch.testing.assert_close(logprob, logp.gather(1, token[:, None])[:, 0].float(), atol=1e-5, rtol=0)


def test_rare_tokens_can_be_drawn(model, monkeypatch):
    """50,256 tokens share a probability of 1e-4. float32 noise, k · 2^-24, would reach one in thirty of them."""
    logits = torch.full((50_304,), math.log(1e-4 / 50_256))
    logits[0] = math.log(1 - 1e-4)
    logits[50_257:] = -torch.inf
    seen = []
    real = decode.decode
    monkeypatch.setattr(decode, "decode", lambda model, prompts, noise, *rest: seen.append(noise) or real(model, prompts, noise, *rest))
    torch.manual_seed(0)
    model.generate([[1]] * 1000, 50)
    rare = 1 - 1e-4 * seen[0].flatten()[:200]  # the noise that falls on rare tokens, with the same last digits
    grid = 1 - torch.arange(1, 1677, dtype=torch.float64) / 2**24
    drawn, reachable = (sample(logits.view(-1, 64).repeat(len(u), 1, 1), u)[0] for u in (rare, grid))
    assert (drawn > 0).all() and (torch.isin(drawn, reachable).double().mean() < 0.1)
    u = seen[0].flatten()
    assert u.dtype == torch.float64 and ((u * 2**24) % 1 != 0).double().mean() > 0.99 and 0 <= u.min() and u.max() < 1


# ------------------------------------------------------------------------------------ log-probs and scalars

@pytest.mark.parametrize("max_tokens", [64, None])
def test_logprobs_of_a_packed_batch_equal_the_textbooks(model, max_tokens):
    groups = random_groups()
    naive = []
    for prompt, responses in groups:
        for response in responses:
            naive.append(model.naive_logprobs(torch.tensor([prompt + response]))[0, len(prompt) - 1:])
    torch.testing.assert_close(model.logprobs(pack(groups, max_tokens)), torch.cat(naive), atol=1e-5, rtol=0)


def test_naive_logprobs_are_those_of_every_token_but_the_first(model):
    tokens = torch.randint(100, (3, 9), generator=torch.Generator().manual_seed(0))
    found = model.naive_logprobs(tokens)
    assert found.shape == (3, 8)
    for i in range(3):
        for t in range(1, 9):  # each from the tokens before it alone
            logp = model(tokens[i:i + 1, :t])[0, -1].log_softmax(-1)
            torch.testing.assert_close(found[i, t - 1], logp[tokens[i, t]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_softmax_holds_the_token_logprobs_to_the_bit(temperature, model):
    torch.manual_seed(0)
    states, target = torch.randn(50, 32), torch.randint(100, (50,))
    logp = model.log_softmax(states, temperature)
    assert logp.shape == (50, 100)  # the padding of the vocabulary is gone, and had no probability
    chosen = logp.gather(1, target[:, None])[:, 0]
    assert torch.equal(chosen, model.token_logprobs(states, target, temperature))
    torch.testing.assert_close(logp.exp().sum(-1), torch.ones(50))


def test_scalar_heads(model):
    model.set_scalar_heads(2)
    groups = random_groups()
    batch = pack(groups, 64)
    assert model.config.n_scalars == 2 and model.scalar_head.weight.shape == (2, 32)
    assert not model.scalar_head.bias.any()
    with torch.no_grad():
        score, values, states = model.score(batch), model.values(batch), model.states(batch)
        i = 0
        for s, (prompt, response) in enumerate((p, r) for p, rs in groups for r in rs):
            row = torch.tensor([list(prompt) + list(response)])
            v = model.scalars(model.hidden(row, torch.arange(row.size(1))))[0, :, 0]
            torch.testing.assert_close(score[s], v[-1], atol=1e-5, rtol=1e-5)  # after the last token
            before_each = v[len(prompt) - 1:-1]
            torch.testing.assert_close(values[i:i + len(response)], before_each, atol=1e-5, rtol=1e-5)
            i += len(response)
    assert i == len(values) and model.scalars(states).shape == (i, 2)
    torch.manual_seed(0)
    wide = GPT(GPTConfig(100, 8, 1, 2, 400, n_scalars=50))
    assert abs(wide.scalar_head.weight.std() * 401 ** 0.5 - 1) < 0.02
    model.set_scalar_heads(0)
    assert "scalar_head.weight" not in model.state_dict()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_logprobs_and_gradients_equal_the_full_softmax(temperature):
    torch.manual_seed(0)
    n, vocab_size = CHUNK + 37, 50  # more than one chunk; 14 rows of padding
    states, weight, target = torch.randn(n, 8), torch.randn(64, 8), torch.randint(vocab_size, (n,))
    a = [states.clone().requires_grad_(), weight.clone().requires_grad_()]
    b = [states.clone().requires_grad_(), weight.clone().requires_grad_()]
    g = torch.randn(n)
    chunked = TokenLogprobs.apply(*a, target, vocab_size, temperature)
    full = ((b[0] @ b[1][:vocab_size].t()) / temperature).log_softmax(-1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(chunked, full, atol=1e-5, rtol=1e-5)
    (chunked * g).sum().backward()
    (full * g).sum().backward()
    for x, y in zip(a, b):
        torch.testing.assert_close(x.grad, y.grad, atol=1e-4, rtol=1e-4)


def test_logits_scores_and_values_are_not_rounded_to_bfloat16():
    """Their operands are, under autocast; but near 100, where GPT-2's logits lie, bfloat16's steps are ½."""
    torch.manual_seed(0)
    model, states, target = make_model(n_scalars=1), torch.randn(50, 32), torch.randint(100, (50,))
    with torch.no_grad():
        model.wte.weight[:, 0], states[:, 0] = -10, 10  # a logit of -100 more, for each token
        weight, rounded = (x.bfloat16().double() for x in (model.wte.weight[:100], states))
        exact = (rounded @ weight.t()).log_softmax(-1).gather(1, target[:, None])[:, 0].float()
        model.dtype = torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model.token_logprobs(states, target), exact, atol=1e-4, rtol=0)
            scores = model.scalars(states)
        torch.testing.assert_close(model.token_logprobs(states, target), exact, atol=1e-4, rtol=0)
        assert torch.equal(scores, model.scalars(states))
        half = copy.deepcopy(model).bfloat16()
        logits = next_logits(half, states.bfloat16()).flatten(1)[:, :100]
        torch.testing.assert_close(logits, (rounded @ weight.t()).float(), atol=1e-4, rtol=0)


def test_padded_vocabulary_is_unreachable():
    model = make_model(vocab_size=3)
    with torch.no_grad():
        model.wte.weight[3:] = 100 * model.ln_f.bias + 50  # as tempting as can be
    assert model.wte.weight.shape[0] == 64
    groups = [([0], [[a], [b]]) for a, b in [(0, 1), (2, 2)]]
    p = model.logprobs(pack(groups, 3)).exp()
    assert math.isclose(p[:3].sum().item(), 1, abs_tol=1e-5)
    assert {t for r in model.generate([[0]] * 50, 10) for t in r} <= {0, 1, 2}
    p.log().sum().backward()
    assert model.wte.weight.grad[3:].abs().max() == 0


def test_memory_of_logprobs_does_not_grow_with_tokens_times_vocabulary(monkeypatch):
    """Of the logits, no more than one chunk is kept for the backward pass."""
    monkeypatch.setattr(logprobs, "CHUNK", 60)
    model, batch = make_model(vocab_size=5000, n_embd=8), pack(random_groups(n=100), 64)
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        model.logprobs(batch)
    weight, last_chunk = (5056, 8), (len(batch.token_index) % 60, 5056)
    assert [shape for shape in shapes if 5056 in shape] == [weight, last_chunk]


@pytest.mark.parametrize("n", [1, 59, 60, 61, 120])
def test_gradient_of_logprobs_in_chunks(n, monkeypatch):
    """Recomputed or kept: the gradient is that of the log-softmax in one piece."""
    monkeypatch.setattr(logprobs, "CHUNK", 60)
    states, target, incoming = torch.randn(n, 16), torch.randint(90, (n,)), torch.randn(n)
    grads = []
    for chunked in (True, False):
        torch.manual_seed(0)
        model, s = make_model(vocab_size=90, n_embd=16), states.clone().requires_grad_()
        if chunked:
            found = model.token_logprobs(s, target, 0.7)
        else:
            logits = s @ model.wte.weight[:90].t()
            found = (logits / 0.7).log_softmax(-1)[range(n), target]
        (found * incoming).sum().backward()
        grads.append((s.grad, model.wte.weight.grad))
    for chunked, whole in zip(*grads):
        torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------- the Hugging Face format

@pytest.fixture
def theirs():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=97, n_positions=48, n_embd=32, n_layer=3, n_head=4)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def as_published(theirs):
    """Without the prefix of the names, and without the head, which is tied."""
    weights = theirs.state_dict()
    return {name.removeprefix("transformer."): weights[name] for name in weights if name != "lm_head.weight"}


def assert_same_logits(ours, theirs):
    tokens = torch.randint(97, (3, 40))
    with torch.no_grad():
        mine, their = ours(tokens), theirs(tokens).logits
    torch.testing.assert_close(mine, their, atol=1e-4, rtol=0)


def test_reads_what_transformers_writes(theirs, tmp_path):
    pytest.importorskip("safetensors")
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert_same_logits(GPT.from_pretrained(str(tmp_path)), theirs)


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_pytorch_model_bin_as_published(theirs, tmp_path, zipped):
    """The published file is older than torch's zip format, has no such prefix, and holds the causal mask."""
    published = as_published(theirs) | {"h.0.attn.bias": torch.ones(1, 1, 48, 48)}
    torch.save(published, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    theirs.config.save_pretrained(tmp_path)
    assert_same_logits(GPT.from_pretrained(str(tmp_path)), theirs)


def test_transformers_reads_what_we_write(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = make_model(vocab_size=97)
    ours.save_pretrained(str(tmp_path))
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(str(tmp_path), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_same_logits(ours, theirs.eval())


def test_the_epsilon_of_layernorm_is_honoured(theirs, tmp_path):
    theirs.config.layer_norm_epsilon = 1e-3
    torch.save(as_published(theirs), tmp_path / "pytorch_model.bin")
    theirs.config.save_pretrained(tmp_path)
    theirs = type(theirs).from_pretrained(tmp_path).eval()
    ours = GPT.from_pretrained(str(tmp_path))
    assert_same_logits(ours, theirs)
    ours.save_pretrained(str(tmp_path / "again"))
    assert GPT.from_pretrained(str(tmp_path / "again")).config == ours.config


@pytest.mark.parametrize("key, value", [("scale_attn_by_inverse_layer_idx", True), ("scale_attn_weights", False), ("activation_function", "relu"),
                                        ("n_inner", 100), ("add_cross_attention", True), ("tie_word_embeddings", False), ("layer_norm_epsilon", 0)])
def test_a_config_that_describes_another_function_is_refused_by_name(key, value, theirs, tmp_path):
    torch.save(as_published(theirs), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(theirs.config.to_dict() | {key: value}, default=str))
    with pytest.raises(SystemExit, match=f"config.json: {key} is {value!r}, "):
        GPT.from_pretrained(str(tmp_path))


# Keys for training, generation and classification, or of the precision of a product.
IGNORED_KEYS = {
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "initializer_range", "use_cache", "reorder_and_upcast_attn",
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
    "summary_first_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
}


def test_every_key_that_transformers_gpt2_reads_is_on_a_list():
    transformers = pytest.importorskip("transformers")
    known = {"model_type", "layer_norm_epsilon", "transformers_version", *config_json.CONFIG_KEYS, *config_json.FIXED_KEYS, *IGNORED_KEYS}
    of_gpt2 = set(transformers.GPT2Config().to_dict()) - set(transformers.PretrainedConfig().to_dict())
    assert len(of_gpt2) > 15 and not of_gpt2 - known
    assert not config_json.FIXED_KEYS.keys() & IGNORED_KEYS


def test_a_folder_with_a_vocabulary_that_is_not_gpt2s_is_refused(tmp_path):
    weights.check_vocabulary(str(tmp_path))
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    with pytest.raises(SystemExit, match="vocab.json: not GPT-2's vocabulary"):
        weights.check_vocabulary(str(tmp_path))
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    with pytest.raises(SystemExit, match="tokenizer.json: not GPT-2's vocabulary"):
        weights.check_vocabulary(str(tmp_path))


@pytest.mark.skipif(not (SHARED / "tiktoken").is_dir(), reason="the GPT-2 encoding is not beside the checkout")
def test_gpt2s_own_vocabulary_is_accepted(tmp_path):
    """Its vocab.json, written as transformers does: printable bytes as themselves, the others from U+0100 on."""
    encoding = get_tokenizer("gpt2")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelling = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in printable)}
    tokens = ["".join(spelling[b] for b in encoding.decode_single_token_bytes(i)) for i in range(50256)] + ["<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    weights.check_vocabulary(str(tmp_path))


def in_shards(theirs, dir, file):
    """The folder of a model whose weights are in several files, as transformers writes it, or wrote it with torch.save."""
    if file == "model.safetensors":
        pytest.importorskip("safetensors")
        theirs.save_pretrained(dir, max_shard_size="30KB")
    else:
        theirs.config.save_pretrained(dir)
        weight_map = {}
        for i, (name, weight) in enumerate(as_published(theirs).items()):
            weight_map[name] = f"pytorch_model-{i % 3 + 1:05d}-of-00003.bin"
        for shard in set(weight_map.values()):
            torch.save({name: weight for name, weight in as_published(theirs).items() if weight_map[name] == shard}, dir / shard)
        (dir / f"{file}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return dir / f"{file}.index.json"


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_in_several_files_are_read(file, theirs, tmp_path):
    index = in_shards(theirs, tmp_path, file)
    shards = set(json.loads(index.read_text())["weight_map"].values())
    assert len(shards) > 2 and not (tmp_path / file).exists()
    assert_same_logits(GPT.from_pretrained(str(tmp_path)), theirs)
    (tmp_path / min(shards)).unlink()
    with pytest.raises(SystemExit, match=f"{file}.index.json: lists '{min(shards)}', which is missing"):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("content, message", [
    ("", "not the index of a model's weights"), ("[]", "not the index"), ("{}", "not the index"), ('{"weight_map": 3}', "not the index"),
    ('{"weight_map": {"wte.weight": [1]}}', "not the index"), ('{"weight_map": {"wte.weight": 1}}', "1 does not name a file of weights in this folder"),
    ('{"weight_map": {"wte.weight": "../other/model.safetensors"}}', "does not name a file"), ('{"weight_map": {"wte.weight": "/etc/passwd"}}', "does not"),
    ('{"weight_map": {"wte.weight": "config.json"}}', "does not name a file of weights"), ('{"weight_map": {}}', "wte.weight is missing|is missing")])
def test_an_index_that_is_none(content, message, theirs, tmp_path):
    theirs.config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(SystemExit, match=message) as error:
        GPT.from_pretrained(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("vocab_size", [50257, 50258, 50304])
def test_added_rows_of_the_vocabulary_are_left_out(vocab_size, tmp_path, caplog):
    """Even if they are as tempting as can be. What is left is GPT-2's distribution, to the bit."""
    caplog.set_level("INFO")
    with torch.device("meta"):
        theirs = GPT(GPTConfig(vocab_size, 16, n_layer=1, n_head=2, n_embd=8)).state_dict()
    torch.manual_seed(0)
    state = {name: torch.randn(weight.shape) * 0.5 for name, weight in theirs.items()}
    state["wte.weight"][50257:] = 50 * state["ln_f.bias"]
    weights.write_pretrained(str(tmp_path), GPTConfig(vocab_size, 16, n_layer=1, n_head=2, n_embd=8), state)
    model, tokenizer_name = load_model_only(str(tmp_path))
    assert model.config.vocab_size == 50257 and tokenizer_name == "gpt2"
    assert torch.equal(model.wte.weight[:50257], state["wte.weight"][:50257]) and len(model.wte.weight) == 50304
    expected = ["left out %d rows of its vocabulary, beyond GPT-2's 50257 tokens" % (vocab_size - 50257)] * (vocab_size > 50257)
    assert [any(line in record.message for line in expected) for record in caplog.records] == [True] * len(expected)

    batch = pack([([5, 6], [[7, 8, 50256]])])
    assert {token for response in model.generate([[1, 2]] * 20, 10) for token in response} <= set(range(50257))
    with torch.no_grad():
        everything = model.log_softmax(model.states(batch))
        assert everything.shape == (3, 50257)
        torch.testing.assert_close(everything.exp().sum(-1), torch.ones(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(model.logprobs(batch), everything.gather(1, batch.target[:, None])[:, 0])


def test_more_rows_than_padding_are_another_vocabulary(tmp_path):
    for vocab_size in (50256, 50305):
        GPT(GPTConfig(vocab_size, 16, n_layer=1, n_head=1, n_embd=2)).save_pretrained(str(tmp_path))
        with pytest.raises(SystemExit, match=f"a vocabulary of {vocab_size} is not GPT-2's, which has 50257 tokens"):
            load_model_only(str(tmp_path))
    GPT(GPTConfig(50300, 16, n_layer=1, n_head=1, n_embd=2)).save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 50290}))
    with pytest.raises(SystemExit, match=r"wte.weight has shape \(50300, 2\), config.json says \(50290, 2\)"):
        load_model_only(str(tmp_path))


def test_tokens_that_were_added_do_not_make_another_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "VOCAB_SIZE", 2)
    monkeypatch.setattr(weights, "VOCABULARY_SHA256", hashlib.sha256(b"a\nb").hexdigest())
    for vocabulary in ({"a": 0, "b": 1}, {"<pad>": 2, "b": 1, "a": 0}):
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
        weights.check_vocabulary(str(tmp_path))
    for vocabulary in ({"<pad>": 0, "a": 1, "b": 2}, {"a": 1, "b": 0}, {"a": 0}):
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
        with pytest.raises(SystemExit, match="vocab.json: not GPT-2's vocabulary"):
            weights.check_vocabulary(str(tmp_path))


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_model_on_the_hub_is_read_as_the_folder_that_it_is_fetched_to(kind, theirs, tmp_path, monkeypatch):
    """Weights in one format only, the safer one if there is a choice; once, however often it is named."""
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("safetensors")
    if kind == "torch":
        torch.save(as_published(theirs), tmp_path / "pytorch_model.bin")
        theirs.config.save_pretrained(tmp_path)
    else:
        theirs.save_pretrained(tmp_path)
    asked = []

    def snapshot_download(repository, allow_patterns):
        asked.append((repository, "pytorch_model*.bin" in allow_patterns))
        assert "config.json" in allow_patterns and not any(pattern.startswith("*") for pattern in allow_patterns)
        return str(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    weights.fetch_from_hub.cache_clear()
    for _ in range(2):
        assert_same_logits(GPT.from_pretrained("hub:somebody/tiny"), theirs)
    assert asked == [("somebody/tiny", False), ("somebody/tiny", True)][:2 if kind == "torch" else 1]
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0}))
    with pytest.raises(SystemExit, match="a vocabulary of 97 is not GPT-2's"):
        load_model_only("hub:somebody/tiny")
    with pytest.raises(SystemExit, match="vocab.json: not GPT-2's vocabulary"):
        weights.check_vocabulary("hub:somebody/tiny")
    assert template_of_checkpoint("hub:somebody/tiny") == "plain"


def test_a_model_on_the_hub_that_cannot_be_had(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def refuse(*args, **kwargs):
        raise OSError("no route\nto the host")
    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(SystemExit, match="^hub:somebody/none: cannot be fetched .OSError: no route.$"):
        load_model_only("hub:somebody/none")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = "^hub:somebody/other needs a package that is not installed: pip install huggingface_hub safetensors$"
    with pytest.raises(SystemExit, match=message):
        load_model_only("hub:somebody/other")


def test_our_own_folder_round_trips_to_the_bit(tmp_path):
    ours = make_model(vocab_size=97)
    ours.save_pretrained(str(tmp_path))
    again = GPT.from_pretrained(str(tmp_path))
    assert again.config == ours.config
    for (name, a), b in zip(ours.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a[:97], b[:97]) if name == "wte.weight" else torch.equal(a, b), name


def test_published_weights_come_through_the_hub_cache(theirs, tmp_path, monkeypatch):
    def small(**fields):
        """All that read_pretrained says of the shape, but for the vocabulary and the context."""
        assert (fields["vocab_size"], fields["block_size"]) == (50257, 1024)
        return GPTConfig(**fields | dict(vocab_size=97, block_size=48))
    monkeypatch.setattr(weights, "PRETRAINED", {"gpt2": (3, 4, 32)})
    monkeypatch.setattr(model_module, "GPTConfig", small)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(as_published(theirs), tmp_path / "checkpoints" / "gpt2.bin")
    assert_same_logits(GPT.from_pretrained("gpt2"), theirs)


def test_missing_weights_without_network(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no route")
    monkeypatch.setattr(files, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    message = "checkpoints/gpt2.bin is missing and https.*cannot be fetched .*no route.*put the file there"
    with pytest.raises(SystemExit, match=message):
        GPT.from_pretrained("gpt2")


def test_folders_that_are_not_gpt2(tmp_path, monkeypatch):
    def message():
        with pytest.raises(SystemExit) as error:
            GPT.from_pretrained(str(tmp_path))
        assert "\n" not in str(error.value)
        return str(error.value)
    assert "no config.json" in message()
    config = dict(model_type="llama", vocab_size=97, n_positions=64, n_layer=2, n_head=2, n_embd=32)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "model_type is 'llama'" in message()
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    assert "neither pytorch_model.bin nor model.safetensors" in message()
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in message()
    make_model(vocab_size=97, n_layer=1).save_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    assert "h.1.attn.c_attn.bias is missing" in message()
    wider = {"model_type": "gpt2", "n_layer": 1, "n_embd": 64}
    (tmp_path / "config.json").write_text(json.dumps(config | wider))
    assert "has shape" in message()
