"""A corpus is one text file, or a part of it, read as one string."""

from __future__ import annotations

from afq_export.spec.strict import Data


class CorpusSpec(Data):
    """`file` is relative to the TOML file. `part` is the fraction of the text used, from and to (cut at a line end).

    `sha256` pins the whole file; empty: not pinned.
    """

    name: str
    file: str
    description: str = ""
    licence: str = ""
    sha256: str = ""
    part: tuple[float, float] = (0.0, 1.0)
