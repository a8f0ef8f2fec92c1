"""One decoder, from GPT-2 to today's parts, whose attention type is a config switch.

Read from the top, the parts before the whole: `ModelConfig` turns the switch into two numbers (`n_kv_head`, `window`),
`Attention` and `MLP` make a `Block`, `GPT` stacks them. A layer does not know how attention is computed: it calls
`attend(layer, q, k, v, window)`. Training passes the dense kernel (`dense_attention`), decoding passes the paged cache of
the engine.
"""

import math
import zlib
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import nn

from kernels.choice import TAKEN_HEAD_DIMS, triton_takes
from kernels.linear import Linear


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the decoder. Zeros are resolved on construction, so an instance holds the numbers really used."""

    n_layer: Annotated[int, "number of Blocks"] = 12
    n_head: Annotated[int, "query heads"] = 12
    n_kv_head: Annotated[int, "KV heads; 0: by `attention` (mha: n_head, mqa: 1, gqa: the divisor nearest n_head // 4)"] = 0
    n_embd: Annotated[int, "width of the residual stream"] = 768
    head_dim: Annotated[int, "width of a head; 0: n_embd / n_head"] = 0
    max_seq_len: Annotated[int, "context length in tokens"] = 1024
    vocab_size: Annotated[int, "rows of the embedding; 0: the tokenizer's"] = 0
    attention: Annotated[Literal["mha", "mqa", "gqa", "swa"], "attention type, resolved to n_kv_head and window"] = "mha"
    window: Annotated[int, "keys that a query sees, itself included; 0: max_seq_len / 4 under swa, else no limit"] = 0
    window_pattern: Annotated[str, "repeated over the depth: L a windowed layer, G a global one"] = "L"
    pos: Annotated[Literal["learned", "rope"], "position encoding"] = "learned"
    rope_theta: Annotated[float, "base of the RoPE frequencies"] = 10000.0
    norm: Annotated[Literal["layernorm", "rmsnorm"], "normalisation before each sublayer"] = "layernorm"
    norm_eps: Annotated[float, "added to the variance in every norm"] = 1e-5
    mlp: Annotated[Literal["gelu", "swiglu"], "feed-forward sublayer"] = "gelu"
    mlp_hidden: Annotated[int, "its hidden width; 0: 4 n_embd, or 8/3 n_embd rounded up to 64 for swiglu"] = 0
    qk_norm: Annotated[bool, "RMSNorm of queries and keys over the head"] = False
    bias: Annotated[bool, "biases in Linear and LayerNorm"] = True
    tie_embeddings: Annotated[bool, "the output head is the embedding matrix"] = True
    dropout: Annotated[float, "on embeddings and sublayer outputs while training"] = 0.0

    def __post_init__(self):
        at_least_one = ("n_layer", "n_head", "n_embd", "max_seq_len")
        for key in at_least_one + ("n_kv_head", "head_dim", "vocab_size", "window", "mlp_hidden"):
            least = int(key in at_least_one)
            bits = 16 if key in ("n_layer", "n_head") else 31  # one by one, more of them would be gone through for minutes
            if not least <= getattr(self, key) < 2**bits:
                raise ValueError(f"{key} takes {least} or more, below 2^{bits}, got {getattr(self, key)}")
        for key in ("rope_theta", "norm_eps"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"{key} takes a number above 0, got {getattr(self, key)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout takes a probability in [0, 1), got {self.dropout}")
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; change one or set head_dim")
        if not self.window_pattern or set(self.window_pattern) - set("LG"):
            raise ValueError(f"window_pattern takes a row of L and G, as in LLLG, got {self.window_pattern!r}")
        self._set("head_dim", self.head_dim or self.n_embd // self.n_head)
        if self.pos == "rope" and self.head_dim % 2:
            raise ValueError(f"pos=rope turns pairs, so head_dim must be even, got {self.head_dim}")
        hidden = 4 * self.n_embd if self.mlp == "gelu" else math.ceil(8 * self.n_embd / 3 / 64) * 64
        self._set("mlp_hidden", self.mlp_hidden or hidden)
        self._resolve_attention()

    def _resolve_attention(self):
        """The label becomes n_kv_head and window, here and nowhere else; a number that contradicts it is refused."""
        divisors = [n for n in range(1, self.n_head + 1) if self.n_head % n == 0]
        if self.n_kv_head and self.n_kv_head not in divisors:
            raise ValueError(f"n_kv_head must divide n_head={self.n_head}, got {self.n_kv_head}; it takes one of {divisors}")
        by_label = {
            "mha": self.n_head,
            "mqa": 1,
            "gqa": min(divisors, key=lambda n: abs(n - max(1, self.n_head // 4))),
            "swa": self.n_head,
        }
        if self.attention in ("mha", "mqa") and self.n_kv_head not in (0, by_label[self.attention]):
            want = by_label[self.attention]
            raise ValueError(f"attention={self.attention} means n_kv_head={want}, got {self.n_kv_head}; use attention=gqa")
        if self.attention == "gqa" and self.n_kv_head == self.n_head > 1:
            raise ValueError(f"attention=gqa takes n_kv_head below n_head={self.n_head}, got {self.n_kv_head}; use attention=mha")
        if self.attention != "swa" and (self.window or self.window_pattern != "L"):
            raise ValueError(
                f"attention={self.attention} has no window, got window={self.window} and window_pattern="
                f"{self.window_pattern}; use attention=swa, with n_kv_head={self.n_kv_head or by_label[self.attention]}"
            )
        self._set("n_kv_head", self.n_kv_head or by_label[self.attention])
        if self.attention == "swa":
            self._set("window", self.window or max(1, self.max_seq_len // 4))
            if not any(self.windows):
                raise ValueError(f"attention=swa takes a window_pattern with an L in {self.n_layer} layers, got {self.window_pattern}")

    def _set(self, key, value):
        object.__setattr__(self, key, value)  # the way a frozen dataclass may complete itself

    @property
    def windows(self):
        """The window of each layer, 0 for a global one."""
        pattern = self.window_pattern
        return tuple(self.window if pattern[i % len(pattern)] == "L" else 0 for i in range(self.n_layer))


def dense_attention(impl, device, dtype, head_dim):
    """The `attend` of training: `impl` is a value of the key attention_impl, `dtype` that of q, k and v. Raises ValueError
    for impl="triton" where there are no such kernels."""
    able = triton_takes(device, head_dim)
    if impl == "auto":  # the Triton kernels are made for tensor cores, which float32 does not use
        impl = "triton" if able and dtype != torch.float32 else "sdpa"
    if impl == "triton":
        if not able:
            raise ValueError(
                f"attention_impl=triton takes an NVIDIA GPU, the package triton and a head_dim {TAKEN_HEAD_DIMS}; "
                f"got {device.type} and head_dim={head_dim}; take attention_impl=auto"
            )
        from kernels.flash_attention import flash_attention as attention
    elif impl == "sdpa":
        from kernels.sdpa import attention
    else:
        from kernels.reference import attention

    def attend(layer, q, k, v, window):
        return attention(q, k, v, window)

    return attend


def rope_angles(positions, config):
    """Cosines and sines of the rotary embedding (Su et al. 2021, section 3.4.2), float32, for (..., T) positions.

    Computed once a forward pass for all layers, and from the positions themselves: there is no table to outgrow.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim
    angles = positions[..., None].float() * config.rope_theta**-exponents
    return angles.cos()[..., None, :], angles.sin()[..., None, :]  # (..., T, 1, D / 2), one for all heads


