"""Which precisions DeepSpeed takes on a device is asked before anything loads, with either answer on every machine."""

from types import SimpleNamespace

import pytest
import torch

from llava.errors import InputError
from llava.train.engine import check_precision

accelerator = pytest.importorskip("deepspeed.accelerator", reason="DeepSpeed is for Linux")


def pretend(monkeypatch: pytest.MonkeyPatch, fp16: bool | None, bf16: bool) -> None:
    """Give DeepSpeed a device that computes in these precisions; it answers None for fp16 that a CPU has not."""
    device = SimpleNamespace(is_fp16_supported=lambda: fp16, is_bf16_supported=lambda: bf16, device_name=lambda: "cpu")
    monkeypatch.setattr(accelerator, "get_accelerator", lambda: device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_device_that_has_a_precision_trains_in_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    pretend(monkeypatch, fp16=True, bf16=True)
    check_precision(dtype)


def test_fp16_is_refused_where_the_processor_has_none(monkeypatch: pytest.MonkeyPatch):
    pretend(monkeypatch, fp16=None, bf16=True)
    check_precision(torch.bfloat16)
    with pytest.raises(InputError) as caught:
        check_precision(torch.float16)
    assert str(caught.value) == (
        "--fp16 True: DeepSpeed does not compute in fp16 on this cpu device; use --bf16 True "
        "(scripts: PRECISION=bf16), or float32, without either flag (scripts: PRECISION=fp32)"
    )


def test_bf16_is_refused_where_the_device_has_none(monkeypatch: pytest.MonkeyPatch):
    pretend(monkeypatch, fp16=True, bf16=False)
    with pytest.raises(InputError, match=r"--bf16 True: .* use --fp16 True \(scripts: PRECISION=fp16\), or float32"):
        check_precision(torch.bfloat16)


def test_only_float32_is_offered_where_there_is_nothing_else(monkeypatch: pytest.MonkeyPatch):
    pretend(monkeypatch, fp16=False, bf16=False)
    check_precision(torch.float32)
    with pytest.raises(InputError, match=r"on this cpu device; use float32, without either flag"):
        check_precision(torch.float16)
