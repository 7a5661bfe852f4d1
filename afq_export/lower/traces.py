"""torch's memory of traced programs, emptied after every one: it would keep the program for good."""

from __future__ import annotations

import linecache

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import graph_module
from torch.fx.experimental import symbolic_shapes


def forget_traces(module: torch.fx.GraphModule) -> None:
    """Empties what torch remembers of `module` when nobody holds it any more.

    Results of traced calls hold the delegates and with them all weights: those of fixed shapes in the class of all fake
    tensors, those of symbolic ones with the shapes, in a circle through C++ that no garbage collector sees. The shapes
    are the keys of caches, and the source of every forward function that was generated is kept for tracebacks.
    """
    FakeTensorMode.cache_clear()
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor) and value.fake_mode.shape_env is not None:
            value.fake_mode.shape_env.fake_tensor_cache.clear()
            (value.fake_mode.shape_env.tracked_fakes or []).clear()
            break
    for cached in (*vars(symbolic_shapes.ShapeEnv).values(), symbolic_shapes._maybe_evaluate_static_worker):
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()
    graph_module._loader.eval_cache.clear()
    linecache.clearcache()
