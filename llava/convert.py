"""Convert a checkpoint between LLaVA's layout and transformers': `python -m llava.convert --to llava-hf|llava SRC DST`.

Tensors are read and written one by one, with the bits and the dtype that they have. The new folder appears when it is
complete. There and back gives the tensors and the settings of the beginning.

`--to llava-hf` writes what `LlavaForConditionalGeneration`, `AutoProcessor`, vLLM and the like read: the vision tower
beside the language model, rows of embeddings for `<image>` and `<pad>`, processor files, a chat template. `--to llava`
leaves the tower out where it is bit for bit that of `mm_vision_tower`, and keeps it otherwise.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava.chat_template import CHAT_TEMPLATE, read_chat_template, write_jinja
from llava.conversation import conversation_name_for, get_model_name_from_path
from llava.errors import InputError, run_command

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

# Every function imports what it needs of torch: the command answers --help and mistaken options before that.

LAYOUTS = ("llava-hf", "llava")
SHARD_BYTES = 5 * 2**30
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
AFTER_IMAGE = {"type": "Replace", "pattern": {"Regex": r"<image>(?!<image>|\z)"}, "content": "<image>▁"}
"""Text behind an image starts as a prompt does, with the blank of sentencepiece: LLaVA encodes it on its own."""
COPIED = ("tokenizer.model", "generation_config.json")
README = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- llava
---
# {name}

`{source}` in the layout of transformers' `{architecture}`.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder, backend="pil")  # LLaVA's pixels bit for bit
```

Images: `image_aspect_ratio` {aspect}. Chat template: {template}.
"""


# --------------------------------------------------------------------------------------------------- to transformers'
def convert_to_hf(source: str, folder: Path) -> str:
    """Write a checkpoint in LLaVA's layout as a llava-hf folder.

    Args:
        source: folder or hub id of a full checkpoint.
        folder: an empty one that is there.

    Returns:
        What was written, in one line.

    Raises:
        InputError: a part of a checkpoint, a damaged one, or a setting that transformers' LLaVA does not have.
    """
    from llava.files import write_json
    from llava.model.checkpoint_folder import locate_tower
    from llava.model.config_rules import CONFIG_FILE
    from llava.model.hf_layout import HF_NAMES, STORED_PREFIX, rename, to_hf_config
    from llava.model.multimodal_encoder.stored_encoder import StoredVisionTower

    # 1. All that can be refused before weights are read.
    given = open_source(source, is_hf=False)
    values, tower, tokenizer = given.values, given.tower, given.tokenizer
    values["unfreeze_mm_vision_tower"] = isinstance(tower, StoredVisionTower)
    values["mm_vision_tower"] = locate_tower(values["mm_vision_tower"], source, folder)
    vision = json.loads(tower.config.to_json_string(use_diff=False))
    settings = to_hf_config(values, given.file, vision, tower.num_patches, len(tokenizer))
    check_weights(source, given.config)
    # 2. The weights.
    shards = Shards(folder)
    num_rows = settings["text_config"]["vocab_size"]
    for name, value in read_own(source):
        shards.add(rename(name, HF_NAMES), add_rows(value, num_rows) if name in EMBEDDINGS else value)
    for name, value in read_vision(tower).items():
        shards.add(rename(f"{STORED_PREFIX}{name}", HF_NAMES), value)
    written = shards.close()
    # 3. Settings, tokenizer, processors, chat template, model card.
    copy_files(source, folder)
    write_json(folder / CONFIG_FILE, settings, indent=2)
    write_tokenizer(tokenizer, settings, folder)
    write_processor(tower, settings, folder)
    shown = write_card(source, values, settings, tokenizer, folder)
    vocab_size = given.config.vocab_size
    return f"{written}; vocabulary {vocab_size}, with <image> and <pad> {num_rows} rows; chat template {shown}"


@dataclass(frozen=True)
class Source:
    """A checkpoint that is going to be converted.

    Attributes:
        config: LLaVA's, whatever the layout.
        values, file: config.json as it is stored, and its name.
        tower: without weights.
        tokenizer: of the language model.
    """

    config: "PreTrainedConfig"
    values: dict
    file: str
    tower: "CLIPVisionTower"
    tokenizer: "PreTrainedTokenizerBase"


