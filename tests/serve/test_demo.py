"""The page's command: what it refuses before it loads anything, and what it begins with."""

import shutil
import subprocess
import sys

import pytest
from PIL import Image

from llava.assistant import Llava
from llava.errors import InputError, run_command
from llava.serve import demo, samples
from llava.serve.samples import SHAPES, find_pocket_checkpoint, list_samples
from playground.shapes import samples as generator
from playground.shapes.sentence import ALL_NAMES, SUFFIX, ask_color, ask_number, ask_presence, ask_shape
from playground.shapes.world import SPLITS, draw_scene


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "0"], "--port 0: expected 1 to 65535"),
        (["--port", "65536"], "--port 65536: expected 1 to 65535"),
        (["--conv-mode", "nothing"], "nothing"),
        (["--endpoint", "http://x", "--model-path", "m"], "--model-path says nothing with --endpoint"),
        (["--endpoint", "http://x", "--load-4bit"], "--load-4bit says nothing with --endpoint"),
        (["--endpoint", "x"], "--endpoint x: expected an address"),
        (["--model-path", "no/such/folder"], "no/such/folder"),
    ],
)
def test_a_mistaken_option_ends_in_one_line(options, words, monkeypatch, capsys):
    if "x" in options:
        pytest.importorskip("openai")
    # The page itself is not needed here, nor is the package that it is made with.
    monkeypatch.setattr(sys, "argv", ["demo", *options])
    monkeypatch.setattr(demo, "main", lambda: (demo.check_options(args := demo.build_parser().parse_args()),
                                               demo.load_answerer(args)))  # fmt: skip
    with pytest.raises(SystemExit) as end:
        run_command(demo.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and words in error and error.count("\n") == 1


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo"])
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as end:
        run_command(demo.main)
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "error: this needs the package gradio, which is not installed: pip install gradio\n"
    )


def test_an_installed_package_has_no_pocket_model_and_no_samples(monkeypatch, tmp_path):
    monkeypatch.setattr(samples, "SHAPES", tmp_path)
    monkeypatch.setattr(samples, "PHOTOS", tmp_path / "photos")
    assert list_samples() == []
    with pytest.raises(InputError, match="name a checkpoint by --model-path CKPT"):
        find_pocket_checkpoint()


def list_drawn() -> list[samples.Sample]:
    return [sample for sample in list_samples() if sample.image.is_relative_to(SHAPES)]


def test_the_kept_samples_are_those_that_the_generator_writes(tmp_path):
    generator.write_samples(tmp_path)
    kept = SHAPES / "sample_images"
    assert sorted(file.name for file in kept.iterdir()) == sorted(file.name for file in tmp_path.iterdir())
    assert all((kept / file.name).read_bytes() == file.read_bytes() for file in tmp_path.glob("*.json"))
    for number, sample in zip(generator.SAMPLES, list_drawn(), strict=True):
        scene, _ = draw_scene(generator.SEED, SPLITS["eval"], number)
        assert Image.open(sample.image).tobytes() == scene.tobytes()


@pytest.mark.parametrize("reduce", ["TRIM:-1", "none"])
def test_the_pocket_model_answers_every_question_of_the_samples(reduce):
    model = Llava.from_pretrained(find_pocket_checkpoint(), reduce=reduce, device="cpu")
    for number, sample in zip(generator.SAMPLES, list_drawn(), strict=True):
        _, scene = draw_scene(generator.SEED, SPLITS["eval"], number)
        answers = {each.text: each.answer for each in [*ask_color(scene), *ask_shape(scene), *ask_number(scene)]}
        names = [item.name for item in scene.objects]
        answers |= {ask_presence(name): "yes" if name in names else "no" for name in ALL_NAMES}
        for question in sample.questions:
            assert model.ask(sample.image, question + SUFFIX).text.lower() == answers[question], question


@pytest.mark.parametrize("reduce", ["TRIM:-1", "none"])
@pytest.mark.parametrize("name", ["llava-shapes", "llava-shapes-trim"])
def test_the_pocket_models_answer_the_questions_of_the_photographs(name, reduce):
    model = Llava.from_pretrained(SHAPES / "checkpoints" / name, reduce=reduce, device="cpu")
    photos = [sample for sample in list_samples() if sample.image.is_relative_to(samples.PHOTOS)]
    assert len(photos) == 3
    for sample in photos:
        for question in sample.questions:
            # No photograph shows one of the shapes that are asked for.
            right = "blue" if "sky" in question else "no"
            assert model.ask(sample.image, question).text.lower() == right, question


def test_the_photographs_are_small_and_their_licenses_are_beside_them():
    card = (samples.PHOTOS / "README.md").read_text(encoding="utf-8")
    for file in samples.PHOTOS.glob("*.jpg"):
        assert file.stat().st_size < 60_000 and max(Image.open(file).size) <= 448
        (row,) = [line for line in card.splitlines() if f"`{file.name}`" in line]
        assert "CC0" in row or "public domain" in row


def test_the_browser_script_wants_a_folder_and_a_chromium(tmp_path):
    root = SHAPES.parents[1]
    command = ["bash", str(root / "scripts" / "test_page.sh")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.partition(": bash")[0]) == (2, "error: name a folder for the environment")
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    bare = {"PATH": str(tmp_path), "PYTHON": sys.executable}
    done = subprocess.run([*command, str(tmp_path / "env")], env=bare, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2, "error: there is no Chromium: apt-get install chromium, or set CHROMIUM to its file\n",
    )  # fmt: skip
    assert not (tmp_path / "env").exists()
