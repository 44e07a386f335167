"""LLaVA's import path of the TextVQA metric; the metric itself is in `llava.eval.metrics`."""

from collections.abc import Mapping, Sequence

from llava.eval.metrics.vqa_accuracy import grade_textvqa
from llava.eval.metrics.vqa_text import normalize_m4c
from llava.gone import look_up

__getattr__ = look_up(__name__)


class EvalAIAnswerProcessor:
    """Rewrite an answer as the TextVQA scorer does, and LLaVA before an upload."""

    def __call__(self, item: str) -> str:
        return normalize_m4c(item)


class TextVQAAccuracyEvaluator:
    """Score answers against ten references each."""

    def __init__(self) -> None:
        self.answer_processor = EvalAIAnswerProcessor()

    def eval_pred_list(self, pred_list: Sequence[Mapping[str, str | list[str]]]) -> float:
        """Average the accuracy of answers.

        Args:
            pred_list: objects with `pred_answer` and `gt_answers`, at least one.

        Returns:
            A fraction in [0, 1].
        """
        grades = [grade_textvqa(entry["pred_answer"], entry["gt_answers"]) for entry in pred_list]
        return sum(grades) / len(grades)
