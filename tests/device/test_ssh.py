"""Faults of a real ssh server and of the way to it: one clear line each, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afq_export.device import remote
from afq_export.device.remote import Setup
from afq_export.device.ssh import Target, open_ssh, parse_target
from afq_export.errors import InputError, MissingToolError
from tests.device.standins import Keys, Standin, board, free_port, make_keys, running, wait_for, write_program

MIB = 2**20


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("ssh") / "keys")


@pytest.fixture(scope="module")
def server(keys: Keys) -> Iterator[Standin]:
    with board(keys.folder, keys, size="512m") as standin:
        yield standin


@pytest.fixture
def client(keys: Keys, server: Standin, monkeypatch: pytest.MonkeyPatch) -> Keys:
    """The client's configuration, as it should be."""
    keys.write(server.port)
    monkeypatch.setenv("AFQ_SSH", f"ssh -F {keys.config}")
    return keys


def test_it_is_one_connection_that_ends(client: Keys, server: Standin) -> None:
    device = open_ssh("root@127.0.0.1", Setup(folder=server.scratch))
    folder = Path(device._link._close.peek()[2][1])
    with device.folder() as there:
        for _ in range(3):
            device.run(["true"], folder=there, timeout=20)
        assert len(server.sessions()) == 1
        assert [path.name for path in folder.iterdir()] == ["m"]
    del device
    assert not folder.exists()
    wait_for(lambda: not server.sessions(), "the connection ends")


def test_usual_folders(client: Keys, server: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_ssh("127.0.0.1").facts().name == "ssh:127.0.0.1"
    with open_ssh("127.0.0.1").folder() as folder:
        assert os.path.dirname(folder) == "/var/tmp"
    monkeypatch.setenv("AFQ_DEVICE_FOLDER", server.scratch)
    with open_ssh("127.0.0.1", Setup.of_environment()).folder() as folder:
        assert os.path.dirname(folder) == server.scratch
    monkeypatch.setenv("AFQ_DEVICE_FOLDER", "not/absolute")
    with pytest.raises(InputError, match="not an absolute path"):
        Setup.of_environment()


def another_host_key(keys: Keys, server: Standin) -> None:
    known = keys.folder / "known_hosts"
    known.write_text(f"[127.0.0.1]:{server.port} {(keys.folder / 'other.pub').read_text()}")


def no_host_key(keys: Keys, server: Standin) -> None:
    (keys.folder / "known_hosts").write_text("")


def another_key(keys: Keys, server: Standin) -> None:
    keys.write(server.port, IdentityFile=str(keys.folder / "other"))


def no_server(keys: Keys, server: Standin) -> None:
    keys.write(free_port())


def no_name(keys: Keys, server: Standin) -> None:
    keys.write(server.port, HostName="no-such-host.invalid")


def wrong_option(keys: Keys, server: Standin) -> None:
    keys.write(server.port, NoSuchOption="1")


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (another_host_key, "its host key is not the known one; make sure that it is the right machine"),
        (no_host_key, "its host key is not known; connect once by hand"),
        (another_key, "the login is refused; set up a key"),
        (no_server, "it cannot be reached; is it on"),
        (no_name, "there is no host of this name"),
        (wrong_option, "ssh does not start; look at AFQ_SSH"),
    ],
)
def test_no_connection(client: Keys, server: Standin, fault: Callable[[Keys, Standin], None], why: str) -> None:
    fault(client, server)
    with pytest.raises(MissingToolError, match=rf"^device is gone \[ssh:me@127.0.0.1\]: {why}") as raised:
        open_ssh("me@127.0.0.1").facts()
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == 3


