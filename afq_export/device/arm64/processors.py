"""The processors that `--on arm64:` takes."""

from __future__ import annotations

from afq_export.errors import InputError

PROCESSORS = {
    "cortex-a35": "Armv8.0",
    "cortex-a53": "Armv8.0, Raspberry Pi 3",
    "cortex-a55": "Armv8.2 with dot product, little core of phones",
    "cortex-a57": "Armv8.0",
    "cortex-a72": "Armv8.0, Raspberry Pi 4",
    "cortex-a76": "Armv8.2 with dot product, Raspberry Pi 5",
    "cortex-a710": "Armv9.0 with dot product, int8 matrices and SVE2, phones from 2022",
    "neoverse-n1": "Armv8.2 with dot product, servers",
    "neoverse-n2": "Armv9.0 with int8 matrices and SVE2, servers",
    "neoverse-v1": "Armv8.4 with int8 matrices and SVE, servers",
}
"""As qemu 10 names them, and what they are."""

REFUSED = {
    "max": "it has SME, whose kernels quantize dynamic activations otherwise, and no phone is like it",
}
"""Names that qemu knows and a verdict must not rest on."""


def refuse_unknown(name: str) -> None:
    """Raises InputError unless `name` is one of PROCESSORS."""
    if name in REFUSED:
        raise InputError("no processor to judge on", where=f"arm64:{name}", why=REFUSED[name], do=_known())
    if name not in PROCESSORS:
        raise InputError("unknown processor", where=f"arm64:{name}", do=_known())


def _known() -> str:
    return f"known: {', '.join(PROCESSORS)}"
