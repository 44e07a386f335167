"""One object for Python users: images of every kind, one answer or many, and one line for every mistake."""

import base64
import http.server
import re
import subprocess
import sys
import threading
from functools import partial
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import llava
from llava import Answer, Llava
from llava.assistant import UnansweredError
from llava.cli import ModelSpec
from llava.conversation import conv_templates
from llava.errors import InputError
from llava.eval.run_llava import build_parser, eval_model
from llava.picture import Picture
from playground.shapes.world import draw_scene

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "playground/shapes/checkpoints/llava-shapes"
TRIM = "llava-v1.5-tiny84-TRIM"
COLOR = "What color is the {}?"


@pytest.fixture(scope="module")
def model():
    """The pocket model of shapes, with TRIM."""
    return Llava.from_pretrained(SHAPES, reduce="TRIM:-1", device="cpu")


@pytest.fixture(scope="module")
def scenes():
    """Six images, each with the question about its first object and the answer."""
    drawn = [draw_scene(1, 2, number) for number in range(6)]
    return [(image, COLOR.format(scene.objects[0].shape), scene.objects[0].color) for image, scene in drawn]


@pytest.fixture
def files(tmp_path, scenes):
    """The six images as files."""
    paths = [tmp_path / f"{number}.png" for number in range(len(scenes))]
    for path, (image, _, _) in zip(paths, scenes, strict=True):
        image.save(path)
    return paths


