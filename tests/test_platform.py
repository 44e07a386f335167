"""Systems other than the one that the tests run on: old shells, Pythons without the packages, no POSIX calls."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava import packages
from llava.packages import EXTRAS, NEEDED, NEEDED_BY_SOME, OLDEST_PYTHON
from llava.signals import is_alive

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SCRIPTS = [
    *sorted((ROOT / "scripts").rglob("*.sh")),
    ROOT / "playground" / "shapes" / "train.sh",
    ROOT / "eval_all_benchmarks.sh",
    ROOT / ".ci" / "run",
]
# Not in bash 3.2, the one of macOS; and options that only GNU's tools have.
FORBIDDEN = {
    "mapfile": r"\b(mapfile|readarray)\b",
    "associative array": r"\b(declare|local|typeset|readonly) +-[a-zA-Z]*[Agn]",
    "${x@Q}": r"\$\{\w+(\[[^]]*\])?@[A-Za-z]\}",
    "${x^^}": r"\$\{\w+(\[[^]]*\])?(\^|,)",
    "wait -n": r"\bwait +-",
    "coproc": r"\bcoproc\b",
    "|& or &>>": r"\|&|&>>",
    "exec {fd}": r"\{\w+\}[<>]",
    "negative index": r"\[-\d+\]",
    "printf %(time)T": r"%\([^)]*\)T",
    "[[ -v": r"\[\[ +(! +)?-v ",
    "shopt": r"\b(globstar|lastpipe|inherit_errexit)\b",
    "EPOCHSECONDS": r"\b(EPOCHSECONDS|EPOCHREALTIME|BASHPID)\b",
    "sed -i or -r": r"\bsed +-[a-z]*[ir]",
    "GNU only": r"\b(realpath|readlink +-f|timeout|nproc|tac|stat +-c|date +-d|grep +-[a-z]*P|setsid)\b",
}
# Training is for machines with GPUs: Linux, bash 4.4 or newer.


def code_lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_run_in_bash_3_2_and_with_bsd_tools(script: Path) -> None:
    found = [(name, line) for line in code_lines(script) for name, form in FORBIDDEN.items() if re.search(form, line)]
    assert not found


@pytest.mark.parametrize(
    "line",
    ["mapfile -t A < <(x)", "declare -A X=()", "local -n x=y", "echo ${x@Q}", "echo ${x[0]@Q}", "wait -n", "x |& y",
     "echo ${x^^}", "exec {fd}>file", "echo ${x[-1]}", "sed -i s/a/b/ f", "timeout 5 x", "[[ -v x ]]"],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    assert any(re.search(form, line) for form in FORBIDDEN.values())


# ---------------------------------------------------------------------------------------------------- the right Python
@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python without any package."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin" / "python"


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    drop = ("PYTHON", "PYTHONPATH", "DRY_RUN", "CDPATH", "CUDA_VISIBLE_DEVICES", "NUM_GPUS")
    settings = {name: value for name, value in os.environ.items() if name not in drop} | environment
    return subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True, timeout=120, check=False)


COMMANDS = {
    "eval": ["scripts/v1_5/eval/pope.sh", "run", "ckpt"],
    "eval help": ["scripts/v1_5/eval/gqa.sh", "--help"],
    "all": ["eval_all_benchmarks.sh", "plain=owner/name"],
    "demo": ["scripts/demo.sh"],
    "test": ["scripts/test.sh"],
    "shapes": ["playground/shapes/train.sh"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_script_without_the_packages_ends_in_one_line(command: str, bare: Path, tmp_path: Path) -> None:
    script, *arguments = COMMANDS[command]
    done = run(["bash", str(ROOT / script), *arguments], tmp_path, PYTHON=str(bare), DRY_RUN="1")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: Python at {bare} lacks torch, ")
    assert f"'{bare} -m pip install -c constraints.txt -e .'" in line


@pytest.mark.parametrize("module", ["llava.eval", "llava.eval.run_llava", "llava.serve.cli", "llava.calibrate"])
def test_a_command_without_the_packages_ends_in_one_line(module: str, bare: Path) -> None:
    done = run([str(bare), "-m", module, "--help"], ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: Python at {bare} lacks torch, ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("missing", ["PIL.no_such_part", "llava.no_such_module", "some_other_package"])
def test_other_missing_modules_keep_their_traceback(missing: str) -> None:
    code = f"import sys; sys.argv = ['-m']; import llava; import {missing}"
    done = run([sys.executable, "-c", code], ROOT)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_program_that_imports_llava_keeps_its_traceback(bare: Path) -> None:
    done = run([str(bare), "-c", "import llava; import torch"], ROOT)
    assert (done.returncode, "Traceback" in done.stderr) == (1, True)


def test_an_old_python_is_told_so() -> None:
    code = "import sys; sys.argv = ['-m']; sys.version_info = (3, 9, 6, 'final', 0); import llava"
    done = run([sys.executable, "-c", code], ROOT)
    assert done.returncode == 2
    assert done.stderr == f"error: Python at {sys.executable} is version 3.9; 3.11 or newer is needed\n"


def write_fake(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('#!/bin/sh\necho "$0 $*"\n')
    path.chmod(0o755)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The scripts in a repository of their own, called by a relative path; tools of the system without any Python."""
    for name in ("scripts/lib/python.sh", "scripts/v1_5/eval/pope.sh"):
        target = tmp_path / "repo dir" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    (tmp_path / "tools").mkdir()
    for tool in ("bash", "dirname", "sh", "env"):
        where = subprocess.run(["which", tool], capture_output=True, text=True, check=True).stdout.strip()
        (tmp_path / "tools" / tool).symlink_to(where)
    return tmp_path / "repo dir"


