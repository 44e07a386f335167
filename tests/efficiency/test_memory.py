import ctypes

import pytest

from llava.efficiency.memory import heap_bytes


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library is not glibc 2.33 or newer")
@pytest.mark.parametrize("size", [2**16, 2**24])  # from the heap, and mapped by itself
def test_memory_in_use_on_the_heap_grows_with_a_block_and_shrinks_when_it_is_freed(size: int) -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    before = heap_bytes()
    block = libc.malloc(size)
    during = heap_bytes()
    libc.free(block)
    assert size <= during - before < 2 * size
    assert heap_bytes() - before < size // 2


def test_a_c_library_that_does_not_tell_gives_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert heap_bytes() is None
