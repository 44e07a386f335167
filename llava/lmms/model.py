"""`llava_trim`, a model of lmms-eval that answers with this package's own evaluation loop.

lmms-eval's `llava` model calls `generate` batch by batch: it reads and encodes an image again for every question, and
knows no token reduction but config.json's. This one hands all requests to `llava.eval.predict`, which encodes an image
once, and reports the visual tokens of each question. Prompts, and with them the answers, are those of `llava`.
"""

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import numpy as np
import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from PIL import Image
from tqdm import tqdm

from llava.cli import ModelSpec, user_path
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import InputError
from llava.eval.benchmark import Question
from llava.eval.predict import Answered, Predictor, Settings, choose_unit_size, keep_freed_memory
from llava.files import parse_natural
from llava.image import read_image
from llava.picture import Picture
from llava.prompt import DEFAULT_CONV_MODE, check_conv_mode, query_of
from llava.sampling import Sampling

DEFAULT_NEW_TOKENS = 1024
"""Length limit of an answer where the task sets none, as in lmms-eval's `llava`."""


@dataclass
class VisualTokenCounts(TokenCounts):
    """Tokens of one answer, as they stand under `token_counts` in lmms-eval's samples.

    Attributes:
        input_tokens: positions that the language model read: text and visual tokens.
        output_tokens: tokens of the answer's text.
        image_tokens: visual tokens that the language model read, over all images of the question.
        image_patches: the same before reduction.
    """

    image_tokens: int | None = None
    image_patches: int | None = None

    def to_dict(self) -> dict[str, int | None]:
        return {**super().to_dict(), "image_tokens": self.image_tokens, "image_patches": self.image_patches}


class LlavaTrim(lmms):
    """LLaVA with a token reduction, for tasks of the type `generate_until`."""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        reduce: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        conv_template: str = DEFAULT_CONV_MODE,
        *,
        model_base: str | None = None,
        tower_dtype: str | None = None,
        attn_implementation: str | None = None,
        load_8bit: bool = False,
        load_4bit: bool = False,
        calibrated: str | None = None,
        **unknown: Any,
    ) -> None:
        """Load the model.

        Args:
            pretrained: checkpoint folder or hub id.
            reduce: token reduction; None: config.json's, "none": none.
            dtype: "float32", "float16" or "bfloat16"; None: float16 on an accelerator, float32 on the CPU.
            device: "cpu", "cuda:1", ...; None: the accelerator (of several processes each its own), else the CPU.
            batch_size: questions that the language model reads at once, or "auto": as many as memory allows.
            conv_template: conversation template.
            model_base: base model of a LoRA or projector-only checkpoint.
            tower_dtype: of the vision and text towers; None: float32.
            attn_implementation: of the language model.
            load_8bit: quantise the language model to 8 bit.
            load_4bit: quantise it to 4 bit.
            calibrated: file with the fence of a target `avg=`.
            unknown: refused.

        Raises:
            InputError: an option or the checkpoint is not usable.
        """
        super().__init__()
        if unknown:
            known = ", ".join(name for name in LlavaTrim.__init__.__annotations__ if name not in ("unknown", "return"))
            raise InputError(f"llava_trim has no option {sorted(unknown)[0]}; it has {known}")
        check_conv_mode(conv_template)
        batch_size = parse_batch_size(batch_size)
        spec = ModelSpec(
            path=str(user_path(str(pretrained))),
            base=model_base,
            reduce=reduce and reduce.strip("\"'"),  # lmms-eval leaves the quotes around commas in place
            device=device or own_device(),
            dtype=dtype,
            tower_dtype=tower_dtype,
            attn_implementation=attn_implementation,
            load_8bit=load_8bit,
            load_4bit=load_4bit,
            calibrated=calibrated and user_path(calibrated),
        )
        self._tokenizer, self._model, self._image_processor = spec.load()
        self._settings = Settings(model_id=spec.name, conv_mode=conv_template, batch_size=batch_size)
        self._pictures: WeakValueDictionary[bytes, Picture] = WeakValueDictionary()

    @property
    def device(self) -> torch.device:
        """Where lmms-eval gathers what several processes have."""
        return self._model.device

    # ----------------------------------------------------------------------------------------------------- requests
    @torch.inference_mode()
    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer requests.

        Returns:
            For each request the text, with `VisualTokenCounts`.

        Raises:
            InputError: a question cannot be asked; names its task and document.
        """
        start = time.perf_counter()
        if self.device.type == "cpu":
            keep_freed_memory()
        results: dict[int, GenerationResult] = {}
        with tqdm(total=len(requests), disable=self.rank != 0, desc="llava_trim", unit="q") as progress:
            for sampling, numbers in group_by_sampling(requests).items():
                settings = replace(self._settings, sampling=sampling)
                predictor = Predictor(self._model, self._tokenizer, self._image_processor, settings)
                with closing(predictor):
                    for answered, faults in predictor.run(self._make_units(requests, numbers)):
                        if faults:
                            raise InputError(f"{name_document(requests[faults[0].question.id])}: {faults[0].reason}")
                        results |= {each.question.id: self._make_result(each) for each in answered}
                        progress.update(len(answered))
        ordered = [results[number] for number in range(len(requests))]
        report_means(requests, ordered, time.perf_counter() - start)
        return ordered

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        """Refuse: this model compares no given answers."""
        refuse("loglikelihood", requests)

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> NoReturn:
        """Refuse: this model asks single questions."""
        refuse("generate_until_multi_round", requests)

    def _make_units(self, requests: Sequence[Instance], numbers: Sequence[int]) -> Iterator[list[Question]]:
        """Yield questions in units of work; documents are decoded unit by unit, not all at once."""
        size = choose_unit_size(self._model)
        for start in range(0, len(numbers), size):
            yield [self._make_question(requests[number], number) for number in numbers[start : start + size]]

    def _make_question(self, request: Instance, number: int) -> Question:
        """Turn a request into a question, with the prompt of lmms-eval's `llava`."""
        context, _, doc_to_visual, doc_id, task, split = request.args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        images = tuple(self._make_picture(visual, request) for visual in visuals)
        prompt = context
        if images and DEFAULT_IMAGE_TOKEN not in context:
            prompt = " ".join([DEFAULT_IMAGE_TOKEN] * len(images)) + f"\n{context}"
        return Question(number, prompt=prompt, query=query_of(prompt), images=images)

    def _make_picture(self, visual: object, request: Instance) -> Picture:
        """Return the picture of an image; one of the same pixels that is still in use serves again.

        Pixels are taken as they are stored, as in every benchmark.
        """
        if not isinstance(visual, Image.Image):
            raise InputError(f"{name_document(request)} holds {type(visual).__name__}; llava_trim reads images only")
        pixels = np.asarray(read_image(visual, f"of {name_document(request)}"))  # uint8[height, width, 3]
        key = hashlib.blake2b(pixels, person=b"%dx%d" % pixels.shape[:2]).digest()
        return self._pictures.setdefault(key, Picture(pixels))

    def _make_result(self, answered: Answered) -> GenerationResult:
        counts = VisualTokenCounts(
            input_tokens=answered.num_positions,
            output_tokens=len(self._tokenizer(answered.text, add_special_tokens=False).input_ids),
            image_tokens=answered.metadata["num_tokens"],
            image_patches=answered.metadata["num_patches"],
        )
        return GenerationResult(answered.text, counts)


