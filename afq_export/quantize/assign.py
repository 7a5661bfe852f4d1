"""Which grid and which kernel every linear gets: the recipe against the target, before any work."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

import msgspec

from afq_export.arch.config import DecoderConfig
from afq_export.arch.decoder import family
from afq_export.errors import InputError
from afq_export.quantize.checkpoint import LinearRecord
from afq_export.spec.online import NORM_MATRIX, Online
from afq_export.spec.quant import Granularity, LinearSpec, QuantSpec, linear_name
from afq_export.spec.recipe import Activations, Override, Recipe, Weights
from afq_export.spec.target import Kernel, No, TargetProfile, Yes

HEAD = "lm_head"


def assign(config: DecoderConfig, recipe: Recipe, target: TargetProfile) -> dict[str, LinearRecord]:
    """Every linear's grid and kernel, by name, in running order (lm_head last).

    A grid that the target has no kernel for is replaced as `recipe.fallback` says, with a note. lm_head takes dynamic
    activations whenever the blocks' are quantized (one static int8 grid for all logits would merge most of them), float
    ones where the target has no such kernel, and the blocks' for targets that run nothing but stored grids.
    Raises InputError when nothing fits, an override matches no linear, or the target has no token rows or no KV cache
    of the recipe's bits.
    """
    _check_overrides(config, recipe)
    _check_embedding(config, recipe, target)
    _check_cache(config, recipe, target)
    _check_online(recipe, target)
    records = {}
    for index in range(config.layers):
        for role, (outputs, inputs, bias) in family(config).linear_shapes(config).items():
            name = linear_name(index, role)
            records[name] = _fit(
                _spec(name, outputs, inputs, bias, recipe.weights, recipe.activations, recipe), recipe, target
            )
    dynamic = recipe.activations.mode != "none" and any(kernel.activation == "dynamic" for kernel in target.kernels)
    head = Activations("dynamic", 8) if dynamic else Activations("none")
    if target.static_graph:
        head = recipe.activations
    spec = _spec(HEAD, config.vocab, config.hidden, False, recipe.head, head, recipe)
    if spec.activation is not None and not spec.activation.dynamic and not target.static_graph:
        raise InputError(
            "no static lm_head",
            where=f"recipe {recipe.name}: an override makes {HEAD}'s activations static",
            why="ranges are observed in the blocks only",
            do=f"leave {HEAD} out of the pattern, e.g. blocks.*",
        )
    records[HEAD] = _fit(spec, recipe, target)
    session_options(records, target)
    return records


def session_options(records: Mapping[str, LinearRecord], target: TargetProfile) -> dict[str, str]:
    """The target's session options and those of the kernels in use. Raises InputError when two kernels disagree."""
    options = dict(target.session)
    asked: dict[str, Kernel] = {}
    for kernel in {record.kernel: target.kernel(record.kernel) for record in records.values()}.values():
        for key, value in kernel.session.items():
            if key in asked and options[key] != value:
                why = f"{key}: {asked[key].name} needs {options[key]}, {kernel.name} {value}; a session has one value"
                raise InputError("two kernels exclude each other", where=target.name, why=why)
            options[key], asked[key] = value, kernel
    return options


def _fit(spec: LinearSpec, recipe: Recipe, target: TargetProfile) -> LinearRecord:
    """The record of a linear: its own grid when the target runs it, else the first fallback that it runs."""
    first = target.supports(spec)
    if isinstance(first, Yes):
        return record_for(spec, first.kernel, "")
    for weight in _fallbacks(spec.weight, recipe):
        candidate = msgspec.structs.replace(spec, weight=weight)
        answer = target.supports(candidate)
        if isinstance(answer, Yes):
            return record_for(candidate, answer.kernel, f"{weight} instead of {spec.weight}: {first.reason}")
    do = f"take another recipe, e.g. {target.default_recipe}, or another fallback than {recipe.fallback!r}"
    if spec.bias and not any(kernel.takes_bias for kernel in target.kernels):
        do = "take a model whose linears have no bias, or another target"  # no recipe helps
    raise InputError(
        "no kernel",
        where=f"{target.name}: {spec.name}, weight {spec.weight}",
        why=first.reason if isinstance(first, No) else "",
        do=do,
    )


def record_for(spec: LinearSpec, kernel: Kernel, note: str = "") -> LinearRecord:
    """A linear's record: scales are rounded to what the kernel keeps and activations lie on its grid."""
    weight = msgspec.structs.replace(spec.weight, scale_type=kernel.scale_type)
    activation = spec.activation
    if activation is not None and activation.dynamic:
        grouped = kernel.activation_granularity is Granularity.PER_GROUP
        activation = msgspec.structs.replace(
            activation,
            granularity=kernel.activation_granularity,
            symmetric=kernel.activation_symmetric,
            group=(kernel.activation_group or weight.group) if grouped else 0,
        )
    chosen = msgspec.structs.replace(spec, weight=weight, activation=activation, output=kernel.output)
    return LinearRecord(chosen, kernel.name, note=note)


def _fallbacks(weight: QuantSpec, recipe: Recipe) -> list[QuantSpec]:
    if recipe.fallback == "refuse":
        return []
    coarser = [QuantSpec(weight.bits, g, weight.symmetric) for g in (Granularity.PER_CHANNEL, Granularity.PER_TENSOR)]
    return coarser + ([QuantSpec(8, Granularity.PER_CHANNEL)] if recipe.fallback == "int8" else [])


