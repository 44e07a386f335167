"""FLOPs and bytes of every stage of a question, from shapes alone: pure arithmetic.

Convention: one multiply-add is two FLOPs; matrix products, the patch convolution and attention are counted, the rest
(norms, activations, softmax, rotary embedding) is not; attention is counted as the full square although its upper half
is masked. This is what `torch.utils.flop_counter` counts, and what gives the published 8.67 TFLOPs for a 7B prefill of
640 tokens and 2.48 for 186 (with logits at every position).

Bytes are the least that must move between memory and the arithmetic units: each weight once per batch, the stage's
input and output, and the key-value cache. Activations inside a stage are not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llava.efficiency.shapes import LanguageShape, ModelShape, TowerShape, TransformerShape

FLOAT32_BYTES = 4
DECODE = "decode"


@dataclass(frozen=True)
class Cost:
    """Work of a stage: floating-point operations, and bytes that must move at least."""

    flops: int
    bytes: int

    @property
    def intensity(self) -> float:
        """FLOPs per byte; compare with the machine's (peak FLOPs per second over bytes per second)."""
        return self.flops / self.bytes if self.bytes else 0.0


@dataclass(frozen=True)
class Workload:
    """What is asked.

    Attributes:
        batch_size: questions at once, one picture each.
        prompt_tokens: language model tokens of the prompt, image tokens excepted.
        query_tokens: tokens that the text tower reads per query.
        new_tokens: tokens of the answer.
    """

    batch_size: int = 1
    prompt_tokens: int = 64
    query_tokens: int = 77
    new_tokens: int = 16


@dataclass(frozen=True)
class Look:
    """One look of a token reduction at a layer's attention in the vision tower.

    Attributes:
        layer: counted as `mm_vision_select_layer`: the layer whose output is hidden state `layer`.
        num_queries: rows whose attention is computed; 0 where only the layer's output is taken.
    """

    layer: int
    num_queries: int


@dataclass(frozen=True)
class Reduction:
    """What a token reduction leaves of one image, and what it looks at.

    Attributes:
        num_kept: patches copied verbatim; may be a mean over images, rounded.
        num_tokens: tokens that the language model reads, a mean token included.
        reads_text: whether patches are scored against the query.
        looks: what it looks at in the vision tower besides the patches.
        reads_projected: whether it looks at all patches behind the projector.
        drops: where tokens leave inside the language model: (layer, tokens that are left from it on), rising layers.
    """

    num_kept: int
    num_tokens: int
    reads_text: bool
    looks: tuple[Look, ...] = ()
    reads_projected: bool = False
    drops: tuple[tuple[int, int], ...] = ()

    def tokens_per_layer(self, num_layers: int) -> list[int]:
        """Image tokens that each layer of the language model reads."""
        counts = [self.num_tokens] * num_layers
        for layer, num_tokens in self.drops:
            counts[layer:] = [num_tokens] * (num_layers - layer)
        return counts

    def mean_tokens(self, num_layers: int) -> float:
        """Image tokens on average over the layers."""
        return sum(self.tokens_per_layer(num_layers)) / num_layers


@dataclass(frozen=True)
class Precision:
    """Bytes per number of the language model and projector, and of the towers."""

    language: int = 2
    tower: int = 4


def encoder_flops(shape: TransformerShape, num_tokens: int) -> int:
    """FLOPs of a tower's encoder layers on one sequence: four projections, attention, an MLP of two matrices."""
    width = shape.width
    linear = 4 * width * width + 2 * width * shape.inner
    return shape.layers * (2 * num_tokens * linear + 4 * num_tokens**2 * width)


def vision_flops(shape: TowerShape, looks: Sequence[Look] = ()) -> int:
    """FLOPs of the vision tower on one image.

    Args:
        shape: the tower.
        looks: at a layer's attention. Layers behind the selected one are run if one is looked at; a layer that is
            looked at projects its keys, and the queries of the rows looked at, once more.
    """
    width, num_tokens = shape.vision.width, shape.num_rows
    num_queries: dict[int, int] = {}
    for look in looks:
        number = look.layer if look.layer > 0 else shape.num_layers + 1 + look.layer
        num_queries[number] = max(min(look.num_queries, num_tokens), num_queries.get(number, 0))
    layers = replace(shape.vision, layers=max(shape.vision.layers, *num_queries, 0))
    patches = 2 * shape.num_patches * 3 * shape.patch_size**2 * width
    looked_at = sum(
        2 * width * width * (num_tokens + rows) + 2 * rows * num_tokens * width for rows in num_queries.values() if rows
    )
    return patches + encoder_flops(layers, num_tokens) + looked_at


