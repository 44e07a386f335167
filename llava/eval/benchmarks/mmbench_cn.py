"""MMBench-CN: the questions of MMBench in Chinese, asked and scored alike.

File: `mmbench_dev_cn_20231003.tsv`, in the folder `mmbench_cn` or `mmbench`. The last line of each question is Chinese,
as LLaVA asks; TRIM's script asks Chinese questions with the English line.
"""

from collections.abc import Mapping
from typing import ClassVar

from llava.eval.benchmarks._hub_mmbench import MMBenchChinese
from llava.eval.benchmarks.mmbench import MmBench
from llava.eval.hub import HubForm
from llava.eval.metrics.choice import CHINESE_LETTER_LINE


class MmBenchCn(MmBench):
    """MMBench, Chinese dev: the share of questions that are right in every order of their options."""

    name = "mmbench_cn"
    row = "MMBench-CN (Circular)"
    folders = ("mmbench_cn", "mmbench")
    hub: ClassVar[Mapping[str, HubForm]] = {"mmbench_dev_cn_20231003": MMBenchChinese()}
    tables = ("mmbench_dev_cn_20231003",)
    letter_line = CHINESE_LETTER_LINE
