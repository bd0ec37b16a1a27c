"""Signals to a command: one sentence and 128 + signal, also while it is imported; other programs are left alone."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def start(arguments, *places):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*places, ROOT)))}
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("command", ["curate.select", "curate select", "pipelines.prepare"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_command_is_imported_ends_it_with_the_sentence(tmp_path, command, number):
    (tmp_path / "pydantic.py").write_text("import time\nprint('importing', flush=True)\nwhile True: time.sleep(1)\n")
    process = start(["-m", *command.split()], tmp_path)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == 128 + number
    assert said.endswith("nothing is lost; run the same command again to continue\n")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_middle_of_a_command_runs_what_puts_it_in_order(number):
    code = """
import os, sys
from curate.core.config import run_command
def command():
    try:
        os.kill(os.getpid(), int(sys.argv[1]))
        while True: pass
    finally:
        print("in order", flush=True)
run_command(command)
"""
    said, errors = (process := start(["-c", code, str(int(number))])).communicate()
    assert (process.returncode, said) == (128 + number, "in order\n")
    assert len(errors.splitlines()) == 1


def test_a_command_under_nohup_goes_on(tmp_path):
    code = """
import os, signal
from curate.core.config import run_command
signal.signal(signal.SIGHUP, signal.SIG_IGN)
run_command(lambda: os.kill(os.getpid(), signal.SIGHUP))
"""
    _, errors = (process := start(["-c", code])).communicate()
    assert (process.returncode, errors) == (0, "")


def test_workers_of_a_command_end_silently_and_as_they_were_told():
    code = """
import os, signal, time
from curate.core.config import run_command
def command():
    read, write = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.write(write, b"up")
        while True: time.sleep(1)
    os.read(read, 2)
    os.kill(worker, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]), flush=True)
run_command(command)
"""
    said, errors = start(["-c", code]).communicate()
    assert (said, errors) == (f"{-signal.SIGTERM}\n", "")


def test_a_program_that_imports_the_package_keeps_its_handlers(tmp_path):
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").write_text("import curate\n")  # while `python -m` looks for its main
    (tmp_path / "trainer" / "__main__.py").write_text(
        "import signal\nprint(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"
    )
    for arguments in (["-m", "trainer", "curate.select"], ["-c", "import trainer.__main__"]):
        assert start(arguments, tmp_path).communicate()[0] == "True\n"
