"""The greedy decoder against transformers' `generate`, id by id."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.generation import Generator, GreedyDecoder, is_plain, share_images
from llava.model.builder import load_pretrained_model
from llava.model.image_tokens import ImageTokens
from llava.sampling import Sampling

DEVICE = os.environ.get("LLAVA_TEST_DEVICE", "cpu")
LIMIT = 12


@pytest.fixture(scope="module")
def model(golden: Path) -> Any:
    checkpoints = golden / "checkpoints"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(checkpoints)
        return load_pretrained_model("llava-v1.5-tiny84-TRIM", None, "llava-tiny", device=DEVICE, dtype="float32")[1]


@pytest.fixture
def prompts(model: Any) -> tuple[list[torch.Tensor], list[tuple[ImageTokens, ...]]]:
    """Prompts with one, two and no images, of many lengths, all with the same beginning."""
    generator = torch.Generator().manual_seed(3)
    vocabulary, width = model.config.vocab_size, model.config.hidden_size
    beginning = torch.randint(3, vocabulary, (6,), generator=generator)
    rows, images = [], []
    for number in range(24):
        sentinels = [torch.tensor([IMAGE_TOKEN_INDEX])] * (number % 3)
        rest = torch.randint(3, vocabulary, (1 + number % 7,), generator=generator)
        rows.append(torch.cat([beginning, *sentinels, rest]))
        images.append(tuple(draw_tokens(2 + number % 5, width, generator) for _ in sentinels))
    return rows, images


def draw_tokens(length: int, width: int, generator: torch.Generator) -> ImageTokens:
    return ImageTokens(torch.randn(length, width, generator=generator), num_patches=36)


def generate_alone(model: Any, rows: list[torch.Tensor], images: list[tuple[ImageTokens, ...]]) -> list[list[int]]:
    """Ask `generate` one by one; cut at the token that ends the answer."""
    ends = model.generation_config.eos_token_id
    answers = []
    for row, own in zip(rows, images, strict=True):
        ids = model.generate(row[None], image_tokens=list(own), do_sample=False, max_new_tokens=LIMIT)[0].tolist()
        stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        answers.append(ids[:stop])
    return answers


@pytest.fixture
def ending(model: Any, prompts: tuple) -> Iterator[None]:
    """Let tokens that this random model often says end an answer, so that rows end at different times."""
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [2]
    free = [token for answer in generate_alone(model, *prompts) for token in answer]
    common = sorted(set(free), key=free.count)
    model.generation_config.eos_token_id = [2, *common[len(common) // 3 :: 7]]
    yield
    model.generation_config.eos_token_id = before


@pytest.mark.usefixtures("ending")
def test_a_batch_gets_the_ids_that_generate_gives_each_prompt_alone(model: Any, prompts: tuple) -> None:
    rows, images = prompts
    expected = generate_alone(model, rows, images)
    assert len(set(map(len, expected))) >= 3
    decoder = GreedyDecoder(model)
    assert decoder.decode(rows, images, LIMIT) == expected
    alone = [decoder.decode([row], [own], LIMIT)[0] for row, own in zip(rows, images, strict=True)]
    assert alone == expected


@pytest.mark.usefixtures("ending")
def test_a_prompt_with_another_beginning_costs_no_answer(model: Any, prompts: tuple) -> None:
    rows, images = prompts
    decoder = GreedyDecoder(model)
    decoder.decode(rows, images, 1)
    odd = [row.clone() for row in rows]
    odd[0][0] = odd[4][1] = 5
    assert decoder.decode(odd, images, LIMIT) == generate_alone(model, odd, images)


@pytest.fixture
def seen(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and columns of each call of the model."""
    calls = []
    forward = model.forward

    def note(**inputs: Any) -> Any:
        given = inputs.get("inputs_embeds")
        calls.append(tuple((inputs["input_ids"] if given is None else given).shape[:2]))
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", note)
    return calls


