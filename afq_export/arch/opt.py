"""The OPT block: LayerNorm with bias, learned positions, biases everywhere, ReLU MLP (arXiv 2205.01068)."""

from __future__ import annotations

from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.arch.ops import Ops, Weights, spread
from afq_export.spec.sites import ONLINE, FoldSite, Form, SiteKind

MODEL_TYPES = ("opt",)
QKV = ("q_proj", "k_proj", "v_proj")
NORMS = ("attn_norm", "mlp_norm")
WRITERS = ("o_proj", "fc2")
"""Linears whose output is added to the residual stream."""


def linear_shapes(config: DecoderConfig) -> dict[str, tuple[int, int, bool]]:
    """(O, I, bias) of every linear of a block, in the order in which they run."""
    c = config
    return {
        "q_proj": (c.hidden, c.hidden, c.qkv_bias),
        "k_proj": (c.hidden, c.hidden, c.qkv_bias),
        "v_proj": (c.hidden, c.hidden, c.qkv_bias),
        "o_proj": (c.hidden, c.hidden, c.out_bias),
        "fc1": (c.intermediate, c.hidden, c.mlp_bias),
        "fc2": (c.hidden, c.intermediate, c.mlp_bias),
    }


def block_names(config: DecoderConfig, block: int) -> dict[str, str]:
    """Our tensor name -> checkpoint key, for one block."""
    prefix = f"model.decoder.layers.{block}."
    parts = {"attn_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm", "fc1": "fc1", "fc2": "fc2"}
    parts |= {role: f"self_attn.{role}" for role in QKV} | {"o_proj": "self_attn.out_proj"}
    shapes = linear_shapes(config)
    return {
        f"{ours}.{kind}": f"{prefix}{theirs}.{kind}"
        for ours, theirs in parts.items()
        for kind in ("weight", "bias")
        if kind == "weight" or ours not in shapes or shapes[ours][2]
    }


def embedding_names(config: DecoderConfig) -> dict[str, str]:
    """Our tensor name -> checkpoint key, before the blocks."""
    decoder = "model.decoder."
    return {
        "embed_tokens.weight": decoder + "embed_tokens.weight",
        "embed_positions.weight": decoder + "embed_positions.weight",
    }


def head_names(config: DecoderConfig) -> dict[str, str]:
    """Our tensor name -> checkpoint key, after the blocks."""
    decoder = "model.decoder."
    return {
        "final_norm.weight": decoder + "final_layer_norm.weight",
        "final_norm.bias": decoder + "final_layer_norm.bias",
        "lm_head.weight": decoder + "embed_tokens.weight" if config.tied else "lm_head.weight",
    }


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
        },
    )
    through = (Form.DIAGONAL, Form.PERMUTATION) if c.activation == "relu" else (Form.PERMUTATION,)
    return (
        FoldSite(name="attn_norm", producers=("attn_norm",), consumers=QKV, shift=c.qkv_bias, **norm),
        FoldSite(name="mlp_norm", producers=("mlp_norm",), consumers=("fc1",), shift=c.mlp_bias, **norm),
        FoldSite(
            name="v_to_o",
            kind=SiteKind.V_TO_O,
            producers=("v_proj",),
            consumers=("o_proj",),
            dim=c.hidden,
            heads=c.heads,
            forms=(Form.DIAGONAL, Form.PER_HEAD, Form.PERMUTATION),
            shift=c.qkv_bias and c.out_bias,
        ),
        FoldSite(
            name="q_to_k",
            kind=SiteKind.Q_TO_K,
            producers=("q_proj",),
            consumers=("k_proj",),
            dim=c.hidden,
            heads=c.heads,
            forms=(Form.DIAGONAL, Form.PER_HEAD),
        ),
        FoldSite(
            name="up_to_down",
            kind=SiteKind.UP_TO_DOWN,
            producers=("fc1",),
            consumers=("fc2",),
            dim=c.intermediate,
            forms=() if c.down_hadamard else through,
            refused=dict.fromkeys(("diagonal", "permutation", "affine"), ONLINE)
            if c.down_hadamard
            else {"affine": "the nonlinearity is elementwise: only a positive scale or a permutation passes"},
            positive=True,
        ),
    )


def embed(config: DecoderConfig, rows_BTD: Tensor, weights: Weights, positions_T: Tensor) -> Tensor:
    """Hidden states [B, T, D]: token rows plus learned position rows."""
    return rows_BTD + weights["embed_positions.weight"][positions_T + config.position_offset]


def attention_in(
    config: DecoderConfig, ops: Ops, x_BTD: Tensor, rope: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, T, H, d]: everything of a block before the KV cache. `rope` is None."""
    shape = (*x_BTD.shape[:2], config.heads, config.head_dim)
    h = ops.norm("attn_norm", x_BTD)
    return (
        ops.linear("q_proj", h).view(shape),
        ops.linear("k_proj", h).view(shape),
        ops.linear("v_proj", h).view(shape),
    )


def attention_out(config: DecoderConfig, ops: Ops, x_BTD: Tensor, a_BTHd: Tensor) -> Tensor:
    """Everything of a block after attention: output projection, residual, MLP, residual. Returns [B, T, D]."""
    out = ops.linear("o_proj", a_BTHd.reshape(*a_BTHd.shape[:2], config.heads * config.head_dim))
    x = ops.add("attn_residual", x_BTD, out)
    h = ops.norm("mlp_norm", x)
    y = spread(config, ops, ops.activation(ops.linear("fc1", h)))
    return ops.add("mlp_residual", x, ops.linear("fc2", y))
