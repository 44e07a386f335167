"""`python -m llava.eval wrong`: what was wrong, what flipped between two runs, and both drawn."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from llava.cli import ModelSpec
from llava.errors import InputError
from llava.eval.benchmark import Question, Verdict
from llava.eval.results import Result
from llava.eval.wrong import choose_run, format_listing, list_flips, list_wrong, name_runs
from tests.eval.test_commands import Done, run

NAMES = ("trim", "none")


def verdict(number: int, points: float, **fields: object) -> Verdict:
    return Verdict(f"[{number}]", f"said {number}", "a", points, **fields)


def scored(*verdicts: Verdict) -> Result:
    return Result("pope", "POPE (Avg. F1)", 50.0, verdicts=verdicts)


QUESTIONS = {f"[{number}]": Question(number, prompt=f"Is it {number}?\nYes or no.") for number in range(5)}


@pytest.fixture
def answered(make_pope: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A POPE of 18 questions, and answers that say yes to all."""
    folder, file = make_pope(), tmp_path / "runs" / "trim" / "answers.jsonl"
    write_answers(folder, file, lambda number: "Yes, there is.")
    return folder, file


def write_answers(folder: Path, file: Path, say: Callable[[int], str], tokens: int = 7) -> None:
    file.parent.mkdir(parents=True)
    rows = []
    for number, line in enumerate((folder / "llava_pope_test.jsonl").read_text().splitlines()):
        metadata = {"num_tokens": tokens, "num_patches": 36}
        rows.append({"question_id": json.loads(line)["question_id"], "text": say(number), "metadata": metadata})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def wrong(answered: tuple[Path, Path], *options: object) -> Done:
    return run("wrong", "pope", "--root", answered[0], "--answers", answered[1], *options)


# ------------------------------------------------------------------------------------------------------------ listing
def test_what_is_wrong_is_listed_with_all_that_explains_it() -> None:
    verdicts = [
        verdict(0, 1.0),
        verdict(1, 0.3, parsed="no", image="val/x.jpg", query="Is it?", num_tokens=9, category="random"),
        Verdict("[2]", "", ("yes", "no", "yes"), 0.0),
        verdict(3, 0.0, unit="pair"),
    ]
    listing = list_wrong(scored(*verdicts), QUESTIONS)
    assert format_listing(listing) == (
        "== wrong (2)\n\n"
        "question 1  random  val/x.jpg\n    Is it 1?\n    Yes or no.\n  query       Is it?\n  reference   a\n"
        "  prediction  said 1  [read as no]  (0.3 points, 9 visual tokens)\n\n"
        "question 2\n    Is it 2?\n    Yes or no.\n  reference   yes (2 times), no\n"
        "  prediction  (empty)  (0 points)\n\n"
        "2 of 3 wrong; POPE (Avg. F1) 50.00"
    )
    short = format_listing(list_wrong(scored(*verdicts), QUESTIONS, limit=1))
    assert "== wrong (2, the first 1)" in short
    assert "question 2" not in short


def test_control_characters_of_an_answer_do_not_reach_the_terminal() -> None:
    text = format_listing(list_wrong(scored(Verdict("[1]", "\x1b[2Jred", "a\x07", 0.0)), QUESTIONS))
    assert not set(text) & {"\x1b", "\x07"}
    assert "[2Jred" in text


def test_a_group_is_listed_with_its_first_question_or_its_own_name() -> None:
    group = Verdict("g", "A | B", "A", 0.0, unit="group", details={"question_keys": ["[4]", "[1]"]})
    text = format_listing(list_wrong(scored(group, Verdict("h", "x", "y", 0.0, unit="group")), QUESTIONS))
    assert "question 4\n    Is it 4?" in text
    assert "question h\n    h\n" in text