@pytest.mark.usefixtures("ending")
def test_the_shared_beginning_is_read_once_and_finished_answers_leave_the_batch(
    model: Any, prompts: tuple, seen: list
) -> None:
    rows, images = prompts
    decoder = GreedyDecoder(model)
    decoder.decode(rows, images, LIMIT)
    first = list(seen)
    decoder.decode(rows, images, LIMIT)
    assert first[0] == (1, 6)
    assert seen[len(first) :] == first[1:]
    sizes = [size for size, _ in first[1:]]
    assert sizes[0] == len(rows) > sizes[-1]
    assert sizes == sorted(sizes, reverse=True)


@pytest.fixture
def about_three_images(model: Any) -> tuple[list[torch.Tensor], list[tuple[ImageTokens, ...]]]:
    """Twelve questions about three images of one length, some with another image behind."""
    generator = torch.Generator().manual_seed(5)
    vocabulary, width = model.config.vocab_size, model.config.hidden_size
    beginning = torch.randint(3, vocabulary, (6,), generator=generator)
    sentinel = torch.tensor([IMAGE_TOKEN_INDEX])
    shared = [draw_tokens(7, width, generator) for _ in range(3)]
    rows, images = [], []
    for number in range(12):
        rest = torch.randint(3, vocabulary, (1 + number % 5,), generator=generator)
        more = number % 4 == 3
        rows.append(torch.cat([beginning, sentinel, rest, *[sentinel, rest] * more]))
        images.append((shared[number % 3], *[draw_tokens(4, width, generator)] * more))
    return rows, images


@pytest.mark.usefixtures("ending")
def test_an_image_that_several_prompts_begin_with_is_read_once(
    model: Any, about_three_images: tuple, seen: list
) -> None:
    rows, images = about_three_images
    expected = generate_alone(model, rows, images)
    seen.clear()
    assert GreedyDecoder(model).decode(rows, images, LIMIT) == expected
    assert seen[0] == (3, 6 + 7)
    assert seen[1] == (12, 4 + 4 + 4)  # of the longest: four ids, an image, four ids


@pytest.mark.usefixtures("ending")
def test_images_are_read_with_their_questions_where_hardly_any_is_shared_or_lengths_differ(
    model: Any, about_three_images: tuple, seen: list
) -> None:
    rows, images = about_three_images
    generator = torch.Generator().manual_seed(6)
    width = model.config.hidden_size
    longer = [(draw_tokens(8, width, generator), *images[0][1:]), *images[1:]]
    own = [(draw_tokens(7, width, generator), *each[1:]) for each in images]
    for changed in (longer, own):
        expected = generate_alone(model, rows, changed)
        seen.clear()
        assert GreedyDecoder(model).decode(rows, changed, LIMIT) == expected
        assert seen[0] == (1, 6)  # the ids before the image
    assert share_images(longer) and not share_images(own) and not share_images([*images, ()])


def test_anything_but_plain_greedy_search_is_left_to_generate(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_plain(model)
    assert not is_plain(object())
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.2)
    assert not is_plain(model)


def test_an_end_of_turn_that_the_model_ends_at_itself_leaves_the_greedy_decoder_to_work(
    model: Any, prompts: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, images = prompts[0][:6], prompts[1][:6]
    generator, sampling = Generator(model, model.tokenizer), Sampling(max_new_tokens=LIMIT)
    watched = generator.answer(rows, images, sampling, end="###")
    monkeypatch.setattr(model, "generate", lambda *arguments, **options: pytest.fail("transformers was asked"))
    assert generator.answer(rows, images, sampling, end="</s>") == generator.answer(rows, images, sampling) == watched
    monkeypatch.setattr(model.generation_config, "eos_token_id", 5)  # then nobody else stops at the end of turn
    with pytest.raises(pytest.fail.Exception):
        generator.answer(rows, images, sampling, end="</s>")
