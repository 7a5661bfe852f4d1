"""lm-eval: found or named as missing, and silent."""

from __future__ import annotations

import importlib.util
import logging
from importlib.metadata import version

from afq_export.errors import MissingToolError

INSTALL = 'run `pip install "afq-export[eval]"` (it is "lm-eval[hf]>=0.4.13,<0.4.14")'
SERIES = "0.4.13"
"""The version whose definitions `sources` follows; lm-eval changes its tasks and interfaces in patch releases."""
PARTS = {"lm_eval": "lm-eval", "accelerate": "accelerate", "peft": "peft"}
"""Module -> package; lm-eval's Hugging Face model needs the last two."""


def require_lm_eval() -> None:
    """Raises MissingToolError when lm-eval, or what its Hugging Face model imports, is not there, or is of another
    version."""
    missing = [package for module, package in PARTS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingToolError(f"{', '.join(missing)} not installed", do=INSTALL)
    if version("lm_eval") != SERIES and not version("lm_eval").startswith(f"{SERIES}."):
        raise MissingToolError("this lm-eval is another version", why=f"{version('lm_eval')}, not {SERIES}", do=INSTALL)


def silence() -> None:
    """No messages of lm-eval's; what it takes for a warning is how we use it."""
    for name in ("lm_eval", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
