"""Files from strangers: whatever is done to them, a reader gives what it promises or refuses in one line.

A few hundred cases by reader run in the suite; `AFQ_FUZZ=100000 pytest tests/fuzz -m 'slow or not slow'` runs more.
"""

from __future__ import annotations

import dataclasses
import os
import random
import resource
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from afq_export.errors import AfqError
from afq_export.guard.file import MAGIC, read_baseline, write_baseline
from afq_export.load.model import open_model
from afq_export.lower.bundle import open_bundle, seal
from afq_export.quantize.checkpoint import open_checkpoint
from afq_export.report.compare import open_subject
from afq_export.runfolder import RunFolder, prepare
from afq_export.runtime.onnxruntime import RunOptions, read_options, write_options
from afq_export.spec import report as spec
from afq_export.spec.catalog import load_corpus, load_recipe, load_target
from afq_export.spec.request import Request, recorded_request
from afq_export.spec.strict import to_toml
from tests.checkpoints import random_checkpoint, small_config
from tests.fuzz import mutate
from tests.guard import sample as guard_sample
from tests.load.test_model import _gguf, write_model
from tests.report.sample import sample

CASES = int(os.environ.get("AFQ_FUZZ", "150"))
LONGEST = 5.0
"""Seconds that no case may take, on a busy machine."""
MEMORY_MB = 1500
"""Growth of the process' memory that all cases together may cause."""


def bundle(folder: Path) -> Path:
    """The smallest folder that opens as a bundle, with a report."""
    folder.mkdir()
    (folder / "model.pte").write_bytes(b"program")
    (folder / "report.json").write_text(spec.to_json(sample()))
    (folder / "recipe.toml").write_text(to_toml(load_recipe("w4a8-g32", ())))
    (folder / "target.toml").write_text(to_toml(load_target("android-xnnpack")))
    empty = spec.Manifest(
        files={},
        model=spec.ManifestModel("m", "a" * 64),
        recipe="w4a8-g32",
        target="android-xnnpack",
        runtime="executorch",
        backend="xnnpack",
        program="model.pte",
        versions={"torch": "2.13"},
        seed=0,
        command=("afq-export", "run"),
    )
    seal(folder, empty)
    return folder


def toml_of(data: bytes, chosen: random.Random) -> bytes:
    """Damage of a TOML document."""
    import tomllib

    if chosen.random() < 0.3:
        return mutate.bytes_of(data, chosen)
    try:
        return tomli_w.dumps(mutate.document(tomllib.loads(data.decode()), chosen)).encode()
    except (TypeError, ValueError, AttributeError):  # null and the like do not exist in TOML
        return mutate.bytes_of(data, chosen)


def unpacked_baseline(data: bytes, chosen: random.Random) -> bytes:
    """Damage of the packed bytes, or of what is in them under a right checksum."""
    import lzma

    import msgspec

    if chosen.random() < 0.4:
        return mutate.bytes_of(data, chosen)
    content = lzma.decompress(data[len(MAGIC) + 8 :])
    if chosen.random() < 0.5:
        changed = mutate.bytes_of(content, chosen)
    else:
        try:
            changed = msgspec.msgpack.encode(mutate.document(msgspec.msgpack.decode(content), chosen))
        except (UnicodeEncodeError, OverflowError):
            changed = mutate.bytes_of(content, chosen)
    return MAGIC + len(changed).to_bytes(8, "little") + lzma.compress(changed)


def read_all(folder: Path) -> None:
    """Everything that a quantized checkpoint holds."""
    checkpoint = open_checkpoint(folder)
    for index in range(checkpoint.config.layers):
        checkpoint.block(index)
        checkpoint.block_floats(index)
    checkpoint.embedding()
    checkpoint.embedding_floats()
    checkpoint.linear("lm_head")


def read_tensors(name: str) -> None:
    """Every tensor of a model."""
    model = open_model(name)
    for key in model.source.shapes():
        model.source.read(key)


def a_manifest(folder: Path) -> Any:
    path = bundle(folder / "b") / "manifest.json"
    return path, mutate.json_of, lambda: open_bundle(path.parent)


def a_report(folder: Path) -> Any:
    path = bundle(folder / "b") / "report.json"

    def read() -> None:
        manifest = open_bundle(path.parent, reports=False).manifest
        seal(path.parent, manifest)  # a stranger's digest is right
        open_subject(path.parent)

    return path, mutate.json_of, read


