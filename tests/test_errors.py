"""Whatever ends a command, its last line is readable and its exit code true; no traceback for what is not our fault."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava.errors import one_line

ROOT = Path(__file__).parents[1]
START = """import sys, time
from llava.errors import InputError, run_command

def main():
    {}

run_command(main)
"""
PYTHON = f'{sys.executable} -c "$CODE"'


def run(statement, redirection="", **environment):
    """Run `main` with a statement as its body in a shell; returns (exit code, standard output, standard error)."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "", "CODE": START.format(statement)}
    settings |= environment
    done = subprocess.run(
        ["bash", "-c", f"{PYTHON} {redirection}"], env=settings, capture_output=True, timeout=60, check=False
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nb\tc \u2028 d", "a b c d"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("bell\x07 null\0 delete\x7f c1\x9b", "bell\\x07 null\\x00 delete\\x7f c1\\x9b"),
        ("half \ud83d byte \udcff", "half \\ud83d byte \\udcff"),
        ("right to left \u202e", "right to left \\u202e"),
        ("é 字 🙂 ½", "é 字 🙂 ½"),
    ],
)
def test_text_is_made_fit_for_one_line_of_a_terminal(text, line):
    assert one_line(text) == line


@pytest.mark.parametrize(
    ("statement", "code", "line"),
    [
        ("raise InputError('no\\nsuch \\x1b[31mthing \\ud83d')", 2, "error: no such \\x1b[31mthing \\ud83d"),
        ("open('/no/such/file')", 2, "error: /no/such/file: No such file or directory"),
        ("raise PermissionError(13, 'Permission denied', 'a\\x1bb')", 2, "error: a\\x1bb: Permission denied"),
        ("raise OSError('first\\nsecond')", 2, "error: first second"),
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("raise MemoryError", 2, "error: out of memory; use smaller inputs, smaller batches or a smaller model"),
        ("main()", 2, "error: an input is nested too deeply; look for brackets inside brackets in the files it reads"),
        ("raise SystemExit(7)", 7, ""),
    ],
)
def test_an_ending_is_one_line_and_its_exit_code(statement, code, line):
    assert run(statement) == (code, "", f"{line}\n" if line else "")


@pytest.mark.parametrize(
    "error",
    [
        "type('OutOfMemoryError', (RuntimeError,), {})('CUDA out of memory')",
        "RuntimeError('DefaultCPUAllocator: can\\'t allocate memory: you tried to allocate 8 bytes')",
    ],
)
def test_torchs_lack_of_memory_is_one_line(error):
    code, _, line = run(f"raise {error}")
    assert code == 2 and line.startswith("error: out of memory (") and line.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        "type('SafetensorError', (Exception,), {})('Error while serializing: I/O error: No space left (os error 28)')",
        "RuntimeError('[enforce fail at inline_container.cc:672] . unexpected pos 1344 vs 1232')",
        "RuntimeError('PytorchStreamWriter failed writing file data/0: file write failed')",
    ],
)
def test_weights_that_do_not_fit_on_the_disk_are_one_line(error):
    code, _, line = run(f"raise {error}")
    assert code == 2 and line.startswith("error: cannot write weights (") and line.endswith("): is the disk full?\n")


def test_a_programming_error_keeps_its_traceback():
    code, _, text = run("{}['key']")
    assert code == 1 and "Traceback" in text and "KeyError" in text


@pytest.mark.parametrize("statement", ["print('é 字')", "print('x' * 100_000)", "print('\\ud83d')"])
@pytest.mark.parametrize(
    ("redirection", "code", "says"),
    [
        (">&-", 0, ""),
        ("<&-", 0, ""),
        ("2>&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        (">/dev/full", 2, "error: cannot write the output: No space left on device\n"),
        (">/dev/full 2>/dev/full", 2, ""),
        (">/dev/full 2>&-", 2, ""),
        ("| true; exit ${PIPESTATUS[0]}", None, ""),
    ],
)
def test_no_stream_ends_in_a_traceback(statement, redirection, code, says):
    ended, _, text = run(statement, redirection)
    # A reader that leaves at once may leave before or after the writing.
    assert ended in ((0, 141) if code is None else (code,))
    assert text == says


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_the_exit_code_is_true_where_no_line_can_be_written(redirection):
    assert run("raise InputError('é')", redirection) == (2, "", "")


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}]
)
def test_text_that_the_terminal_cannot_show_is_replaced(environment):
    code, out, _ = run("print('a \\xe9 \\u5b57 \\ud83d')", **environment)
    assert code == 0 and out.startswith("a ")
    code, _, line = run("raise InputError('a \\xe9')", **environment)
    assert code == 2 and line.startswith("error: a ")


def test_input_that_is_no_text_is_replaced():
    code, out, _ = run("print(ascii(input()))", "< <(printf 'caf\\xe9\\n')", PYTHONUTF8="1")
    assert (code, out) == (0, "'caf\\ufffd'\n")


def test_what_is_printed_to_a_closed_stream_lands_in_no_file(tmp_path):
    statement = f"file = open('{tmp_path}/data', 'w'); print('lost', flush=True); import os; os.system('echo lost too')"
    assert run(statement, ">&- 2>&-")[0] == 0
    assert (tmp_path / "data").read_text() == ""


def test_help_to_a_full_disk_is_one_line():
    command = f"cd {ROOT} && PYTHONUNBUFFERED= {sys.executable} -m llava.eval list --help >/dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, "error: cannot write the output: No space left on device\n")


WAIT = """try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)"""


@pytest.mark.parametrize(
    ("number", "code", "line"), [(signal.SIGTERM, 143, "stopped by SIGTERM\n"), (signal.SIGINT, 130, "interrupted\n")]
)
def test_a_signal_is_a_clean_end(number, code, line):
    with subprocess.Popen(
        [sys.executable, "-c", START.format(WAIT)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, text = process.communicate(timeout=30)
    assert (process.returncode, out, text) == (code, "cleaned up\n", line)


def test_a_second_sigterm_ends_a_clean_up_that_hangs():
    statement = WAIT.replace('print("cleaned up", flush=True)', 'print("hangs", flush=True); time.sleep(60)')
    with subprocess.Popen(
        [sys.executable, "-c", START.format(statement)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.stdout.readline() == "hangs\n"
        begin = time.monotonic()
        process.terminate()
        assert process.wait(timeout=30) == -signal.SIGTERM
    assert time.monotonic() - begin < 10


def test_another_signal_leaves_a_clean_up_in_peace():
    """As after Ctrl-C in a terminal, which reaches a script and its commands, and the script then ends the commands."""
    clean_up = 'print("cleans up", flush=True); time.sleep(1); print("cleaned up", flush=True)'
    statement = WAIT.replace('print("cleaned up", flush=True)', clean_up)
    with subprocess.Popen(
        [sys.executable, "-c", START.format(statement)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "cleans up\n"
        process.terminate()
        out, text = process.communicate(timeout=30)
    assert (process.returncode, out, text) == (130, "cleaned up\n", "interrupted\n")


def test_a_forked_worker_ends_by_sigterm_without_a_word():
    statement = """import multiprocessing
    context = multiprocessing.get_context("fork")
    started = context.Event()
    worker = context.Process(target=lambda: (started.set(), time.sleep(60)))
    worker.start(); started.wait(); worker.terminate(); worker.join(); print(worker.exitcode)"""
    assert run(statement) == (0, f"{-signal.SIGTERM}\n", "")
