"""What is asked of a device through its POSIX shell, and what the answers mean. Nothing here talks to a device.

The commands are those that a Linux board, busybox and Android's toybox all have.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

from afq_export.device.cores import read_cpuinfo
from afq_export.device.transport import DeviceFacts, Finished

FOLDER = re.compile(r"/(?:[^/]+/)*afq-[0-9a-f]{16}")
"""A scratch folder of ours: nothing else is ever removed."""

STDERR_BYTES = 60_000
"""Of standard error are kept: Android's shell hands it to printf, and an argument may have 128 KiB."""

NOEXEC = 77
"""Exit code for a file system that runs no programs, as /tmp is on careful machines."""

_ABIS = {"arm64": "aarch64", "arm64-v8a": "aarch64", "amd64": "x86_64", "armeabi-v7a": "armv7l", "x86": "i686"}
_NARROW = {"aarch64": "armv7l", "x86_64": "i686"}
"""What a 64-bit kernel runs when its programs are 32-bit ones, as on the 32-bit Raspberry Pi OS."""

_FACTS = """
say() { printf '%s=%s\\n' "$1" "$2"; }
property() { getprop "$1" 2>/dev/null; }
say machine "$(uname -m)"
say system "$(uname -s)"
say bits "$(getconf LONG_BIT 2>/dev/null)"
say android "$(property ro.build.version.release)"
say abi "$(property ro.product.cpu.abi)"
say phone "$(property ro.product.manufacturer) $(property ro.product.model)"
say emulated "$(property ro.boot.qemu)$(property ro.kernel.qemu)"
say board "$(cat /proc/device-tree/model 2>/dev/null)"
say memory "$(sed -n 's/^MemTotal: *//p' /proc/meminfo 2>/dev/null)"
say disk "$(df -Pk . | tail -n 1)"
python=$(command -v PYTHON 2>/dev/null)
say python "$python"
[ -n "$python" ] && say onnxruntime "$("$python" -c \
'import importlib.metadata as m; print(m.version("onnxruntime"))' </dev/null 2>/dev/null)"
printf '\\n'
cat /proc/cpuinfo 2>/dev/null
exit 0
"""


def wrapped(script: str, mark: str) -> str:
    """`script`, whose standard error (the end of it) and exit code follow its standard output.

    `mark` is a text that no output has. It comes first, and last; when it does not, the connection broke. It makes no
    difference whether the connection carries exit codes and two streams, which adb's does only on newer devices. What
    the shell itself remarks on the end of a program (`Segmentation fault`) is dropped.
    """
    return (
        f"LC_ALL=C; export LC_ALL; ulimit -c 0 2>/dev/null; exec 3>&1 2>/dev/null; printf '%s\\n' {mark}\n"
        f"said=$( {{ ( exec 2>&1 1>&3 3>&-; {script}\n); printf '\\n%d %s' $? {mark}; }} | tail -c {STDERR_BYTES} )\n"
        f"printf '\\n%s\\n%s' {mark} \"$said\""
    )


def unwrapped(stdout: bytes, mark: str) -> tuple[bytes, Finished | None]:
    """What came before, which a shell's start-up files wrote, and what `wrapped` made of a script's end.

    None when it did not come to one.
    """
    sign = mark.encode()
    before, _, rest = stdout.partition(sign + b"\n")
    found = re.fullmatch(rb"(.*)\n%s\n(.*)\n(\d+) %s" % (sign, sign), rest, re.DOTALL)
    if not found:
        return before, None
    code = int(found[3])
    ended_by = code - 128 if 128 < code <= 192 else None
    return before, Finished(code, found[1], found[2].decode(errors="replace"), ended_by)


def in_base(bases: Sequence[str], action: str) -> str:
    """Does `action` in the first of `bases` (shell words, as `"$TMPDIR"`) where it can be done."""
    return (
        f"for base in {' '.join(bases)}; do\n"
        f'if [ -n "$base" ] && cd "$base" 2>/dev/null && [ -w . ]; then {action}\nfi\ndone\n'
        'echo "no folder to write in" >&2; exit 1'
    )


