"""GQA from the hub: `testdev_balanced` questions and pictures are two configurations, joined by the picture's id.

Question by question the same as LLaVA's file, which is in shuffled order. What the finer metrics read (types, groups,
semantic steps, entailed questions) is taken where the dataset has it; where it has not, accuracy stays right and the
break-down has one group of unknown type.
"""

import ast
import json
from typing import Any, ClassVar

from llava.eval.hub import SHORT_ANSWER_LINE, HubForm, HubRow, HubRows, HubTable, Layout, Tables, safe_name

QUESTION_FILE = "llava_gqa_testdev_balanced.jsonl"
ANNOTATION_FILE = "data/testdev_balanced_questions.json"
UNKNOWN = "unknown"
TYPES = ("structural", "semantic", "detailed")
STEP_FIELDS = ("operation", "argument", "dependencies")


class GqaTestdev(HubForm):
    """The balanced questions of test-dev."""

    dataset = "lmms-lab/GQA"
    tables: ClassVar[Tables] = {
        "questions": HubTable(
            "testdev", ("id", "imageId", "question", "answer", "isBalanced"), config="testdev_balanced_instructions"
        ),
        "pictures": HubTable("testdev", ("id", "image"), config="testdev_balanced_images"),
    }
    files = (QUESTION_FILE, ANNOTATION_FILE)

    def convert(self, rows: HubRows, layout: Layout) -> None:
        """Write questions, annotations and pictures."""
        for row in rows["pictures"]:
            layout.save_image(f"data/images/{safe_name(row['id'], self.dataset)}.jpg", row["image"])
        questions, annotations = [], {}
        for row in rows["questions"]:
            identity = str(row["id"])
            annotations[identity] = make_annotation(row)
            questions.append(
                {
                    "question_id": identity,
                    "image": f"{safe_name(row['imageId'], self.dataset)}.jpg",
                    "text": row["question"] + SHORT_ANSWER_LINE,
                    "category": "default",
                }
            )
        layout.write_json(ANNOTATION_FILE, annotations)
        layout.write_lines(QUESTION_FILE, questions)


def make_annotation(row: HubRow) -> dict[str, Any]:
    """Make a question's record of the official file."""
    types, groups = parse_cell(row.get("types")) or {}, parse_cell(row.get("groups")) or {}
    return {
        "semantic": [
            {name: step.get(name) for name in STEP_FIELDS} for step in list_steps(parse_cell(row.get("semantic")))
        ],
        "entailed": [str(each) for each in parse_cell(row.get("entailed")) or []],
        "equivalent": [str(each) for each in parse_cell(row.get("equivalent")) or []],
        "question": row["question"],
        "imageId": row["imageId"],
        "isBalanced": bool(row["isBalanced"]),
        "groups": {"global": groups.get("global"), "local": groups.get("local")},
        "answer": row["answer"],
        "semanticStr": row.get("semanticStr") or "",
        "types": {name: types.get(name) or UNKNOWN for name in TYPES},
        "fullAnswer": row.get("fullAnswer") or "",
    }


def parse_cell(cell: Any) -> Any:
    """Return a cell's value; lists and records may be stored as their text."""
    if not isinstance(cell, str):
        return cell
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(cell)
        except (ValueError, SyntaxError):
            continue
    return None


def list_steps(cell: Any) -> list[dict[str, Any]]:
    """Return the steps of a question's program; a list of records may be stored as a record of lists."""
    if isinstance(cell, dict):
        names = [name for name in STEP_FIELDS if name in cell]
        return [dict(zip(names, step, strict=True)) for step in zip(*(cell[name] for name in names), strict=True)]
    return list(cell or [])
