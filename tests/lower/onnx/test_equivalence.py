"""Whole files against what they stand for: fake quantization, the specification, the integer reference; and the same
file called in other ways.

What holds to the last bit, measured on ONNX Runtime 1.31 on one machine: the integer reference with the runtime's own
float operators, whatever the kernels; sequences of one length side by side in a batch. A call with a single query, or a
row of MatMulNBits alone, is computed by other kernels than several, in another order of float additions: decoding step
by step, and a sequence with padding beside it, are equal within float rounding.
"""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from torch import Tensor

from afq_export.arch import decoder
from afq_export.lower.onnx.cache import OPSET, read_back
from afq_export.lower.onnx.float_parts import OnnxFloatParts
from afq_export.lower.onnx.graph import OnnxGraph
from afq_export.lower.onnx.hadamard import BEHIND_NORM
from afq_export.lower.onnx.interface import dummy_inputs
from afq_export.lower.onnx.program import opset_of
from afq_export.quantize.checkpoint import QuantizedCheckpoint, QuantizedLinear
from afq_export.spec.online import MATRIX_KIND
from afq_export.validate.evaluate import hidden_states
from afq_export.validate.onnxruntime import executed_kernels
from afq_export.validate.rungs import QuantizedRung, fake_quant_rung, integer_rung
from tests.lower.onnx.decoders import CASES, CONTEXT, PREFILL, Decoders, Lowered, random_ids

TOKENS = 2 * PREFILL + 5
ROUNDING = 1e-5
"""Over the largest logit. Norms, softmax and sums differ in their last bits; a code that flips costs 100 times this."""


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, decoders: Decoders) -> Lowered:
    return decoders(request.param)


@torch.no_grad()
def logits(rung: QuantizedRung, ids_T: Tensor) -> np.ndarray:
    """Float32 [T, V] of a rung in torch."""
    return decoder.head(rung.head(), hidden_states(rung, ids_T[None]))[0].numpy()


def error(given: np.ndarray, expected: np.ndarray) -> float:
    assert given.shape == expected.shape
    return float(np.abs(given - expected).max() / np.abs(expected).max())


def quantizes_activations_in_the_kernel(case: Lowered) -> bool:
    """MatMulNBits at accuracy level 4: the file says nothing of int8 inputs."""
    kernels = {record.kernel for record in case.checkpoint.records.values()}
    return any(case.target.kernel(name).arithmetic == "onnxruntime.dynamic_per_block" for name in kernels)


class WeightOnly(QuantizedCheckpoint):
    """The checkpoint as the file states it: linears that are quantized in blocks have a float input."""

    def linear(self, name: str) -> QuantizedLinear:
        linear = super().linear(name)
        if not linear.spec.weight.group:
            return linear
        spec = msgspec.structs.replace(linear.spec, activation=None)
        return dataclasses.replace(linear, record=msgspec.structs.replace(linear.record, spec=spec))


def as_stated(checkpoint: QuantizedCheckpoint) -> QuantizedCheckpoint:
    facts = {field.name: getattr(checkpoint, field.name) for field in dataclasses.fields(QuantizedCheckpoint)}
    return WeightOnly(**facts)


def test_the_runtime_computes_fake_quantization(case: Lowered) -> None:
    ids = random_ids(case.config.vocab, TOKENS)
    assert error(case.session().logits(ids).numpy(), logits(fake_quant_rung(case.checkpoint), ids)) < ROUNDING


def test_the_specification_is_fake_quantization(case: Lowered) -> None:
    """onnx's own evaluator shares no code with the runtime, and knows every operator in the file."""
    ids = random_ids(case.config.vocab, TOKENS)
    evaluator = ReferenceEvaluator(onnx.load(case.path))
    names = list(evaluator.output_names)
    inputs, outputs = case.session().run_both(ids)
    stated = dict(zip(names, evaluator.run(names, inputs), strict=True))
    assert error(stated["logits"][0], logits(fake_quant_rung(as_stated(case.checkpoint)), ids)) < ROUNDING
    distance = error(outputs["logits"], stated["logits"])
    if quantizes_activations_in_the_kernel(case):
        assert 1e-3 < distance < 0.1, "int8 activations are the session's doing, and cost what int8 costs"
    else:
        assert all(error(numbers(case, outputs[name]), numbers(case, stated[name])) < ROUNDING for name in names)


