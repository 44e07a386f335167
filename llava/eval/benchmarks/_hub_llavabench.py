"""LLaVA-Bench (in the wild) from the hub: pictures with their captions, questions, reference answers.

The references carry no answer ids there, which no score reads. Pictures are numbered as they first appear unless the
dataset names them.
"""

import hashlib
from typing import Any, ClassVar

from llava.eval.hub import HubForm, HubRow, HubRows, HubTable, Layout, Tables, guess_suffix, image_bytes, safe_name

CATEGORY_PREFIX = "llava_bench_"
REFERENCE_MODEL = "gpt-4"


class LlavaBenchWild(HubForm):
    """All sixty questions."""

    dataset = "lmms-lab/llava-bench-in-the-wild"
    tables: ClassVar[Tables] = {
        "questions": HubTable("train", ("question_id", "image", "question", "caption", "gpt_answer", "category")),
    }
    files = ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl")

    def convert(self, rows: HubRows, layout: Layout) -> None:
        """Write questions, contexts, references and pictures."""
        names: dict[str, str] = {}
        questions, references, contexts = [], [], {}
        for row in rows["questions"]:
            image = name_picture(row, names, self.dataset)
            layout.save_image(f"images/{image}", row["image"])
            contexts[image] = {"id": image.rsplit(".", 1)[0], "image": image, "caption": row["caption"]}
            category = row["category"].removeprefix(CATEGORY_PREFIX)
            identity, text = row["question_id"], row["question"]
            questions.append({"question_id": identity, "image": image, "category": category, "text": text})
            references.append(make_reference(identity, text, row["gpt_answer"]))
        layout.write_lines("context.jsonl", contexts.values())
        layout.write_lines("answers_gpt4.jsonl", references)
        layout.write_lines("questions.jsonl", questions)


def name_picture(row: HubRow, names: dict[str, str], dataset: str) -> str:
    """Return a picture's file name: the dataset's, or the next number for one not seen before.

    Args:
        row: of the dataset.
        names: by the pictures' digests; the new one is added.
        dataset: for the message.
    """
    if row.get("image_id"):
        name = safe_name(row["image_id"], dataset)
        return name if "." in name else f"{name}{guess_suffix(row['image'])}"
    digest = hashlib.sha256(image_bytes(row["image"]) or b"").hexdigest()
    return names.setdefault(digest, f"{len(names) + 1:03d}{guess_suffix(row['image'])}")


def make_reference(identity: Any, prompt: str, text: str) -> dict[str, Any]:
    """Make a line of the references' file."""
    return {
        "question_id": identity,
        "prompt": prompt,
        "answer_id": f"hub-{identity}",
        "model_id": REFERENCE_MODEL,
        "metadata": {},
        "text": text,
    }
