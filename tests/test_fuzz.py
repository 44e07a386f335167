"""A slice of the fuzzer, `python -m tests.fuzz`: no traceback and no hang on broken input."""

import pytest

from tests import fuzz

pytest.importorskip("datasets", reason="training records are read with it")

SECONDS = 20


def test_no_broken_input_ends_in_a_traceback_or_hangs(monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    report = fuzz.run(SECONDS, seed=20261126)
    assert report.failures == []
    assert report.refused > 0
