"""Stand-ins of devices: a real ssh server, and a device behind a real adb server, each with a small disk of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from afq_export.device.arm64.environment import Environment, open_environment
from afq_export.device.kit import kit_for
from afq_export.errors import MissingToolError
from tests.device.test_session import FACTS

APART = Path(__file__).with_name("apart.sh")
FAKE_ADBD = Path(__file__).parents[2].parent / "shared" / "kits" / "arm64" / "fakeadbd.py"
PHONE_FOLDER, BOARD_FOLDER = "/data/local/tmp", "/afq-board/scratch"
AUTH_TOKEN = 1
WAIT_S = 15.0


def wait_for(happened: Callable[[], object], what: str) -> None:
    """Waits until it is true, polling; fails after WAIT_S."""
    end = time.monotonic() + WAIT_S
    while not happened():
        if time.monotonic() > end:
            pytest.fail(f"{what} within {WAIT_S:g} s")
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def running(seconds: str) -> list[int]:
    """Processes that sleep for `seconds`, in whatever namespace."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if line.read_bytes().decode(errors="replace") == f"sleep\0{seconds}\0":
                found.append(int(line.parent.name))
    return found


@dataclass
class Standin:
    """A server in namespaces of its own, so that killing it kills whatever it runs, as pulling a plug does."""

    port: int
    process: subprocess.Popen[bytes]
    scratch: str
    log: Path

    @property
    def first(self) -> int:
        """Process id of the server itself, as seen from here."""
        return children(self.process.pid)[0]

    @property
    def disk(self) -> Path:
        """Its scratch folder, as seen from here and not through the transport."""
        return Path(f"/proc/{self.first}/root{self.scratch}")

    def left(self) -> list[str]:
        """What lies in it."""
        return sorted(os.listdir(self.disk))

    def sessions(self) -> list[int]:
        """Processes of the server that serve one connection each."""
        return children(self.first)

    def pull_the_plug(self) -> None:
        """Everything of it is gone at once."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        wait_for(lambda: not answers(self.port), "the stand-in is gone")


@contextlib.contextmanager
def apart(
    tmp: Path, command: list[str], port: int, scratch: str, size: str, user: bool, **settings: str
) -> Iterator[Standin]:
    """`command` with `scratch` of `size`, in a user namespace of its own where `user`. `settings`: environment."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare (Linux)")
    new = tmp / f"root-{port}"
    new.mkdir()
    log = tmp / f"log-{port}"
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", *(["--map-root-user"] if user else [])]
    with log.open("wb") as said:
        process = subprocess.Popen(
            [*unshare, "sh", str(APART), str(new), scratch, size, *command],
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )
    standin = Standin(port, process, scratch, log)
    try:
        wait_for(lambda: answers(port) or process.poll() is not None, "the stand-in answers")
        if process.poll() is not None:
            pytest.skip(f"no namespaces for a stand-in: {log.read_text()[-200:]}")
        yield standin
    finally:
        standin.pull_the_plug()


def arm64_environment() -> Environment | None:
    """The arm64 emulation, where it is installed."""
    try:
        return open_environment(check=False)
    except MissingToolError:
        return None


@contextlib.contextmanager
def phone(tmp: Path, size: str = "48m", arm64: Environment | None = None, cpu: str = "cortex-a76") -> Iterator[Standin]:
    """A stand-in of an Android device, not connected to adb's server yet. With `arm64` it runs Linux ARM programs."""
    if not FAKE_ADBD.is_file():
        pytest.skip("needs ../shared/kits/arm64/fakeadbd.py, the stand-in of an Android device")
    path, shell = android_tools(tmp / "system-bin")
    port = free_port()
    command = ["env", f"PATH={path}", sys.executable, str(FAKE_ADBD), str(port), "/", shell, "-c"]
    settings = {}
    if arm64:
        settings = {"ARM64_EMULATOR": str(arm64.emulator), "QEMU_LD_PREFIX": str(arm64.system), "QEMU_CPU": cpu}
    with apart(tmp, command, port, PHONE_FOLDER, size, user=True, **settings) as standin:
        yield standin


def android_tools(folder: Path) -> tuple[str, str]:
    """Search path and shell of a phone: Android's own, toybox and mksh, and nothing else, where they are installed."""
    folder.mkdir()
    write_program(folder / "getprop", PROPERTIES)
    toybox, mksh = shutil.which("toybox"), shutil.which("mksh")
    if toybox is None or mksh is None:
        return f"{folder}:/usr/bin:/bin", "sh"
    for name in subprocess.run([toybox], capture_output=True, text=True, check=True).stdout.split():
        (folder / name).symlink_to(toybox)
    (folder / "sh").symlink_to(mksh)
    return str(folder), mksh


PROPERTIES = """#!/bin/sh
# Properties of a phone.
case $1 in
ro.build.version.release) echo 14;;
ro.product.cpu.abi) echo arm64-v8a;;
ro.product.manufacturer) echo Example;;
ro.product.model) echo Phone 1;;
ro.boot.qemu) [ -z "$QEMU_CPU" ] || echo 1 ;;
esac
"""


