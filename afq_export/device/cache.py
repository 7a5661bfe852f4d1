"""Where environments that a device needs are kept: outside of the system, and of any run folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$AFQ_CACHE, else afq-export in $XDG_CACHE_HOME, else in ~/.cache."""
    own, shared = os.environ.get("AFQ_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser().resolve()
    return (Path(shared) if shared else Path.home() / ".cache").expanduser().resolve() / "afq-export"
