"""MME from the hub: question ids are the pictures' paths, as in LLaVA's question file.

The two questions of a picture may stand anywhere in the dataset; they are brought together, as MME's own files have
them. Pictures keep the dataset's bytes under the name of the id.
"""

from pathlib import PurePosixPath
from typing import ClassVar

from llava.errors import InputError
from llava.eval.hub import SHORT_ANSWER_LINE, HubForm, HubRow, HubRows, HubTable, Layout, Tables, safe_name

DATA_FOLDER = "MME_Benchmark_release_version"
QUESTION_FILE = "llava_mme.jsonl"
LABEL_ENDING = "Please answer yes or no."
PICTURE_FOLDER, LABEL_FOLDER = "images", "questions_answers_YN"


class Mme(HubForm):
    """All fourteen subtasks."""

    dataset = "lmms-lab/MME"
    tables: ClassVar[Tables] = {
        "questions": HubTable("test", ("question_id", "image", "question", "answer", "category"))
    }
    files = (QUESTION_FILE,)

    def convert(self, rows: HubRows, layout: Layout) -> None:
        """Write questions, label files and pictures."""
        groups: dict[tuple[str, str], list[HubRow]] = {}
        for row in rows["questions"]:
            image = name_picture(row, self.dataset)
            layout.save_image(f"{DATA_FOLDER}/{image}", row["image"])
            # The picture is on the disk; only the text stays in memory.
            text = {name: row[name] for name in ("question", "answer")}
            groups.setdefault((row["category"], image), []).append(text)
        questions = []
        for (category, image), pair in groups.items():
            labels = "".join(f"{row['question']}\t{row['answer']}\n" for row in pair)
            layout.write_text(f"{DATA_FOLDER}/{name_labels(image)}", labels)
            for row in pair:
                text = row["question"].removesuffix(LABEL_ENDING).rstrip() + SHORT_ANSWER_LINE
                questions.append({"question_id": image, "image": image, "text": text, "category": category})
        layout.write_lines(QUESTION_FILE, questions)


def name_picture(row: HubRow, dataset: str) -> str:
    """Return a picture's path under the data folder.

    Raises:
        InputError: the id is no path in the subtask's folder.
    """
    image = safe_name(row["question_id"], dataset)
    if not image.startswith(f"{row['category']}/"):
        raise InputError(f"{dataset}: question_id {image!r} is not {row['category']}/<picture>")
    return image


def name_labels(image: str) -> str:
    """Return where a picture's questions and answers stand: beside it, or in a folder beside `images`."""
    path = PurePosixPath(image).with_suffix(".txt")
    if path.parent.name == PICTURE_FOLDER:
        path = path.parent.parent / LABEL_FOLDER / path.name
    return str(path)
