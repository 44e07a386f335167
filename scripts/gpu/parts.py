"""A part of the GPU run: steps, each measured once and written down as soon as it is done."""
# ruff: noqa: T201

import gc
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from llava.efficiency.cost import Precision
from llava.efficiency.random_model import build_random_model, check_memory
from llava.efficiency.shapes import ModelSource, read_shape, read_source
from llava.errors import InputError
from llava.files import read_json, write_json
from llava.model.token_reduction import CONFIG_KEY, Need
from scripts.bench.side_by_side import SIZES

PART_SECONDS = 460
"""After that a part stops between two steps; another call goes on."""
MODEL = "llava-v1.5-7b"
REDUCTIONS = ("TRIM:-1", "none")

Figures = dict[str, Any]
Steps = Mapping[str, Callable[[], Figures]]


class Skip(Exception):
    """A step that this machine cannot do; the message says what is missing."""


@dataclass(frozen=True)
class Scale:
    """What the parts work on: LLaVA-1.5-7B on an accelerator, or a tiny model on the CPU, to try the parts.

    Attributes:
        device: where everything runs.
        source: shapes of the model with random weights.
        is_rehearsal: then little is measured, and figures mean nothing.
    """

    device: torch.device
    source: ModelSource
    is_rehearsal: bool

    @classmethod
    def choose(cls, is_rehearsal: bool) -> "Scale":
        """Find the accelerator, unless the CPU will do.

        Raises:
            InputError: there is none.
        """
        if is_rehearsal:
            config, tower = SIZES["tiny"]
            tower = tower | {"vision_config": tower["vision_config"] | {"image_size": 84}}
            source = ModelSource("tiny", config, tower, read_shape(config, tower, "tiny"), has_weights=False)
            return cls(torch.device("cpu"), source, is_rehearsal)
        if not torch.accelerator.is_available():
            raise InputError("no GPU: torch finds no accelerator here; --rehearse tries every part, small, on the CPU")
        return cls(torch.accelerator.current_accelerator(), read_source(MODEL), is_rehearsal)

    def describe(self) -> dict[str, str]:
        """What figures depend on."""
        on_cpu = self.device.type == "cpu"
        name = "cpu" if on_cpu else torch.get_device_module(self.device).get_device_name(self.device)
        return {
            "device": name,
            "model": self.source.name,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def build(
        self, tower_dtype: torch.dtype, attention: str | None = None, needs: Collection[Need] = frozenset()
    ) -> tuple[Any, Any]:
        """Build the model with random weights in bfloat16, ready for reductions with these needs: model, processor."""
        gc.collect()
        precision = Precision(torch.bfloat16.itemsize, tower_dtype.itemsize)
        check_memory(self.source, precision, self.device, 0)
        return build_random_model(
            {**self.source.config, CONFIG_KEY: None},
            self.source.tower_config,
            needs=needs,
            device=self.device,
            dtype=torch.bfloat16,
            tower_dtype=tower_dtype,
            attn_implementation=attention,
        )


def run_part(name: str, steps: Steps, scale: Scale, out: Path) -> bool:
    """Do the steps of a part that are not in its file yet.

    Args:
        name: of the part; its file is `OUT/name.json`.
        steps: what to do, by name, in order.
        scale: what they work on.
        out: the folder.

    Returns:
        Whether all are done; False when time was up before.

    Raises:
        InputError: the file is from another machine, or from a rehearsal.
    """
    path = out / f"{name}.json"
    figures: Figures = read_part(path) or {"machine": scale.describe(), "complete": False, "steps": {}}
    if figures["machine"] != scale.describe():
        before = ", ".join(figures["machine"].values())
        raise InputError(f"{path} is from another machine or model ({before}): take another folder")
    start = time.monotonic()
    longest = 0.0
    for step, work in steps.items():
        if step in figures["steps"]:
            continue
        begin = time.monotonic()
        if begin - start + longest > PART_SECONDS:
            print(f"{name}: time is up; the same command goes on with {step}")
            return False
        figures["steps"][step] = found = measure(work)
        longest = max(longest, time.monotonic() - begin)
        write_json(path, figures)
        note = found.get("skipped") or found.get("out_of_memory") or "done"
        print(f"{name}: {step}: {note} ({time.monotonic() - begin:.0f} s)", flush=True)
    write_json(path, figures | {"complete": True})
    return True


def measure(work: Callable[[], Figures]) -> Figures:
    """Run a step; what the machine cannot do is a result too."""
    try:
        return work()
    except (Skip, InputError) as error:
        return {"skipped": str(error)}
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
    # Out of the handler, which keeps every tensor of the failed step alive.
    gc.collect()
    torch.accelerator.empty_cache()
    return {"out_of_memory": reason}


def read_part(path: Path) -> Figures | None:
    """Read a part's file, if there is one."""
    return read_json(path) if path.is_file() else None
