"""Which operators a profile says were executed."""

from __future__ import annotations

import json

import pytest

from afq_export.errors import InputError
from afq_export.runtime.profile import executed


def event(name: str, operator: str, category: str = "Node") -> dict:
    return {"name": name, "cat": category, "ph": "X", "args": {"op_name": operator, "node_index": "0"}}


def test_names_and_operators_in_the_order_of_the_first_run():
    events = [
        event("session_initialization", "", "Session"),
        event("blocks.0.q_proj.codes_kernel_time", "QuantizeLinear"),
        event("blocks.0.q_proj_kernel_time", "MatMulIntegerToFloat"),
        event("_kernel_time", "Reshape"),
        event("blocks.0.q_proj_fence_before", "MatMulIntegerToFloat"),
        event("blocks.0.q_proj.codes_kernel_time", "QuantizeLinear"),
    ]
    ran = executed(json.dumps(events))
    assert list(ran.items()) == [
        ("blocks.0.q_proj.codes", "QuantizeLinear"),
        ("blocks.0.q_proj", "MatMulIntegerToFloat"),
    ]


def test_one_name_for_two_operators_is_refused():
    events = [event("a_kernel_time", "MatMul"), event("a_kernel_time", "MatMulNBits")]
    with pytest.raises(InputError, match="MatMul and MatMulNBits"):
        executed(json.dumps(events))


@pytest.mark.parametrize("text", ["", "[{", '{"a": 1}', "[1]"])
def test_what_is_no_profile_is_refused(text):
    with pytest.raises(InputError, match="no profile"):
        executed(text)


def test_a_profile_of_nothing_is_refused():
    with pytest.raises(InputError, match="no operator"):
        executed(json.dumps([event("session_initialization", "", "Session")]))