def test_flips_are_listed_both_ways_with_the_agreement() -> None:
    here = scored(verdict(0, 1.0), verdict(1, 1.0), verdict(2, 0.0), verdict(3, 0.0))
    there = scored(verdict(3, 0.0), verdict(2, 1.0), verdict(1, 0.0), verdict(0, 1.0), verdict(4, 1.0))
    listing = list_flips((here, there), NAMES, QUESTIONS)
    assert [(section.title, [each.question.id for each in section.cases]) for section in listing.sections] == [
        ("right in trim, wrong in none", [1]),
        ("right in none, wrong in trim", [2]),
    ]
    assert listing.summary[2:] == [
        "right in trim, wrong in none: 1",
        "right in none, wrong in trim: 1",
        "both right 1, both wrong 1; agreement 50.0 % of 4",
        "compared are the 4 that both answered, of 4 and 5",
    ]
    assert "  trim        said 1  (1 point)\n  none        said 1  (0 points)" in format_listing(listing)
    with pytest.raises(InputError, match="have no answered question in common"):
        list_flips((here, scored(verdict(4, 1.0))), NAMES, QUESTIONS)


def test_runs_are_called_by_what_differs_in_their_paths(tmp_path: Path) -> None:
    assert name_runs(Path("a/plain/merge.jsonl"), Path("a/trim/merge.jsonl")) == ("plain", "trim")
    assert name_runs(Path("x/one.jsonl"), Path("x/two.jsonl")) == ("one", "two")
    with pytest.raises(InputError, match="is the file of --answers"):
        name_runs(tmp_path / "a.jsonl", tmp_path / "b" / ".." / "a.jsonl")