def a_recipe(folder: Path) -> Any:
    path = folder / "recipe.toml"
    path.write_text(to_toml(load_recipe("w4a8-g32+affinequant", ())))
    return path, toml_of, lambda: load_recipe(str(path), ())


def a_target(folder: Path) -> Any:
    path = folder / "target.toml"
    path.write_text(to_toml(load_target("linux-x64-ort")))
    return path, toml_of, lambda: load_target(str(path))


def a_corpus(folder: Path) -> Any:
    path = folder / "corpus.toml"
    (folder / "text.txt").write_text("once upon a time\n")
    path.write_text('name = "c"\nlicence = "CC0-1.0"\nfile = "text.txt"\n')
    return path, toml_of, lambda: load_corpus(str(path))


def a_baseline(folder: Path) -> Any:
    path = folder / "x.afqb"
    write_baseline(path, guard_sample.baseline())
    return path, unpacked_baseline, lambda: read_baseline(path)


def a_checkpoint(folder: Path) -> Any:
    path = random_checkpoint(folder / "q", small_config()).folder / "quant.json"
    return path, mutate.json_of, lambda: read_all(path.parent)


def a_run(folder: Path) -> Any:
    prepare(folder, {"weights": "a"}, dataclasses.asdict(Request()), fresh=False)
    path = folder / "run.json"

    def read() -> None:
        recorded_request(RunFolder(folder).read()["request"])
        RunFolder(folder).cost("calibrate", "seconds")

    return path, mutate.json_of, read


def session_options(folder: Path) -> Any:
    path = folder / "session_options.json"
    write_options(path, RunOptions({"graph_optimization_level": "all"}, ("CPUExecutionProvider",), 64, 8))
    return path, mutate.json_of, lambda: read_options(path)


def a_safetensors_file(folder: Path) -> Any:
    path = write_model(folder / "m") / "model.safetensors"
    return path, mutate.safetensors_of, lambda: read_tensors(str(path.parent))


def a_configuration(folder: Path) -> Any:
    path = write_model(folder / "m") / "config.json"
    return path, mutate.json_of, lambda: open_model(str(path.parent))


def a_shard_index(folder: Path) -> Any:
    import json

    path = write_model(folder / "m") / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "model.safetensors"}}))
    return path, mutate.json_of, lambda: open_model(str(path.parent))


def a_gguf_file(folder: Path) -> Any:
    path = folder / "m.gguf"
    _gguf(write_model(folder / "m"), path)
    head = 4096  # names, types, counts and offsets; what follows is numbers

    def damage(data: bytes, chosen: random.Random) -> bytes:
        return (
            mutate.bytes_of(data[:head], chosen) + data[head:]
            if chosen.random() < 0.9
            else mutate.bytes_of(data, chosen)
        )

    return path, damage, lambda: read_tensors(str(path))


FAST = (a_manifest, a_report, a_recipe, a_target, a_corpus, a_baseline, a_run, session_options, a_shard_index)
SLOW = (a_checkpoint, a_safetensors_file, a_configuration, a_gguf_file)
"""Readers that take some ten milliseconds a case: fewer cases in the suite."""


@pytest.mark.parametrize("reader", [*FAST, *SLOW], ids=lambda reader: reader.__name__)
@pytest.mark.timeout(0)
def test_whatever_the_file_says(reader: Callable[[Path], Any], tmp_path: Path) -> None:
    path, damage, read = reader(tmp_path)
    read()  # as it is, it is fine
    whole, accepted = path.read_bytes(), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in range(CASES if reader in FAST or CASES > 1000 else CASES // 5):
        data = damage(whole, random.Random(zlib.crc32(f"{reader.__name__} {case}".encode())))
        path.write_bytes(data)
        start = time.monotonic()
        try:
            read()
            accepted += 1
        except AfqError as error:
            assert "\n" not in str(error), f"case {case}: more than one line: {error}"
            assert error.exit_code == 2, f"case {case}: {error}"
        except BaseException as error:
            (tmp_path / "case").write_bytes(data)
            raise AssertionError(f"case {case} ({tmp_path / 'case'}): {type(error).__name__}: {error}") from error
        assert time.monotonic() - start < LONGEST, f"case {case} took too long"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6
    assert grown < MEMORY_MB, f"{grown:.0f} MB more"
    assert accepted < CASES  # damage does something