def write_program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@contextlib.contextmanager
def adb_server(tmp: Path) -> Iterator[None]:
    """An adb server of its own, with keys of its own; needs adb."""
    if shutil.which("adb") is None:
        pytest.skip("needs adb (Debian package adb)")
    home = tmp / "adb-home"
    home.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("TMPDIR", str(home))
        patch.setenv("ANDROID_ADB_SERVER_PORT", str(free_port()))
        patch.delenv("ANDROID_SERIAL", raising=False)
        try:
            yield
        finally:
            subprocess.run(["adb", "kill-server"], capture_output=True, check=False, timeout=30)


def connect(port: int) -> str:
    """Tells adb's server of a device; its serial."""
    serial = f"127.0.0.1:{port}"
    subprocess.run(["adb", "connect", serial], capture_output=True, check=False, timeout=30)
    return serial


@contextlib.contextmanager
def distrustful_phone() -> Iterator[int]:
    """A device that accepts no key, on the port given: it answers everything with another token to be signed."""

    def serve(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = server.accept()
                threading.Thread(target=refuse, args=(client,), daemon=True).start()

    def refuse(client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            while header := client.recv(24, socket.MSG_WAITALL):
                client.recv(struct.unpack("<6I", header)[3], socket.MSG_WAITALL)
                token = os.urandom(20)
                command = int.from_bytes(b"AUTH", "little")
                words = (command, AUTH_TOKEN, 0, len(token), sum(token), command ^ 0xFFFFFFFF)
                client.sendall(struct.pack("<6I", *words) + token)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


@dataclass
class Keys:
    """Files of an ssh server and of those who may log in; `config` is for `ssh -F`."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "config"

    def write(self, port: int, **changes: str) -> Path:
        """Configuration of the client: nothing of this user's own is looked at."""
        options = {
            "UserKnownHostsFile": str(self.folder / "known_hosts"),
            "GlobalKnownHostsFile": "/dev/null",
            "IdentityFile": str(self.folder / "user"),
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "Port": str(port),
        } | changes
        lines = "".join(f"  {key} {value}\n" for key, value in options.items())
        self.config.write_text(f"Host *\n{lines}")
        key = (self.folder / "host.pub").read_text()
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {key}")
        return self.config


def make_keys(folder: Path) -> Keys:
    if shutil.which("ssh") is None:
        pytest.skip("needs ssh (Debian package openssh-client)")
    folder.mkdir(mode=0o700)
    for name in ("host", "user", "other"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(folder / name)], check=True
        )
    shutil.copy(folder / "user.pub", folder / "authorized_keys")
    return Keys(folder)


@contextlib.contextmanager
def board(tmp: Path, keys: Keys, size: str = "48m", **changes: str) -> Iterator[Standin]:
    """A real ssh server on loopback. It can serve its own user only, so its disk is apart only where this is root."""
    sshd = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin")
    if sshd is None:
        pytest.skip("needs sshd (Debian package openssh-server)")
    if os.geteuid() != 0:
        pytest.skip("needs to be root, for a disk of its own behind the ssh server")
    port = free_port()
    options = {
        "ListenAddress": f"127.0.0.1:{port}",
        "HostKey": str(keys.folder / "host"),
        "AuthorizedKeysFile": str(keys.folder / "authorized_keys"),
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
        "SetEnv": "HOME=/ PATH=/usr/bin:/bin",
    } | changes
    config = tmp / f"sshd_config-{port}"
    config.write_text("".join(f"{key} {value}\n" for key, value in options.items()))
    start = 'mount -t tmpfs none /run; mkdir /run/sshd; exec "$@"'
    command = ["sh", "-c", start, "sh", sshd, "-D", "-e", "-f", str(config)]
    with apart(tmp, command, port, BOARD_FOLDER, size, user=False) as standin:
        keys.write(port)
        yield standin


def arm_runner(runtime: str, folder: Path) -> Path:
    """The Linux runner for aarch64 with its libraries in `folder`, as a user would bring one."""
    folder.mkdir()
    facts = msgspec.structs.replace(FACTS, abi="aarch64", python="")
    try:
        files = kit_for(runtime, facts).files
    except MissingToolError as error:
        pytest.skip(str(error))
    for path, name in files:
        shutil.copy(path, folder / name)
    return next(folder.glob("*_runner"))


def main(kind: str) -> None:
    """Starts a `board` or a `phone` to try by hand, says what to set and its name, and ends with standard input."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        tmp = Path(name)
        if kind == "board":
            keys = make_keys(tmp / "keys")
            standin = stack.enter_context(board(tmp, keys, size="2g"))
            ssh = f"AFQ_SSH='ssh -F {keys.config}'"
            print(f"export {ssh} AFQ_DEVICE_FOLDER={standin.scratch}\n# ssh:127.0.0.1", flush=True)
        else:
            stack.enter_context(adb_server(tmp))
            standin = stack.enter_context(phone(tmp, "2g", arm64_environment()))
            port = os.environ["ANDROID_ADB_SERVER_PORT"]
            runners = {"RUNNER_PTE": "executorch", "RUNNER_ONNX": "onnxruntime"}
            built = {name: arm_runner(runtime, tmp / name) for name, runtime in runners.items()}
            print("export", *(f"{name}={path}" for name, path in built.items()))
            print(f"export ANDROID_ADB_SERVER_PORT={port}\n# adb:{connect(standin.port)}", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1])
