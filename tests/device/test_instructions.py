"""Instructions are counted by address, in the runtime's libraries only."""

from __future__ import annotations

from pathlib import Path

import pytest

from afq_export.device.arm64.instructions import FAMILIES, count_instructions, family_of

LOG = """\
----------------
IN: 
0x00001000:  4f88e307  sdot     v7.4s, v24.16b, v8.4b[0]
0x00001004:  4f88e307  sdot     v7.4s, v24.16b, v8.4b[0]
0x00001000:  4f88e307  sdot     v7.4s, v24.16b, v8.4b[0]
0x00001008:  9bc07c20  umull    x0, w1, w0
0x0000100c:  2e60c020  umull    v0.8h, v1.8b, v0.8b
0x00001010:  b4001c60  cbz      x0, #0x1060
0x00002000:  4e80a4a5  smmla    v5.4s, v5.16b, v0.16b
0x00003000:  04a00000  fmla     z0.s, p0/m, z1.s, z2.s
"""
CODE = (("libruntime.so.1", 0x1000, 0x2000), ("libm.so.6", 0x2000, 0x3000), ("libruntime_more.so", 0x3000, 0x4000))


def test_distinct_addresses_in_the_named_libraries(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(LOG)
    assert count_instructions(log, CODE, ["libruntime"]) == {"sdot": 2, "umull": 1, "fmla": 1}
    assert count_instructions(log, CODE, ["libruntime.so"]) == {"sdot": 2, "umull": 1}
    assert count_instructions(log, CODE, ["libm"]) == {"smmla": 1}
    assert count_instructions(log, CODE, ["other"]) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_most_advanced_family_names_it(family: str) -> None:
    families = list(FAMILIES)
    less = {FAMILIES[name][0]: 9 for name in families[families.index(family) :]}
    assert family_of(less) == family


def test_without_any_it_is_scalar() -> None:
    assert family_of({}) == "scalar"
    assert family_of({"sdot": 0}) == "scalar"
