"""The Llama block and what shares it: Mistral, Qwen2 (q/k/v biases), Qwen3 (q/k norms).

RMSNorm, rotary positions, grouped-query attention, gated MLP.
"""

from __future__ import annotations

from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.arch.ops import Ops, Weights, spread
from afq_export.spec.sites import ONLINE, FoldSite, Form, SiteKind

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
QKV = ("q_proj", "k_proj", "v_proj")
NORMS = ("attn_norm", "mlp_norm")
WRITERS = ("o_proj", "down_proj")
"""Linears whose output is added to the residual stream."""

_NEEDS_BIAS = "RMSNorm has no bias to take it"
_GATE = "the gate's nonlinearity stands between up and down: only a scale per channel or a permutation passes"


def linear_shapes(config: DecoderConfig) -> dict[str, tuple[int, int, bool]]:
    """(O, I, bias) of every linear of a block, in the order in which they run."""
    c, q, kv = config, config.heads * config.head_dim, config.kv_heads * config.head_dim
    return {
        "q_proj": (q, c.hidden, c.qkv_bias),
        "k_proj": (kv, c.hidden, c.qkv_bias),
        "v_proj": (kv, c.hidden, c.qkv_bias),
        "o_proj": (c.hidden, q, c.out_bias),
        "gate_proj": (c.intermediate, c.hidden, c.mlp_bias),
        "up_proj": (c.intermediate, c.hidden, c.mlp_bias),
        "down_proj": (c.hidden, c.intermediate, c.mlp_bias),
    }


def block_names(config: DecoderConfig, block: int) -> dict[str, str]:
    """Our tensor name -> checkpoint key, for one block."""
    prefix = f"model.layers.{block}."
    names = {"attn_norm.weight": "input_layernorm.weight", "mlp_norm.weight": "post_attention_layernorm.weight"}
    for role, (_, _, bias) in linear_shapes(config).items():
        part = "mlp" if role in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        names[f"{role}.weight"] = f"{part}.{role}.weight"
        if bias:
            names[f"{role}.bias"] = f"{part}.{role}.bias"
    if config.qk_norm:
        names |= {"q_norm.weight": "self_attn.q_norm.weight", "k_norm.weight": "self_attn.k_norm.weight"}
    return {ours: prefix + theirs for ours, theirs in names.items()}


def embedding_names(config: DecoderConfig) -> dict[str, str]:
    """Our tensor name -> checkpoint key, before the blocks."""
    return {"embed_tokens.weight": "model.embed_tokens.weight"}


def head_names(config: DecoderConfig) -> dict[str, str]:
    """Our tensor name -> checkpoint key, after the blocks."""
    head = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
    return {"final_norm.weight": "model.norm.weight", "lm_head.weight": head}


def fold_sites(config: DecoderConfig) -> tuple[FoldSite, ...]:
    """The sites of a block, in the order in which they are folded."""
    c = config
    norm = dict(
        kind=SiteKind.NORM_TO_LINEARS,
        dim=c.hidden,
        forms=(Form.DIAGONAL,),
        online=(Form.PER_HEAD,),
        refused={
            "affine": "a dense matrix does not fold into a norm's gain; it would stay an online matmul",
            "permutation": "a norm's output cannot be permuted without a gather at run time",
            "shift": _NEEDS_BIAS,
        },
    )
    v_to_o = FoldSite(
        name="v_to_o",
        kind=SiteKind.V_TO_O,
        producers=("v_proj",),
        consumers=("o_proj",),
        dim=c.kv_heads * c.head_dim,
        heads=c.kv_heads,
        repeats=c.repeats,
        forms=(Form.DIAGONAL, Form.PER_HEAD, Form.PERMUTATION),
        refused={} if c.qkv_bias and c.out_bias else {"shift": "v_proj or o_proj has no bias to take it"},
        shift=c.qkv_bias and c.out_bias,
    )
    q_to_k = FoldSite(
        name="q_to_k",
        kind=SiteKind.Q_TO_K,
        producers=("q_proj",),
        consumers=("k_proj",),
        dim=c.kv_heads * c.head_dim,
        heads=c.kv_heads,
        repeats=c.repeats,
        forms=() if c.qk_norm else (Form.ROPE_PAIRS,),
        refused={"affine": "q_norm and k_norm stand between the projections and RoPE: nothing passes them"}
        if c.qk_norm
        else {"per_head": "a dense matrix does not commute with RoPE: only a scaled rotation per frequency pair does"},
    )
    up_to_down = FoldSite(
        name="up_to_down",
        kind=SiteKind.UP_TO_DOWN,
        producers=("up_proj", "gate_proj"),
        consumers=("down_proj",),
        dim=c.intermediate,
        forms=() if c.down_hadamard else (Form.DIAGONAL, Form.PERMUTATION),
        refused=dict.fromkeys(("diagonal", "permutation", "affine"), ONLINE)
        if c.down_hadamard
        else {"affine": _GATE, "shift": _GATE},
    )
    return (
        FoldSite(name="attn_norm", producers=("attn_norm",), consumers=QKV, **norm),
        FoldSite(name="mlp_norm", producers=("mlp_norm",), consumers=("gate_proj", "up_proj"), **norm),
        v_to_o,
        q_to_k,
        up_to_down,
    )


def embed(config: DecoderConfig, rows_BTD: Tensor, weights: Weights, positions_T: Tensor) -> Tensor:
    """Hidden states [B, T, D] from the token rows (positions enter through RoPE)."""
    return rows_BTD


def attention_in(
    config: DecoderConfig, ops: Ops, x_BTD: Tensor, rope: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, T, H, d], k and v [B, T, K, d], rotated: everything of a block before the KV cache. `rope`: cos, sin."""
    batch, tokens, _ = x_BTD.shape
    h = ops.norm("attn_norm", x_BTD)
    q = ops.linear("q_proj", h).view(batch, tokens, config.heads, config.head_dim)
    k = ops.linear("k_proj", h).view(batch, tokens, config.kv_heads, config.head_dim)
    v = ops.linear("v_proj", h).view(batch, tokens, config.kv_heads, config.head_dim)
    if config.qk_norm:
        q, k = ops.norm("q_norm", q), ops.norm("k_norm", k)
    assert rope is not None, "the Llama family has rotary positions"
    return ops.rotate(q, rope), ops.rotate(k, rope), v


def attention_out(config: DecoderConfig, ops: Ops, x_BTD: Tensor, a_BTHd: Tensor) -> Tensor:
    """Everything of a block after attention: output projection, residual, gated MLP, residual. Returns [B, T, D]."""
    out = ops.linear("o_proj", a_BTHd.reshape(*a_BTHd.shape[:2], config.heads * config.head_dim))
    x = ops.add("attn_residual", x_BTD, out)
    h = ops.norm("mlp_norm", x)
    gated = ops.multiply("gated", ops.activation(ops.linear("gate_proj", h)), ops.linear("up_proj", h))
    return ops.add("mlp_residual", x, ops.linear("down_proj", spread(config, ops, gated)))