def numbers(case: Lowered, output: np.ndarray) -> np.ndarray:
    """An output as numbers: bytes of a quantized cache are read back."""
    if output.dtype != np.uint8:
        return output
    graph, cache, width = OnnxGraph(), case.checkpoint.kv_cache, case.config.head_dim
    rows = ("batch", case.config.kv_heads, "total", output.shape[-1])
    value = read_back(graph, "rows", cache, width)
    made = helper.make_graph(
        graph.nodes,
        "rows",
        [helper.make_tensor_value_info("rows", TensorProto.UINT8, rows)],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, (*rows[:3], width))],
        initializer=list(graph.initializers.values()),
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)])
    return ReferenceEvaluator(model).run(None, {"rows": output})[0]


def test_the_integer_reference_is_the_runtime_bit_for_bit(case: Lowered) -> None:
    ids = random_ids(case.config.vocab, TOKENS)
    kept = not case.checkpoint.kv_cache.quantized
    parts = OnnxFloatParts(opset_of(case.checkpoint, case.target), case.target, case.options, kept)
    reference = logits(integer_rung(case.checkpoint, case.target, parts=parts), ids)
    assert np.array_equal(case.session().logits(ids).numpy(), reference)


@pytest.mark.parametrize("name", ["llama, matrices behind norms", "opt, matrices behind norms"])
def test_a_last_call_of_one_token_is_the_reference_too(decoders: Decoders, name: str) -> None:
    """A float product with one row may have a kernel of its own, which adds in another order."""
    case, ids = decoders(name), random_ids(96, 2 * PREFILL + 1)
    parts = OnnxFloatParts(opset_of(case.checkpoint, case.target), case.target, case.options)
    reference = logits(integer_rung(case.checkpoint, case.target, parts=parts), ids)
    assert np.array_equal(case.session().logits(ids).numpy(), reference)


def test_every_linear_runs_as_its_kernel(case: Lowered) -> None:
    ran = executed_kernels(case.path, case.options, random_ids(case.config.vocab, 4))
    for name, record in case.checkpoint.records.items():
        assert ran[name] == case.target.kernel(record.kernel).runs_as, name
    float_products = [name for name, kernel in ran.items() if kernel in ("MatMul", "Gemm", "FusedMatMul")]
    operators, floats = case.content.operators, case.checkpoint.block_floats(0)
    behind = sum(name.endswith(MATRIX_KIND) for name in floats) * case.config.layers
    assert operators.get(BEHIND_NORM, 0) == behind
    assert len(float_products) == behind + (case.config.layers if case.config.down_hadamard else 0)


def test_a_prefill_in_chunks_is_the_whole_one(case: Lowered) -> None:
    session, ids = case.session(), random_ids(case.config.vocab, TOKENS)
    whole = session.run_both(ids)[1]["logits"][0]
    assert error(session.logits(ids).numpy(), whole) < ROUNDING
    parts = torch.cat([session.extend(ids[:5], 0), session.extend(ids[5:], 5)])
    assert error(parts.numpy(), whole) < ROUNDING


def test_decoding_step_by_step_is_the_prefill(case: Lowered) -> None:
    session, ids = case.session(), random_ids(case.config.vocab, TOKENS)
    whole = session.logits(ids).numpy()
    steps = torch.cat([session.extend(ids[place : place + 1], place) for place in range(TOKENS)])
    assert error(steps.numpy(), whole) < 10 * ROUNDING
    assert torch.equal(session.logits(ids), torch.from_numpy(whole)), "the cache of an earlier sequence shows through"


def test_going_back_forgets_what_came_after(case: Lowered) -> None:
    session, ids = case.session(), random_ids(case.config.vocab, 12)
    session.logits(ids[:8])
    first = session.extend(ids[4:8], 4)
    session.extend(random_ids(case.config.vocab, 6, seed=5), 4)
    assert torch.equal(session.extend(ids[4:8], 4), first)


def padded(case: Lowered, sequences: list[np.ndarray], right: bool = False) -> dict[str, np.ndarray]:
    """One batch of sequences of different lengths, padded on the left or on the right; positions count real tokens."""
    shape = len(sequences), max(map(len, sequences))
    ids, mask, positions = (np.zeros(shape, np.int64) for _ in range(3))
    for row, sequence in enumerate(sequences):
        count = len(sequence)
        where = slice(0, count) if right else slice(shape[1] - count, shape[1])
        ids[row, where], mask[row, where], positions[row, where] = sequence, 1, np.arange(count)
    given = dummy_inputs(case.config, *shape, past=0, kv_cache=case.checkpoint.kv_cache) | {
        "input_ids": ids,
        "attention_mask": mask,
    }
    return given | ({"position_ids": positions} if case.config.rope else {})


