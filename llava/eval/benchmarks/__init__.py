"""The benchmarks by name. A benchmark is one file here and one line in the table; its order is that of all tables."""

import difflib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from inspect import isabstract
from pathlib import Path

from llava.errors import InputError
from llava.eval.benchmark import Benchmark

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
        InputError: there is no such file, or it defines no benchmark, or several.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}; TASK is a name of `python -m llava.eval list`, or a .py file")
    spec = spec_from_file_location(path.stem, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    classes = [each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__]
    own = [each for each in classes if issubclass(each, Benchmark) and not isabstract(each)]
    if len(own) != 1:
        raise InputError(f"{path} must define one subclass of llava.eval.benchmark.Benchmark, not {len(own)}")
    return own[0]()
