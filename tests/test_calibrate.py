"""The sign's measurement: boxes to patches, figures of planted cases, input errors, the command itself."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from llava import calibrate
from llava.calibrate import (
    OPTIONS,
    Figures,
    LabelledImage,
    choose_option,
    cover_cells,
    measure_option,
    read_labelled_images,
)
from llava.errors import InputError
from llava.model.token_reduction import VisualTokens

GRID = (4, 4)


def plant(sign: float, count: int = 6, grid: int = 8) -> tuple[VisualTokens, Tensor]:
    """Pictures whose object, three patches, has a dot product of `sign` x 8 with its query; the others nearly 0."""
    generator = torch.Generator().manual_seed(0)
    inside = torch.zeros(count, grid * grid, dtype=torch.bool)
    inside[:, 10:13] = True
    joint = 0.05 * torch.randn(count, grid * grid, 4, generator=generator)
    joint[..., 0] += sign * 8 * inside
    text = torch.tensor([1.0, 0, 0, 0]).expand(count, 4)
    return VisualTokens(joint, (grid, grid), joint, text), inside


def test_a_box_covers_the_cells_it_half_fills() -> None:
    cells = cover_cells([(0, 0, 20, 10)], (40, 40), GRID).view(GRID)
    assert cells.nonzero().tolist() == [[0, 0], [0, 1]]


def test_a_small_box_owns_the_cell_it_lies_in() -> None:
    cells = cover_cells([(31, 21, 33, 23)], (40, 40), GRID).view(GRID)
    assert cells.nonzero().tolist() == [[2, 3]]


def test_boxes_follow_the_padding_to_a_square() -> None:
    wide = cover_cells([(0, 0, 10, 10)], (40, 20), GRID).view(GRID)
    tall = cover_cells([(0, 0, 10, 10)], (20, 40), GRID).view(GRID)
    assert wide.nonzero().tolist() == [[1, 0]]
    assert tall.nonzero().tolist() == [[0, 1]]


def test_cells_that_do_not_fill_the_picture_are_as_large_as_patches() -> None:
    box = [(35, 0, 40, 40)]
    assert cover_cells(box, (40, 40), GRID).view(GRID).nonzero()[:, 1].unique().tolist() == [3]
    assert cover_cells(box, (40, 40), GRID, covered=0.9).view(GRID).nonzero().tolist() == [[0, 3]]  # owns one
    assert cover_cells([(37, 0, 40, 9)], (40, 40), GRID, covered=0.9).view(GRID).nonzero().tolist() == [[0, 3]]
    assert cover_cells([(27, 0, 36, 40)], (40, 40), GRID, covered=0.9).view(GRID)[0].tolist() == [False] * 3 + [True]


def test_boxes_do_not_depend_on_the_picture_scale() -> None:
    small = cover_cells([(3, 4, 17, 19)], (20, 30), GRID)
    large = cover_cells([(30, 40, 170, 190)], (200, 300), GRID)
    assert torch.equal(small, large)


@pytest.mark.parametrize(("sign", "option"), [(-1.0, OPTIONS[0]), (1.0, OPTIONS[1])])
def test_the_planted_sign_is_found(sign: float, option: str) -> None:
    tokens, inside = plant(sign)
    best = choose_option([measure_option(each, tokens, inside) for each in OPTIONS])
    assert best is not None
    assert best.option == option
    assert best.recall == 1 and best.auc == 1


def test_no_sign_fits_where_nothing_is_planted() -> None:
    tokens, inside = plant(0.0)
    assert choose_option([measure_option(each, tokens, inside) for each in OPTIONS]) is None


def test_the_two_signs_have_opposite_auc() -> None:
    tokens, inside = plant(-0.01)
    negated, direct = (measure_option(each, tokens, inside).auc for each in OPTIONS)
    assert negated + direct == pytest.approx(1, abs=1e-4)


def test_gain_is_what_random_patches_would_not_find() -> None:
    assert Figures("TRIM:-1", kept_ratio=0.2, recall=0.7, precision=0.3, auc=0.8).gain == pytest.approx(0.5)


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        '{"image": "a.png", "query": "?", "boxes": []}',
        '{"image": "a.png", "query": "?", "boxes": [[5, 5, 5, 9]]}',
        '{"image": "a.png", "query": "?", "boxes": [[1, 2, 3]]}',
        '{"query": "?", "boxes": [[0, 0, 1, 1]]}',
    ],
)
def test_a_bad_line_is_told_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "pictures.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 1: expected"):
        read_labelled_images(path)


def test_missing_and_empty_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_labelled_images(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="no images"):
        read_labelled_images(tmp_path / "empty.jsonl")


def test_image_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    row = {"image": "images/a.png", "query": "Is it?", "boxes": [[0, 0, 4, 4]]}
    (tmp_path / "pictures.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert read_labelled_images(tmp_path / "pictures.jsonl") == [
        LabelledImage(tmp_path / "images" / "a.png", "Is it?", ((0.0, 0.0, 4.0, 4.0),))
    ]


class StubTower:
    """A tower whose joint space is the mean colour of a cell, and whose query is always `red`, negated."""

    grid = GRID
    covered, has_cls = 1.0, True
    device, dtype = torch.device("cpu"), torch.float32
    image_processor = None

    def encode(self, images: Tensor) -> Tensor:
        """Mean colours, [I, 16, 3]."""
        return torch.nn.functional.adaptive_avg_pool2d(images, GRID).flatten(2).transpose(1, 2)

    def project_to_joint(self, patches: Tensor) -> Tensor:
        """The colours as they are."""
        return patches

    def embed_text(self, texts: list[str]) -> Tensor:
        """Against red."""
        return torch.tensor([[-1.0, 0, 0]]).repeat(len(texts), 1)


def test_pictures_are_measured_through_the_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    for index in range(3):
        picture = Image.new("RGB", (64, 32))
        picture.paste((255, 0, 0), (16 * index, 0, 16 * index + 16, 16))
        picture.save(tmp_path / f"{index}.png")
        rows.append(LabelledImage(tmp_path / f"{index}.png", "red?", ((16 * index, 0, 16 * index + 16, 16),)))

    def pad(pictures: list[Image.Image], tower: object) -> Tensor:
        squares = torch.zeros(len(pictures), 3, 64, 64)
        for square, picture in zip(squares, pictures, strict=True):
            data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            square[:, 16:48] = data.view(32, 64, 3).permute(2, 0, 1) / 255
        return squares

    monkeypatch.setattr(calibrate, "prepare", pad)
    negated, direct = calibrate.calibrate(StubTower(), rows)
    assert (negated.recall, negated.precision, negated.kept_ratio) == (1, 1, 1 / 16)
    assert direct.recall == 0