def refusal(call, *arguments, **settings):
    """Return the one line that a call is refused with."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **settings)
    line = str(caught.value)
    assert "\n" not in line
    return line


# ------------------------------------------------------------------------------------------------------- one answer
def test_the_package_exports_the_object_and_is_imported_without_torch():
    assert {"Llava", "Answer"} <= set(llava.__all__)
    code = "import sys, llava; assert 'torch' not in sys.modules; llava.Llava; assert 'torch' in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_an_answer_tells_its_text_tokens_kept_patches_scores_and_seconds(model, scenes):
    image, question, color = scenes[3]
    answer = model.ask(image, question)
    (kept,), (scores,) = answer.kept, answer.scores
    assert isinstance(answer, Answer) and color in answer.text and str(answer) == answer.text
    assert kept.dtype == bool and scores.dtype == np.float32 and kept.shape == scores.shape == (8, 8)
    assert answer.num_tokens == kept.sum() + 1 and answer.num_patches == 64
    assert (
        answer.describe_tokens() == f"visual tokens: {answer.num_tokens} of 64 kept ({answer.num_tokens / 0.64:.1f} %)"
    )
    assert list(answer.seconds) == ["read", "encode", "reduce", "generate"] and min(answer.seconds.values()) > 0


def test_ask_answers_as_run_llava_does(model, files, scenes, capsys):
    arguments = [
        "--model-path",
        str(SHAPES),
        "--reduce",
        "TRIM:-1",
        "--image-file",
        str(files[0]),
        "--query",
        scenes[0][1],
    ]
    assert model.ask(files[0], scenes[0][1]).text == eval_model(build_parser().parse_args(arguments))
    assert model.ask(files[0], scenes[0][1]).describe_tokens() in capsys.readouterr().err


def test_an_image_may_be_a_path_an_address_a_pillow_image_an_array_a_tensor_or_a_list(model, files, scenes):
    image, question, _ = scenes[0]
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    forms = [str(files[0]), files[0], image, Image.open(files[0]), image.convert("RGBA"), array, tensor, tensor / 255]
    forms += [[image], (array,)]
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=files[0].parent)
    handler.func.log_message = lambda *arguments: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        answers = [model.ask(f"http://127.0.0.1:{server.server_port}/0.png", question)]
        server.shutdown()
    answers += [model.ask(form, question) for form in forms]
    assert len({answer.text for answer in answers}) == 1
    assert all((answer.scores[0] == answers[0].scores[0]).all() for answer in answers)


def test_a_photograph_on_its_side_is_turned_upright_as_a_file_and_as_an_object(model, tmp_path, scenes):
    image, question, _ = scenes[1]
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "side.png", exif=exif)
    upright = model.ask(image, question).scores[0]
    assert (model.ask(tmp_path / "side.png", question).scores[0] == upright).all()
    assert (model.ask(Image.open(tmp_path / "side.png"), question).scores[0] == upright).all()
    (answer,) = model.ask_many([(tmp_path / "side.png", question)], progress=False)
    assert np.allclose(answer.scores[0], upright)


def test_several_images_have_their_own_grids_and_no_image_has_none(model, scenes):
    answer = model.ask([scenes[0][0], scenes[1][0]], scenes[0][1])
    assert len(answer.kept) == 2 and answer.num_patches == 128
    assert answer.num_tokens == sum(kept.sum() + 1 for kept in answer.kept)
    alone = model.ask(None, "Is there a red circle?")
    assert (alone.kept, alone.num_patches) == ((), 0) and alone.text
    assert list(alone.seconds) == ["reduce", "generate"] and "<img" not in alone._repr_html_()


def test_a_stream_gives_the_text_of_the_answer_piece_by_piece(model, scenes, capsys):
    image, question, _ = scenes[0]
    pieces = []
    answer = model.ask(image, question, stream=pieces.append)
    assert len(pieces) > 1 and "".join(pieces) == answer.text == model.ask(image, question).text
    model.ask(image, question, stream=True)
    assert capsys.readouterr().out.strip() == answer.text


def test_answers_are_greedy_unless_a_temperature_is_given_and_a_seed_repeats_a_draw(model, scenes):
    image, question, _ = scenes[0]
    assert len({model.ask(image, question).text for _ in range(3)}) == 1
    draws = [model.ask(image, question, temperature=5.0, max_new_tokens=6, seed=seed).text for seed in (1, 1, 2, 3)]
    assert draws[0] == draws[1] and len(set(draws)) > 1


def test_a_seeded_draw_leaves_the_random_numbers_of_the_caller_as_they_are(model, scenes):
    torch.manual_seed(5)
    model.ask(scenes[0][0], "Why?", temperature=1.0, max_new_tokens=4, seed=1)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


def test_a_chat_that_another_reduction_cannot_go_on_with_is_told_to_show_its_images_anew(model, scenes):
    image, question, _ = scenes[0]
    chat = model.chat(image)
    try:
        model.set_token_reduction("FasterVLM:20")
        assert "in a chat: chat.show(images)" in refusal(chat.ask, question)
        chat.show(image)
        assert chat.ask(question).num_tokens == 20
    finally:
        model.set_token_reduction("TRIM:-1")


def test_a_chat_keeps_its_turns_and_reads_its_images_once(model, scenes):
    image, question, _ = scenes[3]
    chat = model.chat(image)
    first, second = chat.ask(question), chat.ask("Is there a red circle?")
    assert chat.turns == [first, second] and first.text == model.ask(image, question).text
    assert "encode" in first.seconds and list(second.seconds) == ["reduce", "generate"]
    assert (first.kept[0] != second.kept[0]).any()
    chat.show(scenes[1][0])
    assert chat.turns == [] and chat.ask(scenes[1][1]).text == model.ask(scenes[1][0], scenes[1][1]).text


def test_a_chat_whose_next_image_cannot_be_read_goes_on_as_before(model, scenes):
    chat = model.chat(scenes[0][0])
    chat.ask(scenes[0][1])
    assert "no such file" in refusal(chat.show, "missing.png")
    assert chat.ask("And?").num_patches == 64 and len(chat.turns) == 2


# ------------------------------------------------------------------------------------------------------ many answers
def mixed_pairs(files, scenes):
    """Twenty questions about one, two and no images, several about the same one, as files and as objects."""
    questions = [question for _, question, _ in scenes]
    images = [image for image, _, _ in scenes]
    pairs = [(path, question) for path, question in zip(files, questions, strict=True)]
    pairs += [(images[0], "Is there a red circle?"), (np.asarray(images[1]), "How many objects are there?")]
    pairs += [(files[0], f"Is there a {color} square?") for color in ("red", "green", "blue", "white")]
    pairs += [(None, "What is A?"), ([], "Repeat."), ([files[0], images[3]], questions[3]), ((files[1],), "Describe.")]
    pairs += [(images[number], "Describe the image.") for number in range(3)]
    return [*pairs, ([images[2], images[4]], "Is <image> as red as <image>?")]


@pytest.mark.parametrize("reduce", ["TRIM:-1", "none", "FasterVLM:16", "TRIM:0.5|FastV:0.5,layer=2"])
def test_ask_many_gives_the_answers_of_ask_in_their_order(model, files, scenes, reduce):
    pairs = mixed_pairs(files, scenes)
    assert len(pairs) == 20
    model.set_token_reduction(reduce)
    try:
        alone = [model.ask(*pair, max_new_tokens=24) for pair in pairs]
        together = model.ask_many(pairs, max_new_tokens=24, progress=False)
        small = model.ask_many(iter(pairs), max_new_tokens=24, batch_size=3, progress=False)
    finally:
        model.set_token_reduction("TRIM:-1")
    for answers in (together, small):
        assert [answer.text for answer in answers] == [answer.text for answer in alone]
        assert [answer.question for answer in answers] == [answer.question for answer in alone]
        assert [answer.num_tokens for answer in answers] == [answer.num_tokens for answer in alone]
        for one, other in zip(alone, answers, strict=True):
            assert all(map(np.array_equal, one.kept, other.kept))


def test_a_templates_end_of_turn_ends_answers_of_ask_and_of_ask_many(model, scenes, monkeypatch):
    template = conv_templates["vicuna_v1"].copy()
    template.sep2 = " is"
    monkeypatch.setitem(conv_templates, "short", template)
    short = Llava(model.tokenizer, model.model, model.image_processor, "short")
    pairs = [(image, question) for image, question, _ in scenes] + [(scenes[0][0], "Is there a red circle?")]
    alone = [short.ask(*pair).text for pair in pairs]
    assert "The square" in alone and not any(" is" in text for text in alone)
    assert [answer.text for answer in short.ask_many(pairs, progress=False)] == alone


def test_ask_many_encodes_each_image_once_and_shares_its_time_out(model, files, scenes, monkeypatch):
    encoded = []
    encode = model.model.encode_patches
    monkeypatch.setattr(model.model, "encode_patches", lambda images: encoded.extend(images) or encode(images))
    image = scenes[2][0]
    pairs = [(files[number % 2], scenes[number % 6][1]) for number in range(8)] + [
        (image, "Describe."),
        (image, "Why?"),
    ]
    answers = model.ask_many(pairs, progress=False)
    assert len(encoded) == 3
    assert len({answer.seconds["encode"] for answer in answers}) == 1
    assert all(list(answer.seconds) == ["read", "encode", "reduce", "generate"] for answer in answers)


@pytest.mark.parametrize("kind", ["array", "tensor", "float tensor", "Pillow image"])
def test_a_generator_may_reuse_its_buffer(model, scenes, kind):
    pytest.importorskip("matplotlib")
    buffer = np.zeros_like(np.asarray(scenes[0][0]))
    tensor = torch.zeros(buffer.transpose(2, 0, 1).shape, dtype=torch.float32 if "float" in kind else torch.uint8)
    picture = Image.new("RGB", scenes[0][0].size)

    def frames():
        for image, question, _ in scenes:
            buffer[:] = np.asarray(image)
            values = torch.from_numpy(buffer.transpose(2, 0, 1).copy())
            tensor.copy_(values / 255 if "float" in kind else values)
            picture.paste(image)
            yield {"array": buffer, "Pillow image": picture}.get(kind, tensor), question

    answers = model.ask_many(frames(), progress=False)
    apart = model.ask_many([(image, question) for image, question, _ in scenes], progress=False)
    assert [answer.text for answer in answers] == [answer.text for answer in apart]
    assert len({answer.text for answer in answers}) > 2
    assert answers[0].figure().tobytes() == apart[0].figure().tobytes()


def test_an_object_that_a_generator_gives_again_unchanged_is_encoded_once(model, scenes, monkeypatch):
    encoded = []
    encode = model.model.encode_patches
    monkeypatch.setattr(model.model, "encode_patches", lambda images: encoded.extend(images) or encode(images))
    array = np.asarray(scenes[0][0]).copy()
    model.ask_many(((array, question) for _, question, _ in scenes), progress=False)
    assert len(encoded) == 1


def test_figures_show_the_image_that_the_question_was_about(model, scenes):
    pytest.importorskip("matplotlib")
    array, question = np.asarray(scenes[0][0]).copy(), scenes[0][1]
    answers = [model.ask(array, question), *model.ask_many([(array, question)], progress=False)]
    drawn = [answer.figure().tobytes() for answer in answers]
    array[:] = 0
    assert [answer.figure().tobytes() for answer in answers] == drawn


def test_ask_many_counts_on_standard_error_unless_told_not_to(model, scenes, capsys):
    model.ask_many([(scenes[0][0], scenes[0][1])] * 2)
    shown = capsys.readouterr()
    assert "2/2" in shown.err and shown.out == ""
    assert model.ask_many([], progress=False) == [] and capsys.readouterr().err == ""


def test_answers_of_ask_many_hold_neither_features_nor_copies_of_images(model, files, scenes):
    pytest.importorskip("matplotlib")
    (answer,) = model.ask_many([(files[0], scenes[0][1])], progress=False)
    assert all(tokens.features.numel() == 0 for tokens in answer._image_tokens)
    assert [picture.source for picture in answer._pictures] == [files[0]]
    assert answer.figure().size == model.ask(files[0], scenes[0][1]).figure().size
    files[0].unlink()
    assert "no such file" in refusal(answer.figure) and "no such file" in answer._repr_html_()


# ------------------------------------------------------------------------------------------------------------ drawings
def test_a_figure_is_saved_and_a_notebook_shows_it_without_another_file(model, scenes, tmp_path):
    pytest.importorskip("matplotlib")
    answer = model.ask(scenes[0][0], scenes[0][1])
    answer.save(tmp_path / "kept.png")
    saved = Image.open(tmp_path / "kept.png")
    shown = answer._repr_html_()
    (content,) = re.findall(r'src="data:image/png;base64,([^"]+)"', shown)
    assert Image.open(BytesIO(base64.b64decode(content))).tobytes() == saved.tobytes()
    assert answer.text in shown and "http" not in shown
    assert "kept.jpg: a drawing is written as .png, .pdf, .svg, not .jpg" in refusal(answer.save, "kept.jpg")
    assert refusal(answer.save, 5) == "path 5: expected a file such as kept.png, not int"


def test_a_question_with_bytes_of_another_encoding_is_drawn(model, scenes):
    pytest.importorskip("matplotlib")
    answer = model.ask(scenes[0][0], "Is it a b\udcfcs?", max_new_tokens=2)
    assert answer.question == "Is it a b\ufffds?"
    assert "b\ufffds" in answer._repr_html_().encode().decode()


def test_html_shows_questions_and_answers_as_text_whatever_is_in_them(model, scenes):
    pytest.importorskip("matplotlib")
    shown = model.ask(scenes[0][0], '"><script>alert(1)</script>', max_new_tokens=2)._repr_html_()
    assert "<script" not in shown and "&lt;script&gt;" in shown


@pytest.mark.parametrize(("reduce", "has_kept", "has_scores"), [("none", True, False), ("Pool:0.25", False, False)])
def test_answers_of_every_reduction_can_be_drawn(model, scenes, reduce, has_kept, has_scores):
    pytest.importorskip("matplotlib")
    model.set_token_reduction(reduce)
    try:
        answer = model.ask([scenes[0][0], scenes[1][0]], scenes[0][1])
    finally:
        model.set_token_reduction("TRIM:-1")
    assert ([grid is not None for grid in answer.kept], [grid is not None for grid in answer.scores]) == (
        [has_kept] * 2,
        [has_scores] * 2,
    )
    assert answer.figure().mode == "RGB" and "<img" in answer._repr_html_()


def test_several_crops_have_a_grid_each(golden, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(golden / "checkpoints")
    model = Llava.from_pretrained(TRIM, device="cpu")
    config = model.model.config
    config.image_aspect_ratio, config.image_grid_pinpoints = "anyres", [[168, 84], [84, 168], [168, 168]]
    answer = model.ask("../data/images/wide_shapes.png", "What is it?", max_new_tokens=2)
    assert answer.kept[0].shape[1:] == (6, 6) and len(answer.kept[0]) > 2
    assert answer.num_patches == answer.kept[0].size and answer.figure().mode == "RGB"


# ------------------------------------------------------------------------------------------------------------ settings
def test_the_token_reduction_is_told_and_changed(model, scenes):
    image, question, _ = scenes[0]
    assert model.reduce == "TRIM:-1" and "reduce='TRIM:-1'" in repr(model)
    try:
        model.set_token_reduction("none")
        assert model.reduce == "none" and model.ask(image, question).num_tokens == 64
        model.set_token_reduction("TRIM:flops=0.8")
        assert model.reduce.startswith("TRIM:") and model.ask(image, question).num_tokens < 64
    finally:
        model.set_token_reduction("TRIM:-1")


def test_an_object_is_made_of_what_load_pretrained_model_returns(model, scenes):
    tokenizer, network, processor, _ = llava.load_pretrained_model(str(SHAPES), device="cpu", reduce="TRIM:-1")
    own = Llava(tokenizer, network, processor)
    assert own.ask(scenes[0][0], scenes[0][1]).text == model.ask(scenes[0][0], scenes[0][1]).text


# ------------------------------------------------------------------------------------------------------------ mistakes
IMAGE_MISTAKES = [
    (b"bytes", "an image is a path, an http(s) address, a Pillow image, a NumPy array or a tensor, or a list"),
    (7, "not int"),
    ("missing.png", "image missing.png: no such file"),
    ("x" * 300, "File name too long"),
    ([["a.png"]], "not list"),
    ([None], "not NoneType"),
    (np.zeros((4, 4, 3)), "a NumPy array of float64: expected uint8 (0 to 255)"),
    (np.zeros((4, 4, 3), bool), "a NumPy array of bool"),
    (np.zeros((2, 4, 4, 3), np.uint8), "shape [2, 4, 4, 3]: expected [height, width] or [height, width, channels]"),
    (np.zeros((3, 40, 40), np.uint8), "several images are a list"),
    (np.zeros((0, 4, 3), np.uint8), "shape [0, 4, 3]"),
    (torch.zeros(40, 40, 3, dtype=torch.uint8), "expected [height, width] or [channels, height, width]"),
    (torch.zeros(3, 4, 4, dtype=torch.int64), "a tensor of int64: expected uint8 (0 to 255), or floats in [0, 1]"),
    (torch.randn(3, 4, 4), "values outside [0, 1]"),
    (torch.full((3, 4, 4), torch.nan), "values outside [0, 1]"),
    (Image.new("F", (4, 4)), "floating-point pixels"),
    (Image.new("I", (4, 4)), "no known scale; make it 8 bit"),
    ("", "the path of an image is empty"),
    ("ftp://a.example/b.png", "ftp:// is not read; give the path of a file or an http(s) address"),
]


@pytest.mark.parametrize(("image", "reason"), IMAGE_MISTAKES, ids=[reason for _, reason in IMAGE_MISTAKES])
def test_what_is_no_image_is_refused_in_words_by_ask_and_ask_many(model, image, reason):
    assert reason in refusal(model.ask, image, "What is it?")
    line = refusal(model.ask_many, [(None, "Why?"), (image, "What is it?")], progress=False)
    assert line.startswith("pairs[1]: ") and reason in line


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        (" ", "the question is empty"),
        (None, "a question is a text, not NoneType"),
        (["Why?"], "a question is a text, not list"),
        ("<image> <image>?", "2 <image> placeholders for 1 new images"),
        ("word " * 5000, "positions"),
        ("half \ud83d", "half of a surrogate pair"),
    ],
)
def test_what_is_no_question_is_refused_in_words_by_ask_and_ask_many(model, scenes, question, reason):
    assert reason in refusal(model.ask, scenes[0][0], question)
    line = refusal(model.ask_many, [(None, "Why?"), (scenes[0][0], question)], progress=False)
    assert line.startswith("pairs[1]: ") and reason in line


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"temperature": "hot"}, "temperature 'hot': expected a number"),
        ({"temperature": -1}, "temperature -1: expected 0, or 0.001 to 100"),
        ({"max_new_tokens": 2.5}, "max_new_tokens 2.5: expected a whole number"),
        ({"max_new_tokens": None}, "max_new_tokens None: expected a whole number"),
        ({"top_k": 3}, "there is no setting top_k: expected temperature, top_p, num_beams, max_new_tokens, seed"),
        ({"seed": True, "temperature": 1}, "seed True: expected a whole number"),
        ({"top_p": 0.5, "num_beams": 2}, "top_p 0.5: nothing is drawn without temperature="),
    ],
)
def test_settings_of_the_search_are_refused_in_words(model, scenes, settings, reason):
    assert reason in refusal(model.ask, scenes[0][0], "Why?", **settings)
    assert reason in refusal(model.ask_many, [(None, "Why?")], **settings)


def test_wrong_arguments_are_refused_in_words(model, scenes):
    assert "expected a list of (images, question), not str" in refusal(model.ask_many, "bus.jpg")
    assert "pairs[0]: expected (images, question), not str" in refusal(model.ask_many, ["bus.jpg"])
    assert "batch_size 0" in refusal(model.ask_many, [], batch_size=0)
    assert "batch_size True" in refusal(model.ask_many, [], batch_size=True)
    assert "stream 3: expected True" in refusal(model.ask, scenes[0][0], "Why?", stream=3)
    assert "beam search" in refusal(model.ask, scenes[0][0], "Why?", stream=True, num_beams=2)
    assert 'did you mean "TRIM"' in refusal(model.set_token_reduction, "TRIMM:-1")
    assert '"none" for none' in refusal(model.set_token_reduction, None)
    assert model.reduce == "TRIM:-1"


@pytest.mark.parametrize(
    ("checkpoint", "settings", "reason"),
    [
        (SHAPES, {"reduce": 0.25}, 'reduce 0.25: expected a token reduction such as "TRIM:-1", not float'),
        (SHAPES, {"reduce": "TRIMM:-1"}, 'did you mean "TRIM"'),
        (SHAPES, {"dtype": "float8"}, "dtype float8: expected float16"),
        (SHAPES, {"tower_dtype": 8}, "tower_dtype 8: expected float16"),
        (SHAPES, {"load_8bit": "yes"}, "load_8bit 'yes': expected True or False"),
        (SHAPES, {"attn_implementation": 5}, "attn_implementation 5: expected a name"),
        (SHAPES, {"conv_mode": 5}, "conv_mode 5: expected the name of a template, not int"),
        (SHAPES, {"device": "gpu7"}, "gpu7"),
        (SHAPES, {"conv_mode": "vicuna"}, 'did you mean "vicuna_v1"'),
        (7, {}, "checkpoint 7: expected a folder or a hub id, not int"),
        ("./no-such-folder", {}, "no-such-folder"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_words(checkpoint, settings, reason, monkeypatch):
    assert reason in refusal(Llava.from_pretrained, checkpoint, **settings)


def test_images_that_break_off_are_named_and_cost_no_other_answer(model, files, scenes):
    pairs = [(path, question) for path, (_, question, _) in zip(files, scenes, strict=True)]
    whole = [answer.text for answer in model.ask_many(pairs, progress=False)]
    for number in (4, 1):
        files[number].write_bytes(files[number].read_bytes()[:200])
    with pytest.raises(UnansweredError) as caught:
        model.ask_many(pairs, progress=False)
    line = str(caught.value)
    assert line.startswith(f"pairs[1]: image {files[1]}: damaged") and "\n" not in line
    assert line.endswith("and 1 more; the other 4 answers are in this error's `answers`")
    assert [answer and answer.text for answer in caught.value.answers] == [
        None if number in (1, 4) else text for number, text in enumerate(whole)
    ]
    assert set(caught.value.reasons) == {1, 4} and "damaged" in caught.value.reasons[4]


def test_pictures_are_equal_by_path_or_by_object():
    image = Image.new("RGB", (2, 2))
    assert Picture(str(SHAPES)) == Picture(SHAPES) and Picture(image) == Picture(image)
    assert Picture(image) != Picture(image.copy()) and len({Picture(image), Picture(image)}) == 1


def test_types_and_devices_of_torch_are_taken_by_their_names(monkeypatch):
    seen = []

    def load(spec):
        seen.append(spec)
        raise InputError("loaded enough")

    monkeypatch.setattr(ModelSpec, "load", load)
    refusal(Llava.from_pretrained, SHAPES, dtype=torch.bfloat16, tower_dtype="float32", device=torch.device("cpu"))
    assert (seen[0].dtype, seen[0].tower_dtype, seen[0].device) == ("bfloat16", "float32", "cpu")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"image_file": Image.new("RGB", (4, 4))},
            "image_file: expected a path or an http(s) address, or a list of these",
        ),
        ({"image_file": ["a.png", 5]}, "not int; llava.Llava takes images of every kind"),
        ({"query": 5}, "query 5: expected a text, not int"),
        ({"model_path": 5}, "model_path 5: expected a text, not int"),
        ({"conv_mode": 5}, "conv_mode 5: expected a text, not int"),
    ],
)
def test_what_eval_model_cannot_read_is_refused_in_words(changes, reason):
    arguments = {"model_path": str(SHAPES), "query": "Why?", "image_file": "a.png"} | changes
    assert reason in refusal(eval_model, SimpleNamespace(**arguments))
