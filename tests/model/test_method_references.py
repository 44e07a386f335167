"""The methods before the language model against slow float64 readings of their formulae, on random images."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llava.model.token_reduction import Need, VisualTokens, parse_reducer
from llava.model.token_reduction.base import PROJECTED

NUM_INPUTS, BATCH = 200, 8
HEADS, WIDTH = 2, 4
GRIDS = ((6, 6), (5, 7), (4, 4))


def make_batch(number: int) -> VisualTokens:
    """Images with all that any of the methods looks at."""
    rows, cols = grid = GRIDS[number % len(GRIDS)]
    num_patches = rows * cols
    generator = torch.Generator().manual_seed(number)

    def draw(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=generator)

    maps = {layer: (2 * draw(HEADS, num_patches + 1, num_patches + 1)).softmax(dim=-1) for layer in (2, -2)}
    return VisualTokens(
        patches=draw(num_patches, 12),
        grid=grid,
        joint=draw(num_patches, 10),
        text=draw(10),
        intermediates={
            PROJECTED: draw(num_patches, 40),
            Need("attention", 2): maps[2],
            Need("attention", -2): maps[-2],
            Need("received", 2): maps[2].mean(dim=(1, 2))[:, 1:],
            Need("received", -2): maps[-2].mean(dim=(1, 2))[:, 1:],
            Need("cls_attention", -2): maps[-2][:, :, 0, 1:],
            Need("keys", -2): draw(HEADS, num_patches + 1, WIDTH),
            Need("cls", -2): draw(12),
            Need("keys", -1): 2 * draw(HEADS, num_patches + 1, WIDTH),
            Need("cls_query", -1): 2 * draw(HEADS, WIDTH),
        },
    )


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


def largest(scores: list[float], count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda place: -scores[place])[:count]


class Image:
    """One image in float64."""

    def __init__(self, tokens: VisualTokens, row: int):
        self.patches, self.joint, self.text = (
            each[row].double() for each in (tokens.patches, tokens.joint, tokens.text)
        )
        self.needs = {need: values[row].double() for need, values in tokens.intermediates.items()}
        self.num, self.columns = len(self.patches), tokens.grid[1]
        self.projected = self.needs[PROJECTED]
        heads = self.needs[Need("cls_attention", -2)]
        self.attention = [sum(float(head[place]) for head in heads) / len(heads) for place in range(self.num)]

    def similarity(self, vectors: Tensor) -> list[list[float]]:
        return [[cosine(one, other) for other in vectors] for one in vectors]


def faster_vlm(image: Image, count: int) -> list[int]:
    return largest(image.attention, count)


def div_prune(image: Image, count: int) -> list[int]:
    similarity = image.similarity(image.projected)
    distance = [[1 - value for value in row] for row in similarity]
    others = range(image.num)
    picks = [max(others, key=lambda i: min(distance[i][j] for j in others if j != i))]
    while len(picks) < count:
        rest = [i for i in others if i not in picks]
        picks.append(max(rest, key=lambda i: min(distance[i][j] for j in picks)))
    return picks


def cd_pruner(image: Image, count: int) -> list[int]:
    relevance = [-cosine(patch, image.text) for patch in image.joint]
    low, high = min(relevance), max(relevance)
    relevance = [(value - low + 1e-6) / (high - low) for value in relevance]
    similarity = image.similarity(image.projected)
    kernel = torch.tensor(
        [[relevance[i] * similarity[i][j] * relevance[j] for j in range(image.num)] for i in range(image.num)],
        dtype=torch.float64,
    )
    picks: list[int] = []
    while len(picks) < count:
        # The pick that makes the determinant of the chosen part of the kernel largest.
        def gain(i: int) -> float:
            return float(torch.logdet(kernel[[*picks, i]][:, [*picks, i]]))

        picks.append(max((i for i in range(image.num) if i not in picks), key=gain))
    return picks


def scope(image: Image, count: int) -> list[int]:
    similarity, saliency = image.similarity(image.patches), [HEADS * value for value in image.attention]
    covered, picks = [0.0] * image.num, []
    while len(picks) < count:

        def gain(j: int, covered: list[float] = covered) -> float:
            return saliency[j] * sum(max(0.0, similarity[i][j] - covered[i]) for i in range(image.num))

        pick = max((j for j in range(image.num) if j not in picks), key=gain)
        covered = [max(old, similarity[i][pick]) for i, old in enumerate(covered)]
        picks.append(pick)
    return picks


def vis_pruner(image: Image, count: int) -> list[int]:
    order = largest(image.attention, image.num)
    important = int(count * 0.5)
    similarity = image.similarity(image.patches)
    rest = order[important:]
    while len(rest) > count - important:
        first, second = rest[0::2], rest[1::2]
        number = min(8, len(rest) - (count - important), len(first))
        nearest = [max(similarity[i][j] for j in second) for i in first]
        rest = [first[place] for place in largest(nearest, len(first))[number:]] + second
    return order[:important] + rest


def hi_prune(image: Image, count: int) -> list[int]:
    def received(layer: int) -> list[float]:
        whole = image.needs[Need("attention", layer)]
        return [
            sum(float(head[query][place + 1]) for head in whole for query in range(image.num + 1))
            for place in range(image.num)
        ]

    middle, deep = received(2), received(-2)
    kept = set()
    for anchor in largest(middle, round(count * 0.5 / 5)):
        for step in (0, -1, 1, -image.columns, image.columns):
            kept.add(min(max(anchor + step, 0), image.num - 1))
    assert len(kept) <= count
    rest = [place for place in largest(deep, image.num) if place not in kept]
    return [*kept, *rest[: count - len(kept)]]


def holo_v(image: Image, count: int) -> list[int]:
    """With the excess of a run given to the most attended patches of the others."""
    crops = min(5, image.num)
    sizes = [image.num // crops + (run < image.num % crops) for run in range(crops)]
    starts = [sum(sizes[:run]) for run in range(crops)]
    scores = []
    for start, size in zip(starts, sizes, strict=True):
        places = range(start, start + size)
        if size == 1:
            scores.append(image.attention[start])
            continue
        unit = {i: image.projected[i] / (image.projected[i].norm() + 1e-6) for i in places}
        rows = {i: [0.0 if i == j else float(unit[i] @ unit[j]) for j in places] for i in places}
        means = {i: sum(rows[i]) / (size - 1) for i in places}
        variance = {i: sum((value - means[i]) ** 2 for value in rows[i]) / (size - 1) for i in places}
        scaled = {i: 1000 * image.attention[i] for i in places}
        factor = (sum(scaled.values()) / size) / (sum(variance.values()) / size + 1e-6)
        scores.append(sum(scaled[i] + 0.09 * variance[i] * factor for i in places) / size)
    weights = [score / (sum(scores) + 1e-6) for score in scores]
    shares = [math.floor(weight * count) for weight in weights]
    for run in largest(weights, count - sum(shares)):
        shares[run] += 1
    kept = []
    for start, size, share in zip(starts, sizes, shares, strict=True):
        kept += [start + place for place in largest(image.attention[start : start + size], share)]
    rest = [place for place in largest(image.attention, image.num) if place not in kept]
    return kept + rest[: count - len(kept)]


SELECTIONS: dict[str, tuple[str, Callable[[Image, int], list[int]]]] = {
    "FasterVLM": ("FasterVLM:{}", faster_vlm),
    "DivPrune": ("DivPrune:{}", div_prune),
    "CDPruner": ("CDPruner:{}", cd_pruner),
    "SCOPE": ("SCOPE:{}", scope),
    "VisPruner": ("VisPruner:{}", vis_pruner),
    "HiPrune": ("HiPrune:{},alpha=0.5,object_layer=2", hi_prune),
    "HoloV": ("HoloV:{},crops=5,faithful=false", holo_v),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_selection_keeps_what_the_formulae_keep(name):
    spec, reference = SELECTIONS[name]
    for number in range(NUM_INPUTS // BATCH):
        tokens, count = make_batch(number), (5, 8, 11, 3)[number % 4]
        count = max(count, 5) if name == "HiPrune" else count
        kept = parse_reducer(spec.format(count))(tokens).kept
        for row in range(BATCH):
            found = kept[row].nonzero().flatten().tolist()
            assert found == sorted(reference(Image(tokens, row), count)), (number, row)


def vision_zip(image: Image, count: int) -> Tensor:
    dominant = sorted(largest(image.attention, count - 1))
    rest = [place for place in range(image.num) if place not in dominant]
    contextual = 4
    keys = image.needs[Need("keys", -2)].mean(dim=0)[1:]
    step = max(1, len(rest) // contextual)
    targets = [rest[number * step] for number in range(contextual)]
    joined: dict[int, list[int]] = {target: [] for target in targets}
    for place in rest:
        if place not in targets:
            joined[max(targets, key=lambda target: cosine(keys[place], keys[target]))].append(place)
    merged = [
        image.patches[target] + (image.patches[joined[target]].mean(dim=0) if joined[target] else 0)
        for target in targets
    ]
    return torch.stack([image.needs[Need("cls", -2)], *image.patches[dominant], *merged])


def pru_merge(image: Image, kept: Callable[[list[float]], list[int]]) -> Tensor:
    keys = image.needs[Need("keys", -1)].transpose(0, 1).flatten(1)
    query = image.needs[Need("cls_query", -1)].flatten()
    weights = torch.stack([query @ key / math.sqrt(len(query)) for key in keys]).softmax(dim=0)[1:].tolist()
    chosen = kept(weights)
    tokens = []
    for i in chosen:
        others = [j for j in range(image.num) if j != i]
        near = sorted(others, key=lambda j: -cosine(keys[i + 1], keys[j + 1]))[:32]
        tokens.append(image.patches[i] + sum(weights[j] * image.patches[j] for j in near))
    dropped = [j for j in range(image.num) if j not in chosen]
    rest = sum((weights[j] * image.patches[j] for j in dropped), torch.zeros(12, dtype=torch.float64))
    return torch.stack([*tokens, rest])


def outliers(weights: list[float]) -> list[int]:
    ordered = sorted(weights)

    def quantile(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])

    first, third = quantile(0.25), quantile(0.75)
    count = sum(weight > third + 1.5 * (third - first) for weight in weights)
    return largest(weights, count)


def outliers_and_steps(weights: list[float]) -> list[int]:
    top = outliers(weights)
    if not top:
        return top
    step = int(int(1 / (len(top) / len(weights))) / 3)
    return top + [place for place in range(0, len(weights) - 1, step) if place not in top]


MERGES: dict[str, Callable[[Image], Tensor]] = {
    "VisionZip:6,contextual=4": lambda image: vision_zip(image, 6),
    "PruMerge:-1": lambda image: pru_merge(image, outliers),
    "PruMerge:5": lambda image: pru_merge(image, lambda weights: largest(weights, 5)),
    "PruMerge+:-1": lambda image: pru_merge(image, outliers_and_steps),
}


@pytest.mark.parametrize("spec", MERGES)
def test_merged_tokens_are_those_of_the_formulae(spec):
    for number in range(NUM_INPUTS // BATCH):
        tokens = make_batch(number)
        reduced = parse_reducer(spec)(tokens)
        for row in range(BATCH):
            length = int(reduced.lengths[row])
            found = reduced.features[row] if reduced.order is None else reduced.features[row][reduced.order[row]]
            expected = MERGES[spec](Image(tokens, row)).float()
            assert length == len(expected)
            torch.testing.assert_close(found[:length], expected, atol=1e-5, rtol=1e-4)


def test_the_random_images_have_outliers_and_none():
    counts = {int(count) for number in range(8) for count in parse_reducer("PruMerge:-1")(make_batch(number)).lengths}
    assert min(counts) <= 2 and max(counts) >= 5
