"""The program as files: an .mlpackage, and the same package inside the delegate of an ExecuTorch program.

Core ML's own writer gives its parts random names and the day's date; here both follow from the content, so that the
same checkpoint gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
from coremltools.proto import Model_pb2

from afq_export.runtime.library import quiet

with quiet():
    from executorch.backends.apple.coreml import executorchcoreml

MODEL = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS = Path("Data/com.apple.CoreML/weights/weight.bin")
MODULE, PACKAGE_IN_DELEGATE = "lowered_module", "model.mlpackage"
_DATE = "com.github.apple.coremltools.conversion_date"
_AUTHOR = "com.apple.CoreML"


@dataclasses.dataclass(frozen=True)
class Interface:
    """Names of a function's inputs and outputs, in the order in which the delegate is called."""

    inputs: tuple[str, ...] = ("tokens", "input_pos")
    outputs: tuple[str, ...] = ("logits",)


def write_package(program: Any, tokens: ct.RangeDim, opset: ct.target, facts: Mapping[str, str], package: Path) -> None:
    """Serializes a program to the folder `package`; `facts` are its metadata."""
    inputs = [
        ct.TensorType(name="tokens", shape=(1, tokens), dtype=np.int32),
        ct.TensorType(name="input_pos", shape=(1,), dtype=np.int32),
    ]
    with quiet(), tempfile.TemporaryDirectory() as scratch:
        model = ct.convert(
            program,
            source="milinternal",
            convert_to="mlprogram",
            inputs=inputs,
            minimum_deployment_target=opset,
            compute_precision=ct.precision.FLOAT32,  # types are written out: nothing is to be cast
            skip_model_load=True,
        )
        del model.user_defined_metadata[_DATE]
        for name, value in facts.items():
            model.user_defined_metadata[f"afq_export.{name}"] = value
        made = Path(scratch) / "made.mlpackage"
        model.save(str(made))
        shutil.copytree(made / "Data", package / "Data")
    content = Model_pb2.Model.FromString((package / MODEL).read_bytes())
    (package / MODEL).write_bytes(content.SerializeToString(deterministic=True))
    (package / "Manifest.json").write_text(_manifest(package), encoding="utf-8")


def delegate_bytes(package: Path, interface: Interface = Interface()) -> bytes:
    """What ExecuTorch's Core ML delegate keeps of a package: the folder and the names of its inputs and outputs."""
    metadata = {
        "inputNames": interface.inputs,
        "outputNames": interface.outputs,
        "identifier": f"executorch_{_identity(package, 'delegate')}",
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / MODULE
        shutil.copytree(package, folder / PACKAGE_IN_DELEGATE)
        (folder / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
        return executorchcoreml.flatten_directory_contents(str(folder.resolve()))


def unpack_delegate(data: bytes, folder: Path) -> Path:
    """Inverse of `delegate_bytes`: the package, below `folder`. Raises ValueError for other bytes."""
    if not executorchcoreml.unflatten_directory_contents(data, str(folder.resolve())):
        raise ValueError("the delegate's bytes hold no folder")
    return folder / MODULE / PACKAGE_IN_DELEGATE


def _manifest(package: Path) -> str:
    """Manifest.json: which part is the model, which its weights."""
    parts = {
        _identity(package, "model"): ("model.mlmodel", "CoreML Model Specification", _AUTHOR),
        _identity(package, "weights"): ("weights", "CoreML Model Weights", _AUTHOR),
    }
    entries = {
        identity: {"author": author, "description": description, "name": name, "path": f"{author}/{name}"}
        for identity, (name, description, author) in parts.items()
    }
    root = next(iter(parts))
    content = {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": root}
    return json.dumps(content, indent=4) + "\n"


def _identity(package: Path, part: str) -> str:
    digest = hashlib.sha256()
    for path in (package / MODEL, package / WEIGHTS):
        digest.update(path.read_bytes())
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{digest.hexdigest()} {part}")).upper()
