"""What ONNX Runtime really executed, read from the profile that a session writes.

A fused operator keeps the name of the MatMul that it came from, so the linear `blocks.0.q_proj` is found under its name
whatever it became: MatMulIntegerToFloat, QLinearMatMul, MatMulNBits, MatMulInteger, or a MatMul or Gemm in float when
the fusion did not happen.
"""

from __future__ import annotations

import json
from collections import Counter

from afq_export.errors import InputError

KERNEL_TIME = "_kernel_time"
"""What ends the name of the event that says that a node's kernel ran."""


def executed(profile: str) -> dict[str, str]:
    """Node name -> type of the operator that ran under it, in the order of the first run.

    `profile` is the JSON text of the file that `InferenceSession.end_profiling` names. Nodes without a name are left
    out. Raises InputError when the text is no such profile, or one name stands for several operators.
    """
    found: dict[str, str] = {}
    for event in _events(profile):
        name = str(event.get("name", ""))
        if event.get("cat") != "Node" or not name.endswith(KERNEL_TIME) or name == KERNEL_TIME:
            continue
        name, operator = name.removesuffix(KERNEL_TIME), event.get("args", {}).get("op_name", "")
        if found.setdefault(name, operator) != operator:
            raise InputError("two operators of one name", where=name, why=f"{found[name]} and {operator}")
    if not found:
        raise InputError("no operator in the profile", do="run the session once before profiling ends")
    return found


def executed_nodes(profile: str) -> dict[str, int]:
    """Type of operator -> how many nodes ran as it, by name. Raises InputError as `executed` does."""
    return dict(sorted(Counter(executed(profile).values()).items()))


def _events(profile: str) -> list[dict]:
    try:
        events = json.loads(profile)
    except json.JSONDecodeError as error:
        raise InputError("no profile of ONNX Runtime", why=str(error)) from error
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        raise InputError("no profile of ONNX Runtime", why="it is no list of events")
    return events
