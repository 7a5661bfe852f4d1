"""The processor in the words of /proc/cpuinfo: its name, or those of its cores, and its features."""

from __future__ import annotations

from collections import Counter

CORES = {
    "0x41": {
        "0xd03": "cortex-a53",
        "0xd04": "cortex-a35",
        "0xd05": "cortex-a55",
        "0xd07": "cortex-a57",
        "0xd08": "cortex-a72",
        "0xd09": "cortex-a73",
        "0xd0a": "cortex-a75",
        "0xd0b": "cortex-a76",
        "0xd0c": "neoverse-n1",
        "0xd0d": "cortex-a77",
        "0xd40": "neoverse-v1",
        "0xd41": "cortex-a78",
        "0xd42": "cortex-a78ae",
        "0xd44": "cortex-x1",
        "0xd46": "cortex-a510",
        "0xd47": "cortex-a710",
        "0xd48": "cortex-x2",
        "0xd49": "neoverse-n2",
        "0xd4d": "cortex-a715",
        "0xd4e": "cortex-x3",
        "0xd4f": "neoverse-v2",
        "0xd80": "cortex-a520",
        "0xd81": "cortex-a720",
        "0xd82": "cortex-x4",
    },
    "0x4e": {"0x003": "nvidia-denver2", "0x004": "nvidia-carmel"},
    "0x51": {
        "0x802": "kryo-385-gold",
        "0x803": "kryo-385-silver",
        "0x804": "kryo-485-gold",
        "0x805": "kryo-485-silver",
    },
}
"""CPU implementer -> CPU part -> name, of the main identification registers (MIDR_EL1) that the makers publish."""


def read_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """(`4x cortex-a55 + 4x cortex-a76`, features that all cores have) of a /proc/cpuinfo; empty where it says nothing.

    On x86 the name is the model's own.
    """
    models: Counter[str] = Counter()
    features: list[list[str]] = []
    implementer = ""
    for line in text.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        match key:
            case "model name":
                models[value] += 1
            case "CPU implementer":
                implementer = value.lower()
            case "CPU part":
                part = value.lower()
                models[CORES.get(implementer, {}).get(part, f"part {implementer}/{part}")] += 1
            case "flags" | "Features":
                features.append(value.split())
    # 32-bit kernels give every ARM core a model name too: "ARMv7 Processor rev 4 (v7l)".
    named = {name: count for name, count in models.items() if not name.startswith(("ARMv", "AArch64"))} or models
    common = set(features[0]).intersection(*features) if features else set()
    processor = " + ".join(f"{count}x {name}" for name, count in named.items())
    return processor, tuple(name for name in (features[0] if features else []) if name in common)
