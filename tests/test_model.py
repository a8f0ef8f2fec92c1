"""The decoder: the attention switch, agreement with transformers, cost formulas against counting."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from util import counted_compilations

from kernels import reference
from model import GPT, ModelConfig, dense_attention, mean_visible_keys, rope_angles, rotate

TINY = {"n_layer": 2, "n_head": 4, "n_embd": 64, "max_seq_len": 32, "vocab_size": 97}
MODERN = {"pos": "rope", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "bias": False, "tie_embeddings": False}
VARIANTS = [
    {"attention": "mha"},
    {"attention": "mqa"},
    {"attention": "gqa", "n_kv_head": 2},
    {"attention": "swa", "window": 5},
    {"attention": "swa", "window": 5, "window_pattern": "LG", "n_kv_head": 2},
]
attend = dense_attention("reference", torch.device("cpu"), torch.float64, 16)


def make(seed=1, **keys):
    model = GPT(ModelConfig(**{**TINY, **keys}))
    model.init_weights(seed)
    return model


def tokens(*shape, seed=0):
    return torch.randint(TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "keys, n_kv_head, window",
    [
        ({"attention": "mha"}, 12, 0),
        ({"attention": "mqa"}, 1, 0),
        ({"attention": "gqa"}, 3, 0),
        ({"attention": "gqa", "n_head": 10, "n_embd": 640}, 2, 0),
        ({"attention": "gqa", "n_kv_head": 4}, 4, 0),
        ({"attention": "swa"}, 12, 256),
        ({"attention": "swa", "n_kv_head": 1, "window": 64}, 1, 64),
    ],
)
def test_the_switch_is_resolved_to_two_numbers(keys, n_kv_head, window):
    config = ModelConfig(**keys)
    assert (config.n_kv_head, config.window) == (n_kv_head, window)
    assert ModelConfig(**dataclasses.asdict(config)) == config  # what a checkpoint stores builds the same shape


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"n_kv_head": 5}, ["n_kv_head", "5", "12"]),
        ({"attention": "mha", "n_kv_head": 4}, ["mha", "4", "gqa"]),
        ({"attention": "mqa", "n_kv_head": 4}, ["mqa", "4", "gqa"]),
        ({"attention": "gqa", "n_kv_head": 12}, ["gqa", "12", "mha"]),
        ({"attention": "gqa", "window": 64}, ["gqa", "64", "swa"]),
        ({"window_pattern": "LG"}, ["window_pattern", "LG", "swa"]),
        ({"attention": "swa", "window_pattern": "LX"}, ["window_pattern", "LX"]),
        ({"attention": "swa", "window_pattern": "GGGL", "n_layer": 3}, ["window_pattern", "3 layers", "GGGL"]),
        ({"attention": "swa", "window": -1}, ["window", "-1"]),
        ({"n_embd": 100}, ["n_embd", "100", "n_head", "12"]),
        ({"n_layer": 0}, ["n_layer", "0"]),
        ({"n_layer": 2**31 - 1}, ["n_layer", "2^16"]),
        ({"n_head": 2**31 - 1, "head_dim": 1}, ["n_head", "2^16"]),
        ({"pos": "rope", "head_dim": 7}, ["head_dim", "7"]),
        ({"dropout": 1.0}, ["dropout", "1.0"]),
        ({"norm_eps": -1.0}, ["norm_eps", "-1.0"]),
        ({"rope_theta": 0.0}, ["rope_theta", "0.0"]),
    ],
)
def test_contradictions_are_refused_in_one_line(keys, words):
    with pytest.raises(ValueError) as error:
        ModelConfig(**keys)
    for word in words:
        assert word in str(error.value)


def test_window_pattern_repeats_over_the_depth():
    config = ModelConfig(n_layer=6, attention="swa", window=7, window_pattern="LLG")
    assert config.windows == (7, 7, 0, 7, 7, 0)


def test_windows_are_computed_once_for_all_layers(monkeypatch):
    computed, windows = [], ModelConfig.windows.fget
    monkeypatch.setattr(ModelConfig, "windows", property(lambda config: computed.append(config) or windows(config)))
    make(n_layer=5)
    assert len(computed) == 1


def hf_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=97, n_positions=32, n_embd=64, n_layer=2, n_head=4, attn_implementation="eager")
    return transformers.GPT2LMHeadModel(config), {"bias": True}


def hf_qwen3():
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=24, rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=32, tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    keys = {"attention": "gqa", "n_kv_head": 2, "head_dim": 24, "mlp_hidden": 96, "norm_eps": 1e-6, "rope_theta": 1e6}
    return transformers.Qwen3ForCausalLM(config), {**MODERN, **keys}


def hf_mistral():
    transformers = pytest.importorskip("transformers")
    config = transformers.MistralConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        rms_norm_eps=1e-5, sliding_window=5, max_position_embeddings=32, tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    keys = {"attention": "swa", "n_kv_head": 2, "window": 5, "mlp_hidden": 96, "qk_norm": False}
    return transformers.MistralForCausalLM(config), {**MODERN, **keys}


def hf_starcoder():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTBigCodeConfig(
        vocab_size=97, n_positions=32, n_embd=64, n_layer=2, n_head=4, multi_query=True, attn_implementation="eager"
    )
    return transformers.GPTBigCodeForCausalLM(config), {"attention": "mqa"}


def named_as_here(name, value, theirs):
    """A weight of transformers under this repository's name: (name, value), or None for what is fused elsewhere."""
    for old, new in [
        ("transformer.h.", "blocks."), ("model.layers.", "blocks."), ("transformer.wte", "tok_emb"), ("transformer.wpe", "pos_emb"),
        ("model.embed_tokens", "tok_emb"), ("transformer.ln_f", "norm"), ("model.norm", "norm"), ("lm_head", "head"),
        ("ln_1", "attn_norm"), ("ln_2", "mlp_norm"), ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "mlp_norm"),
        ("self_attn", "attn"), ("attn.c_attn", "attn.qkv"), ("attn.c_proj", "attn.out"), ("attn.o_proj", "attn.out"),
        ("mlp.c_fc", "mlp.up"), ("mlp.c_proj", "mlp.down"), ("mlp.down_proj", "mlp.down"),
    ]:  # fmt: skip
        name = name.replace(old, new)
    for fused, parts in (("attn.qkv", ("q_proj", "k_proj", "v_proj")), ("mlp.up", ("gate_proj", "up_proj"))):
        if parts[0] in name:
            prefix, key = name.split(f"{fused.split('.')[0]}.{parts[0]}")
            values = [theirs[key_of(theirs, value, parts[0], part)] for part in parts]
            return f"{prefix}{fused}{key}", torch.cat(values)
        if any(part in name for part in parts[1:]):
            return None
    return name, value


