"""How much memory there is, and how much a piece of work takes at its peak."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

PROCESS = Path("/proc/self")
KIBIBYTE = 1024
RESET_PEAK = "5"  # proc(5): writing 5 to clear_refs sets VmHWM back to the present resident size


def available_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device, or None where the system does not tell."""
    if device.type != "cpu":
        return torch.accelerator.get_memory_info(device)[0]
    return _read_kibibytes(Path("/proc/meminfo"), "MemAvailable")


def resident_bytes() -> int | None:
    """Memory of this process that is not backed by files (weights read through mmap are), or None."""
    return _read_kibibytes(PROCESS / "status", "RssAnon")


def peak_resident_bytes() -> int | None:
    """Largest resident size of this process so far, file-backed pages included, or None."""
    return _read_kibibytes(PROCESS / "status", "VmHWM")


# The members of glibc's `struct mallinfo2` (man 3 mallinfo), each a size_t.
_COUNTS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _HeapCounts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _COUNTS]


def heap_bytes() -> int | None:
    """Memory in use on the C library's main heap and in blocks of their own, or None where it does not tell.

    `resident_bytes` also counts what was freed and is kept for later.
    """
    try:
        count = ctypes.CDLL(None).mallinfo2
    except (OSError, TypeError, AttributeError):
        return None
    count.restype = _HeapCounts
    counts = count()
    return counts.uordblks + counts.hblkhd


def measure_peak(work: Callable[[], object], device: torch.device) -> int | None:
    """Run something and tell what it took on top of what was there before.

    Args:
        work: what to run.
        device: on an accelerator its allocator is asked, on the CPU the resident size of the process.

    Returns:
        Bytes, or None where the system does not tell.
    """
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
        before = torch.accelerator.memory_allocated(device)
        torch.accelerator.reset_peak_memory_stats(device)
        work()
        torch.accelerator.synchronize(device)
        return torch.accelerator.max_memory_allocated(device) - before
    if not release_memory():
        return None
    before = _read_kibibytes(PROCESS / "status", "VmRSS")
    work()
    peak = peak_resident_bytes()
    return None if before is None or peak is None else max(0, peak - before)


def release_memory() -> bool:
    """Give freed memory back to the system and forget the peak so far; False where the system can't."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (PROCESS / "clear_refs").write_text(RESET_PEAK)
    except (OSError, AttributeError):
        return False
    return True


def _read_kibibytes(path: Path, field: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * KIBIBYTE
    return None