def _spec(
    name: str, outputs: int, inputs: int, bias: bool, weights: Weights, activations: Activations, recipe: Recipe
) -> LinearSpec:
    """What the recipe asks of a linear, its override included."""
    weight, override = _weight(weights), _override(recipe, name)
    if override is not None:
        weight = _overridden(weights, override)
        if override.activations is not None:
            activations = msgspec.structs.replace(activations, mode=override.activations)
    output = activations.output if activations.mode == "static" else "any"
    return LinearSpec(name, outputs, inputs, bias, weight, _activation(activations), output)


def _override(recipe: Recipe, name: str) -> Override | None:
    """The last override whose pattern matches: later ones are the more special ones."""
    return next((o for o in reversed(recipe.override) if fnmatch.fnmatchcase(name, o.pattern)), None)


def _overridden(weights: Weights, override: Override) -> QuantSpec:
    bits = weights.bits if override.bits is None else override.bits
    group = weights.group if override.group is None else override.group
    return _weight(Weights(bits, group, weights.symmetric))


def _weight(weights: Weights) -> QuantSpec:
    granularity = Granularity.PER_GROUP if weights.group else Granularity.PER_CHANNEL
    return QuantSpec(weights.bits, granularity, weights.symmetric, weights.group)


def _activation(activations: Activations) -> QuantSpec | None:
    if activations.mode == "none":
        return None
    dynamic = activations.mode == "dynamic"
    granularity = Granularity.PER_TOKEN if dynamic else Granularity.PER_TENSOR
    return QuantSpec(activations.bits, granularity, symmetric=False, dynamic=dynamic)


def _check_overrides(config: DecoderConfig, recipe: Recipe) -> None:
    roles = family(config).linear_shapes(config)
    names = [linear_name(i, role) for i in range(config.layers) for role in roles] + [HEAD]
    for override in recipe.override:
        if not fnmatch.filter(names, override.pattern):
            raise InputError(
                "an override matches no layer",
                where=f"recipe {recipe.name}: override.pattern = {override.pattern!r}",
                do=f"names are {names[0]} ... {names[-2]}, {HEAD}",
            )


def _check_embedding(config: DecoderConfig, recipe: Recipe, target: TargetProfile) -> None:
    embedding = recipe.embedding
    if embedding.bits not in target.embedding_bits:
        raise InputError(
            "no kernel for the embedding",
            where=f"recipe {recipe.name} on {target.name}: embedding.bits = {embedding.bits}",
            do=f"take one of {', '.join(map(str, target.embedding_bits))}",
        )
    if embedding.group and config.hidden % embedding.group:
        raise InputError(
            "embedding groups do not fit",
            where=f"recipe {recipe.name}: embedding.group = {embedding.group}",
            why=f"the hidden size {config.hidden} is not a multiple of it",
        )
    in_a_byte = max(1, 8 // embedding.bits)
    if config.hidden % in_a_byte:
        why = f"hidden size {config.hidden} is no multiple of the {in_a_byte} codes in a byte"
        raise InputError(f"no {embedding.bits}-bit embedding", where=recipe.name, why=why)


def _check_online(recipe: Recipe, target: TargetProfile) -> None:
    """Raises InputError for an online operation that the target's programs do not have, or that nothing learns."""
    for name in recipe.transforms.online:
        where = f"recipe {recipe.name} on {target.name}: transforms.online = {name!r}"
        if name not in target.online:
            raise InputError(
                "no such operation",
                where=where,
                why=f"only float programs of {_ONLINE_IN[name]} multiply by a matrix between two linears",
                do="leave it out: everything else folds and costs nothing at run time",
            )
        if name == NORM_MATRIX and not recipe.learning.epochs:
            why = "learning.epochs = 0: its matrices would be diagonals, which fold"
            raise InputError("nothing to multiply by", where=where, why=why, do="set learning.epochs, or leave it out")


_ONLINE_IN: dict[Online, str] = {"down_hadamard": "ONNX Runtime and XNNPACK", "norm_matrix": "ONNX Runtime"}


def _check_cache(config: DecoderConfig, recipe: Recipe, target: TargetProfile) -> None:
    cache, where = recipe.kv_cache, f"recipe {recipe.name} on {target.name}: kv_cache"
    if cache.bits not in target.kv_cache_bits:
        raise InputError(
            "no such KV cache",
            where=f"{where}.bits = {cache.bits}",
            why="its programs keep keys and values on calibrated grids already"
            if target.static_graph
            else "nothing in its runtime is known to hold codes and to read them back",
            do=f"take one of {', '.join(map(str, target.kv_cache_bits))}, 32 being the program's own numbers",
        )
    if not cache.quantized:
        return
    if cache.group and config.head_dim % cache.group:
        why = f"the head's {config.head_dim} numbers are not a multiple of it"
        raise InputError("cache groups do not fit", where=f"{where}.group = {cache.group}", why=why)
    if cache.bits == 4 and config.head_dim % 2:
        raise InputError("no 4-bit cache", where=where, why=f"heads have {config.head_dim} numbers, two make a byte")