def open_source(source: str, *, is_hf: bool) -> Source:
    """Read all of a checkpoint but its weights.

    Args:
        source: folder or hub id.
        is_hf: whether it shall have the layout of llava-hf, or LLaVA's.

    Raises:
        InputError: it has the other layout, is a part of a checkpoint, has another tower than a CLIP, or names a chat
            template that the tokenizer has not.
    """
    from llava.model.builder import check_tower_fits, find_weights, read_config
    from llava.model.config_rules import CONFIG_FILE, is_hf_layout, read_settings
    from llava.model.multimodal_encoder.builder import build_vision_tower
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
    from llava.model.tokenizer import load_tokenizer

    config = read_config(source)
    values, file = read_settings(source, CONFIG_FILE, "checkpoint")
    if is_hf and not is_hf_layout(values):
        raise InputError(f"{source} does not have the layout of llava-hf (config.json without text_config)")
    if not is_hf and is_hf_layout(values):
        raise InputError(f"{source} has the layout of llava-hf already")
    find_weights(source, None)  # refuses a part of a checkpoint
    tower = build_vision_tower(config, delay_load=True)
    if not isinstance(tower, CLIPVisionTower):
        raise InputError(f"{file}: mm_vision_tower is {config.mm_vision_tower}; only a Hugging Face CLIP is converted")
    check_tower_fits(config, tower, source)
    tokenizer = load_tokenizer(source)
    if values.get("conv_mode") == CHAT_TEMPLATE:
        read_chat_template(tokenizer)
    return Source(config, values, file, tower, tokenizer)


def check_weights(source: str, config: "PreTrainedConfig") -> None:
    """Compare the headers of a checkpoint's weight files with its config.

    Raises:
        InputError: tensors are missing, unexpected or of another shape.
    """
    from llava.model.language_model.families import classes_of
    from llava.model.multimodal_encoder.loading import check_headers, quiet_loading

    with quiet_loading(f"checkpoint {source}"):
        check_headers(classes_of(config).model, source, config, what="checkpoint")


def write_card(source: str, values: dict, settings: dict, tokenizer: "PreTrainedTokenizerBase", folder: Path) -> str:
    """Write the chat template and the model card; returns the template's name, for a person."""
    from llava.files import write_text

    name = get_model_name_from_path(source)
    template = values.get("conv_mode") or conversation_name_for(name)
    jinja = write_jinja(template, tokenizer)
    if jinja is not None:
        write_text(folder / "chat_template.jinja", jinja)
    shown = template if jinja is not None else f"none (the template {template} is no dialogue)"
    aspect = values.get("image_aspect_ratio") or "square"
    architecture = settings["architectures"][0]
    card = README.format(name=name, source=name, architecture=architecture, aspect=aspect, template=shown)
    write_text(folder / "README.md", card)
    return shown


def read_own(source: str) -> Iterator[tuple[str, "Tensor"]]:
    """Yield the tensors of a checkpoint in either layout under LLaVA's names, without its towers.

    Raises:
        InputError: a file that cannot be read, or a tensor with inf or NaN.
    """
    from llava.model.hf_layout import NAMES, rename
    from llava.model.stored_weights import check_finite, iterate_tensors, list_weight_files
    from llava.terminal import make_bar

    files = list_weight_files(source)
    with make_bar("converting", sum(os.path.getsize(file) for file in files), "B") as progress:
        for file in files:
            for stored, value in iterate_tensors(file):
                name = rename(stored, NAMES)
                if not name.startswith("model.vision_tower.") and not name.endswith("rotary_emb.inv_freq"):
                    check_finite([(name, value)], file)
                    yield name, value
                progress.update(value.nbytes)


def read_vision(tower: "CLIPVisionTower") -> "dict[str, Tensor]":
    """Read the vision half of a tower, all layers, under CLIP's names.

    Raises:
        InputError: a tensor is missing, has no place or another shape, or holds inf or NaN.
    """
    from transformers import CLIPVisionModelWithProjection

    from llava.model.multimodal_encoder.clip_encoder import JOINT_WEIGHT
    from llava.model.multimodal_encoder.loading import build_empty, build_shapes
    from llava.model.stored_weights import check_finite, check_shapes

    vision, what = tower.stored_weights(), f"vision tower {tower.name}"
    expected = build_shapes(build_empty(CLIPVisionModelWithProjection, tower.config))
    check_shapes({name: tuple(value.shape) for name, value in vision.items()}, expected, what, optional=(JOINT_WEIGHT,))
    check_finite(vision.items(), what)
    return vision


