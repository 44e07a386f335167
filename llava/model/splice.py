"""Put image tokens where the prompt has its `<image>` placeholders, and pad a batch: pure functions of tensors.

Shape letters: `S` samples, `T` prompt ids, `M` tokens of one image, `L` spliced length, `E` LLM width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import InputError

TEXT = -1
"""In `image_of`: a token that belongs to no image."""


@dataclass(frozen=True)
class Targets:
    """What a batch teaches: the K positions whose next token has a label.

    Attributes:
        places: `int64[K]` those positions among all `S * L`, row by row.
        labels: `int64[K]` the next token of each.
        owners: `int64[K]` which sample each belongs to.
        counts: `int64[S]` how many each sample has, on the CPU.
    """

    places: Tensor
    labels: Tensor
    owners: Tensor
    counts: Tensor

    @classmethod
    def of(cls, labels: Tensor, device: torch.device, borders: Tensor | None = None) -> "Targets":
        """Find them.

        Args:
            labels: `int64[S, L]`, IGNORE_INDEX where nothing is learned; on the CPU nothing waits for the device.
            device: where places, labels and owners go.
            borders: of packed rows, see `PromptEmbeds`; the first token of a sample has no label there. None: a row is
                a sample.
        """
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # the first token is never predicted
        is_learned = following != IGNORE_INDEX
        places = is_learned.flatten().nonzero().flatten()
        chosen = following.flatten()[places]
        if borders is None:
            counts = is_learned.sum(dim=1).cpu()
        else:
            counts = F.pad(is_learned.flatten().cumsum(dim=0), (1, 0))[borders].diff()
        owners = torch.arange(len(counts)).repeat_interleave(counts)
        return cls(upload(places, device), upload(chosen, device), upload(owners, device), counts)


@dataclass(frozen=True)
class PromptEmbeds:
    """A batch of prompts as the decoder reads them, image tokens in their places.

    Attributes:
        embeds: `[S, L, E]`, zeros at padding.
        attention_mask: `bool[S, L]`, False at padding.
        position_ids: `int64[S, L]`, counted from each sample's first token; 0 at padding. Where a reduction asks for
            original positions they have gaps.
        image_of: `int64[S, L]` which of its sample's images each token belongs to, -1 at text and padding; on the CPU.
        labels: `int64[S, L]`, IGNORE_INDEX at image tokens and padding; None where no labels were given.
        targets: the same as the positions that the loss covers, on the embeddings' device; None without labels.
        borders: `int32[S + 1]` of packed rows (see `llava.model.packing`; S above then counts rows): where each sample
            begins when the rows are laid end to end, and where the last one ends; on the CPU. None: a row is a sample.
    """

    embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    image_of: Tensor
    labels: Tensor | None = None
    targets: Targets | None = None
    borders: Tensor | None = None


@dataclass(frozen=True)
class Positions:
    """Where an image's tokens stand among the positions that the whole image takes.

    Attributes:
        offsets: `int64[M]` from the image's first position, on the CPU.
        num_positions: what the text behind the image is moved on by, 1 or more.
    """

    offsets: Tensor
    num_positions: int

    @classmethod
    def without_gaps(cls, num_tokens: int) -> "Positions":
        """One token after the other."""
        return cls(torch.arange(num_tokens), num_tokens)


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Move values of the host to a device; the host goes on at once, while the device still works on other things."""
    return values.to(device, non_blocking=True)


def count_placeholders(input_ids: Tensor) -> list[int]:
    """Count the image placeholders of each sample of `int64[S, T]`."""
    return (input_ids == IMAGE_TOKEN_INDEX).sum(dim=1).tolist()


def assign_images(num_placeholders: list[int], num_images: int, *, allow_dummies: bool = False) -> list[list[int]]:
    """Assign images to placeholders; images come in the order of the placeholders.

    Args:
        num_placeholders: placeholders of each sample.
        num_images: images given with the batch.
        allow_dummies: also accept one image, to be ignored, for each text-only sample, as LLaVA's training code
            passes it. Not for answering: there an image without a placeholder is a mistake.

    Returns:
        For each sample the indices of its images.

    Raises:
        InputError: when neither reading fits.
    """
    total = sum(num_placeholders)
    with_dummies = sum(max(1, count) for count in num_placeholders) if allow_dummies else total
    if num_images not in (total, with_dummies):
        relation = "more images than placeholders" if num_images > total else "fewer images than placeholders"
        raise InputError(
            f"{num_images} image(s) for {total} <image> placeholder(s) in {len(num_placeholders)} prompt(s): "
            f"{relation}; give exactly one image per placeholder, in their order"
        )
    # With dummies, a sample without placeholders skips one image.
    step = 1 if num_images != total else 0
    assigned, start = [], 0
    for count in num_placeholders:
        assigned.append(list(range(start, start + count)))
        start += max(count, step)
    return assigned


