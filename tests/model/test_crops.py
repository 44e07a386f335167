"""Merging the crops of one picture, with and without reduction, against the published merge written out."""

import pytest
import torch

from llava.model.crops import layout_tiles, merge_crops, unpad_image

GRID, TILES, WIDTH = (3, 4), (2, 2), 5
NUM_PATCHES = GRID[0] * GRID[1]


def make_crops() -> torch.Tensor:
    return torch.arange((1 + TILES[0] * TILES[1]) * NUM_PATCHES * WIDTH, dtype=torch.float32).view(
        5, NUM_PATCHES, WIDTH
    )


def published_spatial(crops: torch.Tensor, size: tuple[int, int] | None, newline: torch.Tensor | None) -> torch.Tensor:
    """The published merge as LLaVA-1.6 describes it: tiles to one big grid, unpad, a newline after each row."""
    base, tiles = crops[0], crops[1:].view(*TILES, *GRID, WIDTH)
    picture = tiles.permute(4, 0, 2, 1, 3).reshape(WIDTH, TILES[0] * GRID[0], TILES[1] * GRID[1])
    if size is not None:
        picture = unpad_image(picture, size)
    if newline is not None:
        column = newline[:, None, None].expand(-1, picture.shape[1], 1)
        picture = torch.cat([picture, column], dim=-1)
    return torch.cat([base, picture.flatten(1).T])


@pytest.mark.parametrize("size", [None, (800, 300), (300, 800), (640, 480)])
@pytest.mark.parametrize("with_newline", [False, True])
def test_merge_with_everything_kept_equals_the_published_merge(size, with_newline):
    crops = make_crops()
    newline = torch.full((WIDTH,), -1.0) if with_newline else None
    kept = torch.ones(5, NUM_PATCHES, dtype=torch.bool)
    merged = merge_crops(list(crops), kept, layout_tiles(GRID, TILES, size), newline)
    assert torch.equal(merged, published_spatial(crops, size, newline))


def test_kept_patches_stay_in_the_order_of_the_published_merge_and_means_follow():
    crops = make_crops()
    kept = torch.rand(5, NUM_PATCHES, generator=torch.Generator().manual_seed(0)) < 0.3
    means = torch.full((5, 1, WIDTH), 9999.0) + torch.arange(5)[:, None, None]
    reduced = [torch.cat([crop[mask], mean]) for crop, mask, mean in zip(crops, kept, means, strict=True)]
    merged = merge_crops(reduced, kept, layout_tiles(GRID, TILES))
    full = published_spatial(crops, None, None)
    chosen = {tuple(row.tolist()) for row in crops[kept]}
    base = [row for row in full[:NUM_PATCHES] if tuple(row.tolist()) in chosen]
    rest = [row for row in full[NUM_PATCHES:] if tuple(row.tolist()) in chosen]
    expected = torch.stack([*base, means[0, 0], *rest, *means[1:, 0]])
    assert torch.equal(merged, expected)


def test_a_row_without_kept_patches_leaves_no_newline():
    crops = make_crops()
    kept = torch.zeros(5, NUM_PATCHES, dtype=torch.bool)
    kept[1, 0] = kept[4, NUM_PATCHES - 1] = True
    reduced = [crop[mask] for crop, mask in zip(crops, kept, strict=True)]
    newline = torch.full((WIDTH,), -1.0)
    merged = merge_crops(reduced, kept, layout_tiles(GRID, TILES), newline)
    assert torch.equal(merged, torch.stack([crops[1, 0], newline, crops[4, -1], newline]))


def test_synthesised_tokens_merge_flat():
    crops = [torch.ones(2, WIDTH), torch.zeros(2, WIDTH)]
    merged = merge_crops(crops, None, layout_tiles(GRID, (1, 1)))
    assert torch.equal(merged, torch.cat(crops))


@pytest.mark.parametrize(("size", "shape"), [((100, 50), (6, 12)), ((50, 100), (12, 6)), ((70, 70), (12, 12))])
def test_unpad_cuts_the_bars_of_the_longer_side(size, shape):
    assert unpad_image(torch.zeros(1, 12, 12), size).shape[1:] == shape
