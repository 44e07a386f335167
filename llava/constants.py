"""Sentinels and special tokens shared with every published LLaVA client. The names and values are frozen."""

CONTROLLER_HEART_BEAT_EXPIRATION = 30
WORKER_HEART_BEAT_INTERVAL = 15

LOGDIR = "."

# A label the loss skips, and the mark in `input_ids` where an image's tokens go. Neither is a vocabulary entry.
IGNORE_INDEX = -100
IMAGE_TOKEN_INDEX = -200

DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
# What a user may write in a question to say where the image goes; the faces turn it into the token above.
IMAGE_PLACEHOLDER = "<image-placeholder>"
