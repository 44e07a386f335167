"""From one image's patches to the tokens that the LLM reads: reduce, project, merge crops.

Shape letters: `C` crops of one image (1 in LLaVA-1.5), `I` crops of all images, `N` patches of a crop, `D` vision
width, `M` tokens of the image, `E` LLM width, `P` joint width.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from llava.errors import InputError
from llava.mm_utils import get_anyres_image_grid_shape
from llava.model.crops import MERGE_TYPES, layout_tiles, merge_crops
from llava.model.multimodal_encoder.text_reader import TextIds
from llava.model.multimodal_encoder.tower import ImageFeatures, VisionTower
from llava.model.splice import Positions, upload
from llava.model.token_reduction.base import PROJECTED, TEXT, ReducedTokens, TokenReducer, VisualTokens

NEWLINE = -1
"""Stands for a newline token where patches are numbered."""
MADE = -1
"""In `find_sources`: a token that is no patch's copy."""


@dataclass(frozen=True)
class ImageTokens:
    """What one image becomes for one question.

    Attributes:
        features: `[M, E]` projected tokens, ready to be spliced.
        num_patches: patches before reduction, over all crops.
        kept: `bool[C, N]` patches copied verbatim (all of them without reduction); None where tokens are synthesised.
        scores: `float32[C, N]` the reducer's probabilities, or None.
        centres: `bool[C, N]` patches that synthesised tokens are made around, or None.
        original: where the tokens stand among the positions of the whole image; None: one after the other.
    """

    features: Tensor
    num_patches: int
    kept: Tensor | None = None
    scores: Tensor | None = None
    centres: Tensor | None = None
    original: Positions | None = None

    @property
    def num_tokens(self) -> int:
        """M: what the LLM reads for this image, mean and newline tokens included."""
        return self.features.shape[0]

    @property
    def positions(self) -> Positions:
        """Where the tokens stand in the prompt, from the image's first position on."""
        return self.original or Positions.without_gaps(self.num_tokens)

    @property
    def num_positions(self) -> int:
        """What the text behind the image is moved on by: M, or what the whole image would take."""
        return self.positions.num_positions


@dataclass(frozen=True)
class CropMerge:
    """How the crops of an image are merged (`mm_patch_merge_type`, see `llava.model.crops`).

    Attributes:
        kind: "flat", "spatial" or "spatial_unpad".
        pinpoints: `image_grid_pinpoints` of anyres models; None for others, whose images have one crop.
        crop_size: side of a crop in pixels.
        newline: `[E]` parameter that "spatial_unpad" puts after each row.
    """

    kind: str = "flat"
    pinpoints: str | list | None = None
    crop_size: int = 0
    newline: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the kind.

        Raises:
            InputError: for an unknown one.
        """
        if self.kind not in MERGE_TYPES:
            raise InputError(f'mm_patch_merge_type "{self.kind}" is unknown: use {", ".join(MERGE_TYPES)}')

    @classmethod
    def of_config(cls, config: PreTrainedConfig, crop_size: int, newline: Tensor | None) -> "CropMerge":
        """The merge that a model's config asks for."""
        is_anyres = getattr(config, "image_aspect_ratio", None) == "anyres"
        pinpoints = getattr(config, "image_grid_pinpoints", None) if is_anyres else None
        return cls(getattr(config, "mm_patch_merge_type", None) or "flat", pinpoints, crop_size, newline)

    def __call__(
        self, crops: list[Tensor], kept: Tensor | None, grid: tuple[int, int], image_size: tuple[int, int] | None
    ) -> Tensor:
        """Merge one image's projected crops, C times `[M_c, E]`, into `[M, E]`.

        Raises:
            InputError: when a spatial merge has no image size to go by.
        """
        newline = self.newline if self.kind == "spatial_unpad" else None
        if self.kind == "flat" or len(crops) == 1:
            return merge_crops(crops, kept, newline=newline)
        if self.pinpoints is None or image_size is None:
            raise InputError(
                f"mm_patch_merge_type {self.kind} needs image_aspect_ratio anyres and image_sizes=[(width, height)]"
            )
        cols, rows = get_anyres_image_grid_shape(image_size, self.pinpoints, self.crop_size)
        if rows * cols + 1 != len(crops):
            raise InputError(
                f"{len(crops)} crops do not make a {rows} x {cols} grid of tiles and a base view: "
                f"is {image_size} the image's (width, height)?"
            )
        unpad_size = image_size if self.kind == "spatial_unpad" else None
        return merge_crops(crops, kept, layout_tiles(grid, (rows, cols), unpad_size), newline)


