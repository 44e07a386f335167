"""Every command that a document shows is one: its script exists, and its own parser takes its options."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    *(ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))),
    *(ROOT / "playground/shapes/README.md", ROOT / "playground/data/eval/README.md"),
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
OTHERS = {
    "pip",
    "uv",
    "conda",
    "docker",
    "sbatch",
    "srun",
    "torchrun",
    "git",
    "cd",
    "source",
    "printf",
    "export",
    "curl",
    "cp",
}
"""Commands that are not ours."""
OTHER_MODULES = {"venv", "pip", "pytest", "lmms_eval"}
# Runs each command until its options are read, in one process; prints those that are refused.
PARSE_EACH = """
import argparse, contextlib, io, json, os, runpy, sys

class Parsed(Exception):
    pass

def stop_behind(usual):
    def parse(self, *given, **named):
        parse.depth += 1
        try:
            read = usual(self, *given, **named)
        finally:
            parse.depth -= 1
        if not parse.depth:
            raise Parsed
        return read
    parse.depth = 0
    return parse

argparse.ArgumentParser.parse_args = stop_behind(argparse.ArgumentParser.parse_args)
for words in json.loads(sys.argv[1]):
    sys.argv, out = list(words), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        print(words, "read no options", flush=True)
    except Parsed:
        pass
    except SystemExit:
        print(words, out.getvalue()[-300:], flush=True)
    loaded = [name for name in ("torch", "transformers") if name in sys.modules]
    if loaded:
        print(words, "loaded", loaded, flush=True)
        os._exit(0)
"""


def list_shown() -> Iterator[tuple[str, list[str]]]:
    """Yield each command of each block of shell, by document, without comments and the variables in front."""
    for document in DOCUMENTS:
        for kind, block in FENCE.findall(document.read_text(encoding="utf-8")):
            if kind != "bash":
                continue
            for line in block.replace("\\\n", " ").splitlines():
                # Brackets around what may be left out, and `>FILE`, are not words.
                line = re.sub(r"\[(-- [^\]]*|[A-Z_]+|--[^\]]*)\]", r"\1", line)
                words = shlex.split(re.sub(r"\s>\s?\S+|\s&(?=\s|$)(?!&)", " ", line), comments=True)
                for command in split_at(words, "&&"):
                    while command and re.match(r"[A-Za-z_]+=", command[0]):
                        command = command[1:]
                    if command:
                        yield document.name, command


def split_at(words: list[str], mark: str) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word == mark:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def find_module(command: list[str]) -> list[str] | None:
    """Return module and arguments of a command in Python; of a benchmark's script what it hands on."""
    if re.fullmatch(r"(\S*/)?python3?", command[0]) and command[1:2] == ["-m"]:
        return command[2:]
    if command[0] == "bash" and (found := re.fullmatch(r"scripts/v1_5/eval/(\w+)\.sh", command[1])):
        options = command[command.index("--") + 1 :] if "--" in command else []
        return ["llava.eval", "answer", found[1], "--model-path", "CKPT", "--answers", "FILE", *options]
    return None


def test_every_documented_script_is_there_and_every_other_command_is_known() -> None:
    seen = 0
    for document, command in list_shown():
        if command[0] == "bash":
            script = command[1]
            assert "<" in script or (ROOT / script).is_file(), f"{document}: {script}"
            seen += 1
        elif find_module(command) is None:
            assert Path(command[0]).name in OTHERS, f"{document}: {' '.join(command)}"
    assert seen >= 20


def test_every_documented_command_is_taken_by_its_own_parser() -> None:
    shown = []
    for _, command in list_shown():
        words = find_module(command)
        if words is None or words[0] in OTHER_MODULES:
            continue
        shown.append(["8" if word == "N" else word for word in words])
    assert len(shown) > 40
    done = subprocess.run(
        [sys.executable, "-c", PARSE_EACH, json.dumps(shown)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.slow
def test_the_page_about_own_data_runs_from_top_to_bottom(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    pytest.importorskip("matplotlib")
    for name in ("llava", "scripts", "playground"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "data"))
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    settings = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    settings["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{settings['PATH']}"
    printed = ""
    for kind, block in FENCE.findall((ROOT / "docs/your_data.md").read_text(encoding="utf-8")):
        command = [sys.executable, "-c", block] if kind == "python" else ["bash", "-euc", block]
        done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}\n{done.stderr[-2000:]}"
        printed += done.stdout + done.stderr
    assert "learns: record 0" in printed and "of 64 kept" in printed and "written to my_data/kept.png" in printed