def text_flops(shape: TowerShape, num_tokens: int) -> int:
    """FLOPs of the text tower and its projection on one query."""
    return encoder_flops(shape.text, num_tokens) + 2 * shape.text.width * shape.joint_width


def joint_weights(shape: TowerShape) -> int:
    """Weights of the matrices that take a patch into the joint space: a projection, or two matrices and an MLP."""
    width = shape.vision.width
    return 2 * width * (width + shape.vision.inner) if shape.is_siglip else width * shape.joint_width


def selection_flops(shape: TowerShape) -> int:
    """FLOPs of choosing one picture's tokens: joint projection of all patches, dot products, mean of the dropped."""
    return 2 * shape.num_patches * (joint_weights(shape) + shape.joint_width + shape.vision.width)


def projector_parameters(shape: ModelShape) -> tuple[int, int]:
    """Return the weights and the biases of the projector."""
    width, depth = shape.language.width, shape.projector_depth
    if depth == 0:
        return 0, 0
    return shape.tower.vision.width * width + (depth - 1) * width * width, depth * width


def decoder_weights(shape: LanguageShape) -> int:
    """Weights of one decoder layer's matrices: attention projections and an MLP of three matrices."""
    attention = 2 * shape.width * shape.query_width + 2 * shape.width * shape.cache_width
    return attention + 3 * shape.width * shape.inner


Positions = int | Sequence[int]
"""Positions that the layers read: one number, or one for each layer."""


def per_layer(shape: LanguageShape, positions: Positions) -> Sequence[int]:
    """Positions of each layer."""
    return [positions] * shape.layers if isinstance(positions, int) else positions


def prefill_flops(shape: LanguageShape, num_tokens: Positions, num_logits: int | None = None) -> int:
    """FLOPs of reading one prompt.

    Args:
        shape: the language model.
        num_tokens: positions of the prompt, image tokens included.
        num_logits: positions for which logits are made; None: all, as in the published figures. `generate` makes 1.
    """
    lengths = per_layer(shape, num_tokens)
    layers = sum(2 * length * decoder_weights(shape) + 4 * length**2 * shape.query_width for length in lengths)
    num_logits = lengths[-1] if num_logits is None else num_logits
    return layers + 2 * num_logits * shape.width * shape.vocabulary


def decode_flops(shape: LanguageShape, num_tokens: Positions) -> int:
    """FLOPs of one decoding step of one answer, with `num_tokens` positions in the cache after it."""
    lengths = per_layer(shape, num_tokens)
    layers = sum(2 * decoder_weights(shape) + 4 * length * shape.query_width for length in lengths)
    return layers + 2 * shape.width * shape.vocabulary


def cache_bytes(shape: LanguageShape, num_tokens: Positions, bytes_per_number: int) -> int:
    """Bytes of the keys and values of one sequence."""
    return 2 * shape.cache_width * sum(per_layer(shape, num_tokens)) * bytes_per_number


def encoder_parameters(shape: TransformerShape) -> int:
    """Parameters of a tower's encoder layers, biases and norms included."""
    width, inner = shape.width, shape.inner
    return shape.layers * (4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width)


def pooling_parameters(shape: TransformerShape) -> int:
    """Parameters of SigLIP's pooling head: its query, an attention, a norm and an MLP."""
    width, inner = shape.width, shape.inner
    return 4 * (width * width + width) + 2 * width * inner + inner + width + 3 * width


def count_parameters(shape: ModelShape) -> dict[str, int]:
    """Parameters of the four parts, as they are loaded: towers without the layers that are not run."""
    tower, language = shape.tower, shape.language
    vision_width, text_width = tower.vision.width, tower.text.width
    # Patch embedding and positions; then CLS, two norms and the projection, or a bias, one norm and the pooling head.
    vision = encoder_parameters(tower.vision) + vision_width * (3 * tower.patch_size**2 + tower.num_rows)
    if tower.is_siglip:
        vision += pooling_parameters(tower.vision) + 3 * vision_width
    else:
        vision += vision_width * (1 + 4 + tower.joint_width)
    text = encoder_parameters(tower.text) + text_width * (
        tower.text_vocabulary + tower.text_context + 2 + tower.joint_width
    )
    text += tower.is_siglip * tower.joint_width  # the bias of its head
    biases = (language.query_width + 2 * language.cache_width) if language.has_biases else 0
    decoder = language.layers * (decoder_weights(language) + 2 * language.width + biases) + language.width
    embeddings = (1 if language.is_tied else 2) * language.vocabulary * language.width
    return {
        "vision tower": vision,
        "text tower": text,
        "projector": sum(projector_parameters(shape)),
        "language model": decoder + embeddings,
    }