def test_an_account_without_a_shell(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFQ_SSH", f"ssh -F {keys.config}")
    pattern = "it runs no commands of a POSIX shell: This account is not available"
    command = "echo This account is not available. >&2; false"
    with board(tmp_path, keys, ForceCommand=command), pytest.raises(MissingToolError, match=pattern):
        open_ssh("127.0.0.1").facts()


def test_nothing_is_asked(client: Keys, server: Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tmp_path / "asked"
    write_program(tmp_path / "askpass", f"#!/bin/sh\ntouch {asked}; echo yes\n")
    monkeypatch.setenv("SSH_ASKPASS", str(tmp_path / "askpass"))
    monkeypatch.setenv("SSH_ASKPASS_REQUIRE", "force")
    no_host_key(client, server)
    with pytest.raises(MissingToolError, match="its host key is not known"):
        open_ssh("127.0.0.1").facts()
    assert not asked.exists()


def test_a_shell_that_talks(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFQ_SSH", f"ssh -F {keys.config}")
    pattern = (
        r"device cannot be used .*: its shell says 'Welcome!' before every command; keep its start-up files silent"
    )
    command = 'echo Welcome!; eval "$SSH_ORIGINAL_COMMAND"'
    with board(tmp_path, keys, ForceCommand=command), pytest.raises(MissingToolError, match=pattern):
        open_ssh("127.0.0.1").facts()


def test_a_folder_that_runs_no_programs(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFQ_SSH", f"ssh -F {keys.config}")
    program = tmp_path / "runner"
    program.touch(mode=0o755)
    with board(tmp_path, keys, size="40m,noexec") as server:
        device = open_ssh("127.0.0.1", Setup(folder=server.scratch))
        pattern = r"^device runs no programs .* does not allow it; name another folder there with AFQ_DEVICE_FOLDER"
        with pytest.raises(MissingToolError, match=pattern), device.folder() as folder:
            device.push(program, f"{folder}/runner")
        assert server.left() == []


def test_no_ssh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("AFQ_SSH", raising=False)
    with pytest.raises(MissingToolError, match=r"no ssh client .* install the Debian package openssh-client"):
        open_ssh("board")


def test_the_connection_breaks_while_a_program_runs(client: Keys, server: Standin) -> None:
    number = f"5{os.getpid()}"

    def cut() -> None:
        wait_for(lambda: running(number), "it runs")
        cut_connections(server)

    thread = threading.Thread(target=cut)
    device = open_ssh("127.0.0.1", Setup(folder=server.scratch))
    pattern = r"^device is gone \[ssh:127.0.0.1\]: the connection was lost"
    with pytest.raises(MissingToolError, match=pattern), device.folder() as folder:
        thread.start()
        device.run(["sleep", number], folder=folder, timeout=60)
    thread.join()
    assert server.left() == []
    wait_for(lambda: not running(number), "it is stopped")


def test_the_connection_breaks_while_a_file_is_sent(client: Keys, server: Standin, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.touch()
    os.truncate(file, 200 * MIB)
    thread = threading.Thread(target=cut_when_it_arrives, args=(server,))
    device = open_ssh("127.0.0.1", Setup(folder=server.scratch))
    pattern = r"^transfer was interrupted \[ssh:127.0.0.1\]: \d+ of 209715200 bytes of weights arrived.*; try again$"
    with pytest.raises(MissingToolError, match=pattern), device.folder() as folder:
        thread.start()
        device.push(file, f"{folder}/weights")
    thread.join()
    assert server.left() == []


def test_the_connection_breaks_while_a_file_is_fetched(client: Keys, server: Standin, tmp_path: Path) -> None:
    number, cuts = 200 * MIB, []

    def cut() -> None:
        wait_for(lambda: any(path.stat().st_size for path in tmp_path.glob(".logits.*")), "it arrives")
        cut_connections(server)
        cuts.append(True)

    thread = threading.Thread(target=cut)
    device = open_ssh("127.0.0.1", Setup(folder=server.scratch))
    pattern = r"^transfer was interrupted \[ssh:127.0.0.1\]: \d+ of 209715200 bytes of logits arrived"
    with pytest.raises(MissingToolError, match=pattern), device.folder() as folder:
        device.run(["truncate", "-s", str(number), "logits"], folder=folder, timeout=20)
        thread.start()
        device.pull(f"{folder}/logits", tmp_path / "logits")
    thread.join()
    assert cuts and server.left() == [] and list(tmp_path.iterdir()) == []


def test_the_board_loses_power(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFQ_SSH", f"ssh -F {keys.config}")
    with board(tmp_path, keys) as server:
        device = open_ssh("127.0.0.1", Setup(folder=server.scratch))
        number = f"6{os.getpid()}"

        def fall() -> None:
            wait_for(lambda: running(number), "it runs")
            server.pull_the_plug()

        thread = threading.Thread(target=fall)
        pattern = r"^device is gone \[ssh:127.0.0.1\]: .*; remove /afq-board/scratch/afq-[0-9a-f]{16} there$"
        with pytest.raises(MissingToolError, match=pattern), device.folder() as folder:
            thread.start()
            device.run(["sleep", number], folder=folder, timeout=60)
        thread.join()


def test_a_board_that_hangs(client: Keys, server: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    device = open_ssh("127.0.0.1", Setup(folder=server.scratch))
    with device.folder() as folder:
        monkeypatch.setattr(remote, "ANSWER_S", 0.5)
        for session in server.sessions():
            os.kill(session, signal.SIGSTOP)
        with pytest.raises(MissingToolError, match=r"device is gone .*: no answer within 0.5 s"):
            device._well("true", "never")
        for session in server.sessions():
            os.kill(session, signal.SIGCONT)
        monkeypatch.undo()
        assert folder
    assert server.left() == []


def test_targets() -> None:
    assert parse_target("board") == Target("board")
    assert parse_target("pi@board.local:2222") == Target("board.local", "pi", 2222)
    assert parse_target("pi@[fe80::1%eth0]:22") == Target("fe80::1%eth0", "pi", 22)
    for text in ("", "@board", "pi@", "board:", "board:0", "board:65536", "-oProxyCommand=x", "a b", "pi@-x", "a;b"):
        with pytest.raises(InputError, match=r"not a target for ssh .* give ssh:USER@HOST"):
            parse_target(text)


@given(st.text(max_size=30))
def test_no_target_is_an_option(text: str) -> None:
    try:
        target = parse_target(text)
    except InputError:
        return
    assert not target.host.startswith("-") and not target.user.startswith("-")
    assert not set(target.host + target.user) & set(" '\"\\$`;&|<>()\n")
    assert 0 <= target.port < 2**16


def cut_connections(server: Standin) -> None:
    """Kills the processes that serve connections, not the server."""
    for session in server.sessions():
        for pid in (session, *ssh_children(session)):
            os.kill(pid, signal.SIGKILL)


def ssh_children(pid: int) -> list[int]:
    """The unprivileged half of a session, where there is one."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed if Path(f"/proc/{child}/comm").read_text().startswith("sshd")]


def cut_when_it_arrives(server: Standin) -> None:
    wait_for(lambda: any(path.is_file() and path.stat().st_size for path in server.disk.rglob("*")), "it arrives")
    cut_connections(server)
