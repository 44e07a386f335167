"""The page of `llava.serve.demo`: what stands where, and what happens when; gradio is imported here only."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr

from llava.errors import InputError
from llava.serve.page_model import NONE, Answerer, Result, make_spec, takes_budget
from llava.serve.page_parts import (
    CARET,
    Column,
    Step,
    extend_history,
    show_answers,
    show_hint,
    show_history,
    show_pictures,
    show_problem,
)
from llava.serve.samples import Sample

SHORT = "\nAnswer the question using a single word or phrase."
"""LLaVA's instruction for benchmarks with short answers."""
HINT = "Choose an image, ask a question: the answer, the kept patches and their scores appear here."
ABOUT_SPEC = "The name above an answer is its `--reduce` in every command of llava."

Shown = tuple[Any, Any, Any, Any]
"""New values of answers, pictures, history as shown, and history as it is."""


class Page:
    """What happens on the page; `lay_out` makes the page itself.

    Attributes:
        answerer: is asked.
        samples: images to begin with, and their questions; may be none.
    """

    def __init__(self, answerer: Answerer, samples: Sequence[Sample]):
        self.answerer = answerer
        self.samples = samples

    # What the handlers do -----------------------------------------------------------------------------------------
    def answer(self, image: str | None, question: str, *settings: Any) -> Iterator[Shown]:
        """Answer, each time anew as the answer grows: the chosen method first, then no reduction.

        Args:
            image: the file, or None where there is none.
            question: the user's text.
            *settings: as `_answer` takes them, in the order in which the page hands them over.
        """
        try:
            yield from self._answer(image, question, *settings)
        except InputError as error:
            # Where the upload lies on this machine is nobody's business.
            text = str(error).replace(image, Path(image).name) if image else str(error)
            yield show_problem(text), "", gr.skip(), gr.skip()

    def answer_again(self, image: str | None, question: str, *settings: Any) -> Iterator[Shown]:
        """Answer after a setting has changed, if there is something to answer."""
        if image is None or not question.strip():
            yield (gr.skip(),) * 4
        else:
            yield from self.answer(image, question, *settings)

    def _answer(
        self,
        image: str | None,
        question: str,
        is_short: bool,
        method: str,
        count: int,
        is_automatic: bool,
        compares: bool,
        history: list[Step],
    ) -> Iterator[Shown]:
        if image is None:
            raise InputError("there is no image: upload one, or choose a sample")
        file, answerer = Path(image), self.answerer
        has_rule = answerer.methods.get(method, False)
        spec = make_spec(method, int(count), answerer.num_patches, is_automatic and has_rule)
        specs = [spec, NONE] if compares and spec != NONE else [spec]
        prompt = question + SHORT * (is_short and bool(question.strip()))
        columns = [Column(each) for each in specs]
        for number, each in enumerate(specs):
            with closing(answerer.ask(file, prompt, each)) as items:
                for item in items:
                    is_result = isinstance(item, Result)
                    columns[number] = Column(each, "", item) if is_result else Column(each, item)
                    if not is_result or number > 0:
                        yield show_answers(columns), gr.skip(), gr.skip(), gr.skip()
                        continue
                    history = extend_history(history, file, question, item)
                    pictures = show_pictures(item.pictures) if item.pictures else ""
                    yield show_answers(columns), pictures, show_history(history), history

    def start(self) -> tuple[str, str, list[Step]]:
        """Answer the first sample's first question, so that the page does not open empty and the model is warm."""
        if not self.samples:
            return show_hint(HINT), "", []
        sample = self.samples[0]
        method = next(iter(self.answerer.methods))
        settings = (True, method, self.default_count, self.answerer.methods[method], False, [])
        try:
            *_, (answers, pictures, _, history) = self._answer(str(sample.image), sample.questions[0], *settings)
        except InputError as error:
            return show_problem(str(error)), "", []
        return answers, pictures, history

    @property
    def default_count(self) -> int:
        """A fifth of the patches: about what TRIM:-1 keeps."""
        return max(1, round(self.answerer.num_patches / 5))

    def choose_sample(self, number: int) -> tuple[str, str, Any]:
        """Show a sample: its image, its first question, and the list of its questions."""
        sample = self.samples[number]
        return str(sample.image), sample.questions[0], gr.Dataset(samples=[[text] for text in sample.questions])

    def choose_method(self, method: str) -> tuple[Any, Any]:
        """Offer a method's settings: the slider where it has no budget yet, its own rule where it has one."""
        return gr.Slider(interactive=takes_budget(method)), gr.Checkbox(visible=self.answerer.methods[method])

    # The page ---------------------------------------------------------------------------------------------------
    def lay_out(self) -> gr.Blocks:
        """Make the page."""
        answerer, methods = self.answerer, self.answerer.methods
        first = next(iter(methods))
        answers_html, pictures_html, steps = self.start()
        with gr.Blocks(title="LLaVA with token reduction", analytics_enabled=False, fill_width=True) as blocks:
            history = gr.State(steps)
            gr.Markdown(f"## Which patches does the question need?\n{answerer.title}")
            with gr.Row(equal_height=False):
                with gr.Column(scale=4, min_width=330):
                    sample = self.samples[0] if self.samples else None
                    image = gr.Image(
                        None if sample is None else str(sample.image), label="Image", type="filepath",
                        sources=["upload", "clipboard"], height=220, elem_id="image",
                    )  # fmt: skip
                    # Handlers get the file as it came: `llava.image` opens it, and says in a sentence what is wrong.
                    image.preprocess = lambda payload: None if payload is None else payload.path
                    samples = gr.Dataset(
                        components=[gr.Image(visible=False, type="filepath")], label="Sample images", type="index",
                        samples=[[str(each.image)] for each in self.samples], visible=bool(self.samples),
                        elem_id="samples",
                    )  # fmt: skip
                    question = gr.Textbox(
                        "" if sample is None else sample.questions[0], label="Question", lines=1, max_lines=4,
                        placeholder="What do you want to know about the image?", elem_id="question",
                    )  # fmt: skip
                    with gr.Row():
                        ask = gr.Button("Ask", variant="primary", elem_id="ask")
                        stop = gr.Button("Stop", elem_id="stop")
                    questions = gr.Dataset(
                        components=[gr.Textbox(visible=False)], label="Questions about this sample", type="values",
                        samples=[] if sample is None else [[text] for text in sample.questions],
                        visible=bool(self.samples), elem_id="questions",
                    )  # fmt: skip
                    with gr.Group():
                        is_short = gr.Checkbox(True, label="Answer in a word or phrase", elem_id="short")
                        method = gr.Dropdown(list(methods), value=first, label="Method", elem_id="method")
                        count = gr.Slider(
                            1, answerer.num_patches, self.default_count, step=1, label="Budget: patches to keep",
                            elem_id="budget", interactive=takes_budget(first),
                        )  # fmt: skip
                        is_automatic = gr.Checkbox(
                            True, label="The method's own rule decides instead (-1)", visible=methods[first],
                            elem_id="automatic",
                        )  # fmt: skip
                        compares = gr.Checkbox(False, label="Compare with no reduction", elem_id="compare")
                with gr.Column(scale=9, min_width=420, elem_id="found"):
                    answers = gr.HTML(answers_html, elem_id="answers", elem_classes="fixed")
                    pictures = gr.HTML(pictures_html, elem_id="pictures", elem_classes="fixed")
                    shown_history = gr.HTML("", elem_id="history", elem_classes="fixed")
                    gr.Markdown(ABOUT_SPEC)
            # What happens when. One question at a time: of clicks while one is answered the last one counts.
            settings = [image, question, is_short, method, count, is_automatic, compares, history]
            outputs = [answers, pictures, shown_history, history]
            options = {
                "inputs": settings, "outputs": outputs, "show_progress": "hidden", "trigger_mode": "always_last",
                "concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private",
            }  # fmt: skip
            quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
            asked = gr.on([ask.click, question.submit], self.answer, **options)
            count.input(lambda: False, outputs=is_automatic, **quick)
            moved = count.release(self.answer_again, **options)
            chosen = method.input(
                self.choose_method, inputs=method, outputs=[count, is_automatic], **quick
            ).then(self.answer_again, **options)  # fmt: skip
            ticked = gr.on([is_automatic.input, compares.input, is_short.input], self.answer_again, **options)
            shown = samples.click(
                self.choose_sample, inputs=samples, outputs=[image, question, questions], **quick
            ).then(self.answer_again, **options)
            picked = questions.click(lambda row: row[0], inputs=questions, outputs=question, **quick).then(
                self.answer_again, **options
            )
            stop.click(
                lambda text: text.replace(CARET, ""), inputs=answers, outputs=answers,
                cancels=[asked, moved, chosen, ticked, shown, picked], **quick,
            )  # fmt: skip
        return blocks
