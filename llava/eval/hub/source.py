"""What a benchmark's hub dataset is, and how its rows become the published files."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from tqdm import tqdm

from llava.eval.hub.layout import Layout
from llava.eval.hub.table import HubRow, Tables, read_rows


class HubSource(ABC):
    """The hub's form of a benchmark (or of one split of it).

    Attributes:
        dataset: name on the hub.
        tables: what is read of it, by a name for `rows`.
        files: the files other than pictures that `convert` writes.
    """

    dataset: ClassVar[str]
    tables: ClassVar[Tables]
    files: ClassVar[tuple[str, ...]]

    @abstractmethod
    def convert(self, rows: "Rows", layout: Layout) -> None:
        """Write the published files.

        Args:
            rows: gives the rows of a table by its name.
            layout: where the files go.

        Raises:
            InputError: the dataset cannot be read, or has not what is needed.
        """


class Rows:
    """The tables of a source, read from a dataset, with a progress bar each."""

    def __init__(self, source: HubSource, dataset: str):
        """Take the source and the name or folder of the dataset."""
        self.source = source
        self.dataset = dataset

    def __getitem__(self, name: str) -> Iterator[HubRow]:
        """Read a table from its start."""
        table = self.source.tables[name]
        return iter(tqdm(read_rows(self.dataset, table), desc=f"{self.dataset}, {table}", unit="row"))
