"""What the process does with freed memory, counted in page faults."""

import ctypes
import subprocess
import sys

import pytest

from llava.eval.allocator import keep_freed_memory

COUNT_FAULTS = """
import resource, sys
import torch
from llava.eval.allocator import keep_freed_memory

torch.set_num_threads(1)
def faults():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(40, 2**18)  # 40 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start

before = faults()
assert keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_tensors_are_used_again_without_a_page_fault() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert before > 100
    assert after < before / 20


def test_a_c_library_without_the_setting_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False
