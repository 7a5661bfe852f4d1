"""Standard output is for results: what libraries print there by themselves is kept off it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def standard_output_closed() -> Iterator[None]:
    """Nothing reaches standard output while the body runs, not even what C++ or Rust writes. Exceptions pass."""
    try:
        kept = os.dup(1)
    except OSError:  # the caller has closed it
        yield
        return
    libc, nowhere = ctypes.CDLL(None), os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    libc.fflush(None)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
