"""POPE from the hub: configuration `Full`, a split per category, 3,000 questions each.

The dataset follows POPE's newest label files, LLaVA's question file an older commit: there are 90 more `random`
questions here, and the older files' "in the imange" is spelt right. Ids are LLaVA's: the category's base plus the
question's number.
"""

from typing import ClassVar

from llava.eval.hub.layout import SHORT_ANSWER_LINE, Layout, safe_name
from llava.eval.hub.source import HubSource, Rows
from llava.eval.hub.table import HubTable, Tables

COLUMNS = ("question_id", "question", "answer", "image_source", "image")
FIRST_IDS = {"adversarial": 0, "popular": 20_000_000, "random": 10_000_000}
"""By category, in the order of LLaVA's question file; a question's number is added."""


class PopeFull(HubSource):
    """All three categories."""

    dataset = "lmms-lab/POPE"
    tables: ClassVar[Tables] = {category: HubTable(category, COLUMNS, config="Full") for category in FIRST_IDS}
    files = ("llava_pope_test.jsonl", *(f"coco/coco_pope_{category}.json" for category in FIRST_IDS))

    def convert(self, rows: Rows, layout: Layout) -> None:
        """Write questions, labels and pictures."""
        questions = []
        for category, first_id in FIRST_IDS.items():
            labels = []
            for row in rows[category]:
                image = f"{safe_name(row['image_source'], self.dataset).removesuffix('.jpg')}.jpg"
                layout.save_picture(f"val2014/{image}", row["image"])
                number, text = int(row["question_id"]), row["question"]
                labels.append({"question_id": number, "image": image, "text": text, "label": row["answer"]})
                questions.append(
                    {
                        "question_id": first_id + number,
                        "image": image,
                        "text": text + SHORT_ANSWER_LINE,
                        "category": category,
                    }
                )
            layout.write_lines(f"coco/coco_pope_{category}.json", labels)
        layout.write_lines("llava_pope_test.jsonl", questions)
