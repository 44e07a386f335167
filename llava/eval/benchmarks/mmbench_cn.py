"""MMBench-CN: the questions of MMBench in Chinese, asked and scored alike.

File: `mmbench_dev_cn_20231003.tsv`, in the folder `mmbench` (LLaVA's documentation) or `mmbench_cn` (its script). The
last line of each question is Chinese, as LLaVA asks; TRIM's script asks Chinese questions with the English line.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from llava.eval.benchmark import Extent
from llava.eval.benchmarks.mmbench import MmBench, list_tables, make_form
from llava.eval.hub import HubForm
from llava.eval.metrics.choice import CHINESE_LETTER_LINE

TABLE = "mmbench_dev_cn_20231003"


class MmBenchCn(MmBench):
    """MMBench, Chinese dev: the share of questions that are right in every order of their options."""

    name = "mmbench_cn"
    row = "MMBench-CN (Circular)"
    folders = ("mmbench_cn", "mmbench")
    hub: ClassVar[Mapping[str, HubForm]] = {TABLE: make_form("lmms-lab/MMBench", "cn", TABLE)}
    downloads = list_tables(TABLE)
    official: ClassVar[Mapping[str, Extent]] = {TABLE: Extent(4_329)}
    tables = (TABLE,)
    letter_line = CHINESE_LETTER_LINE

    def find_root(self, data_root: Path) -> Path:
        """Return the folder `mmbench` if it has the table, else the first folder that is there."""
        if (data_root / "mmbench" / f"{TABLE}.tsv").is_file():
            return data_root / "mmbench"
        return super().find_root(data_root)