# ------------------------------------------------------------------------------------------------------------ command
def test_the_command_lists_wrong_answers_and_flips(answered: tuple[Path, Path], tmp_path: Path) -> None:
    done = wrong(answered, "--limit", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("== wrong (9, the first 2)\n\nquestion 1  adversarial  val2014/COCO_val2014_")
    assert "  reference   no\n  prediction  Yes, there is.  [read as yes]  (0 points, 7 visual tokens)" in done.stdout
    assert done.stdout.splitlines()[-1] == "9 of 18 wrong; POPE (Avg. F1) 66.67"
    other = tmp_path / "runs" / "none" / "answers.jsonl"
    write_answers(answered[0], other, lambda number: "No" if number < 6 else "Yes")
    flips = wrong(answered, "--against", other)
    assert "== right in trim, wrong in none (3)" in flips.stdout
    assert "== right in none, wrong in trim (3)" in flips.stdout
    assert "agreement 66.7 % of 18" in flips.stdout.splitlines()[-1]


def test_partial_answers_are_listed_as_far_as_they_go(answered: tuple[Path, Path]) -> None:
    answered[1].write_text("".join(answered[1].read_text().splitlines(keepends=True)[:4]))
    assert "2 of 4 wrong; POPE (Avg. F1) [14 answers missing]" in wrong(answered).stdout


def test_drawing_needs_to_know_the_model(answered: tuple[Path, Path], tmp_path: Path) -> None:
    done = wrong(answered, "--draw", tmp_path / "drawn")
    assert done.returncode == 2
    assert done.stderr == f"error: no {answered[1]}.run.json says which model answered: name one by --model-path\n"
    Path(f"{answered[1]}.run.json").write_text("[]")
    assert "names no model" in wrong(answered, "--draw", tmp_path / "drawn").stderr


def test_options_override_what_the_run_says(tmp_path: Path) -> None:
    answers = tmp_path / "a.jsonl"
    assert choose_run(answers, "ckpt", "base", "TRIM").spec == ModelSpec("ckpt", "base", "TRIM")
    told = {"path": "llava", "base": "vicuna", "reduce": "none", "device": "auto", "dtype": "float16", "conv_mode": "x"}
    (tmp_path / "a.jsonl.run.json").write_text(json.dumps(told))
    assert choose_run(answers, None).spec == ModelSpec("llava", "vicuna", "none", None, "float16")
    assert choose_run(answers, None, reduce="TRIM:9").spec == ModelSpec("llava", "vicuna", "TRIM:9", None, "float16")
    assert choose_run(answers, "other").spec == ModelSpec("other", None, "none", None, "float16")


def test_a_setting_that_the_run_did_not_have_is_named(tmp_path: Path, tiny_checkpoint: Path) -> None:
    answers = tmp_path / "a.jsonl"
    assert choose_run(answers, "ckpt", reduce="TRIM:4").note == "drawn with TRIM:4; the run's setting is not known"
    assert choose_run(answers, "ckpt").note == ""

    def note(drawn: str | None, **told: str) -> str:
        (tmp_path / "a.jsonl.run.json").write_text(json.dumps({"path": str(tiny_checkpoint), **told}))
        return choose_run(answers, None, reduce=drawn).note

    assert note("TRIM:4", reduce="TRIM:-1") == "drawn with TRIM:4; the run's setting is TRIM:-1"
    assert note("TRIM:4") == "drawn with TRIM:4; the run's setting is TRIM:-1"
    assert note("TRIM", reduce="TRIM:-1") == note("TRIM:-1") == note(None, reduce="TRIM:-1") == ""
    assert note("TRIM:4", path="gone").endswith("the run's setting is that of its checkpoint's config.json")
    with pytest.raises(InputError, match="unknown token reducer"):
        note("TRIMM:4")


def test_a_model_path_that_leads_nowhere_is_told_with_its_file(answered: tuple[Path, Path], tmp_path: Path) -> None:
    file = Path(f"{answered[1]}.run.json")
    file.write_text(json.dumps({"path": "models/llava"}))
    done = wrong(answered, "--draw", tmp_path / "drawn")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: {file} names the model models/llava, which is not here: ")
    assert "name the checkpoint by --model-path" in done.stderr


def test_options_of_drawing_are_checked_before_anything_is_read(answered: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = wrong(answered, "--draw", tmp_path / "file", "--model-path", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: --draw {tmp_path / 'file'} is not a folder")
    done = wrong(answered, "--draw", "")
    assert (done.returncode, done.stdout) == (2, "")
    assert "a folder is needed, not an empty name" in done.stderr
    for option in ("--model-path", "--model-base", "--reduce"):
        done = wrong(answered, option, "x")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {option} has no effect without --draw DIR")
        assert len(done.stderr.splitlines()) == 1


def test_an_earlier_drawing_is_replaced_and_nothing_else(answered: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "drawn"
    options = ("--draw", folder, "--model-path", "x", "--reduce", "none")
    assert wrong(answered, *options, "--limit", 3).returncode == 0
    for name in ("mine.png", "0009_mine.png"):
        (folder / name).touch()
    page = (folder / "index.html").read_text()
    assert page.count("<dt>question</dt>") == page.count("<dt>reference</dt><dd>no</dd>") == 3
    assert "<dd>Is there an umbrella in the image?\nAnswer" in page
    assert page.count('<dt>prediction</dt><dd class="wrong">Yes, there is.') == 3
    assert "drawn with none; the run&#x27;s setting is not known" in page
    assert wrong(answered, *options, "--limit", 1).returncode == 0
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["0001_1.png", "0009_mine.png", "index.html", "mine.png"]
    (folder / "index.html").write_text('<img src="0009_mine.png"')
    assert wrong(answered, *options, "--limit", 1).returncode == 0
    assert sorted(path.name for path in folder.iterdir()) == names


def test_the_title_of_a_figure_names_the_question_and_the_setting(
    answered: tuple[Path, Path], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    pytest.importorskip("matplotlib")
    Path(f"{answered[1]}.run.json").write_text(json.dumps({"path": str(tiny_checkpoint), "reduce": "TRIM:-1"}))
    headings = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llava.drawing.Drawing.write", lambda drawing, path: headings.append(drawing.heading))
        done = wrong(answered, "--draw", tmp_path / "drawn", "--limit", 1, "--reduce", "TRIM:4")
    assert done.returncode == 0, done.stderr
    assert headings[0].startswith("question 1 (drawn with TRIM:4; the run's setting is TRIM:-1)\nIs there ")


def test_each_listed_question_is_drawn_and_the_page_shows_them_all(
    answered: tuple[Path, Path], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "drawn"
    done = wrong(answered, "--draw", folder, "--limit", 3, "--model-path", tiny_checkpoint)
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["0001_1.png", "0002_3.png", "0003_5.png", "index.html"]
    page = (folder / "index.html").read_text()
    assert re.findall(r'src="([^"]*)"', page) == names[:3]
    reduced = Image.open(folder / names[0]).size
    assert wrong(answered, "--draw", folder, "--limit", 1, "--model-path", "x", "--reduce", "none").returncode == 0
    alone = Image.open(folder / names[0]).size
    assert alone[0] < reduced[0]


@pytest.mark.parametrize(
    ("reduce", "says"),
    [("Pool:9", "36 patches averaged to 3 x 3"), ("FastV:9,layer=1", "layers 1 to 2: 9 of 36 patches kept")],
)
def test_methods_that_blend_and_methods_inside_the_language_model_are_drawn(
    answered: tuple[Path, Path], tmp_path: Path, tiny_checkpoint: Path, reduce: str, says: str
) -> None:
    pytest.importorskip("matplotlib")
    captions = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llava.drawing.Drawing.write", lambda drawing, path: captions.extend(drawing.views[0].panels))
        options = ("--draw", tmp_path / "drawn", "--limit", 1, "--model-path", tiny_checkpoint, "--reduce", reduce)
        done = wrong(answered, *options)
    assert done.returncode == 0, done.stderr
    assert [panel.caption.split("\n")[1].split(", ")[0] for panel in captions] == [says]


def test_flips_are_drawn_with_the_run_that_reduces_or_both(
    answered: tuple[Path, Path], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    pytest.importorskip("matplotlib")
    other = tmp_path / "runs" / "none" / "answers.jsonl"
    write_answers(answered[0], other, lambda number: "No" if number < 2 else "Yes")
    heights = {}
    for reduce in ("none", "TextSim:0.25"):
        Path(f"{other}.run.json").write_text(json.dumps({"path": str(tiny_checkpoint), "reduce": reduce}))
        done = wrong(answered, "--against", other, "--draw", tmp_path / reduce, "--model-path", tiny_checkpoint)
        assert done.returncode == 0, done.stderr
        heights[reduce] = [Image.open(path).height for path in sorted((tmp_path / reduce).glob("*.png"))]
    assert len(heights["none"]) == 2
    assert all(both > one for one, both in zip(heights["none"], heights["TextSim:0.25"], strict=True))
    Path(f"{other}.run.json").unlink()
    done = wrong(answered, "--against", other, "--draw", tmp_path / "x", "--model-path", tiny_checkpoint)
    assert f"no {other}.run.json: what that run kept is not drawn" in done.stderr


def test_names_and_texts_from_files_do_no_harm_and_a_missing_image_is_named(
    answered: tuple[Path, Path], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    pytest.importorskip("matplotlib")
    folder, file = answered
    questions = folder / "llava_pope_test.jsonl"
    odd = "../../<script>alert(1)</script>\\u0000"
    for path in (questions, file):
        path.write_text(path.read_text().replace('"question_id": 1,', f'"question_id": "{odd}",'))
    write = questions.read_text().replace("adversarial", "<b>")
    questions.write_text(write)
    (folder / "coco" / "coco_pope_adversarial.json").rename(folder / "coco" / "coco_pope_<b>.json")
    sorted(folder.glob("val2014/*"))[0].unlink()
    done = wrong(answered, "--draw", tmp_path / "drawn", "--limit", 1, "--model-path", tiny_checkpoint)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "drawn").glob("*.png")] == ["0001_.._.._script_alert_1_script_.png"]
    page = (tmp_path / "drawn" / "index.html").read_text()
    assert "<script>" not in page
    assert "&lt;b&gt;" in page


def test_listing_loads_no_deep_learning_library() -> None:
    import subprocess
    import sys

    code = "import sys, llava.eval.wrong; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