def add_rows(value: "Tensor", num_rows: int) -> "Tensor":
    """Add rows to `[V, E]`, each the mean of those before: as output its logit is never the largest."""
    import torch

    mean = value.float().mean(dim=0, keepdim=True).to(value.dtype)
    return torch.cat([value, mean.expand(num_rows - value.shape[0], -1)])


def write_tokenizer(tokenizer: object, settings: dict, folder: Path) -> None:
    """Write a tokenizer with `<image>` and `<pad>`, whose ids for a prompt with images are LLaVA's.

    Raises:
        InputError: it has one of these tokens already, or prepares texts in another way than LLaVA's.
    """
    from llava.files import write_json
    from llava.model.hf_layout import ADDED_TOKENS
    from llava.model.tokenizer import SETTINGS_FILE

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    image, pad = ADDED_TOKENS
    if known := set(ADDED_TOKENS) & set(tokenizer.get_vocab()):
        raise InputError(f"tokenizer of {tokenizer.name_or_path} has a token {min(known)} already")
    is_sentencepiece = (content["pre_tokenizer"] or {}).get("type") == "Metaspace"
    if is_sentencepiece:
        if content["normalizer"] is not None:
            raise InputError(f"tokenizer of {tokenizer.name_or_path} has a normaliser; Llama's have none")
        content["normalizer"] = AFTER_IMAGE
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "special": True}
    content["added_tokens"] += [
        # Normalised, where the normaliser is to see what follows.
        {"id": settings["image_token_index"], "content": image, "normalized": is_sentencepiece, **entry},
        {"id": settings["pad_token_id"], "content": pad, "normalized": False, **entry},
    ]
    write_json(folder / "tokenizer.json", content, indent=None)
    is_qwen = settings["text_config"]["model_type"] == "qwen2"
    names = {
        f"{name}_token": str(getattr(tokenizer, f"{name}_token"))
        for name in ("bos", "eos", "unk")
        if getattr(tokenizer, f"{name}_token") is not None
    }
    write_json(
        folder / SETTINGS_FILE,
        {
            # The classes of Llama and others would not take tokenizer.json as it is.
            "tokenizer_class": "Qwen2Tokenizer" if is_qwen else "PreTrainedTokenizerFast",
            "processor_class": processor_class(settings),
            **names,
            "pad_token": pad,
            "image_token": image,
            "extra_special_tokens": {"image_token": image},
            "padding_side": "left",
            "model_max_length": settings["text_config"].get("max_position_embeddings", 2048),
            "clean_up_tokenization_spaces": False,
        },
    )


def processor_class(settings: dict) -> str:
    return "LlavaNextProcessor" if settings["model_type"] == "llava_next" else "LlavaProcessor"


def write_processor(tower: "CLIPVisionTower", settings: dict, folder: Path) -> None:
    """Write the files of the image processor and of the processor as a whole."""
    from llava.files import write_json
    from llava.model.config_rules import PREPROCESSOR_FILE, PREPROCESSOR_RULES
    from llava.model.hf_layout import PROCESSOR_FILE

    kind = processor_class(settings)
    stored = json.loads(tower.read_image_processor().to_json_string())
    images = {key: stored[key] for key in PREPROCESSOR_RULES if stored.get(key) is not None}
    images |= {"image_processor_type": kind.replace("Processor", "ImageProcessor"), "processor_class": kind}
    images["do_pad"] = settings.get("image_aspect_ratio") in ("pad", "anyres")
    if settings["model_type"] == "llava_next":
        images["image_grid_pinpoints"] = settings["image_grid_pinpoints"]
    write_json(folder / PREPROCESSOR_FILE, images, indent=2)
    write_json(
        folder / PROCESSOR_FILE,
        {
            "processor_class": kind,
            "patch_size": tower.config.patch_size,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": settings["vision_feature_select_strategy"],
            "image_token": "<image>",
        },
        indent=2,
    )


