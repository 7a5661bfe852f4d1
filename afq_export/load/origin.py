"""Where a model comes from and under which licence, as far as it says itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from afq_export.errors import InputError
from afq_export.spec.report import Origin

CARD = "README.md"
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
"""Files that licences ask to be handed on with the weights."""
MAX_BYTES = 1 << 20
MAX_TEXT = 200
"""Characters of a name; a card is somebody else's text."""


def folder_origin(folder: Path) -> Origin:
    """Licence and base model of a Hugging Face folder, from its card's front matter. Raises InputError."""
    path = folder / CARD
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        return Origin()
    from huggingface_hub import metadata_load

    try:
        card = metadata_load(path) or {}
    except Exception as error:  # yaml has errors of its own, and the hub client a ValueError
        why = str(error).split("\n")[0] or type(error).__name__
        raise InputError("cannot read the model card", where=str(path), why=why, do="repair or remove it") from error
    licence, named = _text(card.get("license")), _text(card.get("license_name"))
    return Origin(licence=named if licence == "other" and named else licence, base_model=_text(card.get("base_model")))


def licence_files(folder: Path) -> list[Path]:
    """The texts that go with the weights, by name; links and large files are left out."""
    found = {path for pattern in LICENCE_FILES for path in folder.glob(pattern)}
    return sorted(p for p in found if p.is_file() and not p.is_symlink() and p.stat().st_size <= MAX_BYTES)


def gguf_origin(path: Path) -> Origin:
    """The same of a GGUF file that was seen to open, from its metadata."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    keys = {"licence": "general.license", "base_model": "general.base_model.0.repo_url"}
    return Origin(**{name: _text(fields[key].contents()) for name, key in keys.items() if key in fields})


def _text(value: Any) -> str:
    """One short line; of a list its first entry."""
    if isinstance(value, list):
        value = value[0] if value else ""
    return " ".join(value.split())[:MAX_TEXT] if isinstance(value, str) else ""
