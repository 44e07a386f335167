"""Train the two small tokenizers: a LLaMA-style sentencepiece model and CLIP's byte-level BPE.

Both are trained on the world's own sentences, so that a question takes a dozen tokens. Files: `tokenizer.model` for the
language model; `vocab.json` and `merges.txt` for CLIP.

Run: `python -m playground.shapes.tokenizer --out DIR` writes `DIR/llama` and `DIR/clip`.
"""

import argparse
import io
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from llava.conversation import conv_templates
from llava.errors import run_command
from playground.shapes import choice, sentence, wording
from playground.shapes.world import SPLITS, draw_scene

LLAMA_VOCABULARY_SIZE = 640
CLIP_VOCABULARY_SIZE = 1024
CHOICES_PER_SCENE = 3
# The fixed sentences of the prompts are one token each: a prompt then takes 20 tokens instead of 56. So are the option
# letters, or tokens would form across line ends.
FRAME_SENTENCES = [
    conv_templates["v1"].system,
    *(sentence.SUFFIX.strip(), sentence.UNANSWERABLE_HINT.strip(), sentence.OCR_LINE.strip()),
    *(choice.LETTER_LINE.strip(), choice.LETTER_LINE_CN.strip()),
    *(f"\n{letter}." for letter in choice.LETTERS),
]
CLIP_CONTEXT_LENGTH = 77
END_OF_WORD = "</w>"
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
# How CLIP splits a text into words, before any merge.
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def write_corpus(num_scenes: int = 400) -> Iterator[str]:
    """Yield the world's sentences, questions inside LLaVA's prompt."""
    chooser = random.Random(0)
    frame = conv_templates["v1"]
    for index in range(num_scenes):
        _, scene = draw_scene(0, SPLITS["tokenizer"], index)
        questions = [sentence.ask_present(scene, chooser), sentence.ask_absent(scene, chooser)]
        questions += sentence.ask_number(scene) + sentence.ask_color(scene)
        questions += sentence.ask_shape(scene) + sentence.ask_place(scene)
        for form in sentence.CAPTION_FORMS:
            yield sentence.caption(scene.objects, form)
        for question in questions:
            yield f"{frame.system} {frame.roles[0]}: {question.text} {frame.roles[1]}: {question.answer}"
            yield sentence.IMAGE_IN_WORDS.format(sentence.caption(scene.objects)) + sentence.SUFFIX
        yield sentence.DESCRIBE
        for ordinal in sentence.ORDINALS:
            yield sentence.ask_presence(scene.objects[0].name, f"{ordinal} image")


def write_choices(num_scenes: int = 400) -> Iterator[str]:
    """Yield multiple-choice questions; only the language model's tokenizer is trained on them."""
    chooser = random.Random(1)
    frame = conv_templates["v1"]
    for index in range(num_scenes):
        _, scene = draw_scene(0, SPLITS["tokenizer"], index)
        for _ in range(CHOICES_PER_SCENE):
            asked = choice.ask_choice(scene, chooser)
            yield f"{frame.system} {frame.roles[0]}: {asked.prompt} {frame.roles[1]}: {asked.answer}"


def write_wordings(num_scenes: int = 400) -> Iterator[str]:
    """Yield questions as people put them; only the language model's tokenizer is trained on them."""
    chooser = random.Random(2)
    frame = conv_templates["v1"]
    for index in range(num_scenes):
        _, scene = draw_scene(0, SPLITS["tokenizer"], index)
        for kind in wording.WORDINGS:
            for question in sentence.KINDS[kind](scene, chooser):
                asked = wording.vary(question, chooser)
                yield f"{frame.system} {frame.roles[0]}: {asked.prompt} {frame.roles[1]}: {asked.answer}"


def train_llama_tokenizer(folder: Path) -> None:
    """Write `tokenizer.model` and its JSON files with LLaMA's settings: BPE, byte fallback, digits apart."""
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.chain(write_corpus(), write_choices(), write_wordings()), model_writer=model,
        model_type="bpe", vocab_size=LLAMA_VOCABULARY_SIZE, character_coverage=1.0, byte_fallback=True,
        split_digits=True, allow_whitespace_only_pieces=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True, user_defined_symbols=FRAME_SENTENCES,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    special = {role: describe_token(text) for role, text in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"))}
    tokens = {f"{role}_token": value for role, value in special.items()}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": 2048,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        **{name: {"__type": "AddedToken", **value} for name, value in tokens.items()},
    }
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", {**tokens, "pad_token": "<unk>"})


def train_clip_tokenizer(folder: Path) -> None:
    """Write `vocab.json`, `merges.txt` and their configuration, with CLIP's order of ids.

    CLIP pools a text at its largest token id, so the end token must be the last entry of the vocabulary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    merges = learn_clip_merges()
    letters = [chr(code) for code in byte_alphabet()]
    pieces = letters + [letter + END_OF_WORD for letter in letters] + ["".join(pair) for pair in merges]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, CLIP_START, CLIP_END])}
    write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text(
        "".join(["#version: 0.2\n", *(f"{left} {right}\n" for left, right in merges)]), encoding="utf-8"
    )
    special = {
        "bos_token": {**describe_token(CLIP_START), "normalized": True},
        "eos_token": {**describe_token(CLIP_END), "normalized": True},
        "unk_token": {**describe_token(CLIP_END), "normalized": True},
        "pad_token": CLIP_END,
    }
    write_json(folder / "special_tokens_map.json", special)
    config = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": CLIP_CONTEXT_LENGTH,
        "tokenizer_class": "CLIPTokenizer",
        **{name: {"__type": "AddedToken", **value} if isinstance(value, dict) else value
           for name, value in special.items()},
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", config)


def learn_clip_merges() -> list[tuple[str, str]]:
    """Learn byte-pair merges on the corpus; words end in `</w>`, as in CLIP."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=CLIP_VOCABULARY_SIZE - 2,
        end_of_word_suffix=END_OF_WORD,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(write_corpus(), trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def byte_alphabet() -> list[int]:
    """Return the code point of each of the 256 bytes, in the order of GPT-2's table."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return printable + [256 + index for index in range(256 - len(printable))]


def describe_token(text: str) -> dict[str, object]:
    """Describe a special token as Hugging Face's JSON files do."""
    return {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def write_json(path: Path, content: object) -> None:
    """Write JSON with the indentation of Hugging Face's files."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the pocket models' tokenizers on the world's sentences.")
    parser.add_argument("--out", type=Path, required=True, help="folder for llama/ and clip/")
    out = parser.parse_args().out
    train_llama_tokenizer(out / "llama")
    train_clip_tokenizer(out / "clip")


if __name__ == "__main__":
    run_command(main)