def spread_texts(texts: object, count: int, owner: str) -> list[str | TextIds]:
    """Give each prompt or image its query: as given, or one for all.

    Args:
        texts: a text, or one for each.
        count: how many there are.
        owner: what they are, "prompt" or "image".

    Raises:
        InputError: another number of texts, or what is no text.
    """
    if isinstance(texts, str | TextIds):
        return [texts] * count
    if isinstance(texts, bytes | Mapping) or not isinstance(texts, Iterable):
        raise InputError(f"texts: expected a text or a list of texts, not {type(texts).__name__}")
    texts = list(texts)
    for number, text in enumerate(texts):
        if not isinstance(text, str | TextIds):
            raise InputError(f"texts[{number}]: expected a text, not {type(text).__name__}")
    if len(texts) != count:
        raise InputError(f"{len(texts)} texts for {count} {owner}s: give one query per {owner}, or one string")
    return texts


def embed_distinct(tower: VisionTower, texts: list[str | TextIds]) -> Tensor:
    """Embed texts, each distinct one once: S of them to `float32[S, P]`."""
    distinct = list(dict.fromkeys(texts))
    embedded = tower.embed_text(distinct)
    if distinct == texts:
        return embedded
    place = {text: row for row, text in enumerate(distinct)}
    return embedded[upload(torch.tensor([place[text] for text in texts]), embedded.device)]


def reduce_patches(
    reducer: TokenReducer,
    tower: VisionTower,
    projector: nn.Module,
    images: list[ImageFeatures],
    texts: list[str],
    text_embeds: Tensor | None = None,
) -> list[ReducedTokens]:
    """Reduce each crop of each image on its own.

    Args:
        reducer: the method.
        tower: where the joint space comes from.
        projector: `[..., D]` to `[..., E]`, for reducers that look at projected patches.
        images: what the tower gave, one record per image.
        texts: one query per image.
        text_embeds: `float32[images, P]` the same queries, embedded already; None: they are embedded here.

    Returns:
        One record per image, over its crops.

    Raises:
        InputError: the images were encoded without something that the reducer looks at.
    """
    num_crops = [image.num_crops for image in images]
    crops = ImageFeatures.concatenate(images)  # patches [I, N, D], I crops in all
    intermediates = dict(crops.intermediates)
    joint = text = None
    if TEXT in reducer.needs:
        joint = tower.project_to_joint(crops.patches)  # [I, N, P]
        text = embed_distinct(tower, texts) if text_embeds is None else text_embeds  # [images, P]
        if crops.num_crops != len(images):
            # Each crop is reduced for its image's query.
            owners = torch.tensor([index for index, count in enumerate(num_crops) for _ in range(count)])
            text = text[upload(owners, text.device)]
    if PROJECTED in reducer.needs:
        with torch.no_grad():
            intermediates[PROJECTED] = project(projector, crops.patches)  # [I, N, E]
    with tower.own_precision():
        reduced = reducer(VisualTokens(crops.patches, tower.grid, joint, text, intermediates))

    def split(field: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None,) * len(images) if field is None else field.split(num_crops)

    rows = zip(*(split(getattr(reduced, field.name)) for field in fields(reduced)), strict=True)
    return [ReducedTokens(*row) for row in rows]


def project(projector: nn.Module, features: Tensor) -> Tensor:
    """Project `[..., D]` to `[..., E]`, where the projector is and in its dtype."""
    parameter = next(projector.parameters(), None)
    if parameter is not None:
        # Quantised weights are whole numbers; their layers take what comes.
        dtype = parameter.dtype if parameter.is_floating_point() else features.dtype
        features = features.to(device=parameter.device, dtype=dtype)
    return projector(features)


def project_tokens(
    reduced: list[ReducedTokens],
    projector: nn.Module,
    merge: CropMerge,
    grid: tuple[int, int],
    image_sizes: list[tuple[int, int]] | None,
    *,
    keep_positions: bool = False,
) -> list[ImageTokens]:
    """Project the tokens that are left (and no others) to LLM width and merge each image's crops.

    Args:
        reduced: one record per image.
        projector: `[..., D]` to `[..., E]`.
        merge: how crops are merged.
        grid: rows and columns of patches of a crop.
        image_sizes: (width, height) of each image, needed for spatial merges only.
        keep_positions: tokens stand where they would if nothing had left.

    Returns:
        One record per image.

    Raises:
        InputError: positions are to be kept, and the method does not say which patches its tokens stand for.
    """
    # 1. All crops of all images in one run of tokens, without the padding of short rows.
    lengths = [length for image in reduced for length in image.lengths.tolist()]
    valid = torch.cat([crop for image in reduced for crop in _rows_as_read(image, merge)])  # [all tokens, D]
    # 2. One pass of the projector.
    projected = iter(project(projector, valid).split(lengths))
    # 3. Image by image, merge the crops.
    tokens = []
    for index, image in enumerate(reduced):
        crops = [next(projected) for _ in range(image.lengths.shape[0])]  # C times [M_c, E]
        if image.num_blank is not None:
            blanks = image.num_blank.tolist()
            crops = [
                F.pad(crop[: len(crop) - blank], (0, 0, 0, blank)) for crop, blank in zip(crops, blanks, strict=True)
            ]
        size = tuple(image_sizes[index]) if image_sizes is not None else None
        features = merge(crops, image.kept, grid, size)  # [M, E]
        num_patches = image.lengths.shape[0] * grid[0] * grid[1]
        original = find_positions(image, merge, grid, size) if keep_positions else None
        tokens.append(ImageTokens(features, num_patches, image.kept, image.scores, image.centres, original))
    return tokens