def key_of(theirs, value, first, part):
    """The sibling of a weight: the same name with q_proj replaced by k_proj, say."""
    own = next(key for key, other in theirs.items() if other is value)
    return own.replace(first, part)


@pytest.mark.parametrize("build", [hf_gpt2, hf_qwen3, hf_mistral, hf_starcoder])
def test_logits_equal_those_of_transformers(build):
    torch.manual_seed(0)
    theirs, keys = build()
    for parameter in theirs.parameters():  # away from ones and zeros, so that a norm or a bias left out would show
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs = theirs.double().eval()
    ours = make(**keys).double()
    weights = theirs.state_dict()
    state = dict(named for name, value in weights.items() if (named := named_as_here(name, value, weights)))
    for name, parameter in ours.named_parameters():
        value = state[name]
        transposed = type(theirs).__name__.startswith("GPT2") and value.dim() == 2 and "emb" not in name  # its Conv1D
        parameter.data.copy_(value.T if transposed else value)
    ids = tokens(2, 32)
    expected = theirs(ids).logits
    found = ours.logits(ours.features(ids, attend))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()  # their angles and norms are float32 inside


@pytest.mark.parametrize("keys", VARIANTS)
@pytest.mark.parametrize("parts", [{}, MODERN])
def test_no_token_sees_the_future_and_every_visible_one_is_seen(keys, parts):
    model = make(**keys, **parts).double()
    table = torch.nn.functional.one_hot(tokens(1, 32), 97).double() @ model.tok_emb.weight
    table = table.detach().requires_grad_()
    model.tok_emb.forward = lambda ids: table
    at = 20
    probe = torch.randn(64, dtype=torch.float64)
    (grad,) = torch.autograd.grad(model.features(tokens(1, 32), attend)[0, at] @ probe, table)
    reached = grad[0].abs().sum(dim=1) > 0
    first = 0
    if all(model.config.windows):
        first = max(0, at - model.config.n_layer * (model.config.window - 1))
    assert reached.tolist() == [first <= t <= at for t in range(32)]


@pytest.mark.parametrize("keys", VARIANTS)
def test_implementations_agree(keys):
    model = make(**keys, **MODERN).double()
    x = tokens(2, 32)
    a = model(x, x, dense_attention("sdpa", torch.device("cpu"), torch.float64, 16))
    b = model(x, x, attend)
    assert (a - b).abs().max() < 1e-6


def test_loss_is_the_cross_entropy_of_each_position():
    model = make()
    x, y = tokens(3, 32), tokens(3, 32, seed=1)
    log_probs = F.log_softmax(model.logits(model.features(x, attend)), dim=-1)
    expected = -log_probs.gather(-1, y[..., None])[..., 0]
    assert torch.allclose(model(x, y, attend), expected, atol=1e-5)


