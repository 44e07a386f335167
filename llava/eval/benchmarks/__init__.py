"""The benchmarks by name. A benchmark is one file here and one line in the table; its order is that of all tables."""

import difflib
import sys
import traceback
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from inspect import getsourcelines, isabstract
from pathlib import Path
from types import ModuleType

from llava.errors import InputError
from llava.eval.benchmark import Benchmark
from llava.files import read_bytes

CLASSES = {
    "vqav2": "Vqav2",
    "gqa": "Gqa",
    "vizwiz": "VizWiz",
    "sqa": "Sqa",
    "textvqa": "TextVqa",
    "pope": "Pope",
    "mme": "Mme",
    "mmbench": "MmBench",
    "mmbench_cn": "MmBenchCn",
    "seed": "Seed",
    "llavabench": "LlavaBench",
    "mmvet": "MmVet",
}
"""The class of each benchmark, in the module `llava.eval.benchmarks.<name>`, which is imported when it is asked for."""


class _Benchmarks(Mapping[str, Benchmark]):
    """The benchmarks by name, each made on first use."""

    def __getitem__(self, name: str) -> Benchmark:
        return _make(name, CLASSES[name])

    def __iter__(self) -> Iterator[str]:
        return iter(CLASSES)

    def __len__(self) -> int:
        return len(CLASSES)


@cache
def _make(name: str, class_name: str) -> Benchmark:
    return getattr(import_module(f"{__name__}.{name}"), class_name)()


BENCHMARKS: Mapping[str, Benchmark] = _Benchmarks()


def find_benchmark(name: str) -> Benchmark:
    """Look a benchmark up.

    Args:
        name: of the table, or the path of a `.py` file with one benchmark of the user's own.

    Raises:
        InputError: there is none of this name; lists those there are, and the closest. Or the file has none.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    if name.endswith(".py"):
        return load_benchmark(Path(name).expanduser())
    closest = difflib.get_close_matches(name, BENCHMARKS, n=1)
    hint = f"; did you mean {closest[0]!r}?" if closest else ""
    raise InputError(f"no benchmark {name!r}; known: {', '.join(BENCHMARKS)}{hint}")


@cache
def load_benchmark(path: Path) -> Benchmark:
    """Make the benchmark that a Python file outside of this package defines; the file's code runs.

    Raises:
        InputError: there is no such file, its code fails, or it defines no whole benchmark, or several.
    """
    read_bytes(path, "TASK is a name of `python -m llava.eval list`, or a .py file")
    try:
        module = _import_file(path)
        classes = [each for each in vars(module).values() if isinstance(each, type)]
        own = [each for each in classes if issubclass(each, Benchmark) and each.__module__ == module.__name__]
        if len(own) > 1:
            own = [each for each in own if not isabstract(each)]  # without what they share
        if len(own) != 1:
            raise InputError(f"{path} must define one subclass of llava.eval.benchmark.Benchmark, not {len(own)}")
        _check_class(own[0], path)
        return own[0]()
    except InputError:
        raise
    except Exception as error:  # whatever the file's code does
        raise InputError(_explain(error, path)) from error


def _import_file(path: Path) -> ModuleType:
    """Run a file as a module of a name that no other module has; dataclasses look their module up by it."""
    spec = spec_from_file_location(f"benchmark_{path.stem}", path)
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check_class(kind: type[Benchmark], path: Path) -> None:
    """Refuse a benchmark that lacks a method or an attribute that every benchmark has."""
    where = f"{path} line {getsourcelines(kind)[1]}: class {kind.__name__}"
    if isabstract(kind):
        raise InputError(f"{where} needs the method {', '.join(sorted(kind.__abstractmethods__))}")
    for name in ("name", "row"):
        if not isinstance(getattr(kind, name, None), str):
            raise InputError(f'{where} needs the attribute {name}, a string, such as {name} = "colors"')
    folders = getattr(kind, "folders", None)
    if not isinstance(folders, tuple) or not folders or not all(isinstance(folder, str) for folder in folders):
        raise InputError(f'{where} needs the attribute folders, a tuple of strings, such as folders = ("colors",)')


def _explain(error: Exception, path: Path) -> str:
    """Say what is wrong with a file's code, and in which line."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{error.filename} line {error.lineno}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    where = f"{path} line {lines[-1]}" if lines else str(path)
    return f"{where}: {type(error).__name__}: {error}"