def test_sequences_in_a_batch_are_the_sequences_alone(case: Lowered) -> None:
    """Of the same length: to the last bit, whatever the kernel."""
    ids = [random_ids(case.config.vocab, 12, seed).numpy() for seed in (1, 2, 3)]
    together = case.run(padded(case, ids))["logits"]
    for row, sequence in zip(together, ids, strict=True):
        assert np.array_equal(row, case.run(padded(case, [sequence]))["logits"][0])


def test_a_padded_sequence_is_the_sequence_alone(case: Lowered) -> None:
    """The one without padding to the last bit; the other within float rounding, since it attends over more keys."""
    short, long = (random_ids(case.config.vocab, count, seed=count).numpy() for count in (7, 12))
    alone = [case.run(padded(case, [sequence]))["logits"][0] for sequence in (short, long)]
    left, right = (case.run(padded(case, [short, long], right=side))["logits"] for side in (False, True))
    assert np.array_equal(left[1], alone[1]) and np.array_equal(right[1], alone[1])
    assert error(left[0, 5:], alone[0]) < ROUNDING
    assert error(right[0, :7], alone[0]) < ROUNDING
    assert np.isfinite(left).all(), "a token that sees nothing is no NaN"


def test_a_padded_batch_decodes_on(case: Lowered) -> None:
    """The next token of both, after a cache whose first places are masked out."""
    short, long = (random_ids(case.config.vocab, count, seed=count).numpy() for count in (7, 12))
    more = [np.append(short, 5), np.append(long, 6)]
    first, whole = padded(case, [short, long]), [case.run(padded(case, [s]))["logits"][0, -1] for s in more]
    results = case.run(first)
    step = {name.replace("present", "past_key_values"): a for name, a in results.items() if name != "logits"}
    step["input_ids"] = np.array([[5], [6]])
    step["attention_mask"] = np.concatenate([first["attention_mask"], np.ones((2, 1), np.int64)], axis=1)
    if case.config.rope:
        step["position_ids"] = np.array([[7], [12]])
    after = case.run(step)["logits"][:, 0]
    assert error(after, np.stack(whole)) < 10 * ROUNDING


def test_positions_of_opt_count_what_is_not_masked(decoders: Decoders) -> None:
    """With the padding counted, the logits are others: the file takes positions from the mask."""
    case, ids = decoders("opt, static"), random_ids(96, 7).numpy()
    left = padded(case, [ids, np.zeros(12, np.int64)])
    counted = left | {"attention_mask": np.ones((2, 12), np.int64)}
    alone = case.run(padded(case, [ids]))["logits"][0]
    assert error(case.run(left)["logits"][0, 5:], alone) < ROUNDING
    assert error(case.run(counted)["logits"][0, 5:], alone) > 1e-2


def test_position_ids_turn_queries_and_keys(decoders: Decoders) -> None:
    """A shift of all positions changes nothing but float rounding, one of half of them does."""
    case, ids = decoders("llama, weights only"), random_ids(96, 8).numpy()
    given = padded(case, [ids])
    plain = case.run(given)["logits"]
    shifted = case.run(given | {"position_ids": given["position_ids"] + 9})["logits"]
    torn = case.run(given | {"position_ids": given["position_ids"] + 9 * (np.arange(8) > 3)})["logits"]
    assert error(shifted, plain) < 1e-4 < 1e-2 < error(torn, plain)


@pytest.mark.parametrize("position", [-1, CONTEXT, 10**9])
def test_a_position_outside_of_the_tables_is_an_error(decoders: Decoders, position: int) -> None:
    """The runtime says so; it reads nothing beside them."""
    case = decoders("qwen3")
    given = padded(case, [np.array([1])])
    given["position_ids"][:] = CONTEXT - 1
    assert np.isfinite(case.run(given)["logits"]).all()
    given["position_ids"][:] = position
    with pytest.raises(InvalidArgument, match=f"position_ids value {position} .* out of range"):
        case.run(given)
