"""VizWiz from the hub: `val` (scored here) and `test`.

The dataset has ten answers per question without the annotators' confidence, which no metric reads, and the type of the
answer as `category`; whether a question can be answered follows from that type.
"""

from typing import Any, ClassVar

from llava.eval.hub import SHORT_ANSWER_LINE, HubForm, HubRow, HubRows, HubTable, Layout, Tables, safe_name

DATASET = "lmms-lab/VizWiz-VQA"
UNANSWERABLE = "unanswerable"
UNANSWERABLE_LINE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


class VizWizVal(HubForm):
    """The validation split, with its answers."""

    dataset = DATASET
    tables: ClassVar[Tables] = {
        "questions": HubTable("val", ("question_id", "image", "question", "answers", "category"))
    }
    files = ("val.json", "llava_val.jsonl")

    def convert(self, rows: HubRows, layout: Layout) -> None:
        """Write questions, annotations and pictures."""
        questions, records = [], []
        for row in rows["questions"]:
            questions.append(save_question(row, "val", len(questions), layout))
            records.append(
                {
                    "image": questions[-1]["image"],
                    "question": row["question"],
                    "answers": [{"answer": answer, "answer_confidence": "yes"} for answer in row["answers"]],
                    "answer_type": row["category"],
                    "answerable": int(row["category"] != UNANSWERABLE),
                }
            )
        layout.write_json("val.json", records)
        layout.write_lines("llava_val.jsonl", questions)


class VizWizTest(HubForm):
    """The split of the papers, without answers."""

    dataset = DATASET
    tables: ClassVar[Tables] = {"questions": HubTable("test", ("question_id", "image", "question"))}
    files = ("llava_test.jsonl",)

    def convert(self, rows: HubRows, layout: Layout) -> None:
        """Write questions and pictures."""
        questions = [save_question(row, "test", number, layout) for number, row in enumerate(rows["questions"])]
        layout.write_lines("llava_test.jsonl", questions)


def save_question(row: HubRow, folder: str, number: int, layout: Layout) -> dict[str, Any]:
    """Save a row's picture and return its line of LLaVA's question file; the dataset's id is the picture's name."""
    name = safe_name(row["question_id"], DATASET)
    image = name if "." in name else f"{name}.jpg"
    layout.save_image(f"{folder}/{image}", row["image"])
    text = row["question"].capitalize() + UNANSWERABLE_LINE + SHORT_ANSWER_LINE
    return {"question_id": number, "image": image, "text": text, "category": "default"}
