"""ScienceQA-IMG from the hub: the 2,017 test problems with a picture.

The dataset has no problem numbers: a problem's id here is its row. The problems of text alone are not in it, so the
accuracy over all problems is the one over those with a picture.
"""

from typing import Any, ClassVar

from llava.eval.hub import HubForm, HubRow, HubRows, HubTable, Layout, Tables

LETTERS = "ABCDEFGHIJ"
FIELDS = ("task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")


class ScienceQaImg(HubForm):
    """The test split with pictures."""

    dataset = "lmms-lab/ScienceQA"
    tables: ClassVar[Tables] = {
        "problems": HubTable("test", ("image", "question", "choices", "answer", "hint"), config="ScienceQA-IMG")
    }
    files = ("llava_test_CQM-A.json", "problems.json", "pid_splits.json")

    def convert(self, rows: HubRows, layout: Layout) -> None:
        """Write questions, problems and pictures."""
        problems, questions = {}, []
        for number, row in enumerate(rows["problems"]):
            pid = str(number)
            layout.save_image(f"images/test/{pid}/image.png", row["image"])
            problems[pid] = make_problem(row)
            questions.append(make_question(pid, row))
        layout.write_json("problems.json", problems)
        layout.write_json("pid_splits.json", {"test": list(problems)})
        layout.write_json("llava_test_CQM-A.json", questions)


def make_problem(row: HubRow) -> dict[str, Any]:
    """Make a record of the official `problems.json`."""
    return {
        "question": row["question"],
        "choices": list(row["choices"]),
        "answer": int(row["answer"]),
        "hint": row["hint"] or "",
        "image": "image.png",
        **{name: row.get(name) or "" for name in FIELDS},
        "split": "test",
    }


def make_question(pid: str, row: HubRow) -> dict[str, Any]:
    """Make a record of LLaVA's question file: context, question and options, without the line about letters."""
    context = [f"Context: {row['hint']}"] if row["hint"] else []
    options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False)]
    return {
        "id": pid,
        "image": f"{pid}/image.png",
        "conversations": [
            {"from": "human", "value": "\n".join(["<image>", *context, row["question"], *options])},
            {"from": "gpt", "value": LETTERS[int(row["answer"])]},
        ],
    }
