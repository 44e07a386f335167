"""The pocket model with wider heads, which vLLM has on a CPU, is the pocket model."""

from pathlib import Path

import pytest
import torch

from llava import Llava
from llava.errors import InputError
from playground.shapes.wide_heads import CHECKPOINTS, NAME, write_wide_heads
from playground.shapes.world import draw_scene


@torch.inference_mode()
def test_wider_heads_leave_logits_and_answers_as_they_are(tmp_path: Path) -> None:
    write_wide_heads(tmp_path / "wide")
    narrow, wide = (Llava.from_pretrained(path, device="cpu") for path in (CHECKPOINTS / NAME, tmp_path / "wide"))
    assert wide.model.config.head_dim == 64 != narrow.model.config.head_dim
    embeds = 0.1 * torch.randn(1, 80, 192, generator=torch.Generator().manual_seed(0))
    logits = [llava.model(inputs_embeds=embeds).logits for llava in (narrow, wide)]
    torch.testing.assert_close(*logits, atol=2e-4, rtol=0)
    images = [draw_scene(5, 7, number)[0] for number in range(3)]
    asked = [(image, "Describe the image.") for image in images]
    answers = [[answer.text for answer in llava.ask_many(asked)] for llava in (narrow, wide)]
    assert answers[0] == answers[1] and len(set(answers[0])) > 1


def test_what_it_cannot_write_is_one_line(tmp_path: Path) -> None:
    for width in (48, 63):
        with pytest.raises(InputError, match=f"width {width}: expected an even number above 48"):
            write_wide_heads(tmp_path / "wide", width=width)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="holds files already"):
        write_wide_heads(tmp_path)
