"""What the engine vllm says where vLLM is not installed; tests/engines test it where it is."""

import pytest

from llava.errors import InputError
from llava.serve.vllm_engine import VllmEngine
from tests.families import GOLDEN


def test_a_missing_vllm_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.serve.vllm_engine.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"the engine vllm needs the package vllm: pip install -e '\.\[vllm\]'"):
        VllmEngine(str(GOLDEN / "llava-v1.5-tiny84"))
