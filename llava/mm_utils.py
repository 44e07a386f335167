"""Images into pixel values and prompts into ids: the functions that clients of LLaVA import by name.

Names, argument orders and results are those of LLaVA. No function here needs a model. The geometry (padding to a
square, cutting into crops) decides which part of the image a patch shows.
"""

import ast
import base64
import math
from collections.abc import Iterable, Sequence
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import LlamaTokenizer, StoppingCriteria

from llava.chat_template import adds_start
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import get_model_name_from_path as get_model_name_from_path
from llava.errors import InputError
from llava.image import KERNELS, Size, scale_window, to_rgb
from llava.prompt import check_text
from llava.protocols import ImageProcessor, ImageSettings, Tokenizer

ASPECT_RATIOS = (None, "square", "pad", "anyres")
"""Values of `image_aspect_ratio`; None and "square" are the processor's own center crop."""

MAX_CANVAS_SIDE = 2**14

DIRECT_PIXELS = 2**24
"""Up to this many pixels an image is padded or scaled as a whole; above, `scale_window` makes the parts that count."""


# ------------------------------------------------------------------------------------------------------- geometry
def expand2square(pil_img: Image.Image, background_color: tuple[int, int, int]) -> Image.Image:
    """Center an image in the smallest square that contains it.

    Args:
        pil_img: the image, mode RGB.
        background_color: RGB of the bars, 0..255 each.
    """
    side = max(pil_img.size)
    if pil_img.width == pil_img.height:
        return pil_img
    square = Image.new(pil_img.mode, (side, side), background_color)
    square.paste(pil_img, ((side - pil_img.width) // 2, (side - pil_img.height) // 2))
    return square


def select_best_resolution(original_size: Size, possible_resolutions: Iterable[Size]) -> Size:
    """Choose the canvas that keeps the most of an image's own pixels; among equals the one that wastes the least area.

    Args:
        original_size: (width, height) of the image.
        possible_resolutions: (width, height) of the allowed canvases; of equally good ones the first is chosen.
    """
    width, height = original_size

    def worth(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - canvas[0] * canvas[1]

    return max(possible_resolutions, key=worth)


def resize_and_pad_image(image: Image.Image, target_resolution: Size) -> Image.Image:
    """Scale an image to fit a canvas of (width, height), centered on black, with its aspect ratio kept."""
    target_width, target_height = target_resolution
    scale_width, scale_height = target_width / image.width, target_height / image.height
    if scale_width < scale_height:
        size = (target_width, min(math.ceil(image.height * scale_width), target_height))
    else:
        size = (min(math.ceil(image.width * scale_height), target_width), target_height)
    canvas = Image.new("RGB", target_resolution, (0, 0, 0))
    canvas.paste(image.resize(size), ((target_width - size[0]) // 2, (target_height - size[1]) // 2))
    return canvas


def divide_to_patches(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """Cut an image into squares of `patch_size` pixels, in raster order."""
    return [
        image.crop((left, top, left + patch_size, top + patch_size))
        for top in range(0, image.height, patch_size)
        for left in range(0, image.width, patch_size)
    ]


def get_anyres_image_grid_shape(image_size: Size, grid_pinpoints: str | list[Size], patch_size: int) -> tuple[int, int]:
    """Return the number of crops (columns, rows) that an image is cut into.

    Args:
        image_size: (width, height) of the image.
        grid_pinpoints: allowed canvases, as a list or as its text in config.json.
        patch_size: side of one crop in pixels.
    """
    width, height = select_best_resolution(image_size, _read_canvases(grid_pinpoints))
    return width // patch_size, height // patch_size


def _read_canvases(grid_pinpoints: str | list[Size]) -> list[Size]:
    try:
        pairs = ast.literal_eval(grid_pinpoints) if isinstance(grid_pinpoints, str) else grid_pinpoints
        canvases = [(int(width), int(height)) for width, height in pairs]
    except (ValueError, SyntaxError, TypeError, OverflowError, MemoryError, RecursionError):
        canvases = []
    if not canvases or not all(1 <= side <= MAX_CANVAS_SIDE for canvas in canvases for side in canvas):
        shown = repr(grid_pinpoints)
        shown = shown if len(shown) <= 100 else f"{shown[:100]}..."
        raise InputError(
            f"image_grid_pinpoints {shown}: expected a list of (width, height) like [[336, 672], [672, 336]], "
            f"sides up to {MAX_CANVAS_SIDE}"
        )
    return canvases


# ---------------------------------------------------------------------------------------------------- pixel values
def process_images(
    images: list[Image.Image], image_processor: ImageProcessor, model_cfg: ImageSettings
) -> Tensor | list[Tensor]:
    """Turn images into the vision tower's input, as the checkpoint's `image_aspect_ratio` says.

    "pad" centers the image in a square of the mean colour; "anyres" gives a small version, and crops of a larger one;
    "square" or None leaves it to the processor (CLIP: shortest side scaled, center cropped; SigLIP: scaled to a square,
    whatever the shape). Memory follows the image's own pixels, however long and thin it is.

    Args:
        images: of any mode.
        image_processor: a CLIP's or SigLIP's; the Pillow-backed one reproduces LLaVA's pixel values bit for bit.
        model_cfg: has `image_aspect_ratio` (and `image_grid_pinpoints` for "anyres").

    Returns:
        float32[I, 3, S, S], or float32[I, C, 3, S, S] for "anyres" with equal crop counts C; a list of I tensors
        if the counts differ.

    Raises:
        InputError: an `image_aspect_ratio` of another value, or an image that does not fit into memory.
    """
    aspect_ratio = getattr(model_cfg, "image_aspect_ratio", None)
    if aspect_ratio not in ASPECT_RATIOS:
        known = ", ".join(str(ratio) for ratio in ASPECT_RATIOS)
        raise InputError(f"image_aspect_ratio {aspect_ratio!r}: expected one of {known}")
    values = [_process_image(image, image_processor, model_cfg) for image in images]
    if values and all(value.shape == values[0].shape for value in values):
        return _stack(values)
    return values


def _process_image(image: Image.Image, processor: ImageProcessor, model_cfg: ImageSettings) -> Tensor:
    aspect_ratio = getattr(model_cfg, "image_aspect_ratio", None)
    if 0 in image.size:
        raise InputError(f"an image of {image.width} x {image.height} pixels has nothing to see")
    try:
        if image.mode != "RGB":
            image = to_rgb(image)
        if aspect_ratio == "pad":
            return _pad_and_preprocess(image, processor)
        if aspect_ratio == "anyres":
            return process_anyres_image(image, processor, getattr(model_cfg, "image_grid_pinpoints", None))
        return _crop_and_preprocess(image, processor)
    except MemoryError:
        raise InputError(
            f"an image of {image.width} x {image.height} pixels does not fit into memory; make it smaller"
        ) from None


def process_anyres_image(image: Image.Image, processor: ImageProcessor, grid_pinpoints: str | list[Size]) -> Tensor:
    """Turn an image into a view of the whole followed by the crops of its best canvas.

    Args:
        image: of any mode.
        processor: a CLIP's or SigLIP's image processor.
        grid_pinpoints: allowed canvases, (width, height), as a list or as its text in config.json.

    Returns:
        float32[C, 3, S, S]; the whole image (resized to a square) first, then the crops in raster order.
    """
    image = to_rgb(image)
    canvas = select_best_resolution(image.size, _read_canvases(grid_pinpoints))
    crops = divide_to_patches(resize_and_pad_image(image, canvas), processor.crop_size["height"])
    side = _scaled_edge(processor)
    # `resize` holds an image of the new width and the old height meanwhile.
    if side * max(image.size) <= 4 * DIRECT_PIXELS:
        whole = image.resize((side, side))
    else:
        whole = scale_window(image, (side, side), (0, 0, side, side))
    return _stack([_preprocess(view, processor) for view in (whole, *crops)])


def _pad_and_preprocess(image: Image.Image, processor: ImageProcessor) -> Tensor:
    color = tuple(int(mean * 255) for mean in processor.image_mean)
    side = max(image.size)
    if side * side <= DIRECT_PIXELS or not _can_scale_in_parts(processor):
        return _preprocess(expand2square(image, color), processor)
    edge = _scaled_edge(processor)
    window = (0, 0, edge, edge)
    scaled = scale_window(image, (edge, edge), window, canvas=(side, side), color=color, resample=processor.resample)
    return _preprocess(scaled, processor, do_resize=False)


def _crop_and_preprocess(image: Image.Image, processor: ImageProcessor) -> Tensor:
    if not _can_scale_in_parts(processor):
        return _preprocess(image, processor)
    # The size that the processor would scale it to.
    edge, short = _scaled_edge(processor), min(image.size)
    keeps_shape = processor.size.get("shortest_edge") is not None
    width, height = (int(edge * length / short) if keeps_shape else edge for length in image.size)
    if max(image.width * image.height, width * height) <= DIRECT_PIXELS:
        return _preprocess(image, processor)
    if width * height <= DIRECT_PIXELS:
        scaled = image.resize((width, height), processor.resample)
    else:
        crop_width, crop_height = processor.crop_size["width"], processor.crop_size["height"]
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
        window = (left, top, left + crop_width, top + crop_height)
        scaled = scale_window(image, (width, height), window, resample=processor.resample)
    return _preprocess(scaled, processor, do_resize=False)


def _scaled_edge(processor: ImageProcessor) -> int:
    """Pixels of the shorter side after the processor has scaled; SigLIP's scales to a square, whatever the shape."""
    return processor.size.get("shortest_edge") or processor.size["height"]


def _can_scale_in_parts(processor: ImageProcessor) -> bool:
    """Whether the processor scales by a filter that we know: the shortest edge, cropping no more, or to a square."""
    if not getattr(processor, "do_resize", False) or getattr(processor, "resample", None) not in KERNELS:
        return False
    crops, edge = bool(getattr(processor, "do_center_crop", False)), processor.size.get("shortest_edge")
    if not edge:
        return not crops and bool(processor.size.get("height")) and processor.size["height"] == processor.size["width"]
    return crops and max(processor.crop_size["width"], processor.crop_size["height"]) <= edge


def _preprocess(image: Image.Image, image_processor: ImageProcessor, **options: object) -> Tensor:
    # Without the format, an image that is 1 or 3 pixels high is taken for channels-first.
    values = image_processor.preprocess(image, input_data_format="channels_last", **options)
    return torch.as_tensor(values["pixel_values"][0])


def _stack(values: list[Tensor]) -> Tensor:
    """Stack with NumPy: each thread that copies a large tensor with torch starts OpenMP threads of its own.

    With more of them than cores, libgomp puts waiting threads to sleep at once, and every small operation of a model on
    the CPU pays for waking them: images read in threads would halve its speed.
    """
    return torch.from_numpy(np.stack([value.numpy() for value in values]))


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """Read an image from base64 text, as web clients send it.

    Raises:
        InputError: it is not the base64 text of an image.
    """
    try:
        return Image.open(BytesIO(base64.b64decode(image)))
    except (ValueError, OSError, Image.DecompressionBombError):
        raise InputError("not the base64 text of an image") from None


# ------------------------------------------------------------------------------------------------------------- ids
def tokenize_texts(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Tokenize with the ids of LLaVA's original tokenizer, sequence start included: ids for each text, in one call.

    The sentencepiece tokenizer of transformers 4 puts its "▁" before a text that starts with a space; that of
    transformers 5 takes the space itself for the "▁" and loses one token. One more space restores it.

    Raises:
        InputError: a text that no tokenizer takes; see `check_text`.
    """
    for text in texts:
        check_text(text)
    if isinstance(tokenizer, LlamaTokenizer):
        texts = [" " + text if text.startswith((" ", "▁")) else text for text in texts]
    # Not verbose: whether a prompt is too long is for the model to decide, once its images are in place.
    return tokenizer(list(texts), verbose=False).input_ids if texts else []


def tokenize_prompts(
    prompts: Sequence[str], tokenizer: Tokenizer, image_token_index: int = IMAGE_TOKEN_INDEX
) -> list[list[int]]:
    """Tokenize prompts, with one sentinel id for every `<image>`; texts in common are tokenized once.

    Args:
        prompts: texts with any number of `<image>` placeholders.
        tokenizer: the language model's tokenizer.
        image_token_index: the sentinel.

    Returns:
        Ids of each prompt. The sequence start appears once, at the front.
    """
    chunked = [prompt.split(DEFAULT_IMAGE_TOKEN) for prompt in prompts]
    texts = list(dict.fromkeys(chunk for chunks in chunked for chunk in chunks))
    ids = dict(zip(texts, tokenize_texts(texts, tokenizer), strict=True))
    # What the tokenizer put there, not a text that begins with it (ChatML's <|im_start|> may be the sequence start).
    starts = int(adds_start(tokenizer))
    rows = []
    for first, *others in chunked:
        row = list(ids[first])
        for chunk in others:
            row += [image_token_index, *ids[chunk][starts:]]
        rows.append(row)
    return rows


def tokenizer_image_token(
    prompt: str, tokenizer: Tokenizer, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors: str | None = None
) -> list[int] | Tensor:
    """Tokenize one prompt; see `tokenize_prompts`.

    Args:
        prompt: text with any number of `<image>` placeholders.
        tokenizer: the language model's tokenizer.
        image_token_index: the sentinel.
        return_tensors: None or "pt".

    Returns:
        A list of ids, or int64[T] for "pt".

    Raises:
        ValueError: another value of `return_tensors`.
    """
    (input_ids,) = tokenize_prompts([prompt], tokenizer, image_token_index)
    if return_tensors is None:
        return input_ids
    if return_tensors == "pt":
        return torch.tensor(input_ids, dtype=torch.long)
    raise ValueError(f"return_tensors {return_tensors!r}: expected None or 'pt'")


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stop a row of `generate` once its answer ends with one of the keywords.

    `generate` passes the prompt and the answer, or, for a prompt given as embeddings, the answer alone; both work (the
    released code counts from the prompt's length and never stops in the second case).
    """

    def __init__(self, keywords: list[str], tokenizer: Tokenizer, input_ids: Tensor):
        """Tokenize the keywords.

        Args:
            keywords: texts, or special tokens such as `</s>`; an empty one is ignored.
            tokenizer: the language model's tokenizer.
            input_ids: int64[S, T], the prompt, with or without image sentinels.

        Raises:
            InputError: a keyword that no tokenizer takes; see `check_text`.
        """
        self.keywords = [keyword for keyword in keywords if keyword]
        for keyword in self.keywords:
            check_text(keyword)
        self.tokenizer = tokenizer
        self.input_ids = input_ids
        self.keyword_ids = [torch.tensor(self._encode(keyword), dtype=torch.long) for keyword in self.keywords]
        # A token is at least one byte, so this many tokens contain any keyword, however it is tokenized.
        self.tail_length = max((len(keyword.encode()) for keyword in self.keywords), default=0) + 1

    def __call__(self, output_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        """Return which rows are finished.

        Args:
            output_ids: int64[S, L], with or without the prompt in front.
            scores: not used.
            **kwargs: not used.

        Returns:
            bool[S].
        """
        finished = [self._is_finished(row) for row in output_ids[:, self._prompt_length(output_ids) :].cpu()]
        return torch.tensor(finished, dtype=torch.bool, device=output_ids.device)

    def _encode(self, keyword: str) -> list[int]:
        token_ids = self.tokenizer(keyword).input_ids
        has_start = len(token_ids) > 1 and token_ids[0] == self.tokenizer.bos_token_id
        return token_ids[1:] if has_start else token_ids

    def _prompt_length(self, output_ids: Tensor) -> int:
        """Return T if the rows begin with the prompt, 0 if they hold new tokens only."""
        rows, length = self.input_ids.shape
        if output_ids.shape[1] < length or output_ids.shape[0] % rows:
            return 0
        prompts = self.input_ids.repeat_interleave(output_ids.shape[0] // rows, dim=0)
        return length if torch.equal(prompts.to(output_ids.device), output_ids[:, :length]) else 0

    def _is_finished(self, answer: Tensor) -> bool:
        for keyword_ids in self.keyword_ids:
            if len(keyword_ids) and torch.equal(answer[-len(keyword_ids) :], keyword_ids):
                return True
        tail = self.tokenizer.decode(answer[-self.tail_length :], skip_special_tokens=True)
        return any(keyword in tail for keyword in self.keywords)