# ----------------------------------------------------------------------------------------------------------- to LLaVA's
def convert_to_llava(source: str, folder: Path) -> str:
    """Write a llava-hf folder as a checkpoint in LLaVA's layout.

    Args:
        source: folder or hub id.
        folder: an empty one that is there.

    Returns:
        What was written, in one line.

    Raises:
        InputError: another layout, a damaged checkpoint, or another language model or tower than LLaVA's.
    """
    from llava.files import write_json, write_text
    from llava.model.checkpoint_folder import locate_tower
    from llava.model.config_rules import CONFIG_FILE, check_config, family_of
    from llava.model.hf_layout import STORED_PREFIX, to_llava_config

    # 1. All that can be refused before weights are read.
    given = open_source(source, is_hf=True)
    values, tower, tokenizer = given.values, given.tower, given.tokenizer
    check_weights(source, given.config)
    settings = to_llava_config(values, given.file, source)
    vocab_size = find_vocabulary(tokenizer, values, settings["vocab_size"])
    # 2. The weights; the tower's where they are more than a copy.
    shards = Shards(folder)
    for name, value in read_own(source):
        shards.add(name, value[:vocab_size] if name in EMBEDDINGS else value)
    vision = read_vision(tower)
    keeps_tower = bool(values.get("unfreeze_mm_vision_tower")) or not equals_clip(vision, tower)
    if keeps_tower:
        for name, value in vision.items():
            shards.add(f"{STORED_PREFIX}{name}", value)
        tower.save_image_processor(folder)
    else:
        del settings["vision_config"], settings["unfreeze_mm_vision_tower"]
    written = shards.close()
    # 3. Settings and tokenizer.
    settings["mm_vision_tower"] = locate_tower(settings["mm_vision_tower"], source, folder)
    settings["vocab_size"] = vocab_size
    settings["pad_token_id"] = values["text_config"].get("pad_token_id")
    if (settings["pad_token_id"] or 0) >= vocab_size:
        settings["pad_token_id"] = None
    check_config(settings, CONFIG_FILE)
    write_json(folder / CONFIG_FILE, settings, indent=2)
    copy_files(source, folder)
    write_llava_tokenizer(tokenizer, family_of(settings["model_type"]), folder)
    if settings.get("conv_mode") == CHAT_TEMPLATE:
        write_text(folder / "chat_template.jinja", tokenizer.chat_template)
    shown = "with the vision tower" if keeps_tower else f"vision tower {settings['mm_vision_tower']}"
    return f"{written}; vocabulary {vocab_size}, {shown}"


def find_vocabulary(tokenizer: object, values: dict, num_rows: int) -> int:
    """Return how many rows of embeddings LLaVA's vocabulary has.

    As the conversion has noted it; else those before `<image>`, if no word comes behind it.
    """
    from llava.model.hf_layout import ADDED_TOKENS, VOCABULARY_KEY

    noted = values.get(VOCABULARY_KEY)
    if isinstance(noted, int) and 0 < noted <= num_rows:
        return noted
    image = values.get("image_token_index", values.get("image_token_id", num_rows))
    behind = {token for token, number in tokenizer.get_vocab().items() if number >= image}
    return image if image < num_rows and behind <= set(ADDED_TOKENS) else num_rows


def equals_clip(vision: dict[str, "Tensor"], tower: object) -> bool:
    """Return whether a vision half is that of the CLIP which it comes from, as far as that can be read here."""
    import torch

    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
    from llava.model.multimodal_encoder.loading import resolve_name

    try:
        clip = CLIPVisionTower(resolve_name(tower.clip, tower.name)).stored_weights()
    except InputError:
        return False
    return clip.keys() == vision.keys() and all(torch.equal(clip[name].float(), vision[name].float()) for name in clip)


def write_llava_tokenizer(tokenizer: object, family: str, folder: Path) -> None:
    """Write a tokenizer without `<image>` and `<pad>`, as LLaVA's loader reads it."""
    from llava.files import write_json
    from llava.model.hf_layout import ADDED_TOKENS
    from llava.model.tokenizer import SETTINGS_FILE

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = [token for token in content["added_tokens"] if token["content"] not in ADDED_TOKENS]
    content["added_tokens"] = kept
    content["normalizer"] = None if content["normalizer"] == AFTER_IMAGE else content["normalizer"]
    write_json(folder / "tokenizer.json", content, indent=None)
    names = {name: getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "unk")}
    special = [token["content"] for token in kept if token["special"]]
    # What stands for padding has no loss and no meaning: Llama's <unk>; Qwen's <|endoftext|>, the first of its kind.
    padding = names["unk"] or next(iter(special), names["eos"])
    of_family = {"tokenizer_class": "Qwen2Tokenizer" if family == "qwen2" else "PreTrainedTokenizerFast"}
    if any(piece.startswith("▁") for piece in content["model"]["vocab"]):  # sentencepiece's
        of_family = {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "legacy": False,
        }
    write_json(
        folder / SETTINGS_FILE,
        {
            **of_family,
            **{f"{name}_token": None if token is None else str(token) for name, token in names.items()},
            "pad_token": str(padding),
            "padding_side": "right",
            "model_max_length": tokenizer.model_max_length,
            "extra_special_tokens": [token for token in special if token not in names.values()],
            "clean_up_tokenization_spaces": False,
        },
    )