def rotate(x, cos, sin):
    """Turn the pairs (x[i], x[i + D / 2]) by their angles: the half-split order of Llama's public weights."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class RMSNorm(nn.RMSNorm):
    """Root mean square norm (Zhang and Sennrich 2019). Its weight is cast to x's dtype: under autocast heads are bfloat16."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(config):
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


class Attention(nn.Module):
    def __init__(self, config, index, window):
        super().__init__()
        self.index = index  # of the layer
        self.window = window
        self.heads = (config.n_head, config.n_kv_head, config.n_kv_head)  # of q, k, v
        self.head_dim = config.head_dim
        self.qkv = Linear(config.n_embd, sum(self.heads) * config.head_dim, bias=config.bias)
        self.out = Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def heads_of(self, x, rope):
        """(B, T, n_embd) to q (B, T, H, D), k and v (B, T, H_kv, D)."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H + 2 H_kv, D)
        q, k, v = qkv.split(self.heads, dim=2)  # views, no copies
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        # norm and rotation are float32 under autocast; the kernels take one dtype
        return q.to(v.dtype), k.to(v.dtype), v


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gated = config.mlp == "swiglu"
        self.up = Linear(config.n_embd, (1 + self.gated) * config.mlp_hidden, bias=config.bias)
        self.down = Linear(config.mlp_hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            return self.down(F.silu(gate) * x)
        return self.down(F.gelu(x, approximate="tanh"))  # GPT-2's form


class Block(nn.Module):
    def __init__(self, config, index, window):
        super().__init__()
        self.attn_norm = make_norm(config)
        self.attn = Attention(config, index, window)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, attend):
        q, k, v = self.before(x, rope)
        return self.after(x, attend(self.attn, q, k, v, self.attn.window))

    def before(self, x, rope):
        """All before attention: (B, T, n_embd) to q, k and v. Apart from `after`, so that decoding can compile both without
        the attention between them."""
        return self.attn.heads_of(self.attn_norm(x), rope)

    def after(self, x, attended):
        """All behind attention, whose output is (B, T, H, D)."""
        x = x + self.dropout(self.attn.out(attended.flatten(2)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    """The decoder. `forward` gives training losses; `features` and `logits` are its two halves, for decoding."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_emb = nn.Embedding(config.max_seq_len, config.n_embd) if config.pos == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, index, window) for index, window in enumerate(config.windows))
        self.norm = make_norm(config)
        self.head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.tok_emb.weight

    def forward(self, tokens, targets, attend):
        """Cross-entropy of every position: tokens and targets (B, T) ids to (B, T) float32 losses in nats."""
        return self.losses(self.features(tokens, attend), targets)

    def features(self, tokens, attend, positions=None):
        """The residual stream behind the last Block.

        tokens:    (B, T) ids
        attend:    attend(layer, q, k, v, window) with q (B, T, H, D), k and v (B, T, H_kv, D) gives (B, T, H, D); layer
                   is the `Attention` that asks (not its number: torch.compile would compile every layer for its own)
        positions: (B, T) or (T,) positions of the tokens, 0..T-1 when None

        Returns (B, T, n_embd).
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        x, rope = self.embed(tokens, positions)
        for block in self.blocks:
            x = block(x, rope, attend)
        return x

    def embed(self, tokens, positions):
        """(B, T) ids to (B, T, n_embd) of the residual stream, and the `rope_angles` that all layers share, or None."""
        x, rope = self.tok_emb(tokens), None
        if self.pos_emb is not None:
            x = x + self.pos_emb(positions)
        else:
            rope = rope_angles(positions, self.config)
        return self.dropout(x), rope

    def logits(self, x):
        """(..., n_embd) of the residual stream to (..., vocab_size) unnormalised log-probabilities."""
        return self.head(self.norm(x))

    def losses(self, x, targets):
        """(B, T, n_embd) of the residual stream and (B, T) ids to (B, T) float32 losses in nats."""
        logits = self.logits(x)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)

    def compile_for_training(self):
        """Compile what lies before the Blocks, each Block, and what lies behind them. Blocks of the same window share a
        compilation, one for training and one for evaluation; the model as a whole takes longer to compile, and its step is
        no faster."""
        for block in self.blocks:
            block.compile()
        self.embed, self.losses = torch.compile(self.embed), torch.compile(self.losses)

    def compile_for_decoding(self):
        """Fuse what lies before and after attention, for decoding. Neither half knows its layer or its window, so one
        compilation of each serves all Blocks. Tuning makes Inductor write kernels for products of a single row, which
        are bound by bandwidth, where a library has none that is tuned for it."""
        for block in self.blocks:
            for half in ("before", "after"):
                part = getattr(Block, half).__get__(block)
                setattr(block, half, torch.compile(part, dynamic=True, options={"coordinate_descent_tuning": True}))

    @torch.no_grad()
    def init_weights(self, seed):
        """GPT-2's initialisation: normal(0, 0.02), the projections into the residual stream by 1 / sqrt(2 n_layer).

        Each matrix draws from a generator named after it (q, k and v each from their own), so that variants start
        from the same numbers wherever their shapes agree, on every device.
        """

        def draw(weight, name, std):
            # crc32, because hash() of a string differs from process to process
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            weight.copy_(torch.empty(weight.shape).normal_(0, std, generator=generator))

        for name, parameter in self.named_parameters():
            if name.endswith("qkv.weight"):
                attn = self.get_submodule(name.removesuffix(".qkv.weight"))
                for part, rows in zip("qkv", parameter.split([h * attn.head_dim for h in attn.heads])):
                    draw(rows, f"{name}.{part}", 0.02)
            elif name.endswith(("out.weight", "down.weight")):
                draw(parameter, name, 0.02 / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() == 2:
                draw(parameter, name, 0.02)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)

    # Cost formulas: what one token costs, from the config alone.

    def num_params(self):
        """All parameters, a tied matrix counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, seq_len):
        """FLOPs of one training token (forward and backward) in sequences of seq_len tokens.

        2 per weight of every matrix product and 4 D per head and visible key (scores and weighted sum) forward, and
        twice that backward (Kaplan et al. 2020, section 2.1, with only the keys that causality and window show).
        """
        lookups = self.pos_emb.weight.numel() if self.pos_emb is not None else 0
        if not self.config.tie_embeddings:
            lookups += self.tok_emb.weight.numel()
        weights = sum(p.numel() for p in self.parameters() if p.dim() == 2) - lookups
        keys = sum(mean_visible_keys(seq_len, window) for window in self.config.windows)
        return 3 * (2 * weights + 4 * self.config.n_head * self.config.head_dim * keys)

    def kv_bytes_per_token(self, bytes_per_value):
        """Bytes that one token takes in the KV cache, all layers together."""
        return 2 * self.config.n_kv_head * self.config.head_dim * bytes_per_value * self.config.n_layer


def mean_visible_keys(seq_len, window):
    """Keys that a query sees, on average over the positions of a causal sequence; window 0 means no limit."""
    w = min(window or seq_len, seq_len)  # the first w positions see 1 to w keys, all others w
    return (w * (w + 1) / 2 + (seq_len - w) * w) / seq_len
