"""Other authors' methods: the answers of their own code (tests/golden/methods)."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden_methods import CHECKS, METHODS, count_agreements, read_cases

FILES = sorted(METHODS.glob("*.npz"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_method_gives_what_the_authors_code_gives(path):
    agreed, missed = count_agreements(path)
    assert agreed and not missed


def test_every_method_with_a_check_has_recorded_answers():
    assert {path.stem.removesuffix("_a") for path in FILES} == set(CHECKS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_wrong_answer_is_noticed(path):
    case = next(case for _, case in read_cases(path) if case["robust"])
    answer = next(key for key in ("keep_idx", "keep_idx_cls0", "order_idx") if key in case)
    assert CHECKS[path.stem.removesuffix("_a")](case)
    wrong = case[answer].copy()
    wrong.flat[-1] = wrong.flat[-1] - 1 if wrong.flat[-1] else wrong.flat[-1] + 1
    assert not CHECKS[path.stem.removesuffix("_a")](case | {answer: wrong})


def test_the_command_prints_a_line_per_file_and_fails_on_an_empty_folder(tmp_path):
    command = [sys.executable, "-m", "tests.golden_methods"]
    root = Path(__file__).parents[2]
    done = subprocess.run([*command, tmp_path], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 1 and "holds no npz file" in done.stderr