def call(copy: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    (copy.parent / "work").mkdir(exist_ok=True)
    script = "../repo dir/scripts/v1_5/eval/pope.sh"
    return run(["bash", script, "a"], copy.parent / "work", PATH=str(copy.parent / "tools"), **environment)


def test_the_repositorys_environment_comes_before_the_path_and_after_python(copy: Path) -> None:
    tools, own = copy.parent / "tools", copy / ".venv" / "bin" / "python"
    arguments = "-m llava.eval run pope a\n"
    done = call(copy)
    assert (done.returncode, done.stderr) == (2, "error: no Python on the PATH: install one, or set PYTHON\n")
    write_fake(tools / "python3")
    assert call(copy).stdout == f"{tools}/python3 {arguments}"
    write_fake(tools / "python")
    assert call(copy, CDPATH=str(copy.parent)).stdout == f"{tools}/python {arguments}"
    write_fake(own)
    assert call(copy).stdout == f"{own} {arguments}"
    write_fake(copy.parent / "work" / "my python")
    assert call(copy, PYTHON="./my python").stdout == f"{copy.parent}/work/my python {arguments}"
    done = call(copy, PYTHON="none")
    assert (done.returncode, done.stderr) == (2, "error: PYTHON=none is no program: unset it, or name a Python\n")


def test_one_place_only_looks_for_python() -> None:
    looking = [path for path in SCRIPTS if any(re.search(r"\$\{PYTHON:-|command -v .*python", line)
                                              for line in code_lines(path))]  # fmt: skip
    names = {path.name for path in looking}
    assert names == {"python.sh", "environment.sh"}  # environment.sh: the Python that creates .venv


# -------------------------------------------------------------------------------------------------------- the packages
def package_names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in requirements}


def test_the_known_packages_are_the_declared_ones() -> None:
    known = package_names([*NEEDED.values(), *NEEDED_BY_SOME.values()])
    assert known == package_names(PROJECT["dependencies"])


def test_a_package_that_comes_with_an_extra_is_declared_there() -> None:
    for package, extra in EXTRAS.values():
        assert package_names([package]) <= package_names(PROJECT["optional-dependencies"][extra])


def test_a_missing_package_of_training_is_told_with_its_extra(bare: Path, tmp_path: Path) -> None:
    done = run([str(bare), str(ROOT / "llava/packages.py"), "deepspeed"], tmp_path)
    install = f"'{bare} -m pip install -c constraints.txt -e .[train]' in the repository"
    assert (done.returncode, done.stdout) == (2, "") and install in done.stderr


