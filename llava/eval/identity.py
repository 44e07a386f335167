"""What the answers of a run depend on besides its settings, by content: checkpoint, base, vision tower, images."""

import hashlib
import json
import uuid
from collections.abc import Sequence
from pathlib import Path

from llava.cli import ModelSpec
from llava.eval.benchmark import Question, row_key
from llava.model.identity import fingerprint, hash_files, identify_parts


def identify_model(spec: ModelSpec) -> dict[str, str]:
    """Fingerprint the checkpoint, its base and its vision tower.

    What cannot be read equals nothing, not even itself: loading the model says what is wrong with it.
    """
    parts = identify_parts(spec.path, spec.base)
    return {name: part or f"unreadable {uuid.uuid4()}" for name, part in parts.items()}


def identify_questions(questions: Sequence[Question], key_fields: Sequence[str]) -> str:
    """Fingerprint what is asked, whatever the images show."""
    asked = [
        [row_key(question.head(), key_fields), question.prompt, question.query, len(question.images)]
        for question in questions
    ]
    return fingerprint(json.dumps(asked))


def identify_images(questions: Sequence[Question], key_fields: Sequence[str]) -> dict[str, str]:
    """Fingerprint the images of each question by its key; a question without images, or one not readable, is left out.

    Whole files are hashed, however large: then nothing passes, and reading them is what answering does anyway.
    """
    images = dict.fromkeys(image for question in questions for image in question.images)
    hashes = hash_files([image for image in images if isinstance(image, Path)], "images")
    found: dict[str, str] = {}
    for question in questions:
        contents = [
            hashes[image] if isinstance(image, Path) else hashlib.sha256(image.content).hexdigest()
            for image in question.images
        ]
        if contents and None not in contents:
            found[row_key(question.head(), key_fields)] = fingerprint(json.dumps(contents))
    return found
