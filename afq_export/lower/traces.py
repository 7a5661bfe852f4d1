"""torch's memory of traced calls, emptied after every program: it would keep the program for good."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


def forget_traces(module: torch.fx.GraphModule) -> None:
    """Empties the memory of all calls of fixed shapes, and of those with the symbolic shapes of `module`.

    Both hold the delegates and with them all weights. The second is in a circle with its shapes through C++, which no
    garbage collector sees.
    """
    FakeTensorMode.cache_clear()
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor) and value.fake_mode.shape_env is not None:
            value.fake_mode.shape_env.fake_tensor_cache.clear()
            return