def find_positions(
    image: ReducedTokens, merge: CropMerge, grid: tuple[int, int], image_size: tuple[int, int] | None
) -> Positions:
    """Find where an image's tokens would stand if nothing had left.

    A newline token stands behind the token before it. Arguments as for `project_tokens`, for one image.

    Raises:
        InputError: all tokens are synthesised, and none is said to stand for a patch.
    """
    num_crops, num_patches = image.lengths.shape[0], grid[0] * grid[1]
    places = _find_places(image, num_patches)  # [C, M]
    # Numbers of patches, over all crops, go through the merge in place of features: once as they are, once whole.
    merge = replace(merge, newline=torch.tensor([NEWLINE]))
    first = torch.arange(num_crops)[:, None] * num_patches
    crops = _rows_as_read(replace(image, features=(places + first)[..., None]), merge)
    kept = None if image.kept is None else image.kept.cpu()
    numbers = merge(crops, kept, grid, image_size).flatten()
    whole = [crop[:, None] for crop in torch.arange(num_crops * num_patches).split(num_patches)]
    everything = torch.ones(num_crops, num_patches, dtype=torch.bool)
    layout = merge(whole, everything, grid, image_size).flatten()
    # A patch that an unpadded layout cuts off stands at the end.
    position = torch.full((num_crops * num_patches,), len(layout) - 1)
    position[layout[layout != NEWLINE]] = (layout != NEWLINE).nonzero().flatten()
    offsets = position[numbers]
    behind = (numbers == NEWLINE).nonzero().flatten()
    offsets[behind] = offsets[behind - 1] + 1
    return Positions(offsets, len(layout))


def _find_places(image: ReducedTokens, num_patches: int) -> Tensor:
    """The patch that each row stands for: `int64[C, M]`, on the CPU."""
    if image.places is not None:
        return image.places.cpu()
    if image.kept is None:
        raise InputError("position_ids=original: this method does not say which patches its tokens stand for")
    places = torch.full(image.features.shape[:2], num_patches - 1)
    for row, kept in zip(places, image.kept.cpu(), strict=True):
        numbers = kept.nonzero().flatten()
        row[: len(numbers)] = numbers
    return places


def is_reordered(image: ReducedTokens, merge: CropMerge) -> bool:
    """Whether tokens are read in the method's own order; crops merged by place need their patches in raster order."""
    return image.order is not None and (image.lengths.shape[0] == 1 or merge.kind == "flat")


def find_sources(image: ReducedTokens, merge: CropMerge) -> Tensor:
    """Find the patch that each token of an image's first crop is a copy of.

    Whatever the merge, the language model reads the first crop's tokens first, in this order.

    Args:
        image: what the reduction left of the image.
        merge: how its crops are merged.

    Returns:
        `int64[M_0]` numbers of patches, -1 for a token that is made of several, on the CPU.
    """
    sources = torch.full((int(image.lengths[0]),), MADE)
    if image.kept is not None:
        kept = image.kept[0].cpu().nonzero().flatten()
        sources[: len(kept)] = kept
    return sources[image.order[0, : len(sources)].cpu()] if is_reordered(image, merge) else sources


def _rows_as_read(image: ReducedTokens, merge: CropMerge) -> list[Tensor]:
    """Each crop's tokens `[M_c, D]` in the order in which the language model reads them."""
    lengths = image.lengths.tolist()
    if not is_reordered(image, merge):
        return [crop[:length] for crop, length in zip(image.features, lengths, strict=True)]
    order = image.order.to(image.features.device)
    return [crop[row[:length]] for crop, row, length in zip(image.features, order, lengths, strict=True)]


def keep_everything(images: list[ImageFeatures]) -> list[ReducedTokens]:
    """The record of no reduction: all patches of each image `[C, N, D]`, in their places."""
    return [
        ReducedTokens(
            features=image.patches,
            lengths=torch.full((image.num_crops,), image.patches.shape[1]),
            kept=torch.ones(image.patches.shape[:2], dtype=torch.bool),
        )
        for image in images
    ]
