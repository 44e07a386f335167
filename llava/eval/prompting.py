"""The strings around a question: conversation wrapper, image marks, and what the CLIP text tower reads.

Published answers depend on every character here; the tests compare with prompts recorded from the published scripts.
"""

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import conv_templates
from llava.errors import InputError

DEFAULT_CONV_MODE = "vicuna_v1"


def choose_conv_mode(conv_mode: str, model_name: str) -> str:
    """Check the conversation template; models trained on plain captions alone get its `_mmtag` variant (as published).

    Where a template has no such variant, it is used as it is (the published code crashes).

    Raises:
        InputError: there is no such template.
    """
    if conv_mode not in conv_templates:
        raise InputError(f"no conversation template {conv_mode!r}; known: {', '.join(sorted(conv_templates))}")
    is_plain = "plain" in model_name and "finetune" not in model_name.lower()
    variant = f"{conv_mode}_mmtag"
    return variant if is_plain and variant in conv_templates else conv_mode


def wrap_prompt(text: str, num_images: int, conv_mode: str, use_im_start_end: bool = False) -> str:
    """Make the prompt of a single user's turn.

    Args:
        text: the question. If it has exactly one `<image>` mark per image, they stay where they are; without marks,
            one line with a mark goes before it for each image.
        num_images: number of images.
        conv_mode: name of a conversation template.
        use_im_start_end: put `<im_start>` and `<im_end>` around the marks (`mm_use_im_start_end` of the checkpoint).

    Raises:
        InputError: the text has marks, but not one per image.
    """
    num_marks = text.count(DEFAULT_IMAGE_TOKEN)
    if num_marks not in (0, num_images):
        raise InputError(f"the question has {num_marks} {DEFAULT_IMAGE_TOKEN} marks for {num_images} images")
    turn = text if num_marks else f"{DEFAULT_IMAGE_TOKEN}\n" * num_images + text
    if use_im_start_end:
        turn = turn.replace(DEFAULT_IMAGE_TOKEN, DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN)
    conversation = conv_templates[conv_mode].copy()
    conversation.append_message(conversation.roles[0], turn)
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def derive_query(text: str) -> str:
    """Return what the CLIP text tower reads for a question: all of it, each image mark replaced by a blank."""
    return text.replace(DEFAULT_IMAGE_TOKEN, " ")
