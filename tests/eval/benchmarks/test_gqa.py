import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

from llava.errors import InputError
from llava.eval.benchmarks.gqa import Gqa
from llava.eval.metrics.gqa import clean_prediction, count_steps, score_gqa
from llava.eval.predictions import read_answers
from llava.eval.results import export_answers, pair_with_questions, score_answers
from llava.files import write_jsonl

GQA = Gqa()
PREDICTIONS = "expected_testdev_balanced_predictions.json"


@pytest.fixture
def folder(golden: Path) -> Path:
    return golden / "oracle" / "gqa"


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A GQA folder that a test may spoil."""
    return Path(shutil.copytree(folder, tmp_path / "gqa"))


def make_record(answer: str, **changes: Any) -> dict[str, Any]:
    types = {"structural": "verify", "semantic": "attr", "detailed": "verifyAttr"}
    record = {"question": "Is it red?", "answer": answer, "isBalanced": True, "types": types, "semantic": []}
    return {**record, "groups": {"global": None}, "entailed": [], **changes}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Yes.", "yes"), ("yes...", "yes"), ("Yes. ", "yes. "), (" Yes", " yes"), (".", ""), ("U.S.", "u.s"), ("a", "a")],
)
def test_only_the_last_periods_and_the_case_are_cleaned(text: str, expected: str) -> None:
    assert clean_prediction(text) == expected


def test_predictions_for_the_official_script_equal_those_of_llava_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    (file,) = export_answers(GQA, folder / "answers.jsonl", folder, tmp_path / "out")
    assert file.name == "testdev_balanced_predictions.json"
    assert file.read_bytes() == (folder / PREDICTIONS).read_bytes()


def test_llavas_conversion_command_writes_the_file_of_llava(
    repository: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "data" / "testdev_balanced_predictions.json"
    monkeypatch.setattr("sys.argv", ["convert", "--src", str(folder / "answers.jsonl"), "--dst", str(target)])
    runpy.run_path(str(repository / "scripts" / "convert_gqa_for_eval.py"))["main"]()
    assert target.read_bytes() == (folder / PREDICTIONS).read_bytes()


def test_the_layout_of_llava_gives_the_same_scores(copied: Path) -> None:
    flat = score_answers(GQA, copied / "answers.jsonl", copied)
    (copied / "data").mkdir()
    for name in ("testdev_balanced_questions.json", "testdev_balanced_choices.json"):
        (copied / name).rename(copied / "data" / name)
    assert score_answers(GQA, copied / "answers.jsonl", copied) == flat


def test_without_choices_there_is_no_validity_instead_of_zero(copied: Path) -> None:
    full = score_answers(GQA, copied / "answers.jsonl", copied).scores
    (copied / "testdev_balanced_choices.json").unlink()
    scores = score_answers(GQA, copied / "answers.jsonl", copied).scores
    assert full.keys() - scores.keys() == {"validity", "plausibility"}
    assert all(full[name] == scores[name] for name in scores)


def test_a_balanced_question_without_choices_is_named(copied: Path) -> None:
    file = copied / "testdev_balanced_choices.json"
    choices = json.loads(file.read_text())
    records = json.loads((copied / "testdev_balanced_questions.json").read_text())
    identity = next(each for each, record in records.items() if record["isBalanced"])
    del choices[identity]
    file.write_text(json.dumps(choices))
    with pytest.raises(InputError, match=rf'choices.json: "{identity}" must be an object'):
        score_answers(GQA, copied / "answers.jsonl", copied)


@pytest.mark.parametrize("field", ["question", "answer", "isBalanced", "types", "groups", "semantic"])
def test_a_question_that_lacks_what_the_metrics_read_is_named(copied: Path, field: str) -> None:
    file = copied / "testdev_balanced_questions.json"
    records = json.loads(file.read_text())
    identity = list(records)[4]
    del records[identity][field]
    file.write_text(json.dumps(records))
    with pytest.raises(InputError, match=rf'questions.json question {identity}: "{field}" must be'):
        score_answers(GQA, copied / "answers.jsonl", copied)


def test_verdicts_compare_the_cleaned_answer_with_the_reference(folder: Path) -> None:
    _, answers = pair_with_questions(GQA, folder / "answers.jsonl", folder)
    verdicts = {verdict.key: verdict for verdict in GQA.score(answers, folder).verdicts}
    spots = {
        '["20004292"]': ("MAROON.", "maroon", "maroon", 1.0, "query"),
        '["20004551"]': ("Teal", "teal", "t-shirt", 0.0, "query"),
        '["20002738"]': ("left,", "left,", "left", 0.0, "choose"),
    }
    for key, expected in spots.items():
        each = verdicts[key]
        assert (each.prediction, each.parsed, each.reference, each.points, each.category) == expected


def test_only_balanced_questions_have_verdicts(folder: Path) -> None:
    records = json.loads((folder / "testdev_balanced_questions.json").read_text())
    _, answers = pair_with_questions(GQA, folder / "answers.jsonl", folder)
    judged = {json.loads(verdict.key)[0] for verdict in GQA.score(answers, folder).verdicts}
    assert len(judged) == 127 < len(answers)
    assert all(records[identity]["isBalanced"] for identity in judged)


def test_unbalanced_questions_count_for_consistency_alone() -> None:
    records = {
        "1": make_record("yes", entailed=["2", "3", "1"]),
        "2": make_record("no", isBalanced=False),
        "3": make_record("no", isBalanced=False),
    }
    scores = score_gqa(records, {"1": "yes", "2": "no", "3": "yes"})
    assert (scores["accuracy"], scores["consistency"]) == (100, 50)


def test_consistency_looks_at_rightly_answered_questions_that_entail_others() -> None:
    records = {
        "1": make_record("yes", entailed=["3"]),
        "2": make_record("yes", entailed=["2"]),
        "3": make_record("no", entailed=["1"]),
    }
    assert score_gqa(records, {"1": "yes", "2": "yes", "3": "maybe"})["consistency"] == 0


def test_without_all_entailed_predictions_there_is_no_consistency(folder: Path, tmp_path: Path) -> None:
    records = json.loads((folder / "testdev_balanced_questions.json").read_text())
    rows = [row for row in read_answers(folder / "answers.jsonl") if records[row["question_id"]]["isBalanced"]]
    write_jsonl(tmp_path / "balanced.jsonl", rows)
    full = score_answers(GQA, folder / "answers.jsonl", folder).scores
    scores = score_answers(GQA, tmp_path / "balanced.jsonl", folder, allow_partial=True).scores
    assert full.keys() - scores.keys() == {"consistency"}
    assert all(full[name] == scores[name] for name in scores)


def test_a_question_for_something_in_common_may_be_answered_with_a_property() -> None:
    types = {"structural": "compare", "semantic": "attr", "detailed": "twoCommon"}
    records = {"1": make_record("shape", types=types), "2": make_record("red")}
    choices = {"1": {"valid": ["yes"], "plausible": []}, "2": {"valid": ["red", "color"], "plausible": ["red"]}}
    scores = score_gqa(records, {"1": "material", "2": "color"}, choices)
    assert (scores["validity"], scores["plausibility"]) == (100, 50)


def test_steps_that_name_or_check_an_object_do_not_count() -> None:
    steps = [("select", "car (1)"), ("exist", "?"), ("query", "name"), ("choose name", "a|b"), ("query", "color")]
    semantic = [{"operation": operation, "argument": argument} for operation, argument in steps]
    assert count_steps(make_record("yes", semantic=semantic)) == 2


def test_distribution_is_the_chi_square_of_each_group_weighted_by_its_questions() -> None:
    group = {"groups": {"global": "colour"}}
    records = {"1": make_record("red", **group), "2": make_record("red", **group), "3": make_record("blue", **group)}
    records |= {"4": make_record("cup", groups={"global": "thing"}), "5": make_record("yes")}
    predictions = {"1": "red", "2": "green", "3": "red", "4": "cup", "5": "no"}
    # Group colour: red 2 of 2, blue 0 of 1 (green is no right answer); group thing: 0.
    assert score_gqa(records, predictions)["distribution"] == pytest.approx((1.0 * 3 + 0.0 * 1) / 4 / 100)
