"""lmms-eval as a user installs it beside llava: its own `llava` model and our `llava_trim`, on POPE and GQA of shapes.

`bash scripts/test_clients.sh FOLDER` makes the environment. All checkpoints have `tokenizer.model` alone.
"""

import pytest

from tests.clients.conftest import ASKED, NAMES, PREFIX, Answers, Run

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: bash scripts/test_clients.sh FOLDER")
NUM_QUESTIONS = 312
NUM_PATCHES = 64
TRIMS = [label for label, asked in ASKED.items() if asked.model == "llava_trim"]


@pytest.mark.parametrize("label", ASKED)
def test_lmms_eval_gets_the_answers_of_our_runner(
    label: str, runs: dict[str, Run], our_answers: dict[tuple[str, str], Answers]
) -> None:
    ours = our_answers[ASKED[label].checkpoint, ASKED[label].reduce]
    pairs = [pair for name in NAMES for pair in zip(runs[label].answers[name], ours[name], strict=True)]
    assert len(pairs) == NUM_QUESTIONS
    assert len({mine for _, mine in pairs}) > 10  # the model does look
    assert [pair for pair in pairs if pair[0] != pair[1]] == []


@pytest.mark.parametrize("label", TRIMS)
def test_token_counts_are_in_the_samples_and_their_means_in_the_result_file(label: str, runs: dict[str, Run]) -> None:
    for name in NAMES:
        counts = [line["token_counts"][0] for line in runs[label].samples[name]]
        assert {each["image_patches"] for each in counts} == {NUM_PATCHES}
        kept = [each["image_tokens"] for each in counts]
        if ASKED[label].reduce == "none":
            assert set(kept) == {NUM_PATCHES}
        else:
            assert len(set(kept)) > 1
            assert max(kept) < NUM_PATCHES
        assert all(each["input_tokens"] > each["image_tokens"] and each["output_tokens"] >= 1 for each in counts)
        means = runs[label].results["throughput"]
        assert means[f"avg_image_tokens_{PREFIX}{name}"] == pytest.approx(sum(kept) / len(kept))
        assert means[f"avg_image_patches_{PREFIX}{name}"] == NUM_PATCHES


def test_the_scores_of_lmms_eval_follow_the_answers(runs: dict[str, Run]) -> None:
    assert runs["stock-TRIM-1"].results["results"] == runs["stock-TRIM-8"].results["results"]
    assert runs["stock-TRIM-1"].results["results"]["shapes_pope"]["pope_accuracy,none"] > 0.9
