"""Tensors that may be asked for again, up to a number of bytes; what was used longest ago leaves first."""

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """A bounded cache that several threads use.

    Attributes:
        max_bytes: what the values take at most, together.
        num_bytes: what they take now.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._values)

    def find(self, key: Hashable) -> Value | None:
        """Return a value, which counts as used now; None where it is not there."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def keep(self, key: Hashable, value: Value, num_bytes: int) -> None:
        """Keep a value, at the cost of older ones; one that is larger than everything allowed is not kept."""
        with self._lock:
            if key in self._values:
                self.num_bytes -= self._values.pop(key)[1]
            if num_bytes > self.max_bytes:
                return
            self._values[key] = value, num_bytes
            self.num_bytes += num_bytes
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= self._values.popitem(last=False)[1][1]