def make_folder(bases: Sequence[str], name: str) -> str:
    """Makes the folder `name`, which only its owner enters, and says its path without links."""
    return in_base(bases, f"mkdir -m 700 {name} && printf '%s/%s' \"$(pwd -P)\" {name} && exit 0")


def stop_all(folder: str) -> str:
    """Kills what runs in `folder`: a program outlives the connection that started it."""
    inside = shlex.quote(folder)
    return (
        "ls -ld /proc/[0-9]*/cwd 2>/dev/null | while read -r line; do\n"
        f'case $line in *" -> "{inside}|*" -> "{inside}/*)\n'
        "number=${line#*/proc/}; kill -9 ${number%%/*} 2>/dev/null;;\nesac\ndone\n"
    )


def remove_folder(folder: str) -> str:
    """Removes `folder`, twice when something was still writing."""
    if not FOLDER.fullmatch(folder):
        raise ValueError(f"not a scratch folder: {folder}")
    path = shlex.quote(folder)
    return f"{stop_all(folder)}rm -rf {path} 2>/dev/null || {{ sleep 1; rm -rf {path}; }}"


def make_room(parent: str) -> str:
    """Makes the folder of a file, and says what is free there."""
    path = shlex.quote(parent)
    return f"mkdir -p {path} && df -Pk {path} | tail -n 1"


def free_bytes(line: str) -> int | None:
    """Of a line of `df -Pk`; None where it cannot be read."""
    found = re.search(r"\s\d+\s+\d+\s+(\d+)\s+\d+%", line)
    return int(found[1]) * 1024 if found else None


def identity(path: str, executable: bool = False) -> str:
    """Says size and sha256 of a file, the latter where there is a program for it. NOEXEC: it can never be run."""
    file = shlex.quote(path)
    allow = f"chmod 700 {file} && {{ [ -x {file} ] || exit {NOEXEC}; }}\n" if executable else ""
    return (
        f"{allow}wc -c <{file} || exit 1\n"
        f"sha256sum {file} 2>/dev/null || toybox sha256sum {file} 2>/dev/null || busybox sha256sum {file} 2>/dev/null\n"
        "exit 0"
    )


def read_identity(stdout: bytes) -> tuple[int, str]:
    """Size, and sha256 or nothing, of what `identity` said."""
    words = stdout.decode(errors="replace").split()
    digest = words[1].lstrip("\\") if len(words) > 1 else ""
    return int(words[0]), digest


def program(command: Sequence[str], folder: str, env: Mapping[str, str]) -> str:
    """Becomes the program, so that the code is its own and no shell adds words about its end."""
    settings = [f"{name}={value}" for name, value in env.items()]
    return f"cd {shlex.quote(folder)} && exec env {shlex.join([*settings, *command])} </dev/null"


def ask_facts(bases: Sequence[str], python: str) -> str:
    """Asks for everything in DeviceFacts."""
    return in_base(bases, _FACTS.replace("PYTHON", shlex.quote(python)))


def read_facts(stdout: bytes, name: str, kind: str) -> DeviceFacts:
    """DeviceFacts of what `ask_facts` brought."""
    head, _, cpuinfo = stdout.decode(errors="replace").partition("\n\n")
    said = {key: value.strip() for key, _, value in (line.partition("=") for line in head.splitlines())}
    machine = said.get("abi") or said.get("machine", "")
    abi = _ABIS.get(machine, machine)
    if said.get("bits") == "32":
        abi = _NARROW.get(abi, abi)
    processor, features = read_cpuinfo(cpuinfo)
    memory = said.get("memory", "").split()
    return DeviceFacts(
        name=name,
        kind=kind,
        abi=abi,
        os="android" if said.get("android") else said.get("system", "").lower(),
        processor=processor or abi,
        cpu_features=features,
        memory_mb=int(memory[0]) // 1024 if memory and memory[0].isdigit() else 0,
        free_mb=(free_bytes(said.get("disk", "")) or 0) // 2**20,
        python=said.get("python", ""),
        onnxruntime=said.get("onnxruntime", ""),
        model=said.get("phone") or said.get("board", ""),
        emulated="1" in said.get("emulated", ""),
    )
