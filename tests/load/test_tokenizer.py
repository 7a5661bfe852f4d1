"""The tokenizer leaves nothing behind."""

from __future__ import annotations

import ctypes
import gc
import random
import sys

import pytest

from afq_export.load.model import open_model
from afq_export.load.tokenizer import open_tokenizer

ALLOWED = 100_000
"""Bytes that an opened tokenizer and a tokenized text may leave; 8 kB were seen, 4.8 MB with the cache."""


class _Heap(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "used", "free", "keepcost")
    ]


def used() -> int:
    """Bytes of the C heap that are in use."""
    gc.collect()
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = _Heap
    return library.mallinfo2().used


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc counts its heap"
)
def test_a_text_is_forgotten_with_its_tokenizer() -> None:
    model, letters = open_model("demo-llama"), random.Random(0)
    words = ["".join(letters.choices("abcdefghijklmnop", k=9)) for _ in range(20_000)]

    def tokenize() -> None:
        assert open_tokenizer(model)(" ".join(words))["input_ids"]

    tokenize()
    before, rounds = used(), 3
    for _ in range(rounds):
        tokenize()
    assert used() - before < rounds * ALLOWED
