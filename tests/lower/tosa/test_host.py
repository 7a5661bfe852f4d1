"""The host's part of a .pte in ExecuTorch's own runtime: the same inputs of the graph as numpy makes."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch

from afq_export.lower.tosa.decoder import Shape
from afq_export.lower.tosa.host import call_inputs, host_tables
from afq_export.runtime.library import load_runtime
from tests.checkpoints import small_config
from tests.lower.tosa.decoders import static_decoder


def test_the_runtime_makes_the_inputs_that_numpy_makes(tmp_path: Path) -> None:
    from executorch.exir import EdgeCompileConfig, to_edge

    from afq_export.lower.tosa.program import HOST_INPUTS, HostPart

    checkpoint = static_decoder(tmp_path, small_config())
    tables = host_tables(checkpoint, Shape(4, 12))
    host = HostPart(tables, 4).eval()
    example = (torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
        program = to_edge(torch.export.export(host, example), compile_config=config).to_executorch()
    module = load_runtime()._load_for_executorch_from_buffer(program.buffer)
    for position in (0, 5, 11):
        ids = torch.randint(checkpoint.config.vocab, (4,), generator=torch.Generator().manual_seed(position))
        expected = call_inputs(tables, ids.numpy(), position, 4)
        found = module.forward([ids[None], torch.tensor([position])])
        for name, ours, theirs in zip(HOST_INPUTS, host(ids[None], torch.tensor([position])), found, strict=True):
            assert np.array_equal(theirs.numpy(), expected[name]) and theirs.numpy().dtype == expected[name].dtype
            assert np.array_equal(ours.numpy(), expected[name])
