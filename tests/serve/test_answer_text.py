"""Text handed out piece by piece is the text of all tokens, in whole characters, up to the first stop text."""

import random
from pathlib import Path

import pytest

from llava.model.tokenizer import load_tokenizer
from llava.serve.answer_text import AnswerText, TokenNames, find_ends
from llava.serve.engine import Prompt, Search
from tests.families import write_qwen_tokenizer

ROOT = Path(__file__).parents[2]
TEXT = "It is  red: 你好, 🙂 and\n  a <b> – naïve.\n\nUSER: yes"


@pytest.fixture(scope="module", params=["shapes", "llama", "qwen"])
def tokenizer(request, tmp_path_factory):
    if request.param == "qwen":
        folder = tmp_path_factory.mktemp("qwen")
        write_qwen_tokenizer(folder)
        return load_tokenizer(str(folder))
    folders = {
        "shapes": "playground/shapes/checkpoints/llava-shapes",
        "llama": "tests/golden/checkpoints/llava-v1.5-tiny84",
    }
    return load_tokenizer(str(ROOT / folders[request.param]))


def write(tokenizer, ids, stop=()):
    """Feed tokens until a stop text; returns the pieces, and whether one came."""
    text = AnswerText(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(text.add(token))
        if text.is_stopped:
            break
    return [*pieces, text.finish()], text.is_stopped


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_pieces_add_up_to_the_whole_and_hold_no_part_of_a_character(tokenizer):
    ids = encode(tokenizer, TEXT)
    pieces, is_stopped = write(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True) and not is_stopped
    assert len([piece for piece in pieces if piece]) > 10
    assert not any("\ufffd" in piece for piece in pieces)


def test_tokens_of_every_kind_in_any_order_add_up_to_the_whole(tokenizer):
    draw = random.Random(0)
    # Bytes that make up no character are left out: what they decode to depends on what follows.
    names = {name: token for name, token in tokenizer.get_vocab().items() if not name.startswith("<0x")}
    usable = [token for token in names.values() if "\ufffd" not in tokenizer.decode([token])]
    for _ in range(100):
        ids = draw.choices([*usable, *tokenizer.all_special_ids], k=30)
        assert "".join(write(tokenizer, ids)[0]) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_stop_text_ends_the_answer_wherever_token_borders_are(tokenizer):
    ids = encode(tokenizer, TEXT)
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    for start in range(len(whole) - 4):
        stop = whole[start : start + 4]
        pieces, is_stopped = write(tokenizer, ids, [stop, "never"])
        assert is_stopped and "".join(pieces) == whole[: whole.find(stop)]


def test_of_several_stop_texts_the_first_in_the_answer_counts(tokenizer):
    pieces, _ = write(tokenizer, encode(tokenizer, TEXT), ["yes", "USER", "red"])
    assert "".join(pieces) == "It is  "


def test_what_only_began_like_a_stop_text_is_handed_out(tokenizer):
    ids = encode(tokenizer, TEXT)
    pieces, is_stopped = write(tokenizer, ids, ["USER: yes!", "\n\nASSISTANT"])
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True) and not is_stopped


def test_a_character_cut_off_at_the_end_is_what_the_tokenizer_says(tokenizer):
    ids = encode(tokenizer, "a 🙂")[:-1]
    assert "".join(write(tokenizer, ids)[0]) == tokenizer.decode(ids, skip_special_tokens=True)


def test_the_texts_of_single_tokens_join_to_the_whole_text(tokenizer):
    names, text = TokenNames(tokenizer), " It is  red: no\n\nUSER: yes"
    ids = encode(tokenizer, text)
    assert len(ids) > 3 and "".join(names[token] for token in ids).strip() == text.strip()
    assert [names[token] for token in ids] == [TokenNames(tokenizer)[token] for token in reversed(ids)][::-1]


def test_a_templates_end_is_a_token_where_the_tokenizer_has_it_and_else_a_text():
    search, known, added = Search(stop=("x",)), frozenset({2}), {"<|im_end|>": 7}

    def find(end):
        return find_ends(Prompt(None, (), "", end), search, known, added)

    assert find(None) == ({2}, ("x",))
    assert find("<|im_end|>") == ({2, 7}, ("x",))
    assert find("###") == ({2}, ("x", "###"))
