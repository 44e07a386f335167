"""Answer a batch of questions stage by stage, as `generate` does it, with a clock around every stage.

Shape letters: `S` samples, `T` prompt ids, `L` spliced length, `V` vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava.clock import StageClock
from llava.constants import IMAGE_TOKEN_INDEX
from llava.efficiency.memory import measure_peak
from llava.efficiency.timing import Spread
from llava.image import EmbeddedImage, load_image
from llava.mm_utils import process_images
from llava.model.token_reduction import Reduction
from llava.terminal import make_bar

FIRST_PLAIN_ID = 3  # below are the special tokens of Llama's vocabulary
END_TO_END = "end to end"


@dataclass(frozen=True)
class Batch:
    """Questions that are asked together, one picture each.

    Attributes:
        pictures: encoded picture files, as they come from disk.
        queries: what the CLIP text tower reads.
        input_ids: int64[S, T] on the CPU, one image mark per row.
        new_tokens: length of the answers; no answer ends earlier.
    """

    pictures: list[EmbeddedImage]
    queries: list[str]
    input_ids: Tensor
    new_tokens: int


@dataclass(frozen=True)
class Measurement:
    """What one way to reduce tokens took.

    Attributes:
        stages: seconds per batch and stage; "decode" is one step.
        end_to_end: seconds of one call from picture files to answer ids.
        rounds: the single end-to-end times, in the order of the rounds.
        peak_bytes: memory on top of the weights at the peak of that call, or None where it can't be told.
        num_tokens: mean image tokens that the language model read.
        num_kept: mean patches kept, or None where tokens are synthesised.
    """

    stages: dict[str, Spread]
    end_to_end: Spread
    rounds: list[float]
    peak_bytes: int | None
    num_tokens: float
    num_kept: float | None


def make_batch(
    batch_size: int,
    prompt_tokens: int,
    new_tokens: int,
    *,
    vocab_size: int,
    image_size: tuple[int, int],
    image: EmbeddedImage | None = None,
    query: str | None = None,
) -> Batch:
    """Make up questions.

    Args:
        batch_size: S.
        prompt_tokens: language model tokens besides the image's.
        new_tokens: length of the answers.
        vocab_size: V.
        image_size: (width, height) of the drawn picture.
        image: a picture to use instead.
        query: one query for all rows; None: another one for each.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(FIRST_PLAIN_ID, vocab_size, (batch_size, prompt_tokens + 1), generator=generator)
    ids[:, min(prompt_tokens, prompt_tokens // 2)] = IMAGE_TOKEN_INDEX
    picture = image or draw_picture(image_size)
    queries = [query or f"Is there a thing with the number {row} in the image?" for row in range(batch_size)]
    return Batch([picture] * batch_size, queries, ids, new_tokens)


def draw_picture(size: tuple[int, int]) -> EmbeddedImage:
    """Draw a JPEG of (width, height) pixels that is about as hard to decode as a photograph."""
    coarse = Image.effect_noise((max(1, size[0] // 8), max(1, size[1] // 8)), 60).convert("RGB")
    buffer = BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=90)
    return EmbeddedImage("drawn picture", buffer.getvalue())


class Runner:
    """A loaded model that answers a batch, whole or in stages."""

    def __init__(self, model: Any, image_processor: Any, *, compile_decode: bool = False):
        """Take the parts.

        Args:
            model: `LlavaCausalLM`.
            image_processor: of its tower.
            compile_decode: decode with a static cache and `torch.compile`.
        """
        self.model = model
        self.image_processor = image_processor
        self.compile_decode = compile_decode
        self._caches: dict[tuple[int, int], Any] = {}
        self._step = self._compile() if compile_decode else self._decode_step

    def _compile(self) -> Callable[..., Tensor]:
        # CUDA graphs save the launches of a step, which outweigh its work at small batches.
        mode = "default" if self.model.device.type == "cpu" else "reduce-overhead"
        return torch.compile(self._decode_step, mode=mode, dynamic=False)

    def preprocess(self, batch: Batch) -> Tensor | list[Tensor]:
        """Decode the pictures and make pixel values."""
        images = [load_image(picture) for picture in batch.pictures]
        return process_images(images, self.image_processor, self.model.config)

    @torch.inference_mode()
    def run(self, batch: Batch, clock: StageClock) -> tuple[Tensor, list[Any]]:
        """Answer a batch.

        Args:
            batch: the questions.
            clock: gets the time of each stage; "decode" is the sum of all steps.

        Returns:
            int64[S, new tokens] and the image tokens of each row.
        """
        model = self.model
        with clock.stage("preprocess"):
            pixels = self.preprocess(batch)
        with clock.stage("vision tower"):
            patches = model.encode_patches(pixels)
        if model.token_reducer is None:
            reduced = model.choose_tokens(patches, batch.queries)
        else:
            with clock.stage("text tower"):
                text_embeds = model.embed_queries(batch.queries)
            with clock.stage("selection"):
                reduced = model.choose_tokens(patches, batch.queries, text_embeds)
        with clock.stage("projector"):
            image_tokens = model.project_chosen(reduced)
        with clock.stage("prefill"):
            token, mask, cache = self._prefill(batch, image_tokens)
        answer = [token]
        with clock.stage("decode"):
            for _ in range(batch.new_tokens - 1):
                mask = mask if self.compile_decode else torch.nn.functional.pad(mask, (0, 1), value=True)
                token = self._step(token, mask, self._positions, cache)
                self._positions = self._positions + 1
                answer.append(token.clone())
        return torch.cat(answer, dim=1), image_tokens

    def _prefill(self, batch: Batch, image_tokens: list[Any]) -> tuple[Tensor, Tensor, Any]:
        model = self.model
        prompts = model.embed_prompts(batch.input_ids, image_tokens=image_tokens, padding_side="left")
        mask, cache = prompts.attention_mask, None
        if self.compile_decode:
            mask = torch.nn.functional.pad(mask, (0, batch.new_tokens), value=True)
            cache = self._static_cache(*mask.shape)
        elif model.layer_reducer is not None:
            cache = model.make_cache(prompts)
        output = model(
            inputs_embeds=prompts.embeds,
            attention_mask=mask,
            position_ids=prompts.position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._positions = prompts.position_ids[:, -1:] + 1
        return output.logits.argmax(dim=-1), mask, output.past_key_values

    def _static_cache(self, batch_size: int, length: int) -> Any:
        # The same memory every time: a recorded CUDA graph is bound to its addresses.
        from transformers import StaticCache

        shape = (batch_size, length)
        if shape in self._caches:
            self._caches[shape].reset()
        else:
            self._caches[shape] = StaticCache(config=self.model.config, max_cache_len=length)
        return self._caches[shape]

    def _decode_step(self, token: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        output = self.model(
            input_ids=token, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return output.logits[:, -1:].argmax(dim=-1)

    @torch.inference_mode()
    def answer(self, batch: Batch) -> Tensor:
        """Answer a batch by one call of `generate`, from picture files to ids: int64[S, new tokens]."""
        settings = {"cache_implementation": "static"} if self.compile_decode else {}
        return self.model.generate(
            batch.input_ids,
            images=self.preprocess(batch),
            texts=batch.queries,
            do_sample=False,
            max_new_tokens=batch.new_tokens,
            min_new_tokens=batch.new_tokens,
            **settings,
        )


def measure_reductions(
    runner: Runner, batch: Batch, reductions: dict[str, Reduction], *, repeats: int, warmup: int
) -> dict[str, Measurement]:
    """Measure several token reductions on one model, in turns.

    Args:
        runner: the model.
        batch: the questions.
        reductions: by label.
        repeats: measured rounds.
        warmup: rounds before that are not counted.

    Returns:
        One measurement per label.
    """
    device = runner.model.device
    stages: dict[str, list[dict[str, float]]] = {label: [] for label in reductions}
    tokens: dict[str, list[Any]] = {}
    with make_bar("measuring", (warmup + repeats) * len(reductions), "run") as progress:
        for number in range(warmup + repeats):
            for label, reduction in reductions.items():
                runner.model.take_reduction(reduction)
                clock = StageClock(device)
                _, tokens[label] = runner.run(batch, clock)
                with clock.stage(END_TO_END):
                    runner.answer(batch)
                clock.seconds["decode"] /= max(1, batch.new_tokens - 1)
                if number >= warmup:
                    stages[label].append(clock.seconds)
                progress.update()
    measurements = {}
    for label, reduction in reductions.items():
        runner.model.take_reduction(reduction)
        peak = measure_peak(lambda: runner.answer(batch), device)
        measurements[label] = summarise(stages[label], tokens[label], peak)
    return measurements


def summarise(rounds: list[dict[str, float]], image_tokens: list[Any], peak_bytes: int | None) -> Measurement:
    """Put together what the rounds of one reduction gave."""
    spreads = {name: Spread.of([seconds[name] for seconds in rounds]) for name in rounds[0]}
    end_to_end = spreads.pop(END_TO_END)
    kept = [int(tokens.kept.sum()) for tokens in image_tokens if tokens.kept is not None]
    return Measurement(
        stages=spreads,
        end_to_end=end_to_end,
        rounds=[seconds[END_TO_END] for seconds in rounds],
        peak_bytes=peak_bytes,
        num_tokens=sum(tokens.num_tokens for tokens in image_tokens) / len(image_tokens),
        num_kept=sum(kept) / len(kept) if kept else None,
    )
