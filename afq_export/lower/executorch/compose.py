"""Joins delegates into one ExecuTorch program.

A module calls each segment through one opaque operator, so that what torch.export traces is small: the embedding, the
KV cache, attention, and one call per segment. Afterwards each such call is replaced by a call of its delegate.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from executorch.exir import EdgeCompileConfig, EdgeProgramManager, ExecutorchProgramManager, to_edge
from executorch.exir.delegate import executorch_call_delegate
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import Tensor, nn

from afq_export.lower.executorch.graph import Tokens
from afq_export.lower.executorch.segments import Segment
from afq_export.lower.traces import forget_traces


@torch.library.custom_op("afq_export::segment", mutates_args=())
def _segment(name: str, inputs: Sequence[Tensor], sizes: Sequence[int], ranks: Sequence[int]) -> list[Tensor]:
    """Stands for the delegate `name` while the program is traced; `sizes` are the shapes of its results, joined."""
    raise NotImplementedError("a segment runs in the exported program only")


@_segment.register_fake
def _(name: str, inputs: Sequence[Tensor], sizes: Sequence[int], ranks: Sequence[int]) -> list[Tensor]:
    rest = iter(sizes)
    return [inputs[0].new_empty([next(rest) for _ in range(rank)], dtype=torch.float32) for rank in ranks]


def call_segment(segment: Segment, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The results of `segment` on `inputs`, inside a module's forward."""
    tokens = _tokens(segment, inputs)
    sizes = [tokens if isinstance(size, Tokens) else size for shape in segment.outputs for size in shape]
    return _segment(segment.name, list(inputs), sizes, [len(shape) for shape in segment.outputs])


def export_program(
    module: nn.Module,
    example: tuple[Tensor, ...],
    segments: Sequence[Segment],
    *,
    dynamic_shapes: dict[str, Any] | None = None,
    metadata: Mapping[str, object] | None = None,
) -> ExecutorchProgramManager:
    """The program of `module`, whose `call_segment` calls become delegates. `metadata` are its constant methods."""
    config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
    with torch.no_grad(), warnings.catch_warnings():
        # The exporter warns about its own internals; nothing in it is about the model.
        warnings.simplefilter("ignore")
        exported = torch.export.export(module, example, dynamic_shapes=dynamic_shapes, strict=False)
        program = to_edge(exported, compile_config=config).exported_program()
        _splice(program.graph_module, {segment.name: segment for segment in segments})
        # A new manager, because it collects the delegates' constants when it is made.
        finished = EdgeProgramManager(program, dict(metadata or {}), config).to_executorch()
    forget_traces(program.graph_module)
    return finished


def _splice(module: torch.fx.GraphModule, segments: Mapping[str, Segment]) -> None:
    """Replaces every call of the opaque operator by a call of the delegate it stands for."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or "afq_export.segment" not in str(node.target):
            continue
        name, inputs = node.args[:2]
        module.add_module(f"lowered_{name}", _lowered(segments[name]))
        with graph.inserting_before(node):
            delegate = graph.get_attr(f"lowered_{name}")
            call = graph.call_function(executorch_call_delegate, (delegate, *inputs))
        call.meta["val"] = list(node.meta["val"])
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    module.recompile()


def _lowered(segment: Segment) -> LoweredBackendModule:
    payload = segment.payload
    lowered = LoweredBackendModule(_Outline(segment), segment.backend, payload.program, [], payload.data)
    lowered.meta = {"debug_handle_map": {}}
    return lowered


class _Outline:
    """What ExecuTorch asks of a delegate's original program: the shapes of its results, and how many there are."""

    def __init__(self, segment: Segment) -> None:
        graph = torch.fx.Graph()
        inputs = [graph.placeholder(f"input_{position}") for position in range(len(segment.inputs))]
        where = _dynamic_dimension(segment)
        tokens = graph.call_function(torch.ops.aten.sym_size.int, (inputs[where[0]], where[1])) if where else None
        sizes = [tokens if isinstance(size, Tokens) else size for shape in segment.outputs for size in shape]
        ranks = [len(shape) for shape in segment.outputs]
        arguments = (segment.name, inputs, sizes, ranks)
        results = graph.call_function(torch.ops.afq_export.segment.default, arguments)
        graph.output([graph.call_function(operator.getitem, (results, i)) for i in range(len(ranks))])
        self.graph = graph
        self.graph_module = torch.fx.GraphModule({}, graph)

    def module(self) -> torch.fx.GraphModule:
        """Called with fake tensors whenever a pass re-traces the program."""
        return self.graph_module


def _tokens(segment: Segment, inputs: Sequence[Tensor]) -> int:
    where = _dynamic_dimension(segment)
    return inputs[where[0]].shape[where[1]] if where else 0


def _dynamic_dimension(segment: Segment) -> tuple[int, int] | None:
    """(input, dimension) from which the size of `Tokens` is read; None when all shapes are fixed."""
    return next(
        (
            (position, dimension)
            for position, shape in enumerate(segment.inputs)
            for dimension, size in enumerate(shape)
            if isinstance(size, Tokens)
        ),
        None,
    )
