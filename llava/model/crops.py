"""Merge the crops of one image (LLaVA-1.6 style `anyres`) into one run of tokens: pure functions.

An image has a base view (crop 0) and tiles in raster order. LLaVA's merges are `flat` (crop after crop), `spatial`
(base view, then the tiles' patches in raster order of the whole image) and `spatial_unpad` (the same without the
padding of the tile canvas, and one newline token after each row of patches).

With token reduction each crop is reduced on its own, so no full grid is left. The layout is therefore computed on
patch *indices*: kept patches stay where LLaVA's merge puts them, dropped ones leave no gap, a row without kept patches
leaves no newline, and each crop's synthesised tokens (TRIM's mean) follow the base view and the tiles. With everything
kept this is LLaVA's merge, token for token.
"""

import torch
from torch import Tensor

MERGE_TYPES = ("flat", "spatial", "spatial_unpad")


def unpad_image(tensor: Tensor, original_size: tuple[int, int]) -> Tensor:
    """Cut the padding that a resize-with-padding put around an image.

    Args:
        tensor: `[C, H, W]`.
        original_size: width and height of the image before, in pixels.

    Returns:
        `[C, H', W']`, a view: the part that shows the image.
    """
    original_width, original_height = original_size
    height, width = tensor.shape[1:]
    if original_width * height > original_height * width:
        shown = int(original_height * width / original_width)
        margin = (height - shown) // 2
        return tensor[:, margin : height - margin, :]
    shown = int(original_width * height / original_height)
    margin = (width - shown) // 2
    return tensor[:, :, margin : width - margin]


def layout_tiles(
    grid: tuple[int, int], tile_grid: tuple[int, int], original_size: tuple[int, int] | None = None
) -> list[Tensor]:
    """List the tiles' patches in raster order of the whole image.

    Args:
        grid: rows and columns of patches in one crop.
        tile_grid: rows and columns of tiles.
        original_size: width and height of the image in pixels, to leave out the padding; None keeps everything.

    Returns:
        One `int64[columns]` per row of patches, indices into the crops' patches laid end to end (the base view first).
    """
    rows, cols = grid
    tile_rows, tile_cols = tile_grid
    # Each patch's number, tile by tile, behind the base view's; then row by row of the whole image.
    index = torch.arange(tile_rows * tile_cols * rows * cols).view(tile_rows, tile_cols, rows, cols) + rows * cols
    canvas = index.permute(0, 2, 1, 3).reshape(1, tile_rows * rows, tile_cols * cols)
    if original_size is not None:
        canvas = unpad_image(canvas, original_size)
    return list(canvas[0])


def merge_crops(
    crops: list[Tensor], kept: Tensor | None, tile_rows: list[Tensor] | None = None, newline: Tensor | None = None
) -> Tensor:
    """Merge one image's projected crops.

    Args:
        crops: per crop `[M_c, E]`: the kept patches in raster order, then synthesised tokens.
        kept: `bool[C, N]`, which patches those are; None where all tokens are synthesised.
        tile_rows: from `layout_tiles`; None merges flat. Without `kept` there is no place to go by: flat as well.
        newline: `[E]`, put after each row of patches that is not empty; None puts none.

    Returns:
        `[M, E]`.
    """
    # 1. Flat: crop after crop.
    if tile_rows is None or kept is None or len(crops) == 1:
        tokens = torch.cat(crops)
        return tokens if newline is None else torch.cat([tokens, newline[None].to(tokens)])
    # 2. Where each kept patch is: its number among the crops' kept patches laid end to end.
    kept = kept.cpu()  # one wait for the device
    num_kept = kept.sum(dim=1).tolist()
    place = kept.flatten().cumsum(dim=0) - 1  # [C * N]
    is_kept = kept.flatten()
    # 3. Kept patches on one side, synthesised tokens on the other.
    verbatim = torch.cat([crop[:count] for crop, count in zip(crops, num_kept, strict=True)])
    extras = [crop[count:] for crop, count in zip(crops, num_kept, strict=True)]
    # 4. The base view, then the tiles row by row, then the tiles' synthesised tokens.
    merged = [verbatim[: num_kept[0]], extras[0]]
    for row in tile_rows:
        chosen = place[row[is_kept[row]]].to(verbatim.device, non_blocking=True)
        if chosen.numel():
            merged.append(verbatim[chosen])
            if newline is not None:
                merged.append(newline[None].to(verbatim))
    return torch.cat([*merged, *extras[1:]])
