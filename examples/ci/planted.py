"""Plants regressions into copies of a finished bundle and shows that `afq-export check` catches each of them.

    afq-export run --target linux-x64-ort --recipe w8a8-dynamic+rtn --out run
    afq-export baseline create run --out model.afqb
    python examples/ci/planted.py run model.afqb

nothing         the bundle as it is                                             passes
one-step        one scale of one layer, the next float32 up                     fails: identical
one-code        one int8 weight, or a pair of int4 ones, one bit off            fails: identical
wrong-rows      one layer's rows with their neighbours' scales                  fails: top-1, KL or drift
wrong-layer     two layers' integers in each other's place                      fails: drift
tokenizer       two letters with each other's ids                               refused: tokenizer_digest
option          another option for the runtime, where it takes any              fails: runtime options

Every copy is sealed again, as an export would have it: the hashes are in order, only the numbers are wrong.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from afq_export.cli import call
from afq_export.lower.bundle import Bundle, open_bundle, seal
from afq_export.paths import bundle_folder
from afq_export.report.tables import Table
from afq_export.terminal import quieten

ACCURACY, PRECISION = "session.qdq_matmulnbits_accuracy_level", "session.x64quantprecision"
Plant = Callable[[Bundle], bool]
"""Changes a bundle; False when it has no place for that."""
LAYER = 3
"""Which linear, in the order of the file."""


def planted(source: Path, plant: Plant, folder: Path) -> bool:
    """Writes a copy of the bundle with one regression to `folder`; False when it has no place for that."""
    bundle = open_bundle(Path(shutil.copytree(source, folder)))
    found = plant(bundle)
    seal(bundle.folder, bundle.manifest)
    return found


def main(arguments: list[str], plants: Mapping[str, tuple[Plant, int]] | None = None) -> int:
    """Plants everything that the bundle has a place for; exit code 1 when something was not caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a bundle, or the run folder around it")
    parser.add_argument("baseline", type=Path, help="what `baseline create` made of it")
    parser.add_argument("--eval", help="its text, where it is not a shipped one")
    parser.add_argument(
        "--write", nargs=2, metavar=("NAME", "DIR"), help="only write a bundle with one of them planted"
    )
    given = parser.parse_args(arguments)
    source = bundle_folder(given.bundle)
    if given.write:
        name, written = given.write
        return 0 if planted(source, PLANTS[name][0], Path(written)) else 1
    text = ["--eval", given.eval] if given.eval else []
    rows = []
    for name, (plant, expected) in (plants or PLANTS).items():
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "bundle"
            if not planted(source, plant, copy):
                continue
            print(f"== {name}", flush=True)
            code = call(["check", str(copy), "--baseline", str(given.baseline), "--identical", "same-machine", *text])
        rows.append((name, str(code), str(expected), "as it should be" if code == expected else "NOT CAUGHT"))
    print("== all")
    print(Table(("planted", "exit code", "expected", ""), tuple(rows)).text())
    return int(any(row[1] != row[2] for row in rows))


def nothing(bundle: Bundle) -> bool:
    """Leaves the bundle as it is."""
    return True


def one_step(bundle: Bundle) -> bool:
    """The next larger number for one scale of one layer."""
    scales, size = stored_scales(bundle)
    changed = bytearray(scales)
    place = len(scales) // 2 // size * size
    number = int.from_bytes(changed[place : place + size], "little") + 1
    changed[place : place + size] = number.to_bytes(size, "little")
    replace(bundle.model, scales, bytes(changed))
    return True


