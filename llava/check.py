"""Check a checkpoint without answering: `python -m llava.check CKPT [--model-base BASE]`.

One line per part: settings, files, tensors, values, tokenizer, image processor, vision tower, text tower. Exit code 0
if all is well, 2 if anything is not. The language model is not built: its files are read one tensor at a time. The
towers, which are small, are loaded.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from llava.errors import InputError, run_command

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from llava.model.adapter import Part
    from llava.model.multimodal_encoder.tower import VisionTower
    from llava.protocols import ImageProcessor

# Every function imports what it needs of torch: the command answers --help and mistaken options before that.


class NotChecked(Exception):
    """Something that cannot be looked at, because what it depends on is wrong already."""


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        subject: what was looked at.
        text: what it is, or what is wrong with it, in one line.
        is_fault: whether something is wrong.
    """

    subject: str
    text: str
    is_fault: bool = False

    def __str__(self) -> str:
        return f"{'FAULT' if self.is_fault else 'ok':5} {self.subject}: {self.text}"


class CheckpointCheck:
    """The checks of one checkpoint; each method gives the text of its finding, or raises `InputError`."""

    def __init__(self, path: str, base: str | None = None):
        """Store where the checkpoint and its base model are."""
        self.path, self.base = path, base

    def findings(self) -> Iterator[Finding]:
        """Run all checks, one after the other; those whose ground is missing are left out."""
        checks: dict[str, Callable[[], str]] = {
            "config.json": self.describe_config,
            "files": self.describe_files,
            "tensors": self.check_tensors,
            "values": self.check_values,
            "generation_config.json": self.check_generation,
            "tokenizer": self.check_tokenizer,
            "image processor": self.check_image_processor,
            "vision tower": self.check_tower,
            "text tower": self.check_text_tower,
        }
        for subject, check in checks.items():
            try:
                yield Finding(subject, check())
            except NotChecked:
                continue
            except InputError as error:
                yield Finding(subject, " ".join(str(error).split()), is_fault=True)
                if check == self.describe_config and not Path(self.path).is_dir():
                    return  # nothing is there, or the hub cannot be reached

    @cached_property
    def _config(self) -> "PreTrainedConfig":
        from llava.model.builder import read_config

        return read_config(self.path)

    @cached_property
    def _part(self) -> "Part | None":
        from llava.model.builder import find_weights

        return find_weights(self.path, self.base)

    @cached_property
    def _tower(self) -> "VisionTower":
        """The tower's settings; its weights are not loaded."""
        from llava.model.multimodal_encoder.builder import build_vision_tower

        return build_vision_tower(self._ground("_config"), delay_load=True)

    @cached_property
    def _processor(self) -> "ImageProcessor":
        return self._ground("_tower").read_image_processor()

    @property
    def _weights_path(self) -> str:
        """Where the language model is: the base of a part."""
        return self.path if self._ground("_part") is None else str(self.base)

    def _ground(self, name: str) -> object:
        """Return what another check has looked at already.

        Raises:
            NotChecked: it is wrong, and has been reported.
        """
        try:
            return getattr(self, name)
        except InputError:
            raise NotChecked from None

    def describe_config(self) -> str:
        """Check config.json; give the size of the model and what makes its image tokens."""
        config = self._config
        reduction = getattr(config, "mm_vision_token_reduce_func", None) or "none"
        return (
            f"{config.num_hidden_layers} layers of width {config.hidden_size}, vocabulary {config.vocab_size}, "
            f"projector {getattr(config, 'mm_projector_type', None) or 'linear'}, "
            f"image_aspect_ratio {getattr(config, 'image_aspect_ratio', None) or 'square'}, token reduction {reduction}"
        )

    def describe_files(self) -> str:
        """Check that all weight files are there; give their number."""
        from llava.model.stored_weights import list_weight_files

        part = self._part
        files = list_weight_files(self._weights_path)
        if part is None:
            return f"full checkpoint, {len(files)} weight file{'s' if len(files) > 1 else ''}"
        kind = "LoRA adapter and projector" if part.is_lora else "projector"
        return f"{kind}, on the base model {self.base}"

    def check_tensors(self) -> str:
        """Compare names and shapes with what the config asks for, from the headers alone."""
        from llava.model.adapter import check_adapter, check_rest, find_adapter_weights, read_weights
        from llava.model.config_rules import CONFIG_FILE, check_config, read_settings
        from llava.model.language_model.families import classes_of
        from llava.model.multimodal_encoder.loading import build_empty, check_headers, quiet_loading, resolve_name

        config, part = self._ground("_config"), self._ground("_part")
        self._ground("_tower")
        kind = classes_of(config).model
        if part is None:
            with quiet_loading(f"checkpoint {self.path}"):
                stored = check_headers(kind, self.path, config, what="checkpoint")
            return f"{len(stored)}, as the config asks"
        values, file = read_settings(str(self.base), CONFIG_FILE, "model base")
        check_config(values, file, "model base")
        config.mm_vision_tower = resolve_name(config.mm_vision_tower, self.path)
        rest = read_weights(part.weights_file)
        with quiet_loading(f"model base {self.base}"):
            stored = check_headers(kind, str(self.base), config, what="model base", optional=tuple(rest))
            model = build_empty(kind, config)
        check_rest(model, rest, part.weights_file, bool(values.get("mm_vision_tower")))
        if not part.is_lora:
            return f"{len(stored)} of the base model, {len(rest)} on it"
        adapter = check_adapter(model, find_adapter_weights(part), str(self.base))
        return f"{len(stored)} of the base model, {len(rest)} and {len(adapter)} of the adapter on it"

    def check_values(self) -> str:
        """Look for inf and NaN in every tensor."""
        from llava.model.adapter import find_adapter_weights
        from llava.model.stored_weights import check_finite, iterate_tensors, list_weight_files

        part = self._ground("_part")
        files = list_weight_files(self._weights_path)
        if part is not None:
            files += [part.weights_file, *([find_adapter_weights(part)] if part.is_lora else [])]
        for file in files:
            for tensor in iterate_tensors(file):
                check_finite([tensor], file)
        return "no inf, no NaN"

    def check_generation(self) -> str:
        """Check generation_config.json, if there is one."""
        from llava.model.config_rules import GENERATION_FILE, check_generation_config
        from llava.model.stored_weights import find_file

        check_generation_config(self._weights_path, self._ground("_config").vocab_size)
        return "fine" if find_file(self._weights_path, GENERATION_FILE) else "none; the defaults are used"

    def check_tokenizer(self) -> str:
        """Load the tokenizer; give its size and what it puts first."""
        from llava.model.tokenizer import check_vocabulary, has_tokenizer, load_tokenizer
        from llava.prompt import find_template

        own = has_tokenizer(self.path) or self._ground("_part") is None
        place = self.path if own else self._weights_path
        tokenizer = load_tokenizer(place)
        config = self._ground("_config")
        vocab_size = config.vocab_size
        check_vocabulary(tokenizer, vocab_size, place)
        if conv_mode := getattr(config, "conv_mode", None):
            find_template(conv_mode, tokenizer)
        first = tokenizer("a").input_ids[0]
        start = (
            f"prompts start with {tokenizer.bos_token}" if first == tokenizer.bos_token_id else "adds no start token"
        )
        beyond = len(tokenizer) - vocab_size
        extra = f"; {beyond} added tokens have no embedding" if beyond > 0 else ""
        return f"{type(tokenizer).__name__}, {len(tokenizer)} tokens, {start}{extra}"

    def check_image_processor(self) -> str:
        """Check the image processor against the tower."""
        tower, processor = self._ground("_tower"), self._processor
        mean = ", ".join(f"{value:.3g}" for value in processor.image_mean)
        return f"{tower.image_size} x {tower.image_size} pixels, mean {mean}"

    def check_tower(self) -> str:
        """Load the vision tower; give its size."""
        from llava.model.builder import check_tower_fits

        config, tower = self._ground("_config"), self._tower
        self._ground("_processor")
        check_tower_fits(config, tower, self.path)
        num_layers = tower.num_layers
        tower.load_model()
        return (
            f"{tower.name}: {num_layers} layers of width {tower.hidden_size}, hidden state {tower.select_layer}, "
            f"{tower.num_patches} patches"
        )

    def check_text_tower(self) -> str:
        """Load the tower's text half, which text-guided token reductions read."""
        from llava.model.token_reduction import CONFIG_KEY, TEXT, parse_reduction

        reducer = parse_reduction(getattr(self._ground("_config"), CONFIG_KEY, None)).before
        tower = self._ground("_tower")
        if not tower.is_loaded:
            raise NotChecked
        try:
            tower.load_text_tower()
        except InputError as error:
            if reducer is not None and TEXT in reducer.needs:
                raise
            return f"none, and token reduction {reducer.spec() if reducer else 'none'} needs none ({error})"
        return "there, with its tokenizer"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llava.check", description="Check a checkpoint: settings, tensors, values, tokenizer, towers."
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="folder or hub id (whose weights are downloaded)")
    parser.add_argument("--model-base", metavar="CKPT", help="base model, if CKPT is a LoRA adapter or a projector")
    arguments = parser.parse_args()
    num_faults = 0
    for finding in CheckpointCheck(arguments.checkpoint, arguments.model_base).findings():
        sys.stdout.write(f"{finding}\n")
        sys.stdout.flush()
        num_faults += finding.is_fault
    if num_faults:
        sys.stderr.write(f"{num_faults} fault{'s' if num_faults > 1 else ''} in {arguments.checkpoint}\n")
        raise SystemExit(2)


if __name__ == "__main__":
    run_command(main)
