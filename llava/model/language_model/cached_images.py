"""The image tokens that a cache of earlier turns was made with: kept with it, compared with those of the next turn."""

from dataclasses import dataclass

from torch import Tensor
from transformers import Cache

from llava.errors import InputError
from llava.model.splice import TEXT as NO_IMAGE
from llava.model.splice import PromptEmbeds

SAME_TOKENS = 0.1
"""Difference of image tokens, as a share of their norm, up to which they are the same: an image that is encoded in
another batch, in 16 bits, stays below."""
KEY = "_llava_images"


@dataclass(frozen=True)
class CachedImages:
    """The prompts of the latest turn.

    Attributes:
        embeds: `[S, L, E]` as in `PromptEmbeds`.
        image_of: `int64[S, L]`, likewise.
        position_ids: `int64[S, L]`, likewise.
    """

    embeds: Tensor
    image_of: Tensor
    position_ids: Tensor

    def fit(self, batch: PromptEmbeds, length: int) -> bool:
        """Whether prompts begin with the images that a cache of this length holds, in their places.

        The cache's samples may have been repeated, or some of them selected, since it was filled.
        """
        num_own, num_given = len(self.image_of), len(batch.image_of)
        repeats, rest = divmod(num_given, num_own)
        for row in range(num_given):
            candidates = range(num_own) if rest else [row // repeats]
            if not any(self._fit_sample(own, batch, row, length) for own in candidates):
                return False
        return True

    def _fit_sample(self, number: int, batch: PromptEmbeds, row: int, length: int) -> bool:
        known = min(length, self.image_of.shape[1])
        own, given = self.image_of[number, :known], batch.image_of[row, :length]
        holds = (own != NO_IMAGE, given != NO_IMAGE)
        if not any(bool(each.any()) for each in holds):
            return True
        is_laid_out_alike = (
            own.shape == given[:known].shape
            and bool((own == given[:known]).all())
            and not bool(holds[1][known:].any())
            and bool((self.position_ids[number, :known] == batch.position_ids[row, :known]).all())
        )
        if not is_laid_out_alike:
            return False
        pairs = ((self.embeds[number], holds[0]), (batch.embeds[row], holds[0]))
        before, now = (embeds[:known][is_image.to(embeds.device)].float() for embeds, is_image in pairs)
        return bool((before - now).norm() <= SAME_TOKENS * before.norm())


def keep_images(cache: Cache, batch: PromptEmbeds) -> None:
    """Note with a cache which prompts it is about to hold; the ones before have to be the beginning of them.

    Raises:
        InputError: the cache holds other images, or other tokens of them.
    """
    before: CachedImages | None = getattr(cache, KEY, None)
    if before is not None and not before.fit(batch, int(cache.get_seq_length())):
        raise InputError(
            "past_key_values holds other image tokens than this prompt begins with: another token reduction, other "
            "images or another number of them; give the image_tokens= of the earlier turns, or an empty cache"
        )
    setattr(cache, KEY, CachedImages(batch.embeds, batch.image_of, batch.position_ids))
