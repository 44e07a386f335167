"""What the C library does with freed memory, for models that run on the CPU."""

import ctypes

# Names and values of <malloc.h> of glibc (man 3 mallopt).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
KEPT_BYTES = 2**30
GROWTH_BYTES = 2**26


def keep_freed_memory() -> bool:
    """Let the process keep up to a GiB of freed memory for its next tensors, from now on.

    By default glibc hands the memory of large tensors back as soon as they are gone, and the system clears every page
    anew for the next ones: thousands of page faults per pass of a language model, a quarter of the time of a batch of
    short prompts. The process then stays near its peak size instead of shrinking between batches.

    Returns:
        Whether the C library has such a setting (glibc has).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # no glibc; on Windows there is no library without a name
        return False
    settings = {M_MMAP_THRESHOLD: KEPT_BYTES, M_TRIM_THRESHOLD: KEPT_BYTES, M_TOP_PAD: GROWTH_BYTES}
    return all(mallopt(name, value) == 1 for name, value in settings.items())