def one_code(bundle: Bundle) -> bool:
    """One bit of the middle of a layer's integers."""
    codes = stored_codes(bundle)[LAYER]
    changed = bytearray(codes)
    changed[len(codes) // 2] ^= 1
    replace(bundle.model, codes, bytes(changed))
    return True


def wrong_rows(bundle: Bundle) -> bool:
    """A layer's scales, all moved on by one row: an index that is off by one."""
    scales, size = stored_scales(bundle)
    replace(bundle.model, scales, scales[size:] + scales[:size])
    return True


def wrong_layer(bundle: Bundle) -> bool:
    """The integers of LAYER and of the next linear of its shape, exchanged."""
    codes = stored_codes(bundle)
    one = codes[LAYER]
    two = next(other for other in codes[LAYER + 1 :] if len(other) == len(one))
    path = bundle.model
    mark = bytes(len(one))  # a third value, for the exchange
    for old, new in ((one, mark), (two, one), (mark, two)):
        replace(path, old, new)
    return True


def tokenizer(bundle: Bundle) -> bool:
    """`e` and `a` with each other's ids."""
    path = bundle.folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = data["model"]["vocab"]
    if isinstance(vocabulary, dict):
        vocabulary["e"], vocabulary["a"] = vocabulary["a"], vocabulary["e"]
    else:
        places = {token: place for place, (token, _) in enumerate(vocabulary)}
        for token, other in (("e", "a"), ("a", "e")):
            vocabulary[places[token]][0] = other
    path.write_text(json.dumps(data), encoding="utf-8")
    return True


def option(bundle: Bundle) -> bool:
    """Weight-only kernels with int8 activations where they had float32, or the other way round; or faster products."""
    path = bundle.folder / "session_options.json"
    if not path.exists():
        return False
    data = json.loads(path.read_text(encoding="utf-8"))
    key = ACCURACY if ACCURACY in data["config"] else PRECISION
    data["config"][key] = "0" if data["config"].get(key) != "0" else "4"
    path.write_text(json.dumps(data), encoding="utf-8")
    return True


PLANTS: dict[str, tuple[Plant, int]] = {
    "nothing": (nothing, 0),
    "one-step": (one_step, 1),
    "one-code": (one_code, 1),
    "wrong-rows": (wrong_rows, 1),
    "wrong-layer": (wrong_layer, 1),
    "tokenizer": (tokenizer, 2),
    "option": (option, 1),
}
"""Name -> what is done and the exit code that `check` must end with."""


def stored_scales(bundle: Bundle) -> tuple[bytes, int]:
    """The bytes of a layer's weight scales as they stand in the file, and how many each takes."""
    if bundle.backend == "xnnpack":
        from afq_export.lower.executorch.readback import read_linears
        from afq_export.lower.executorch.weights import bfloat16_bits

        linear = read_linears(bundle.model.read_bytes())[LAYER]
        if linear.kind == "qb4w":
            return bfloat16_bits(linear.scales).tobytes(), 2
        return linear.scales.tobytes(), 4
    return _as_stored(bundle, list(_onnx(bundle).values())[LAYER].scales.astype(np.float32)), 4


def stored_codes(bundle: Bundle) -> list[bytes]:
    """The bytes of every layer's integers as they stand in the file."""
    if bundle.backend == "xnnpack":
        from afq_export.lower.executorch.readback import read_linears

        return [linear.packed for linear in read_linears(bundle.model.read_bytes())]
    return [_as_stored(bundle, linear.codes) for linear in _onnx(bundle).values()]


def replace(path: Path, old: bytes, new: bytes) -> None:
    """Puts other bytes in the place of some. Raises ValueError unless they stand in the file once."""
    data = path.read_bytes()
    if data.count(old) != 1 or len(old) != len(new):
        raise ValueError(f"{path.name} does not hold these {len(old)} bytes once")
    path.write_bytes(data.replace(old, new))


def _as_stored(bundle: Bundle, array: np.ndarray) -> bytes:
    """The bytes of a matrix [O, I] in an ONNX file: either way round, int4 two to a byte."""
    data = bundle.model.read_bytes()
    for way in (np.ascontiguousarray(array.T), np.ascontiguousarray(array)):
        flat = way.ravel()
        packed = (flat[::2] & 15 | flat[1::2] << 4).astype(np.uint8) if array.dtype == np.int8 else flat
        for form in (flat.tobytes(), packed.tobytes()):
            if data.count(form) == 1:
                return form
    raise ValueError(f"{bundle.model.name} does not hold a matrix of {array.shape} in a form that is known here")


def _onnx(bundle: Bundle):
    from afq_export.lower.onnx.readback import read_onnx

    return read_onnx(bundle.model).linears


if __name__ == "__main__":
    quieten()
    sys.exit(main(sys.argv[1:]))