# ---------------------------------------------------------------------------------------------------------------- files
class Shards:
    """Safetensors files that are written while tensors come: one, or several with an index."""

    def __init__(self, folder: Path):
        """Start without tensors; the files go into `folder`."""
        self.folder = folder
        self.pending: dict[str, Tensor] = {}  # of the next file
        self.pending_bytes = 0
        self.names: list[list[str]] = []  # of the tensors in each file that is written
        self.num_bytes = 0  # of all tensors

    def add(self, name: str, value: "Tensor") -> None:
        """Take a tensor; what it shares memory with is copied."""
        if self.pending and self.pending_bytes + value.nbytes > SHARD_BYTES:
            self._write()
        self.pending[name] = value.clone(memory_format=_contiguous())
        self.pending_bytes += value.nbytes
        self.num_bytes += value.nbytes

    def close(self) -> str:
        """Write what is left, and the index; return what was written."""
        from llava.files import write_json
        from llava.model.stored_weights import INDEX_FILES, WEIGHT_FILES

        self._write()
        count = len(self.names)
        num_tensors = sum(map(len, self.names))
        if count == 1:
            self._place(0).rename(self.folder / WEIGHT_FILES[0])
        else:
            files = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
            for number, file in enumerate(files):
                self._place(number).rename(self.folder / file)
            weight_map = {name: file for file, names in zip(files, self.names, strict=True) for name in names}
            content = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
            write_json(self.folder / INDEX_FILES[0], content, indent=2)
        return f"{num_tensors} tensors, {self.num_bytes / 1e9:.2f} GB, {count} file{'s' if count > 1 else ''}"

    def _place(self, number: int) -> Path:
        return self.folder / f"shard-{number}"

    def _write(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        from llava.files import FileError
        from llava.model.checkpoint_folder import READABLE

        place = self._place(len(self.names))
        try:
            save_file(self.pending, place, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, for example
            raise FileError(f"cannot write {place}: {error}") from error
        place.chmod(READABLE)
        self.names.append(list(self.pending))
        self.pending, self.pending_bytes = {}, 0


def _contiguous() -> object:
    import torch

    return torch.contiguous_format


def copy_files(source: str, folder: Path) -> None:
    """Copy the files that both layouts share, where they are."""
    from llava.files import read_bytes, write_bytes
    from llava.model.stored_weights import find_file

    for name in COPIED:
        file = find_file(source, name)
        if file is not None:
            write_bytes(folder / name, read_bytes(Path(file)))


def convert(source: str, destination: str, to: str) -> str:
    """Convert a checkpoint.

    Args:
        source: folder or hub id.
        destination: the new folder: not there yet, or empty.
        to: one of `LAYOUTS`.

    Returns:
        What was written, in one line.

    Raises:
        InputError: something cannot be read or converted, or the destination holds files.
    """
    from llava.files import atomic_folder

    with atomic_folder(Path(destination).expanduser()) as folder:
        written = (convert_to_hf if to == "llava-hf" else convert_to_llava)(os.path.expanduser(source), folder)
    return f"{destination}: layout {to}, {written}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llava.convert", description="Convert a checkpoint between LLaVA's layout and transformers'."
    )
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="layout of the new folder")
    parser.add_argument("source", metavar="SRC", help="checkpoint folder or hub id")
    parser.add_argument("destination", metavar="DST", help="new folder")
    arguments = parser.parse_args()
    sys.stdout.write(convert(arguments.source, arguments.destination, arguments.to) + "\n")


if __name__ == "__main__":
    run_command(main)