def splice_sample(
    input_ids: Tensor,
    token_embeds: Tensor,
    labels: Tensor,
    image_features: list[Tensor],
    image_positions: list[Positions] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Replace each image placeholder by its image's tokens.

    Args:
        input_ids: `int64[T]` without padding, with IMAGE_TOKEN_INDEX at placeholders; on the CPU nothing waits for the
            device.
        token_embeds: `[T, E]` embeddings of the ids; the rows at placeholders are not used.
        labels: `int64[T]`, where the ids are.
        image_features: one `[M, E]` per placeholder, in order; M may differ and may be 0.
        image_positions: of the tokens of each image; None: one after the other.

    Returns:
        `[L, E]` embeddings, `int64[L]` labels, IGNORE_INDEX at image tokens, `int64[L]` the image that each token
        belongs to, -1 at text, and `int64[L]` positions from 0 on; the last two on the CPU.
    """
    if image_positions is None:
        image_positions = [Positions.without_gaps(features.shape[0]) for features in image_features]
    embeds, targets, image_of, positions, start, position = [], [], [], [], 0, 0
    placeholders = (input_ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
    images = zip(placeholders, image_features, image_positions, strict=True)
    for number, (place, features, own_positions) in enumerate(images):
        features = features.to(token_embeds)
        # The text up to the placeholder, then the image; the placeholder itself is skipped.
        embeds += [token_embeds[start:place], features]
        targets += [labels[start:place], labels.new_full((features.shape[0],), IGNORE_INDEX)]
        image_of += [torch.full((place - start,), TEXT), torch.full((features.shape[0],), number)]
        first = position + place - start
        positions += [torch.arange(position, first), first + own_positions.offsets]
        start, position = place + 1, first + own_positions.num_positions
    rest = len(input_ids) - start
    image_of.append(torch.full((rest,), TEXT))
    positions.append(torch.arange(position, position + rest))
    embeds, targets = torch.cat([*embeds, token_embeds[start:]]), torch.cat([*targets, labels[start:]])
    return embeds, targets, torch.cat(image_of), torch.cat(positions)


def pad_batch(
    embeds: list[Tensor],
    labels: list[Tensor],
    image_of: list[Tensor],
    positions: list[Tensor],
    *,
    side: str = "right",
    borders: Tensor | None = None,
) -> PromptEmbeds:
    """Stack spliced samples of different lengths.

    Args:
        embeds: S times `[L_i, E]`.
        labels: S times `int64[L_i]`, on any device.
        image_of: S times `int64[L_i]`, on the CPU.
        positions: S times `int64[L_i]`, on the CPU.
        side: where the padding goes, "right" (training) or "left" (generation).
        borders: of packed rows, see `PromptEmbeds`; None: a row is a sample.

    Returns:
        The batch, on the embeddings' device.
    """
    device = embeds[0].device
    lengths = torch.tensor([sample.shape[0] for sample in embeds])  # [S]
    longest = int(lengths.max())
    column = torch.arange(longest)[None, :]  # [1, L]
    first = (longest - lengths)[:, None] if side == "left" else torch.zeros_like(lengths)[:, None]  # [S, 1]
    mask = (column >= first) & (column < first + lengths[:, None])  # [S, L]

    def stack(rows: list[Tensor], fill: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill, padding_side=side)

    owners, position_ids, batch_labels = stack(image_of, TEXT), stack(positions, 0), stack(labels, IGNORE_INDEX)
    return PromptEmbeds(
        embeds=stack(embeds, 0),
        attention_mask=upload(mask, device),
        position_ids=upload(position_ids, device),
        image_of=owners,
        labels=upload(batch_labels, device),
        targets=Targets.of(batch_labels, device, borders),
        borders=borders,
    )


def check_shape(name: str, values: object, prompts: Tensor) -> None:
    """Check that there is a value for each of the ids `int64[S, T]`, or of the embeddings `[S, L, E]`, of a batch.

    Raises:
        InputError: there is not; names both shapes.
    """
    of, each = ("input_ids", "id") if prompts.dim() == 2 else ("inputs_embeds", "embedding")
    if not isinstance(values, Tensor):
        raise InputError(f"{name}: expected a tensor [prompts, {each}s], not {type(values).__name__}")
    if values.shape != prompts.shape[:2]:
        shapes = f"{tuple(values.shape)} for {of} of shape {tuple(prompts.shape)}"
        raise InputError(f"{name} has shape {shapes}: give one number per {each}")


def strip_padding(input_ids: Tensor, attention_mask: Tensor | None, pad_token_id: int | None) -> Tensor:
    """Find out which ids of a batch are not padding.

    Args:
        input_ids: `int64[S, T]`.
        attention_mask: `bool or int[S, T]`, or None when the caller passed none.
        pad_token_id: then ids of this value at either end of a row count as padding; only in batches, since a single
            prompt needs none.

    Returns:
        `bool[S, T]`.

    Raises:
        InputError: a mask of another shape.
    """
    if attention_mask is not None:
        check_shape("attention_mask", attention_mask, input_ids)
        return attention_mask.to(device=input_ids.device, dtype=torch.bool)
    if pad_token_id is None or input_ids.shape[0] == 1:
        return torch.ones_like(input_ids, dtype=torch.bool)
    real = (input_ids != pad_token_id).to(torch.int64)
    after_start = real.cumsum(dim=1) > 0
    before_end = real.flip(1).cumsum(dim=1).flip(1) > 0
    return after_start & before_end
