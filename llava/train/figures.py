"""What a run does while it trains: losses by modality, tokens, speed, time per part, memory, time left.

Nothing here makes the host wait between logging steps. What the host knows anyway (kept tokens, samples) is added up as
plain numbers; what only the device knows (losses, lengths) stays there as small tensors until it is read. Parts are
timed by events in the device's own stream, which are read after the wait that ends every step.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llava.clock import Timeline
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.splice import PromptEmbeds, upload

Given = ParamSpec("Given")
Result = TypeVar("Result")

GIBIBYTE = 2**30

# Parts of a step. A pause (checkpoints, held-out losses, scores) is no part of the speed, only of the time left.
DATA, TOWER, LANGUAGE_MODEL, OPTIMIZER, OTHER, PAUSE = PARTS = (
    "data",
    "tower",
    "language_model",
    "optimizer",
    "other",
    "pause",
)


@dataclass
class Totals:
    """Sums since some moment, of this rank.

    Attributes:
        num_samples: samples whose loss was computed.
        num_images: images of which the language model read a token.
        kept: tokens of these images.
        kept_squared: the sum of their squares.
        num_positions: of all sequences, padding included.
        real: positions without padding, a tensor per batch.
        losses: `float32[4]` per batch: the loss summed over learned tokens, and their number, of samples with an image
            and of those without.
    """

    num_samples: int = 0
    num_images: int = 0
    kept: int = 0
    kept_squared: int = 0
    num_positions: int = 0
    real: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    def read(self) -> list[float]:
        """Return the sums as numbers, those on the device last; waits for it."""
        host = [self.num_samples, self.num_images, self.kept, self.kept_squared, self.num_positions]
        real = float(torch.stack(self.real).sum()) if self.real else 0.0
        losses = torch.stack(self.losses).cpu().double().sum(dim=0).tolist() if self.losses else [0.0] * 4
        return [*map(float, host), real, *losses]


@dataclass(frozen=True)
class Sums:
    """Totals of all ranks; the fields are those of `Totals`, in the order of `Totals.read`."""

    num_samples: float
    num_images: float
    kept: float
    kept_squared: float
    num_positions: float
    real: float
    image_loss: float
    image_tokens: float
    text_loss: float
    text_tokens: float

    def losses(self) -> dict[str, float]:
        """Return the mean loss of a learned token, by modality of its sample; a modality without tokens is left out."""
        parts = {"loss_image": (self.image_loss, self.image_tokens), "loss_text": (self.text_loss, self.text_tokens)}
        return {name: loss / tokens for name, (loss, tokens) in parts.items() if tokens}

    def kept_tokens(self) -> dict[str, float]:
        """Return mean and standard deviation of the tokens of an image; nothing without an image."""
        if not self.num_images:
            return {}
        mean = self.kept / self.num_images
        spread = math.sqrt(max(0.0, self.kept_squared / self.num_images - mean**2))
        return {"kept_tokens_mean": mean, "kept_tokens_std": spread}


class Meter:
    """Watches a model while it trains.

    Attributes:
        totals: since the last `record`, or inside `apart` since its beginning.
        timeline: of this rank.
        is_on: whether forward passes count.
    """

    def __init__(self, device: torch.device):
        """Start at zero.

        Args:
            device: on which this rank computes.
        """
        self.device = device
        self.totals = Totals()
        self.timeline = Timeline(device, PARTS, OTHER)
        self.is_on = False
        self._has_image: list[bool] = []
        self._is_watching = False
        self._begin: tuple[float, int] | None = None
        self._first_end: tuple[float, int] | None = None

    # ------------------------------------------------------------------------------------------------- what is watched
    @contextmanager
    def watching(self, model: PreTrainedModel) -> Iterator[None]:
        """Inside, count what a LLaVA's prompts hold, and time its tower.

        Methods of the model are replaced meanwhile; afterwards it is as before, and may be copied.
        """
        if self._is_watching:
            yield
            return
        is_llava = isinstance(model, LlavaMetaForCausalLM)
        if is_llava:
            model.embed_prompts = self._counting_prompts(model.embed_prompts)
            model.encode_images = self.timed(TOWER, model.encode_images)
        self._is_watching = True
        try:
            yield
        finally:
            self._is_watching = False
            if is_llava:
                del model.embed_prompts, model.encode_images

    def timed(self, part: str, function: Callable[Given, Result]) -> Callable[Given, Result]:
        """Return a function whose time counts for a part."""

        @wraps(function)
        def run(*arguments: Given.args, **options: Given.kwargs) -> Result:
            is_timed = self.is_on and self.timeline.part != PAUSE
            with self.timeline.during(part) if is_timed else nullcontext():
                return function(*arguments, **options)

        return run

    def _counting_prompts(self, function: Callable[..., PromptEmbeds]) -> Callable[..., PromptEmbeds]:
        @wraps(function)
        def run(*arguments: object, **options: object) -> PromptEmbeds:
            batch = function(*arguments, **options)
            if self.is_on:
                self.count_prompts(batch)
            return batch

        return run

    @torch.compiler.disable
    def count_prompts(self, batch: PromptEmbeds) -> None:
        """Count the tokens of a batch with images."""
        totals, has_image = self.totals, []
        samples = batch.image_of  # int64[S, L], on the host
        if batch.borders is not None:
            samples = samples.flatten().split(batch.borders.diff().tolist())
        for row in samples:
            owners = row[row >= 0]
            has_image.append(len(owners) > 0)
            for kept in torch.bincount(owners).tolist():
                totals.num_images += 1
                totals.kept += kept
                totals.kept_squared += kept**2
        self._has_image = has_image
        self._count_positions(batch.attention_mask)

    def count_texts(self, attention_mask: Tensor) -> None:
        """Count a batch of a plain language model, `bool[S, T]`."""
        self._has_image = [False] * len(attention_mask)
        self._count_positions(attention_mask)

    def _count_positions(self, attention_mask: Tensor) -> None:
        self.totals.num_positions += attention_mask.numel()
        self.totals.real.append(attention_mask.sum())

    def count_losses(self, sums: Tensor, counts: Tensor) -> None:
        """Count the losses of the batch that was counted last.

        Args:
            sums: `float32[S]` of each sample's learned tokens, on the device.
            counts: `int64[S]` of these tokens, on the CPU.
        """
        if not self.is_on:
            return
        has_image = torch.tensor(self._has_image)  # bool[S]
        self.totals.num_samples += len(counts)
        kinds = torch.stack([has_image, ~has_image]).float()  # [2, S]
        numbers = kinds @ counts.float()
        losses = upload(kinds, sums.device) @ sums
        pairs = torch.stack([losses, upload(numbers, sums.device)], dim=1)
        self.totals.losses.append(pairs.flatten())

    # ---------------------------------------------------------------------------------------------------------- moments
    def begin(self, step: int) -> None:
        """Start the clock, at a step, unless it runs already."""
        if self._begin is None:
            self._begin = time.monotonic(), step
            self.timeline.enter(OTHER)

    def end_step(self, step: int) -> None:
        """Note that a step is done; call it when the device has done it."""
        self.timeline.fold()
        if self._first_end is None:
            self._first_end = time.monotonic(), step

    @contextmanager
    def on(self) -> Iterator[None]:
        """Let the forward passes inside count."""
        before, self.is_on = self.is_on, True
        try:
            yield
        finally:
            self.is_on = before

    @contextmanager
    def apart(self) -> Iterator[Totals]:
        """Count the forward passes inside apart from those of the training."""
        before, self.totals = self.totals, Totals()
        try:
            with self.on():
                yield self.totals
        finally:
            self.totals = before

    # ---------------------------------------------------------------------------------------------------------- figures
    def record(self, step: int, max_steps: int) -> dict[str, float]:
        """Return the figures since the last call, of all ranks; every rank has to call.

        Args:
            step: the last one that is done.
            max_steps: of the whole run.

        Returns:
            What docs/training.md describes under "Figures while it runs"; what a step has not is left out.
        """
        self.timeline.fold()
        taken, self.totals = self.totals, Totals()
        seconds = self.timeline.take()
        own = [*taken.read(), *(seconds[part] for part in PARTS), float(peak_memory(self.device) or 0)]
        rows = gather(own, self.device)
        columns = list(zip(*rows, strict=True))
        *columns, peaks = columns
        num_sums = len(columns) - len(PARTS)
        sums = Sums(*map(sum, columns[:num_sums]))
        parts = {name: sum(own) / len(rows) for name, own in zip(PARTS, columns[num_sums:], strict=True)}

        busy = sum(parts.values()) - parts[PAUSE]
        figures = sums.losses() | sums.kept_tokens()
        if busy > 0:
            figures |= {
                "visual_tokens_per_second": sums.kept / busy,
                "text_tokens_per_second": (sums.real - sums.kept) / busy,
                "samples_per_second": sums.num_samples / busy,
            }
        if sums.num_positions:
            figures["padding_share"] = 1 - sums.real / sums.num_positions
        if max(peaks):
            figures["memory_gib"] = max(peaks) / GIBIBYTE
        figures |= {f"seconds_{part}": parts[part] for part in PARTS}
        left = self.seconds_left(step, max_steps)
        return figures if left is None else figures | {"eta_seconds": left}

    def seconds_left(self, step: int, max_steps: int) -> float | None:
        """Estimate how long the rest takes, by the steps so far; the first one, which warms up, counts only alone."""
        for start in (self._first_end, self._begin):
            if start is not None and step > start[1]:
                return (time.monotonic() - start[0]) / (step - start[1]) * max(0, max_steps - step)
        return None


def gather(numbers: Sequence[float], device: torch.device) -> list[list[float]]:
    """Return the numbers of every rank, in order of ranks; every rank has to call, with as many.

    Args:
        numbers: of this rank.
        device: on which ranks exchange tensors.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [list(numbers)]
    own = torch.tensor(numbers, dtype=torch.float64, device=device)
    rows = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(rows, own)
    return torch.stack(rows).tolist()


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that this process has held at a time: on the accelerator, or resident without one.

    None where the system does not tell.
    """
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
