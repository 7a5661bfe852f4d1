"""Arm Ethos-U through ExecuTorch: model.pte with Vela's command stream, and the TOSA-INT program that it was made from.

model.pte                 methods `forward` and `decode` (one token): the host's part in portable operators, a delegate
model.tosa                the delegate's graph; Arm's reference model runs it here, nothing here runs a command stream
model.decode.tosa         that of `decode`
model.host.safetensors    token rows, their steps, cosines and sines: what the host looks up
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from afq_export.arch.config import DecoderConfig
from afq_export.errors import InputError, VerdictError
from afq_export.lower.bundle import Bundle
from afq_export.lower.memory import refuse_memory
from afq_export.progress import Progress
from afq_export.quantize.checkpoint import LinearRecord, QuantizedCheckpoint
from afq_export.spec.recipe import Embedding
from afq_export.spec.report import Check, Coverage, Lowered, Refused
from afq_export.spec.target import EthosUOptions, TargetProfile

if TYPE_CHECKING:
    from afq_export.lower.tosa.decoder import Shape
    from afq_export.runtime.session import Session

PROGRAM = "model.pte"
SMALLER = "fewer bits"
"""What helps against a program that does not fit, besides a smaller model."""
TOSA = {"forward": "model.tosa", "decode": "model.decode.tosa"}
"""Method of the program -> its graph's file."""
HOST = "model.host.safetensors"

PROGRAM_BYTES = 15_000
"""Portable operators, first and last commands, and ..."""
BLOCK_BYTES = 13_000
"""... commands and tables of each block."""
ROW_BYTES = 10
"""Bias, multiplier and shift of an output, as Vela packs them."""
DECODED = 16
"""Tokens of the check of `decode`."""
HOST_REASON = "on the host: looked up or compared, not computed"


def refuse(target: TargetProfile, records: Mapping[str, LinearRecord]) -> None:
    """Families without an integer form, programs beyond the target's memory, and tools that are not there."""
    from afq_export.lower.tosa.file import require_serializer
    from afq_export.lower.tosa.vela import require_vela
    from afq_export.runtime.tosa import require_reference_model

    if any(record.spec.role == "fc1" for record in records.values()):
        raise InputError("no integer LayerNorm", where=target.name, do="take a model of the Llama family")
    least = least_memory(target, records)
    refuse_memory(_options(target), "ethos_u", *least, target.name, smaller=SMALLER, least="at least ")
    require_serializer()
    require_vela()
    require_reference_model()


