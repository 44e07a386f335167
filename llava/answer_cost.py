"""FLOPs of one answer: what `llava.efficiency` counts for a workload, for a question that was asked."""

from dataclasses import replace

from llava.efficiency.cost import Precision, Workload, stage_costs, total_flops
from llava.efficiency.estimate import count_reduction
from llava.efficiency.shapes import ModelShape, read_source
from llava.errors import InputError
from llava.model.token_reduction import Reduction


def read_counted_shape(path: str) -> tuple[ModelShape | None, str]:
    """Read the shapes of a checkpoint that FLOPs are counted at; None with a sentence where they are not counted."""
    try:
        return read_source(path).shape, ""
    except InputError as error:
        return None, f"FLOPs are not counted: {error}"


def count_answer(shape: ModelShape, reduction: Reduction, num_tokens: int, prompt_tokens: int, new_tokens: int) -> int:
    """Count the FLOPs of a question about one image, from the vision tower to the last token of the answer.

    Args:
        shape: the model.
        reduction: what it was reduced by.
        num_tokens: of the image, that the language model's first layer read.
        prompt_tokens: the language model's, of the prompt without the image.
        new_tokens: of the answer, its end included.

    Raises:
        InputError: the language model has no layer that the method names.
    """
    # What the method looks at does not depend on the image; how much it leaves is known already.
    counted = replace(count_reduction(replace(reduction, inside=None), shape), num_tokens=num_tokens)
    inside, num_layers = reduction.inside, shape.language.layers
    if inside is not None:
        counts = inside.counts(num_tokens, num_layers)
        counted = replace(counted, drops=tuple(zip(inside.layers(num_layers), counts, strict=True)))
    work = Workload(1, prompt_tokens, shape.tower.text_context, new_tokens)
    return total_flops(stage_costs(shape, counted, work, Precision()), work)
