"""Writes XNNPACK subgraphs: values, nodes and constants of one delegate, straight into the delegate's own format.

The usual way (torch.export, then a partitioner that recognises quantize/dequantize patterns) takes about a second per
linear and silently drops what it does not recognise. Here the integers go where the kernel reads them. The format is
`executorch.backends.xnnpack.serialization`; tests/lower compares ours, value by value, with what ExecuTorch's own
lowering writes for the same linear.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as xnn
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import XNNDatatype as DType
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import (
    CONSTANT_TENSOR_ALIGNMENT,
    serialize_xnnpack_binary,
)
from executorch.backends.xnnpack.utils.xnnpack_constants import (
    UINT64_MAX,
    XNN_FLAG_KEEP_DIMS,
    XNN_INVALID_VALUE_ID,
    XNN_VALUE_FLAG_EXTERNAL_INPUT,
    XNN_VALUE_FLAG_EXTERNAL_OUTPUT,
)
from executorch.exir._serialize._named_data_store import NamedDataStore, NamedDataStoreOutput

WHOLE = 0
"""In a reshape or slice: the dimension that is known at run time only."""


class Tokens(int):
    """The dimension that changes from call to call; its value is the most tokens that one call takes."""


Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Payload:
    """One finished delegate: its program, and the constants that it names by digest."""

    program: bytes
    data: NamedDataStoreOutput


class XnnGraph:
    """A subgraph under construction. Values are integers, as in XNNPACK; `shapes[value]` holds upper bounds.

    At most one dimension of a value may be `Tokens`.
    """

    def __init__(self) -> None:
        self.shapes: list[Shape] = []
        self._values: list[xnn.XValue] = []
        self._nodes: list[xnn.XNode] = []
        self._constants = [xnn.ConstantDataOffset(offset=0, size=0)]
        self._store = NamedDataStore()
        self._inputs: list[int] = []
        self._outputs: list[int] = []
        self._quantized: dict[tuple, int] = {}

    def input(self, shape: Shape) -> int:
        """A float32 tensor that the caller passes; arguments are numbered in the order of these calls."""
        value = self._value(shape)
        tensor = _tensor(self._values[value])
        tensor.external_id, tensor.flags = len(self._inputs), XNN_VALUE_FLAG_EXTERNAL_INPUT
        self._inputs.append(value)
        return value

    def output(self, value: int) -> None:
        """Returns `value` to the caller, in the order of these calls."""
        self._outputs.append(value)

    def constant(self, array: np.ndarray) -> int:
        """A float32 constant."""
        array = np.asarray(array, np.float32)
        return self._value(array.shape, buffer=self._blob(array))

    def unary(self, kind: type, operand: int) -> int:
        """An elementwise node, e.g. `XNNSigmoid`."""
        result = self._value(self.shapes[operand])
        self._node(kind(input_id=operand, output_id=result, flags=0))
        return result

    def relu(self, operand: int) -> int:
        """`max(x, 0)`."""
        result = self._value(self.shapes[operand])
        node = xnn.XNNClamp(input_id=operand, output_id=result, flags=0)
        self._node(node, limits=xnn.OutputMinMax(output_min=0, output_max="+inf"))
        return result

    def binary(self, kind: type, left: int, right: int) -> int:
        """An elementwise node with broadcasting, e.g. `XNNAdd`."""
        result = self._value(broadcast(self.shapes[left], self.shapes[right]))
        self._node(kind(input1_id=left, input2_id=right, output_id=result, flags=0))
        return result

    def reshape(self, operand: int, shape: Shape) -> int:
        """The same elements in `shape`; a `Tokens` dimension, or one marked WHOLE, is found at run time."""
        rows = int(np.prod(self.shapes[operand])) // int(np.prod([size for size in shape if size != WHOLE]))
        result = self._value(tuple(rows if size == WHOLE else size for size in shape))
        new_shape = [WHOLE if isinstance(size, Tokens) else size for size in shape]
        self._node(
            xnn.XNNStaticReshape(num_dims=len(shape), new_shape=new_shape, input_id=operand, output_id=result, flags=0)
        )
        return result

    def slice_last(self, operand: int, start: int, size: int) -> int:
        """`x[..., start : start + size]`."""
        shape = self.shapes[operand]
        result = self._value((*shape[:-1], size))
        leading = [WHOLE] * (len(shape) - 1)
        self._node(
            xnn.XNNStaticSlice(
                num_dims=len(shape),
                offsets=[*(0 for _ in leading), start],
                sizes=[*leading, size],
                input_id=operand,
                output_id=result,
                flags=0,
            )
        )
        return result

    def concatenate_last(self, left: int, right: int) -> int:
        """Two tensors side by side along the last dimension."""
        shape = self.shapes[left]
        result = self._value((*shape[:-1], shape[-1] + self.shapes[right][-1]))
        absent = dict.fromkeys(("input3_id", "input4_id", "input5_id"), XNN_INVALID_VALUE_ID)
        self._node(
            xnn.XNNConcatenate2(
                axis=len(shape) - 1, input1_id=left, input2_id=right, output_id=result, flags=0, **absent
            )
        )
        return result

    def mean_last(self, operand: int) -> int:
        """Mean over the last dimension, kept as 1.

        XNNPACK's node of this format averages the two middle dimensions of four, so rows go there and back.
        """
        shape = self.shapes[operand]
        rows = self.reshape(operand, (WHOLE, shape[-1], 1, 1))
        mean = self._value((self.shapes[rows][0], 1, 1, 1))
        self._node(xnn.XNNGlobalAvgPooling2d(input_id=rows, output_id=mean, flags=XNN_FLAG_KEEP_DIMS))
        return self.reshape(mean, (*shape[:-1], 1))

    def quantize_per_token(self, operand: int) -> int:
        """Asymmetric int8 with one scale and zero point per row, computed by the kernel from the row.

        Linears that share an input (q, k, v; gate, up) share its quantization, here and below.
        """
        key = (operand,)
        if key not in self._quantized:
            grid = xnn.PerTokenDynamicQuant(num_nonbatch_dims=1)
            self._quantized[key] = self._convert(operand, DType.xnn_datatype_qdint8, grid)
        return self._quantized[key]

    def quantize_static(self, operand: int, scale: float, zero_point: int) -> int:
        """Int8 with a stored scale and zero point."""
        key = (operand, scale, zero_point)
        if key not in self._quantized:
            grid = per_tensor(scale, zero_point)
            self._quantized[key] = self._convert(operand, DType.xnn_datatype_qint8, grid)
        return self._quantized[key]

    def dequantize(self, operand: int) -> int:
        """Back to float32."""
        return self._convert(operand, DType.xnn_datatype_fp32, None)

    def per_channel(self, dtype: DType, shape: Shape, data: np.ndarray, scales_O: np.ndarray) -> int:
        """A constant with one float32 scale per output row; `data` in the layout that `dtype` has in the file."""
        buffer = self._blob(data)
        scales = np.ascontiguousarray(scales_O, np.float32)
        grid = xnn.PerChannelQuant(
            scale=[], channel_dim=0, scale_buffer_idx=self._blob(scales, "scale_"), num_scales=scales.size
        )
        return self._value(shape, dtype, grid, buffer)

    def per_group(self, shape: Shape, packed: np.ndarray, scale_bits_OG: np.ndarray) -> int:
        """A 4-bit weight with one bfloat16 scale per group of inputs."""
        buffer = self._blob(packed)
        grid = xnn.PerChannelGroupQuant(
            scale=[],
            channel_dim=0,
            group_size=shape[1] // scale_bits_OG.shape[1],
            scale_buffer_idx=self._blob(scale_bits_OG, "scale_"),
            num_scales=scale_bits_OG.size,
        )
        return self._value(shape, DType.xnn_datatype_qbint4, grid, buffer)

    def fully_connected(
        self,
        operand: int,
        weight: int,
        bias: int | None,
        *,
        handle: int = 0,
        grid: xnn.PerTensorQuant | None = None,
    ) -> int:
        """`x W^T + b`. `grid` makes the result int8 (static kernels only). `handle` marks the node in the file."""
        dtype = DType.xnn_datatype_fp32 if grid is None else DType.xnn_datatype_qint8
        result = self._value((*self.shapes[operand][:-1], self.shapes[weight][0]), dtype, grid)
        self._node(
            xnn.XNNFullyConnected(
                input1_id=operand,
                filter_id=weight,
                bias_id=XNN_INVALID_VALUE_ID if bias is None else bias,
                output_id=result,
                flags=0,
            ),
            handle=handle,
        )
        return result

    def finish(self) -> Payload:
        """The delegate's bytes. The graph must not be used afterwards."""
        for position, value in enumerate(self._outputs):
            tensor = _tensor(self._values[value])
            tensor.external_id = len(self._inputs) + position
            tensor.flags = XNN_VALUE_FLAG_EXTERNAL_OUTPUT
        graph = xnn.XNNGraph(
            version="0",
            xnodes=self._nodes,
            xvalues=self._values,
            num_externs=len(self._inputs) + len(self._outputs),
            input_ids=self._inputs,
            output_ids=self._outputs,
            constant_data=self._constants,
        )
        return Payload(serialize_xnnpack_binary(graph, bytearray()), self._store.get_named_data_store_output())

    def _convert(self, operand: int, dtype: DType, grid: Any) -> int:
        result = self._value(self.shapes[operand], dtype, grid)
        self._node(xnn.XNNConvert(input_id=operand, output_id=result, flags=0))
        return result

    def _blob(self, array: np.ndarray, prefix: str = "") -> int:
        """Adds constant bytes under their digest, so that equal constants are stored once. Returns their index."""
        data = np.ascontiguousarray(array).tobytes()
        key = prefix + hashlib.sha256(data).hexdigest()
        self._constants.append(xnn.ConstantDataOffset(offset=UINT64_MAX, size=len(data), named_key=key))
        self._store.add_named_data(key, data, CONSTANT_TENSOR_ALIGNMENT)
        return len(self._constants) - 1

    def _value(self, shape: Shape, dtype: DType = DType.xnn_datatype_fp32, grid: Any = None, buffer: int = 0) -> int:
        tensor = xnn.XNNTensorValue(
            datatype=dtype,
            num_dims=len(shape),
            dims=[int(size) for size in shape],
            constant_buffer_idx=buffer,
            external_id=XNN_INVALID_VALUE_ID,
            flags=0,
            id_out=len(self._values),
        )
        self._values.append(xnn.XValue(tensor if grid is None else xnn.XNNQuantizedTensorValue(tensor, grid)))
        self.shapes.append(tuple(shape))
        return tensor.id_out

    def _node(self, node: Any, handle: int = 0, limits: xnn.OutputMinMax | None = None) -> None:
        self._nodes.append(xnn.XNode(xnode_union=node, debug_handle=handle, output_min_max=limits))


def per_tensor(scale: float, zero_point: int) -> xnn.PerTensorQuant:
    """A stored int8 grid; the file keeps the scale in float32."""
    return xnn.PerTensorQuant(scale=float(np.float32(scale)), zero_point=int(zero_point))


def broadcast(left: Sequence[int], right: Sequence[int]) -> Shape:
    """numpy's broadcasting, keeping which dimension is `Tokens`."""
    rank = max(len(left), len(right))
    pairs = zip((1,) * (rank - len(left)) + tuple(left), (1,) * (rank - len(right)) + tuple(right), strict=True)
    return tuple(b if a == 1 else a for a, b in pairs)


def _tensor(value: xnn.XValue) -> xnn.XNNTensorValue:
    union = value.xvalue_union
    return union.tensor_value if isinstance(union, xnn.XNNQuantizedTensorValue) else union
