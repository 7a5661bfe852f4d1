"""Damage: bytes flipped, cut, doubled; values of a document replaced, removed, nested."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 1 << 31, -(1 << 31), 1 << 63, 1 << 70, 0.5, -0.0, 1e308, float("inf"),
    float("nan"), "", "x", "../up", "/abs", "a/b", "ü\u202e", "\ud800", "0" * 300, [], [1], ["x"], [[]], {}, {"x": 1},
    [None], {"": []},
)  # fmt: skip
"""What somebody else's file may hold in any place."""


def bytes_of(data: bytes, chosen: random.Random) -> bytes:
    """`data` with one to four places damaged."""
    changed = bytearray(data)
    for _ in range(chosen.randint(1, 4)):
        if not changed:
            break
        at = chosen.randrange(len(changed))
        kind = chosen.randrange(6)
        if kind == 0:
            changed[at] ^= 1 << chosen.randrange(8)
        elif kind == 1:
            changed[at] = chosen.choice((0, 0xFF, 0x7F, 0x80, ord('"'), ord("{"), ord("9")))
        elif kind == 2:
            del changed[at:]
        elif kind == 3:
            del changed[at : at + chosen.randint(1, 16)]
        elif kind == 4:
            changed[at:at] = changed[: chosen.randint(1, 64)]
        else:
            changed[at : at + 8] = chosen.choice((b"\xff" * 8, b"\0" * 8, (1 << 62).to_bytes(8, "little")))
    return bytes(changed)


def document(value: Any, chosen: random.Random) -> Any:
    """A copy of nested `value` with one to three of its places replaced, removed, doubled or joined by others."""
    changed = copy.deepcopy(value)
    for _ in range(chosen.randint(1, 3)):
        places = list(_places(changed))
        if not places:
            return copy.deepcopy(chosen.choice(VALUES))
        holder, key = chosen.choice(places)
        kind = chosen.randrange(5)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[chosen.choice(("x", "", "../x", "name"))] = copy.deepcopy(chosen.choice(VALUES))
        elif kind == 2:
            holder[key] = [holder[key]]
        else:
            holder[key] = copy.deepcopy(chosen.choice(VALUES))
    return changed


def json_of(data: bytes, chosen: random.Random) -> bytes:
    """Damage of a JSON document: of its text or of its values."""
    if chosen.random() < 0.3:
        return bytes_of(data, chosen)
    return json.dumps(document(json.loads(data), chosen)).encode("utf-8", "surrogatepass")


def safetensors_of(data: bytes, chosen: random.Random) -> bytes:
    """Damage of a safetensors file: its bytes, its header's length, or a value in that (offsets, shapes, types)."""
    size = int.from_bytes(data[:8], "little")
    kind = chosen.randrange(4)
    if kind == 0:
        return bytes_of(data, chosen)
    if kind == 1:
        other = chosen.choice((0, 1, size - 1, size + 1, len(data), 1 << 40, (1 << 64) - 1))
        return other.to_bytes(8, "little") + data[8:]
    header = json_of(data[8 : 8 + size], chosen)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _places(value: Any):
    """Every (holder, key) in nested lists and dicts."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])
