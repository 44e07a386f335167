"""The tests that run on any device, on the accelerator."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from scripts.gpu.parts import Figures, Scale, Skip, Steps

ROOT = Path(__file__).parents[2]
FILES = ("tests/test_generation.py", "tests/model/test_parity.py", "tests/model/test_batch_invariance.py")


def make_steps(scale: Scale, out: Path) -> Steps:
    files = FILES[:1] if scale.is_rehearsal else FILES
    return {file: partial(run_tests, scale, file) for file in files}


def run_tests(scale: Scale, file: str) -> Figures:
    """Run one file of tests and count."""
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed")
    device = "cpu" if scale.device.type == "cpu" else f"{scale.device.type}:0"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-p", "no:cacheprovider", "-m", "not slow", f"--junitxml={report}"]
        environment = os.environ | {"LLAVA_TEST_DEVICE": device, "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, "-m", "pytest", file, *options], cwd=ROOT, env=environment, check=False)
        suite = ElementTree.parse(report).getroot()[0]
    failed = [case.get("name") for case in suite if case.find("failure") is not None or case.find("error") is not None]
    total, skipped = int(suite.get("tests")), int(suite.get("skipped"))
    return {"num_passed": total - skipped - len(failed), "num_skipped": skipped, "failed": failed}
