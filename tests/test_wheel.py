"""The wheel alone, outside the repository: its files are all there, and the main commands work."""

import os
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECKPOINT = "checkpoints/llava-shapes-trim"
COMMANDS = {
    "llava.eval.run_llava --model-path {} --image-file shapes.png --query 'Where is the star?'": "of 64 kept",
    "llava.visualize --model-path {} --image-file shapes.png --query 'Where is it?' --out k.png": "written to k.png",
    "llava.eval run pope run {} results.txt '' -- --batch-size 4": "POPE (Avg. F1)",
    "llava.serve.api --help": "--allow-files DIR",
    "llava.train.train --help": "--model_name_or_path",
}
"""Each with a piece of what it prints."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's package in `site`, checkpoints, an image and a benchmark, and nothing else of ours."""
    pytest.importorskip("setuptools", minversion="77", reason="it builds the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # building leaves files beside pyproject.toml
    source.mkdir()
    shutil.copytree(ROOT / "llava", source / "llava", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "--wheel-dir",
        str(folder),
        "./source",
    ]
    subprocess.run([sys.executable, *build], cwd=folder, check=True, capture_output=True)
    (wheel,) = folder.glob("llava-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    shutil.rmtree(source)
    shutil.copytree(ROOT / "playground/shapes/checkpoints", folder / "checkpoints")
    shutil.copy(ROOT / "docs/figures/shapes.png", folder)
    generate = ["--out", str(folder), "--train-images", "0", "--calibrate-images", "0", "--eval-images", "2"]
    command = [sys.executable, "-m", "playground.shapes.generate", *generate, "--benchmarks", "pope"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def test_the_wheel_holds_every_file_of_the_package(installed: Path) -> None:
    ours = {path.relative_to(ROOT) for path in (ROOT / "llava").rglob("*") if "__pycache__" not in path.parts}
    theirs = {path.relative_to(installed / "site") for path in (installed / "site").rglob("*")}
    assert {path for path in ours if (ROOT / path).is_file()} <= theirs
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (metadata,) = (installed / "site").glob("*.dist-info/METADATA")
    for extra in project["optional-dependencies"]:
        assert f"Provides-Extra: {extra}\n" in metadata.read_text(encoding="utf-8")


def run(arguments: list[str], folder: Path) -> str:
    """Run Python with the wheel's package in a folder; returns all that it printed."""
    settings = os.environ | {"PYTHONPATH": str(folder / "site"), "LLAVA_EVAL_ROOT": str(folder / "eval")}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def test_the_wheels_package_is_the_one_that_is_run(installed: Path) -> None:
    assert run(["-c", "import llava; print(llava.__file__)"], installed).startswith(str(installed / "site"))


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[0])
def test_a_command_works_from_the_wheel(command: str, installed: Path) -> None:
    assert COMMANDS[command] in run(["-m", *shlex.split(command.format(CHECKPOINT))], installed)