def test_an_installed_package_names_what_to_install_without_the_repository(bare: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "llava", tmp_path / "llava", ignore=shutil.ignore_patterns("__pycache__"))
    done = run([str(bare), "llava/packages.py", "deepspeed"], tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "constraints" not in done.stderr and f"run '{bare} -m pip install torch " in done.stderr
    assert done.stderr.endswith("tqdm deepspeed'\n")


@pytest.mark.parametrize("has_environment", [False, True])
def test_a_python_of_the_system_is_told_to_use_an_environment(
    has_environment: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyproject.toml").touch()
    if has_environment:
        (tmp_path / ".venv").mkdir()
        (tmp_path / ".venv/pyvenv.cfg").touch()
    monkeypatch.setattr(packages, "REPOSITORY", str(tmp_path))
    monkeypatch.setattr(packages, "is_managed", lambda: True)
    make = "" if has_environment else "python3 -m venv .venv && "
    then = "" if has_environment else " && pip install -c constraints.txt -e ."
    assert f"lacks torch; run '{make}source .venv/bin/activate{then}' in the repository" in packages.explain_missing(
        ["torch"]
    )


OWN_ENVIRONMENTS = {"demo", "vllm"}
"""Extras whose packages do not go together with the tested set."""


def test_every_dependency_is_pinned() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[1:]
    extras = PROJECT["optional-dependencies"]
    extras = [line for name in extras if name not in OWN_ENVIRONMENTS for line in extras[name]]
    assert package_names([*PROJECT["dependencies"], *extras]) - {"llava"} <= package_names(pins)
    assert len(package_names(pins)) == len(pins)


def test_all_documents_name_the_same_python_versions() -> None:
    versions = [line.rpartition(" ")[2] for line in PROJECT["classifiers"]]
    assert PROJECT["requires-python"] == f">={versions[0]}" == f">={OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]}"
    assert f"Python {versions[0]} to {versions[-1]}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"set -- {' '.join(versions)}\n" in (ROOT / "scripts" / "check_install.sh").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------- no POSIX calls
WITHOUT_POSIX = """
import os, signal, subprocess, sys, warnings
warnings.filterwarnings("ignore", "only soft file lock")  # Windows has a lock of its own
sys.modules["fcntl"] = None
del signal.SIGHUP
del os.set_blocking
signal.set_wakeup_fd = lambda number, warn_on_full_buffer=True: -1  # there it takes pipes that block

class Popen(subprocess.Popen):
    def __init__(self, command, **settings):
        refused = {"pass_fds", "preexec_fn", "start_new_session"} & settings.keys()
        assert not refused, f"{refused} is not supported on Windows"
        super().__init__(command, **settings)

subprocess.Popen = Popen
"""


def run_without_posix(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-c", WITHOUT_POSIX + code], cwd, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")


def test_one_worker_answers_without_locks_of_byte_ranges(tmp_path: Path) -> None:
    done = run_without_posix("""
from pathlib import Path
from llava.errors import InputError
from llava.eval.benchmark import Question
from llava.eval.predictions import PredictionStore, make_row, read_answers
questions = [Question(number, f"Is it {number}?") for number in range(3)]
store = PredictionStore(Path("answers.jsonl"), ("question_id",))
store.open({"model": "m"})
other = PredictionStore(Path("answers.jsonl"), ("question_id",), worker=1)
try:
    other.open({"model": "m"})
except InputError as error:
    print(error)
assert store.claim(0) and store.claim(1)
store.append([make_row(question, "yes", "m", {}) for question in questions])
assert store.finish(questions, questions) == []
assert other.open({"model": "m"}) is None and len(other.done) == 3  # the first one is done
assert other.finish(questions, questions) == []
print(len(read_answers(Path("answers.jsonl"))))
""", tmp_path)  # fmt: skip
    assert done.stdout.splitlines() == [
        "a worker is already at work on answers.jsonl; this system allows only one",
        "3",
    ]
    assert done.returncode == 0, done.stderr


def test_several_workers_are_refused_without_locks(tmp_path: Path) -> None:
    (tmp_path / "data" / "pope").mkdir(parents=True)
    (tmp_path / "models" / "llava").mkdir(parents=True)
    (tmp_path / "models" / "llava" / "config.json").write_text("{}")
    code = """
import os
sys.argv = ["llava.eval", "run", "pope", "a", "models/llava"]
os.environ |= {"DRY_RUN": "1", "LLAVA_EVAL_ROOT": "data", "LLAVA_EVAL_WORKERS": os.environ["COUNT"]}
from llava.errors import run_command
from llava.eval.__main__ import main
run_command(main)
"""
    refused = run([sys.executable, "-c", WITHOUT_POSIX + code], tmp_path, PYTHONPATH=str(ROOT), COUNT="2")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: 2 workers: this system has no locks")
    assert refused.stderr.count("\n") == 1
    alone = run([sys.executable, "-c", WITHOUT_POSIX + code], tmp_path, PYTHONPATH=str(ROOT), COUNT="1")
    assert (alone.returncode, len(alone.stdout.splitlines())) == (0, 2), alone.stderr


def test_signals_and_memory_are_looked_up_where_they_exist(tmp_path: Path) -> None:
    done = run_without_posix("""
import torch
from llava.eval.predict import ASSUMED_MEMORY, CPU_SHARE, usable_bytes
from llava.eval.run import execute
import os
del os.sysconf  # psutil, which transformers imports, has other ways on Windows
print(usable_bytes(torch.device("cpu")) == CPU_SHARE * ASSUMED_MEMORY)
print(execute([sys.executable, "-c", "print('ran')"]))
""", tmp_path)  # fmt: skip
    assert sorted(done.stdout.splitlines()) == ["0", "True", "ran"], done.stderr


@pytest.mark.parametrize(
    ("process", "state", "alive"),
    [(1, "WAIT_TIMEOUT", True), (1, "WAIT_OBJECT_0", False), (2, "", True), (3, "", False)],
)
def test_windows_is_asked_for_a_process_without_signals(
    process: int, state: str, alive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []

    def open_process(access: str, inherit: bool, number: int) -> str:
        if number != 1:
            raise {2: PermissionError, 3: OSError}[number]
        return f"{access} {number}"

    windows = SimpleNamespace(
        SYNCHRONIZE="wait for", WAIT_TIMEOUT="WAIT_TIMEOUT", OpenProcess=open_process, CloseHandle=closed.append,
        WaitForSingleObject=lambda handle, milliseconds: state if milliseconds == 0 else None,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "_winapi", windows)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "kill", None)
    assert is_alive(process) is alive
    assert closed == (["wait for 1"] if process == 1 else [])
