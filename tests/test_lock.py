"""Locks between processes: who holds them, who inherits them, and what stays behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from curate.core.artifacts import check_can_begin
from curate.core.lock import LOCK, BusyError, Lock, is_locked_here, locked, sweep
from curate.core.writing import atomic_write

ROOT = Path(__file__).resolve().parents[1]
HOLDER = """
import sys, time
from pathlib import Path
from curate.core.lock import locked
with locked(Path(sys.argv[1])) as lock:
    print("held", flush=True)
    sys.stdin.read()
"""


def start(code, folder):
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def holder(tmp_path):
    process = start(HOLDER, tmp_path / "made")
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_another_process_is_refused_and_told_who_holds_it(tmp_path, holder):
    with pytest.raises(BusyError, match=rf"made is in use by process {holder.pid} on "):
        Lock(tmp_path / "made")
    holder.communicate()  # ends in order
    assert not (tmp_path / "made").exists()  # which it made for its lock alone
    with locked(tmp_path / "made"):
        assert (tmp_path / "made" / LOCK).exists()


def test_a_killed_process_holds_nothing(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / "made" / LOCK).exists()
    with locked(tmp_path / "made"):
        pass
    assert list((tmp_path / "made").iterdir()) == []


def test_who_waits_says_so_and_gets_it_when_it_is_released(tmp_path, holder):
    code = "import logging; logging.basicConfig(level='INFO')" + HOLDER.replace("[1]))", "[1]), wait=True)")
    waiter = start(code, tmp_path / "made")
    assert f"waiting for process {holder.pid}" in waiter.stderr.readline()
    holder.communicate()
    assert waiter.stdout.readline() == "held\n"
    with pytest.raises(BusyError, match=rf"process {waiter.pid} "):
        Lock(tmp_path / "made")
    waiter.communicate()


def test_a_program_that_is_given_the_descriptor_holds_it_when_its_starter_is_killed(tmp_path):
    code = HOLDER.replace(
        '    print("held", flush=True)\n    sys.stdin.read()\n',
        "    import subprocess\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import sys; sys.stdin.read()'], "
        "pass_fds=(lock.descriptor,))\n"
        "    lock.say(f'process {child.pid}')\n"
        "    print(child.pid, flush=True)\n    child.wait()\n",
    )
    starter = start(code, tmp_path)
    child = int(starter.stdout.readline())
    starter.kill()
    starter.wait()
    with pytest.raises(BusyError, match=rf"process {child} "):
        Lock(tmp_path)
    starter.stdin.close()  # the child reads its end
    starter.stdin = None
    with locked(tmp_path, wait=True):
        pass
    starter.communicate()


def test_a_forked_worker_does_not_hold_it(tmp_path):
    with locked(tmp_path):
        read, write = os.pipe()
        worker = os.fork()
        if worker == 0:
            os.close(write)
            os.read(read, 1)  # until the test is over
            os._exit(0)
        os.close(read)
    code = HOLDER.replace("    sys.stdin.read()\n", "")
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False).returncode == 0
    os.close(write)
    os.waitpid(worker, 0)


def test_a_process_gets_again_what_it_holds_and_a_lost_lock_is_released(tmp_path):
    with locked(tmp_path):
        inner = Lock(tmp_path)
        del inner
        assert is_locked_here(tmp_path / "a" / "b")
        assert not is_locked_here(tmp_path.parent / "other")
        check_can_begin(tmp_path, {})  # a lock makes no folder another's
    assert not is_locked_here(tmp_path / "a")
    assert not (tmp_path / LOCK).exists()


def test_the_lock_file_of_a_killed_process_is_swept_and_one_that_is_held_stays(tmp_path, holder):
    sweep(tmp_path / "made")
    assert (tmp_path / "made" / LOCK).exists()
    holder.kill()
    holder.wait()
    sweep(tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == []


def test_what_a_killed_process_left_is_written_over_under_the_lock_and_never_without(tmp_path):
    code = """
import os, sys
from pathlib import Path
from curate.core.writing import atomic_write
from curate.core.lock import locked
with locked(Path(sys.argv[1])), atomic_write(Path(sys.argv[1]) / "x") as part:
    part.mkdir()
    (part / "index.json").write_text("half")
    os.kill(os.getpid(), 9)
"""
    killed = start(code, tmp_path)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    (left,) = (path for path in tmp_path.iterdir() if path.name != LOCK)
    with atomic_write(tmp_path / "x") as part:  # knows of no lock: another's may be alive
        part.mkdir()
    assert left.exists()
    with locked(tmp_path), atomic_write(tmp_path / "x") as part:
        assert part == left
        assert not part.exists()
        part.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
