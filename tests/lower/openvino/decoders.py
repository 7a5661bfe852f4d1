"""Small random quantized decoders as OpenVINO programs: every scheme that the target takes, every family."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec

from afq_export.arch.config import DecoderConfig
from afq_export.backends.openvino import run_options
from afq_export.lower.openvino.program import MODEL, lower_openvino
from afq_export.lower.openvino.readback import OpenvinoContent
from afq_export.progress import silent
from afq_export.quantize.checkpoint import QuantizedCheckpoint
from afq_export.runtime.openvino import OpenvinoSession, RunOptions
from afq_export.spec.catalog import load_recipe, load_target
from afq_export.spec.target import Shapes, TargetProfile
from tests.lower.onnx.decoders import CONTEXT, PREFILL, PROVENANCE, decoder_checkpoint, decoder_config

CASES: dict[str, tuple[DecoderConfig, str, tuple[str, ...]]] = {
    "llama, grouped queries, tied": (decoder_config(kv_heads=1, tied=True), "w8a8-dynamic", ()),
    "llama, heads of 8, rows": (decoder_config(head_dim=8, kv_heads=4, layers=1), "w4a8", ()),
    "llama, weights only": (decoder_config(kv_heads=1, layers=1), "w4a16-g32", ()),
    "llama, 3 bits": (decoder_config(layers=1), "w3a16-g128", ()),
    "qwen2, groups": (decoder_config("qwen2"), "w4a8-g32", ()),
    "qwen3": (decoder_config("qwen3", layers=1), "w4a8-g32", ()),
    "mistral, all in 4 bits, tied": (decoder_config("mistral", tied=True), "w4a8-g32-all4", ()),
    "opt, tied": (decoder_config("opt", tied=True, layers=1), "w8a8-dynamic", ()),
    "opt, gelu, float rows": (decoder_config("opt", activation="gelu", layers=1), "w4a8", ("embedding.bits=32",)),
}
"""Name -> configuration, scheme and changes of the recipe."""


def small_target() -> TargetProfile:
    """The shipped target with a short context."""
    return msgspec.structs.replace(load_target("intel-openvino"), shapes=Shapes(context=CONTEXT, prefill=PREFILL))


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A decoder and its program."""

    checkpoint: QuantizedCheckpoint
    target: TargetProfile
    path: Path
    content: OpenvinoContent

    @property
    def options(self) -> RunOptions:
        """How the program is run."""
        return run_options(self.checkpoint, self.target)

    def session(self) -> OpenvinoSession:
        """The program as the package runs it."""
        return OpenvinoSession(self.path, self.options)


def lowered(folder: Path, case: str) -> Lowered:
    """A random decoder of CASES, lowered into `folder`."""
    config, scheme, changes = CASES[case]
    target = small_target()
    checkpoint = decoder_checkpoint(folder / "quantized", config, load_recipe(scheme, changes), target)
    content = lower_openvino(checkpoint, target, folder, PROVENANCE, silent)
    return Lowered(checkpoint, target, folder / MODEL, content)
