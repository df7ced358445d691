"""Leases: one holder, on whichever machine, and none for good when machines die. Machines are simulated by their name."""

import json
import signal
import subprocess
import sys
import time

import pytest

from scaling import leases

BEAT, SILENT = 0.2, 1.5
HOLD = f"""
import sys, time
from pathlib import Path
from scaling import leases
leases.BEAT_SECONDS, leases.SILENT_SECONDS = {BEAT}, {SILENT}
if sys.argv[2]: leases.machine = lambda: sys.argv[2]
if sys.argv[3]: time.sleep(max(0, float(sys.argv[3]) - time.time()))
with leases.take(Path(sys.argv[1])) as lease:
    print(bool(lease), flush=True)
    if lease: time.sleep(float(sys.argv[4]))
"""


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(leases, "BEAT_SECONDS", BEAT)
    monkeypatch.setattr(leases, "SILENT_SECONDS", SILENT)


def hold(folder, machine="", at="", seconds=60):
    """A process that takes the lease, at a time, as if it were on a machine of that name, and holds it."""
    command = [sys.executable, "-c", HOLD, str(folder), machine, str(at), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def taken(folder):
    with leases.take(folder) as lease:
        return lease is not None


def test_a_killed_process_of_this_machine_holds_nothing(tmp_path):
    """Even one that nobody has waited for yet: its parent may be a launcher that never does."""
    with hold(tmp_path) as process:
        assert process.stdout.readline() == "True\n"
        assert not taken(tmp_path)
        process.send_signal(signal.SIGKILL)
        time.sleep(0.2)  # a zombie now
        assert taken(tmp_path)
    assert [one["number"] for one in leases.attempts(tmp_path)] == [1, 2]


def test_a_machine_that_died_is_waited_for(tmp_path):
    """Nobody can know of a dead host but by its silence; one that beats is never taken from, however long it trains."""
    with hold(tmp_path, "elsewhere") as process:
        assert process.stdout.readline() == "True\n"
        end = time.monotonic() + 2 * SILENT
        while time.monotonic() < end:
            assert not taken(tmp_path)
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        died = time.monotonic()
        while not taken(tmp_path):
            assert time.monotonic() - died < 10
            time.sleep(0.02)
        assert time.monotonic() - died > SILENT - 2 * BEAT


def test_clocks_that_differ(tmp_path, monkeypatch):
    """An hour ahead or behind, this machine still judges a beat by the clock of the files."""
    with hold(tmp_path, "elsewhere") as process:
        assert process.stdout.readline() == "True\n"
        now = time.time
        for skew in (3600, -3600):
            monkeypatch.setattr(time, "time", lambda skew=skew: now() + skew)
            assert not taken(tmp_path)
        process.send_signal(signal.SIGKILL)
        time.sleep(SILENT + BEAT)
        assert taken(tmp_path)


def test_a_suspended_holder_ends_itself(tmp_path):
    """A paused virtual machine wakes up when another trains its trial: it must not write one byte of it, and be started again."""
    process = hold(tmp_path, "elsewhere")
    assert process.stdout.readline() == "True\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(SILENT + BEAT)
    with leases.take(tmp_path) as lease:
        assert lease
        before = (tmp_path / "attempt-1.json").read_text()
        process.send_signal(signal.SIGCONT)
        assert process.wait(10) == 75
        assert "another worker took" in process.stderr.read()
        assert (tmp_path / "attempt-1.json").read_text() == before
    process.stdout.close()
    process.stderr.close()


def test_one_of_many_follows_a_dead_machine(tmp_path):
    """All see the same silence at the same moment; creation decides. Two that read, judge and then write could both win."""
    (tmp_path / "attempt-1.json").write_text(json.dumps({"machine": "dead", "pid": 1, "born": 1}))
    time.sleep(SILENT + 0.1)
    at = time.time() + 2
    processes = [hold(tmp_path, f"machine {i}", at, 1) for i in range(6)]
    won = [process.communicate(timeout=60)[0] for process in processes]
    assert sorted(won) == ["False\n"] * 5 + ["True\n"]


def test_an_attempt_that_a_kill_left_empty(tmp_path):
    """Between its creation and its first bytes: not a holder for ever, nor free at once."""
    (tmp_path / "attempt-1.json").touch()
    assert not taken(tmp_path)
    time.sleep(SILENT + 0.1)
    assert taken(tmp_path)


def test_an_error_frees_at_once(tmp_path):
    with pytest.raises(RuntimeError), leases.take(tmp_path):
        raise RuntimeError
    assert taken(tmp_path)
    assert all(one["ended"] >= one["started"] for one in leases.attempts(tmp_path))
