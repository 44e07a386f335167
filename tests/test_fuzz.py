"""A slice of the fuzzer, `python -m tests.fuzz`: no traceback and no hang on broken input."""

from tests import fuzz

SECONDS = 20


def test_no_broken_input_ends_in_a_traceback_or_hangs(monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    report = fuzz.run(SECONDS, seed=20261126)
    assert report.failures == []
    assert report.refused > 0