def test_grouped_heads_equal_repeated_heads():
    """A GQA model is the MHA model whose key and value rows are repeated over the group."""
    gqa = make(attention="gqa", n_kv_head=2).double()
    mha = make().double()
    weights = dict(gqa.named_parameters())
    D = gqa.config.head_dim
    for name, parameter in mha.named_parameters():
        value = weights[name]
        if ".qkv." in name:
            q, k, v = value.split([4 * D, 2 * D, 2 * D])
            k, v = (x.unflatten(0, (2, D)).repeat_interleave(2, dim=0).flatten(0, 1) for x in (k, v))
            value = torch.cat((q, k, v))
        parameter.data.copy_(value)
    x = tokens(2, 32)
    assert (gqa.features(x, attend) - mha.features(x, attend)).abs().max() < 1e-12


def test_rope_scores_depend_on_distance_only():
    config = ModelConfig(**TINY, pos="rope")
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64)

    def score(i, j):
        turned = [rotate(x, *rope_angles(torch.tensor([p]), config)) for x, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum().item()

    assert score(7, 3) == pytest.approx(score(27, 23), rel=1e-5)
    assert score(7, 3) != pytest.approx(score(8, 3), rel=1e-2)


def test_variants_share_the_weights_whose_shapes_agree():
    mha, mqa, swa = (dict(make(attention=a).named_parameters()) for a in ("mha", "mqa", "swa"))
    other = dict(make(seed=2).named_parameters())
    for name, weight in mha.items():
        assert torch.equal(weight, swa[name])
        if ".qkv." in name:
            q, k, v = mqa[name].split([64, 16, 16])
            assert torch.equal(q, weight[:64])
            assert torch.equal(k, weight[64:80]) and torch.equal(v, weight[128:144])
        else:
            assert torch.equal(weight, mqa[name])
    assert not torch.equal(mha["tok_emb.weight"], other["tok_emb.weight"])


@pytest.mark.parametrize("keys, parts", list(itertools.product(VARIANTS, [{}, MODERN])))
def test_flops_formula_equals_counted_matrix_products(keys, parts):
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = GPT(ModelConfig(**{**TINY, **keys, **parts}))
    x = tokens(1, 32).to("meta")
    with FlopCounterMode(display=False) as counter:
        model(x, x, lambda layer, q, k, v, window: q).sum().backward()
    visible = sum(reference.visible(torch.arange(32), torch.arange(32), w).sum().item() for w in model.config.windows)
    attention = 3 * 4 * model.config.n_head * model.config.head_dim * visible
    assert model.flops_per_token(32) * 32 == pytest.approx(counter.get_total_flops() + attention)


def test_cost_formulas_of_gpt2():
    with torch.device("meta"):
        gpt2 = GPT(ModelConfig(vocab_size=50257))
        mqa = GPT(ModelConfig(vocab_size=50257, attention="mqa"))
    assert gpt2.num_params() == 124_439_808
    assert gpt2.kv_bytes_per_token(2) == 2 * 12 * 64 * 2 * 12 == 12 * mqa.kv_bytes_per_token(2)
    assert mean_visible_keys(4, 0) == 2.5 and mean_visible_keys(4, 2) == 7 / 4


@pytest.mark.parametrize("device, head_dim", [("cpu", 64), ("cuda", 4), ("cuda", 264)])
def test_kernels_that_cannot_run_are_refused_or_not_chosen(device, head_dim):
    with pytest.raises(ValueError, match=f"got {device} and head_dim={head_dim}"):
        dense_attention("triton", torch.device(device), torch.bfloat16, head_dim)
    dense_attention("auto", torch.device(device), torch.bfloat16, head_dim)


def test_losses_are_float32_whatever_the_weights_are():
    model = make().bfloat16()
    assert model(tokens(1, 8), tokens(1, 8), attend).dtype == torch.float32


@pytest.mark.parametrize("keys, windows", [({}, 1), ({"attention": "swa", "window": 5, "window_pattern": "LLLG", **MODERN}, 2)])
def test_compiled_blocks_give_the_same_gradients_and_share_a_compilation(keys, windows, monkeypatch):
    compilations = counted_compilations(monkeypatch)
    eager, compiled = make(n_layer=8, **keys), make(n_layer=8, **keys)
    compiled.compile_for_training()
    x, y = tokens(2, 32), tokens(2, 32, seed=1)
    for model in (eager, compiled):
        model(x, y, attend).mean().backward()
    assert len(compilations) == 2 + windows  # before and behind the Blocks, and one of these for each window
    with torch.no_grad():
        assert torch.allclose(compiled.eval()(x, y, attend), eager.eval()(x, y, attend))
    assert len(compilations) == 2 * (2 + windows)
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm()
