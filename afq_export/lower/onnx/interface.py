"""Inputs and outputs of the exported decoder, as optimum names and shapes them, and dummy inputs from its generators.

input_ids        int64   [batch, sequence]
attention_mask   int64   [batch, total]                      total = past + sequence; 0 leaves a token out
position_ids     int64   [batch, sequence]                   with rotary positions only
past_key_values.<i>.key, .value  float32 [batch, K, past, d]
logits           float32 [batch, sequence, V]
present.<i>.key, .value          float32 [batch, K, total, d]

A quantized cache is uint8 [batch, K, past or total, R] instead: rows of bytes (cache.py).
"""

from __future__ import annotations

import numpy as np
import torch

from afq_export.arch.config import DecoderConfig
from afq_export.quantize.cache import quantize_cache, row_size
from afq_export.runtime.library import quiet
from afq_export.spec.recipe import FLOAT_CACHE, KvCache

with quiet():
    from optimum.exporters.base import ExporterConfig
    from optimum.utils.input_generators import DummyTextInputGenerator, MistralDummyPastKeyValuesGenerator
    from optimum.utils.normalized_config import NormalizedTextConfigWithGQA
    from transformers import PretrainedConfig

Axes = dict[str, dict[int, str]]


class DecoderExporterConfig(ExporterConfig):
    """optimum's description of a decoder with an explicit KV cache; `of` makes it from our own configuration."""

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfigWithGQA
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyTextInputGenerator, MistralDummyPastKeyValuesGenerator)

    @classmethod
    def of(cls, config: DecoderConfig) -> DecoderExporterConfig:
        """The description of `config`."""
        made = cls(described(config), task="text-generation")
        made.layers, made.rotary = config.layers, config.rope is not None
        return made

    @classmethod
    def normalized(cls, described: PretrainedConfig) -> NormalizedTextConfigWithGQA:
        """The view of a configuration that optimum's generators read."""
        return cls.NORMALIZED_CONFIG_CLASS(described)

    @property
    def inputs(self) -> Axes:
        """Names, in order, and their dynamic axes."""
        ids = {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "total"}}
        positions = {"position_ids": {0: "batch", 1: "sequence"}} if self.rotary else {}
        return ids | positions | self._cache("past_key_values", "past")

    @property
    def outputs(self) -> Axes:
        """Names, in order, and their dynamic axes."""
        return {"logits": {0: "batch", 1: "sequence"}} | self._cache("present", "total")

    def _cache(self, name: str, length: str) -> Axes:
        layers = range(self.layers)
        return {f"{name}.{i}.{kind}": {0: "batch", 2: length} for i in layers for kind in ("key", "value")}


def described(config: DecoderConfig) -> PretrainedConfig:
    """Sizes of `config` under the names that optimum normalises."""
    return PretrainedConfig(
        vocab_size=config.vocab,
        hidden_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
    )


def shapes(config: DecoderConfig, kv_cache: KvCache = FLOAT_CACHE) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """Shape of every input and of every output, dynamic sizes by name."""
    exporter = DecoderExporterConfig.of(config)
    sizes = {"input_ids": 2, "attention_mask": 2, "position_ids": 2, "logits": (0, 0, config.vocab)}
    cache = (0, config.kv_heads, 0, row_size(kv_cache, config.head_dim))

    def shape(name: str, axes: dict[int, str]) -> tuple:
        known = sizes.get(name, cache)
        fixed = (0,) * known if isinstance(known, int) else known
        return tuple(axes.get(axis, size) for axis, size in enumerate(fixed))

    inputs, outputs = exporter.inputs, exporter.outputs
    return {n: shape(n, a) for n, a in inputs.items()}, {n: shape(n, a) for n, a in outputs.items()}


def dummy_inputs(
    config: DecoderConfig, batch: int, sequence: int, past: int, kv_cache: KvCache = FLOAT_CACHE
) -> dict[str, np.ndarray]:
    """Inputs of these sizes from optimum's generators: random ids, random keys and values, nothing masked."""
    normalized, task = DecoderExporterConfig.normalized(described(config)), "text-generation"
    text = DummyTextInputGenerator(task, normalized, batch_size=batch, sequence_length=sequence)
    cache = MistralDummyPastKeyValuesGenerator(task, normalized, batch_size=batch, sequence_length=past)
    found = {"input_ids": text.generate("input_ids", framework="np", int_dtype="int64")}
    found["attention_mask"] = np.ones((batch, past + sequence), np.int64)
    if config.rope is not None:
        found["position_ids"] = np.broadcast_to(np.arange(past, past + sequence), (batch, sequence)).copy()
    for index, layer in enumerate(cache.generate("past_key_values", framework="np", float_dtype="fp32")):
        for kind, array in zip(("key", "value"), layer, strict=True):
            rows = np.asarray(array, np.float32)
            if kv_cache.quantized:
                rows = quantize_cache(torch.from_numpy(rows), kv_cache).packed(kv_cache.bits).numpy()
            found[f"past_key_values.{index}.{kind}"] = rows
    return found
