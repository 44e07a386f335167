"""The benchmarks by name. A benchmark is one file here and one line in the table; its order is that of all tables."""

import difflib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module

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

    Raises:
        InputError: there is none of this name; lists those there are, and the closest.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    closest = difflib.get_close_matches(name, BENCHMARKS, n=1)
    hint = f"; did you mean {closest[0]!r}?" if closest else ""
    raise InputError(f"no benchmark {name!r}; known: {', '.join(BENCHMARKS)}{hint}")