def least_memory(target: TargetProfile, records: Mapping[str, LinearRecord]) -> tuple[int, int]:
    """Bytes of flash and SRAM that no compiler goes below: codes of linears and rows, and the tensors that a call takes
    and gives (cache, its new entries, logits)."""
    head = records["lm_head"].spec
    codes = sum(r.spec.outputs * r.spec.inputs * r.spec.weight.bits // 8 for r in records.values())
    codes *= len(_shapes(target.shapes.context, target))
    kept = sum(r.spec.outputs for r in records.values() if r.spec.role in ("k_proj", "v_proj"))
    context, tokens = target.shapes.context, _shapes(target.shapes.context, target)["forward"].tokens
    return codes + head.outputs * head.inputs, kept * (context + tokens) + 2 * tokens * head.outputs


def overhead(config: DecoderConfig, records: Mapping[str, LinearRecord], target: TargetProfile) -> int:
    """Commands by experience, cos and sin in 16 bits, what Vela adds to each output."""
    methods = len(_methods(config, target))
    tables = 2 * min(config.max_positions, target.shapes.context) * config.head_dim * 2
    rows = sum(ROW_BYTES * record.spec.outputs for record in records.values())
    again = sum(record.spec.outputs * record.spec.inputs for record in records.values()) * (methods - 1)
    return tables + again + methods * (rows + PROGRAM_BYTES + BLOCK_BYTES * config.layers)


def shares_rows(head: LinearRecord, embedding: Embedding, target: TargetProfile) -> bool:
    """Never: the head's weights are packed by Vela."""
    return False


def write(
    checkpoint: QuantizedCheckpoint,
    target: TargetProfile,
    folder: Path,
    vector: Tensor,
    provenance: dict[str, str],
    progress: Progress,
) -> None:
    """All files. Raises InputError when Vela refuses a graph, or its programs do not fit the target."""
    from afq_export.lower.tosa.decoder import write_decoder
    from afq_export.lower.tosa.file import write_tosa
    from afq_export.lower.tosa.host import host_tables, save_tables
    from afq_export.lower.tosa.program import write_program
    from afq_export.lower.tosa.vela import compile_tosa

    options, shapes = _options(target), _methods(checkpoint.config, target)
    tables = host_tables(checkpoint, shapes["forward"])
    methods, flash, sram = {}, tables.bytes, 0
    for name, shape in shapes.items():
        graph = write_decoder(checkpoint, shape, progress)
        program = write_tosa(graph)
        (folder / TOSA[name]).write_bytes(program)
        compiled = compile_tosa(program, options, graph, shape.tokens)
        methods[name] = graph, compiled.stream
        flash, sram = flash + compiled.estimate.flash_bytes, max(sram, compiled.estimate.sram_bytes)
    refuse_memory(options, "ethos_u", flash, sram, target.name, smaller=SMALLER)
    save_tables(tables, folder / HOST)
    (folder / PROGRAM).write_bytes(write_program(methods, tables))


def open_session(bundle: Bundle):
    """The TOSA programs on Arm's reference model."""
    from afq_export.lower.tosa.host import load_tables
    from afq_export.lower.tosa.read import read_tosa
    from afq_export.runtime.tosa import TosaSession, reference_model

    graphs, executes = {}, {}
    for name, file in TOSA.items():
        path = bundle.folder / file
        if path.name in bundle.manifest.files:
            program = path.read_bytes()
            graphs[name] = read_tosa(program, str(path))
            executes[name] = reference_model(program, tuple(graphs[name].inputs), tuple(graphs[name].outputs))
    tables, path = load_tables(bundle.folder / HOST), bundle.folder / TOSA["forward"]
    return TosaSession(graphs["forward"], tables, executes["forward"], path, executes.get("decode"))


def runtime(bundle: Bundle, target: TargetProfile, checkpoint: QuantizedCheckpoint):
    """Arm's reference model; the integer reference is the checkpoint's own graph on our operators."""
    from afq_export.validate.ladder import Runtime

    def probe(linears, inputs, **keep):
        from afq_export.lower.tosa.probe import run_linears

        return run_linears(linears, inputs)

    def reference():
        from afq_export.lower.tosa.decoder import write_decoder
        from afq_export.lower.tosa.host import host_tables
        from afq_export.runtime.tosa import TosaSession
        from afq_export.validate.integer.tosa import run_graph

        shape = _methods(checkpoint.config, target)["forward"]
        graph = write_decoder(checkpoint, shape)
        tables = host_tables(checkpoint, shape)
        return TosaSession(graph, tables, lambda inputs: run_graph(graph, inputs), bundle.folder / TOSA["forward"])

    def more(ids_T):
        return [decode_check(open_session(bundle), ids_T[:DECODED])]

    return Runtime(lambda: open_session(bundle), probe, more=more, reference=reference)


def decode_check(session: Session, ids_T: Tensor) -> Check:
    """Tokens one by one through `decode` against all of them through `forward`."""
    import torch

    together = session.logits(ids_T)
    alone = torch.cat([session.extend(ids_T[place : place + 1], place) for place in range(len(ids_T))])
    same = torch.equal(together, alone)
    detail = f"{len(ids_T)} tokens one by one give {'the same' if same else 'other'} logits as together, bit for bit"
    return Check(name="decode", status="passed" if same else "failed", detail=detail)


def coverage(bundle: Bundle, target: TargetProfile, checkpoint: QuantizedCheckpoint) -> Coverage:
    """The TOSA programs must be the checkpoint's, and the delegates what Vela makes of them."""
    from afq_export.lower.tosa.program import BACKEND, read_methods
    from afq_export.lower.tosa.read import read_tosa, verify_tosa
    from afq_export.lower.tosa.vela import compile_tosa

    shapes = _methods(checkpoint.config, target)
    found = read_methods(bundle.model.read_bytes())
    if found.keys() != shapes.keys():
        raise VerdictError("the program has other methods", where=PROGRAM, why=f"{', '.join(found)}")
    refused, estimates = [], []
    for name, shape in shapes.items():
        program = (bundle.folder / TOSA[name]).read_bytes()
        graph = read_tosa(program, TOSA[name])
        verify_tosa(graph, checkpoint, shape)
        compiled = compile_tosa(program, _options(target), graph, shape.tokens)
        if found[name].delegates != ((BACKEND, compiled.stream),):
            raise VerdictError("a delegate is not what Vela makes of its TOSA program", where=f"{PROGRAM}: {name}")
        outside = compiled.estimate.outside
        refused += [Refused(f"{what} in {name}", count, "Vela leaves it to the CPU") for what, count in outside.items()]
        calls = sorted(found[name].calls.items())
        refused += [Refused(f"{what} in {name}", count, HOST_REASON) for what, count in calls]
        estimates.append(compiled.estimate)
    lowered = tuple(Lowered(name, record.kernel) for name, record in checkpoint.records.items())
    return Coverage(lowered, tuple(refused), tuple(estimates))


def describe(path: Path) -> tuple[dict[str, Any], list[tuple[str, int, int, str, str]]]:
    """Delegates and operators of a .pte, and the linears of the TOSA program beside it."""
    from afq_export.lower.tosa.program import read_methods
    from afq_export.lower.tosa.read import read_linears, read_tosa

    facts: dict[str, Any] = {}
    for name, method in read_methods(path.read_bytes()).items():
        delegates = ", ".join(backend for backend, _ in method.delegates)
        facts[f"method {name}"] = f"{delegates}, {sum(method.calls.values())} operators outside"
    beside = path.with_name(TOSA["forward"])
    if not beside.is_file():
        return facts, []
    graph = read_tosa(beside.read_bytes(), str(beside))
    facts["TOSA operators"] = len(graph.operators)
    shapes = read_linears(graph)
    return facts, [("CONV2D", *shape, "int8 per_channel", "int8 static") for shape in shapes.values()]


def _options(target: TargetProfile) -> EthosUOptions:
    if target.ethos_u is None:
        raise InputError("the target has no [ethos_u] table", where=target.name, do='start from base = "ethos-u85"')
    return target.ethos_u


def _methods(config: DecoderConfig, target: TargetProfile) -> dict[str, Shape]:
    """Method of the program -> what a call of it takes."""
    return _shapes(min(config.max_positions, target.shapes.context), target)


def _shapes(context: int, target: TargetProfile) -> dict[str, Shape]:
    from afq_export.lower.tosa.decoder import Shape

    tokens = min(target.shapes.prefill, context)
    shapes = {"forward": Shape(tokens, context)}
    return shapes | {"decode": Shape(1, context)} if _options(target).decode else shapes
