"""TextVQA from the hub: the validation split, whose `ocr_tokens` make LLaVA's reference line.

LLaVA's own question file was made with tokens of the same reader; a few of its lines stand in another order, which the
dataset does not tell.
"""

from typing import ClassVar

from llava.eval.hub import SHORT_ANSWER_LINE, HubForm, HubRows, HubTable, Layout, Tables, safe_name

QUESTION_FILE = "llava_textvqa_val_v051_ocr.jsonl"
ANNOTATION_FILE = "TextVQA_0.5.1_val.json"
ANNOTATION_COLUMNS = ("question", "image_id", "answers", "question_id")
MORE_COLUMNS = (
    "image_classes",
    "flickr_original_url",
    "flickr_300k_url",
    "image_width",
    "image_height",
    "question_tokens",
    "set_name",
)


class TextVqaVal(HubForm):
    """The validation split."""

    dataset = "lmms-lab/textvqa"
    tables: ClassVar[Tables] = {"questions": HubTable("validation", (*ANNOTATION_COLUMNS, "image", "ocr_tokens"))}
    files = (QUESTION_FILE, ANNOTATION_FILE)

    def convert(self, rows: HubRows, layout: Layout) -> None:
        """Write questions, annotations and pictures."""
        questions, annotations = [], []
        for row in rows["questions"]:
            image = f"{safe_name(row['image_id'], self.dataset)}.jpg"
            layout.save_image(f"train_images/{image}", row["image"])
            annotations.append({name: row[name] for name in (*ANNOTATION_COLUMNS, *MORE_COLUMNS) if name in row})
            tokens = ", ".join(row["ocr_tokens"] or [])
            text = f"{row['question'].capitalize()}\nReference OCR token: {tokens}{SHORT_ANSWER_LINE}"
            questions.append({"question_id": row["image_id"], "image": image, "text": text, "category": "default"})
        head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
        layout.write_json(ANNOTATION_FILE, {**head, "data": annotations})
        layout.write_lines(QUESTION_FILE, questions)