def weight_bytes(shape: ModelShape, precision: Precision, *, with_text: bool = True) -> dict[str, int]:
    """Bytes of the weights by part; the text tower is loaded only where a reduction reads text."""
    sizes = {
        name: count * (precision.tower if name.endswith("tower") else precision.language)
        for name, count in count_parameters(shape).items()
    }
    return sizes if with_text else {name: size for name, size in sizes.items() if name != "text tower"}


def stage_costs(shape: ModelShape, reduction: Reduction, work: Workload, precision: Precision) -> dict[str, Cost]:
    """Count every stage of one batch; "decode" is one step at the middle of the answer.

    Args:
        shape: the model.
        reduction: what is left of each picture.
        work: what is asked.
        precision: of the numbers.

    Returns:
        Cost by stage, in the order in which the stages run.
    """
    tower, language, size = shape.tower, shape.language, work.batch_size
    weights = weight_bytes(shape, precision)
    patches = size * tower.num_patches * tower.vision.width * precision.tower
    tokens = size * reduction.num_tokens
    costs = {
        "vision tower": Cost(
            size * vision_flops(tower, reduction.looks),
            weights["vision tower"] + size * 3 * tower.image_size**2 * precision.tower + patches,
        )
    }
    if reduction.reads_text:
        costs["text tower"] = Cost(size * text_flops(tower, work.query_tokens), _text_bytes(tower, work, precision))
        head = joint_weights(tower) * precision.tower
        kept = tokens * tower.vision.width * precision.tower
        costs["selection"] = Cost(size * selection_flops(tower), head + patches + kept)
    matrices, _ = projector_parameters(shape)
    if reduction.reads_projected:
        rows = size * tower.num_patches
        moved = weights["projector"] + rows * (tower.vision.width + language.width) * precision.language
        before = costs.get("selection", Cost(0, 0))
        costs["selection"] = Cost(before.flops + 2 * rows * matrices, before.bytes + moved)
    inout = tokens * (tower.vision.width + language.width) * precision.language
    costs["projector"] = Cost(2 * tokens * matrices, weights["projector"] + inout)
    return costs | _language_costs(language, reduction, work, precision)


def total_flops(costs: dict[str, Cost], work: Workload) -> int:
    """FLOPs of a batch from images to answers, all decoding steps included."""
    steps = {DECODE: max(0, work.new_tokens - 1)}
    return sum(steps.get(name, 1) * each.flops for name, each in costs.items())


def prompt_lengths(language: LanguageShape, reduction: Reduction, work: Workload) -> list[int]:
    """Positions of a prompt in each layer, image tokens included."""
    return [work.prompt_tokens + count for count in reduction.tokens_per_layer(language.layers)]


def _text_bytes(tower: TowerShape, work: Workload, precision: Precision) -> int:
    rows = work.batch_size * work.query_tokens * tower.text.width
    matrices = encoder_parameters(tower.text) + tower.text.width * tower.joint_width
    return (matrices + rows) * precision.tower + work.batch_size * tower.joint_width * FLOAT32_BYTES


def _language_costs(
    language: LanguageShape, reduction: Reduction, work: Workload, precision: Precision
) -> dict[str, Cost]:
    size, bytes_each = work.batch_size, precision.language
    lengths = prompt_lengths(language, reduction, work)
    matrices = (language.layers * decoder_weights(language) + language.width * language.vocabulary) * bytes_each
    embedded = size * lengths[0] * language.width * bytes_each
    logits = size * language.vocabulary * bytes_each
    middle = [length + max(1, work.new_tokens // 2) for length in lengths]
    return {
        "prefill": Cost(
            size * prefill_flops(language, lengths, num_logits=1),
            matrices + embedded + size * cache_bytes(language, lengths, bytes_each) + logits,
        ),
        DECODE: Cost(
            size * decode_flops(language, middle),
            matrices + size * cache_bytes(language, middle, bytes_each) + logits,
        ),
    }
