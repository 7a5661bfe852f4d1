"""What `device list`, `device check` and `device bench` say: with `--json` a stable interface, as report.json is."""

from __future__ import annotations

from typing import Literal

from afq_export.spec.report import Check, DeviceReport, Protocol
from afq_export.spec.strict import Data

SCHEMA_VERSION = 1
PROMPT, ANSWER, REPETITIONS = 64, 32, 5
"""Tokens of a prompt and after it, and processes, that `bench` takes when nothing is said."""


class Kind(Data, kw_only=True):
    """One way to reach devices: how one is named, what is there for it, what is missing, and what to do about it."""

    kind: Literal["host", "arm64", "ssh", "adb"]
    form: str
    found: str
    missing: tuple[str, ...] = ()
    do: str = ""


class Attached(Data):
    """A device that can be named now: `state` is `ready`, or why it cannot be used."""

    name: str
    state: str
    what: str


class Listing(Data, kw_only=True):
    """`device list --json`."""

    schema_version: int = SCHEMA_VERSION
    kinds: tuple[Kind, ...]
    attached: tuple[Attached, ...]


class DeviceCheck(Data, kw_only=True):
    """`device check --json`: the same file on devices and on this machine. `linears`: whether they were run alone, too,
    which takes the run folder around the bundle.
    """

    schema_version: int = SCHEMA_VERSION
    verdict: Literal["pass", "fail"]
    bundle: str
    linears: bool
    protocol: Protocol
    checks: tuple[Check, ...]
    devices: tuple[DeviceReport, ...]


class Spread(Data):
    """Of several repetitions."""

    median: float
    low: float
    high: float


class Bench(Data, kw_only=True):
    """`device bench --json`: `load` in seconds, `prefill` and `decode` in tokens per second, `memory` in MiB: the peak
    of the runner with all its libraries. `claim` is empty where the figures say something of the device's speed.
    """

    schema_version: int = SCHEMA_VERSION
    bundle: str
    device: str
    processor: str
    runtime: str
    emulated: bool
    claim: str
    model_bytes: int
    threads: int
    prompt_tokens: int
    tokens: int
    repetitions: int
    load: Spread
    prefill: Spread
    decode: Spread
    memory: Spread
    folder: str = ""
    """What was left there on request."""
