"""What a shell is asked and how its answers are read, with shells of this machine and without a device."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afq_export.device.cores import read_cpuinfo
from afq_export.device.posix import STDERR_BYTES, free_bytes, program, read_facts, read_identity, unwrapped, wrapped
from afq_export.device.process import execute
from afq_export.device.transport import Finished, signal_name
from afq_export.errors import MissingToolError

MARK = "afq-00112233"
SHELLS = [name for name in ("dash", "bash", "mksh", "busybox") if shutil.which(name)]


def shell(name: str, script: str) -> subprocess.CompletedProcess[bytes]:
    words = [name, "sh"] if name == "busybox" else [name]
    return subprocess.run(
        [*words, "-c", wrapped(script, MARK)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False
    )


@pytest.mark.parametrize("name", SHELLS)
@pytest.mark.parametrize(
    ("script", "finished"),
    [
        ("true", Finished(0, b"", "")),
        ("printf 'a\\n\\n'; printf 'b\\n' >&2; exit 3", Finished(3, b"a\n\n", "b\n")),
        ("exec sh -c 'printf x >&2; kill -11 $$'", Finished(139, b"", "x", 11)),
        ("cat; echo $LC_ALL", Finished(0, b"C\n", "")),
        (f"printf '{MARK}\\n'; printf '7 {MARK}' >&2; exit 1", Finished(1, f"{MARK}\n".encode(), f"7 {MARK}")),
        (
            "head -c 300000 /dev/zero | tr '\\000' x >&2; exit 2",
            Finished(2, b"", "x" * (STDERR_BYTES - len(f"\n2 {MARK}"))),
        ),
    ],
)
def test_an_end_is_read(name: str, script: str, finished: Finished) -> None:
    done = shell(name, script)
    assert done.returncode == 0
    assert unwrapped(done.stdout, MARK) == (b"", finished)


@pytest.mark.parametrize("name", SHELLS)
def test_a_shell_that_is_killed_has_no_end(name: str) -> None:
    done = shell(name, "printf x; kill -9 $$")
    assert done.returncode == -9
    assert unwrapped(done.stdout, MARK) == (b"", None)


@given(
    before=st.binary(max_size=9),
    stdout=st.binary(max_size=40),
    stderr=st.text("a1 \n", max_size=20),
    code=st.integers(0, 255),
)
def test_an_end_cut_off_anywhere_is_none(before: bytes, stdout: bytes, stderr: str, code: int) -> None:
    whole = before + f"{MARK}\n".encode() + stdout + f"\n{MARK}\n{stderr}\n{code} {MARK}".encode()
    finished = Finished(code, stdout, stderr, code - 128 if 128 < code <= 192 else None)
    assert unwrapped(whole, MARK) == (before, finished)
    for length in range(len(whole)):
        assert unwrapped(whole[:length], MARK)[1] is None


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=8), max_size=4))
def test_words_reach_a_program_unchanged(words: list[str]) -> None:
    script = program(["printf", "%s\\n", "", *words], "/", {})
    done = subprocess.run(["sh", "-c", script], stdout=subprocess.PIPE, check=True)
    assert done.stdout.decode() == "".join(f"{word}\n" for word in ["", *words])


def test_a_program_has_no_input() -> None:
    done = subprocess.run(
        ["sh", "-c", program(["cat"], "/", {})], input=b"not for it", stdout=subprocess.PIPE, check=True
    )
    assert done.stdout == b""


PHONE = """machine=aarch64
system=Linux
bits=64
android=14
abi=arm64-v8a
phone=Example Phone 1
emulated=1
board=
memory=3884932 kB
disk=/dev/block/dm-5  114688000 54321000 60367000  48% /data
python=

processor\t: 0
BogoMIPS\t: 38.40
Features\t: fp asimd crc32 atomics asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd05

processor\t: 1
Features\t: fp asimd crc32 atomics asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd05

processor\t: 2
Features\t: fp asimd atomics asimddp i8mm
CPU implementer\t: 0x41
CPU part\t: 0xd0B
"""


def test_facts_of_a_phone() -> None:
    facts = read_facts(PHONE.encode(), "adb:X", "adb")
    assert (facts.abi, facts.os, facts.model, facts.emulated) == ("aarch64", "android", "Example Phone 1", True)
    assert (facts.memory_mb, facts.free_mb, facts.python, facts.onnxruntime) == (3793, 58952, "", "")
    assert facts.processor == "2x cortex-a55 + 1x cortex-a76"
    assert facts.cpu_features == ("fp", "asimd", "atomics", "asimddp")


def test_a_64_bit_kernel_with_32_bit_programs() -> None:
    said = b"machine=aarch64\nsystem=Linux\nbits=32\nphone= \nboard=Raspberry Pi 4 Model B\npython=/usr/bin/python3\n\n"
    facts = read_facts(said, "ssh:pi", "ssh")
    assert (facts.abi, facts.os, facts.model) == ("armv7l", "linux", "Raspberry Pi 4 Model B")
    assert (facts.processor, facts.cpu_features, facts.python) == ("armv7l", (), "/usr/bin/python3")


def test_a_device_that_says_nothing() -> None:
    facts = read_facts(b"", "ssh:x", "ssh")
    assert (facts.abi, facts.memory_mb, facts.free_mb, facts.emulated) == ("", 0, 0, False)


def test_processors() -> None:
    arm32 = "model name\t: ARMv7 Processor rev 3 (v7l)\nFeatures\t: neon\nCPU implementer : 0x41\nCPU part : 0xd08\n"
    assert read_cpuinfo(arm32) == ("1x cortex-a72", ("neon",))
    assert read_cpuinfo("CPU implementer : 0x99\nCPU part : 0x123\n") == ("1x part 0x99/0x123", ())
    assert read_cpuinfo("model name : Some x86\nflags : sse avx\n" * 2) == ("2x Some x86", ("sse", "avx"))
    assert read_cpuinfo("hart : 0\nisa : rv64imafdc\n") == ("", ())


def test_small_answers() -> None:
    assert free_bytes("/dev/my disk 100 60 40 60% /") == 40 * 1024
    assert free_bytes("overlay          1000000 999999 -1 100% /") is None
    assert free_bytes("") is None
    assert read_identity(b" 12\n\\abc  a\\nb\n") == (12, "abc")
    assert (signal_name(11), signal_name(63)) == ("SIGSEGV", "signal 63")


def test_a_daemon_that_keeps_its_pipes_is_not_waited_for() -> None:
    began = time.monotonic()
    done = execute(["sh", "-c", "echo here; sleep 3 & echo there >&2; exit 5"], timeout=20)
    assert (done.code, done.stdout, done.stderr) == (5, b"here\n", "there\n")
    assert time.monotonic() - began < 2


def test_programs_that_do_not_start_or_end(tmp_path: Path) -> None:
    with pytest.raises(MissingToolError, match=r"cannot start \[.*none\]: No such file"):
        execute([str(tmp_path / "none")], timeout=1)
    mark = tmp_path / "mark"
    with pytest.raises(subprocess.TimeoutExpired):
        execute(["sh", "-c", f"(sleep 1; touch {mark}) & sleep 9"], timeout=0.2)
    time.sleep(1.2)
    assert not mark.exists(), "its children are stopped with it"