# -------------------------------------------------------------------------------------------------------------- options
def parse_batch_size(value: int | str) -> int | None:
    """Read `--batch_size`: a number, or "auto", which is None.

    Raises:
        InputError: it is neither.
    """
    if value == "auto":
        return None
    size = parse_natural(str(value))
    if not size:
        raise InputError(f"batch_size {value}: expected a whole number from 1 on, or auto")
    return size


def own_device() -> str | None:
    """Return the accelerator of this process where several work side by side; None: there is one process, or no GPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not torch.accelerator.is_available():
        return None
    return f"{torch.accelerator.current_accelerator().type}:{os.environ.get('LOCAL_RANK', '0')}"


def group_by_sampling(requests: Sequence[Instance]) -> dict[Sampling, list[int]]:
    """Return the numbers of the requests by how their answers are searched for.

    Of a task's generation arguments these count, as in lmms-eval's `llava`: temperature, top_p, num_beams and
    max_new_tokens. `until` does not: an answer ends at the model's end token.

    Raises:
        InputError: one is out of its range; names the document.
    """
    groups: dict[Sampling, list[int]] = {}
    for number, request in enumerate(requests):
        try:
            sampling = make_sampling(request.args[1])
        except InputError as error:
            raise InputError(f"{name_document(request)}: {error}") from None
        groups.setdefault(sampling, []).append(number)
    return groups


def make_sampling(arguments: Mapping[str, Any]) -> Sampling:
    """Read a task's generation arguments; without a temperature the search is greedy, and `top_p` means nothing."""
    temperature = arguments.get("temperature") or 0
    return Sampling(
        temperature=temperature,
        top_p=arguments.get("top_p") if temperature else None,
        num_beams=arguments.get("num_beams") or 1,
        max_new_tokens=arguments.get("max_new_tokens") or DEFAULT_NEW_TOKENS,
    )


# -------------------------------------------------------------------------------------------------------------- reports
def name_document(request: Instance) -> str:
    """Name a request for a person."""
    return f"task {request.task_name}, document {request.doc_id}"


def refuse(kind: str, requests: Sequence[Instance]) -> NoReturn:
    """Refuse requests of a kind that this model does not answer.

    Raises:
        InputError: always; names the task.
    """
    raise InputError(
        f"task {requests[0].task_name} asks for {kind}; llava_trim answers generate_until: leave the task out, or "
        "use a generate_until form of it"
    )


def report_means(requests: Sequence[Instance], results: Sequence[GenerationResult], seconds: float) -> None:
    """Let lmms-eval write each task's mean of visual tokens into its result file, under `throughput`.

    It puts `avg_` before each name: `avg_image_tokens_pope`.

    Args:
        requests: what was asked.
        results: theirs.
        seconds: that all of it took.
    """
    counts: dict[str, list[VisualTokenCounts]] = {}
    for request, result in zip(requests, results, strict=True):
        counts.setdefault(str(request.task_name), []).append(result.token_counts)
    means = {
        f"{name}_{task}": sum(getattr(each, name) for each in own) / len(own)
        for task, own in counts.items()
        for name in ("image_tokens", "image_patches")
    }
    written = sum(result.token_counts.output_tokens for result in results)
    log_metrics(seconds, written, written / seconds, means)
