"""A decoder in ONNX small enough to know its logits, in the form of Hugging Face's exports."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save_model

VOCAB, HEADS, WIDTH = 7, 2, 3


def table() -> np.ndarray:
    """Float32 [VOCAB, VOCAB], the logits that a token gives by itself."""
    return np.random.default_rng(0).standard_normal((VOCAB, VOCAB)).astype(np.float32)


def expected(ids_T: np.ndarray) -> np.ndarray:
    """Float32 [T, VOCAB] of ids [T]: the token's row plus its position."""
    return table()[ids_T] + np.arange(len(ids_T), dtype=np.float32)[:, None]


def save_decoder(path: Path, positions: bool = True) -> None:
    """logits = table[ids] + position + (length of the cache after the call - sum of the attention mask).

    The last is 0 only when cache and mask are passed on as they should be. Without `positions` it has no such input.
    """
    past = ["batch", HEADS, "past", WIDTH]
    present = ["batch", HEADS, "total", WIDTH]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, past),
        helper.make_tensor_value_info("past_key_values.0.value", TensorProto.FLOAT, past),
    ]
    if positions:
        inputs.append(helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "sequence"]))
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", VOCAB]),
        helper.make_tensor_value_info("present.0.key", TensorProto.FLOAT, present),
        helper.make_tensor_value_info("present.0.value", TensorProto.FLOAT, present),
    ]
    constants = {
        "table": table(),
        "ones": np.ones((1, HEADS, 1, WIDTH), np.float32),
        "axis0": np.array([0]),
        "axis1": np.array([1]),
        "axis2": np.array([2]),
        "one": np.array([1]),
        "heads": np.array([HEADS]),
        "width": np.array([WIDTH]),
    }
    make = helper.make_node
    nodes = [
        make("Gather", ["table", "input_ids"], ["rows"]),
        make("Shape", ["input_ids"], ["shape"]),
        make("Gather", ["shape", "axis1"], ["count"]),
        make("Concat", ["one", "heads", "count", "width"], ["new_shape"], axis=0),
        make("Expand", ["ones", "new_shape"], ["new"]),
        make("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2),
        make("Concat", ["past_key_values.0.value", "new"], ["present.0.value"], axis=2),
        make("Shape", ["present.0.key"], ["cache_shape"]),
        make("Gather", ["cache_shape", "axis2"], ["cached"]),
        make("ReduceSum", ["attention_mask"], ["seen"], keepdims=0),
        make("Sub", ["cached", "seen"], ["wrong"]),
        make("Cast", ["wrong"], ["wrong_float"], to=TensorProto.FLOAT),
        make("Add", ["rows", "wrong_float"], ["checked"]),
    ]
    if positions:
        constants["last"] = np.array([-1])
        nodes += [
            make("Cast", ["position_ids"], ["place"], to=TensorProto.FLOAT),
            make("Unsqueeze", ["place", "last"], ["places"]),
            make("Add", ["checked", "places"], ["logits"]),
        ]
    else:
        nodes.append(make("Identity", ["checked"], ["logits"]))
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    save_model(model, path)


def matmul(weight_IO: np.ndarray, name: str) -> bytes:
    """A model of one product: `<name>.x` [1, T, I] to `<name>.y` [1, T, O]."""
    x = helper.make_tensor_value_info(f"{name}.x", TensorProto.FLOAT, [1, "T", weight_IO.shape[0]])
    y = helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, [1, "T", weight_IO.shape[1]])
    node = helper.make_node("MatMul", [x.name, "weight"], [y.name])
    graph = helper.make_graph([node], "product", [x], [y], [numpy_helper.from_array(weight_IO, "weight")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return model.SerializeToString()
