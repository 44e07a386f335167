"""What this machine can do for llava, and what to mend: `python -m llava.doctor [CKPT]`.

One line per subject: Python, packages, accelerator, attention, quantisation, training, tokenizer files, hub, memory,
disk. Exit code 0 if every command can work, 2 if something stands in the way. With a checkpoint, its weights are held
against the memory; nothing is loaded.
"""

import argparse
import importlib
import logging
import os
import platform
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from llava.efficiency.shapes import read_source
from llava.errors import InputError, one_line, run_command
from llava.packages import NEEDED, NEEDED_BY_SOME, explain_missing, list_missing, tell_install

if TYPE_CHECKING:
    import torch

# Every check imports what it needs of torch: a broken installation is what this command is for.

HUB = "https://huggingface.co"
HUB_SECONDS = 5.0
PUBLISHED = ("llava-v1.5-7b", "llava-v1.5-13b")
SLACK = 1.1
"""Weights are not all that an answer needs."""
QUANTISED = 0.55
"""Bytes per number of a 4-bit language model, its scales included."""
OK, NOTE, FAULT = "ok", "note", "FAULT"


@dataclass(frozen=True)
class Finding:
    """What one look found.

    Attributes:
        subject: what was looked at.
        state: `OK`; `NOTE`, something that only some commands need is not there; `FAULT`, most commands cannot work.
        text: what is there, or what is wrong and how to mend it, in one line.
    """

    subject: str
    state: str
    text: str

    def __str__(self) -> str:
        return f"{self.state:5} {self.subject}: {self.text}"


def examine(checkpoint: str | None = None) -> Iterator[Finding]:
    """Look at one subject after the other; what goes wrong in a look is its finding.

    Args:
        checkpoint: folder with a config.json, or "llava-v1.5-7b" or "llava-v1.5-13b"; None: both of these.

    Yields:
        Findings, in the order of the module's first lines.
    """
    looks: dict[str, Callable[[], Iterator[Finding]]] = {
        "python": look_at_python,
        "packages": look_at_packages,
        "accelerator": look_at_accelerator,
        "attention": look_at_attention,
        "quantisation": look_at_quantisation,
        "training": look_at_training,
        "tokenizer.model": look_at_sentencepiece,
        "hub": look_at_hub,
        "memory": lambda: look_at_memory(checkpoint),
        "disk": look_at_disk,
    }
    missing = list_missing()
    if missing:
        yield from look_at_python()
        yield Finding("packages", FAULT, f"this Python {explain_missing(missing)}")
        return  # the other looks need them
    for subject, look in looks.items():
        try:
            yield from look()
        except InputError:
            raise
        except Exception as error:  # a broken package may raise anything; the other looks go on
            yield Finding(subject, FAULT, one_line(f"cannot be looked at: {type(error).__name__}: {error}"))


def look_at_python() -> Iterator[Finding]:
    """Say which Python this is, and where llava comes from."""
    version = platform.python_version()
    place = Path(__file__).parent
    yield Finding("python", OK, f"{version} at {sys.executable}, {platform.platform()}; llava at {place}")


def look_at_packages() -> Iterator[Finding]:
    """Hold what is installed against what llava declares, extras left out."""
    from packaging.requirements import Requirement

    if not is_there("llava"):
        yield Finding(
            "packages", NOTE, "llava is not installed; mend: pip install -c constraints.txt -e . in the clone"
        )
        return
    wanted = [Requirement(line) for line in metadata.requires("llava") or []]
    wanted = [each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    names = {package: name for name, package in {**NEEDED, **NEEDED_BY_SOME}.items()}
    num_sound = 0
    for each in wanted:
        try:
            version = metadata.version(each.name)
        except metadata.PackageNotFoundError:
            state = FAULT if names.get(each.name) in NEEDED else NOTE
            yield Finding(each.name, state, f"not installed; {advise(each)}")
            continue
        if each.specifier.contains(version, prereleases=True):
            num_sound += 1
        else:
            yield Finding(each.name, NOTE, f"{version} is not {each.specifier}; {advise(each)}")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers") if is_there(name))
    yield Finding("packages", OK, f"{num_sound} of {len(wanted)} as llava asks for ({versions})")


def advise(requirement: object) -> str:
    """Return how to install what a requirement names."""
    return f"mend: {sys.executable} -m pip install '{requirement}'"


def is_there(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def look_at_accelerator() -> Iterator[Finding]:
    """Name the devices that torch can use; a GPU that it cannot use is told from none."""
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            free, total = torch.cuda.mem_get_info(number)
            bfloat16 = "yes" if torch.cuda.is_bf16_supported() else "no: use float16"
            yield Finding(
                f"cuda:{number}",
                OK,
                f"{about.name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, compute capability "
                f"{about.major}.{about.minor}, bfloat16 {bfloat16}",
            )
    elif torch.backends.mps.is_available():
        yield Finding(
            "accelerator", OK, "Apple's GPU (mps): inference in float16; DeepSpeed and bitsandbytes need CUDA"
        )
    elif shutil.which("nvidia-smi"):
        build = torch.version.cuda
        reason = f"torch is built for CUDA {build}; look at the driver: nvidia-smi" if build else "torch has no CUDA"
        yield Finding("accelerator", NOTE, f"there is an NVIDIA driver, but torch sees no GPU ({reason})")
    else:
        yield Finding("accelerator", NOTE, f"none: everything runs on the CPU, {torch.get_num_threads()} threads")


def look_at_attention() -> Iterator[Finding]:
    """Name the attention backends that --attn-implementation can take here."""
    from transformers.utils import is_flash_attn_2_available

    names = ["sdpa", "eager", *(["flash_attention_2"] if is_flash_attn_2_available() else [])]
    yield Finding("attention", OK, f"--attn-implementation {', '.join(names)}")


def look_at_quantisation() -> Iterator[Finding]:
    """Say whether --load-4bit and --load-8bit work."""
    import torch

    if not is_there("bitsandbytes"):
        yield Finding(
            "quantisation", NOTE, "no bitsandbytes; for --load-4bit and --load-8bit: pip install bitsandbytes"
        )
        return
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # kernels that it would like are not faults
    importlib.import_module("bitsandbytes")
    where = "" if torch.cuda.is_available() else " (no CUDA here: slow, on the CPU)"
    yield Finding("quantisation", OK, f"bitsandbytes {metadata.version('bitsandbytes')}{where}")


def look_at_training() -> Iterator[Finding]:
    """Look for what DeepSpeed builds its operations with when a training first needs one."""
    import torch

    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not is_there("deepspeed"):
        yield Finding(
            "training", NOTE, f"no deepspeed: the training scripts need it (Linux only): {tell_install('deepspeed')}"
        )
    elif not compiler:
        yield Finding("training", NOTE, "no C++ compiler: DeepSpeed cannot build its offload optimiser; install g++")
    elif torch.cuda.is_available() and not (os.environ.get("CUDA_HOME") or shutil.which("nvcc")):
        yield Finding("training", NOTE, f"{compiler}, but no nvcc: DeepSpeed's fused operations need the CUDA toolkit")
    else:
        yield Finding("training", OK, f"{compiler}, deepspeed {metadata.version('deepspeed')}")


def look_at_sentencepiece() -> Iterator[Finding]:
    """See whether sentencepiece and protobuf fit, which folders without a tokenizer.json need."""
    versions = " and ".join(f"{name} {metadata.version(name)}" for name in ("sentencepiece", "protobuf"))
    try:
        importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except Exception as error:  # protobuf raises errors of its own, by version
        text = (
            f"{versions} do not fit, so folders with a tokenizer.model only do not load; mend: pip install -U protobuf"
        )
        yield Finding("tokenizer.model", NOTE, one_line(f"{text} ({error})"))
    else:
        yield Finding("tokenizer.model", OK, f"readable: {versions}")


def look_at_hub() -> Iterator[Finding]:
    """See whether checkpoints can be had by hub id."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Finding("hub", NOTE, "HF_HUB_OFFLINE is set: only what is in the cache, and folders, can be loaded")
        return
    address = os.environ.get("HF_ENDPOINT", HUB)
    try:
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=HUB_SECONDS):
            pass
    except urllib.error.HTTPError as error:
        yield Finding("hub", OK, f"{address} answers (status {error.code})")
    except (OSError, ValueError) as error:
        text = f"{address} cannot be reached ({error}): give folders, or set HF_ENDPOINT to a mirror"
        yield Finding("hub", NOTE, one_line(text))
    else:
        yield Finding("hub", OK, f"{address} answers")


def look_at_memory(checkpoint: str | None) -> Iterator[Finding]:
    """Hold what models weigh against what is free, on the device where they would go.

    Raises:
        InputError: there is no such checkpoint.
    """
    import torch

    from llava.efficiency.memory import available_bytes
    from llava.model.builder import choose_device

    device = torch.device(choose_device(None))
    free = available_bytes(device)
    if free is None:
        yield Finding("memory", NOTE, f"the system does not tell how much is free on {device}")
        return
    for name in (checkpoint,) if checkpoint else PUBLISHED:
        yield weigh(name, device, free)


def weigh(name: str, device: "torch.device", free: int) -> Finding:
    """Say in which precisions a model fits into `free` bytes.

    Raises:
        InputError: there is no such checkpoint.
    """
    from llava.efficiency.cost import count_parameters

    counts = count_parameters(read_source(name).shape)
    towers = 4 * (counts["vision tower"] + counts["text tower"])
    rest = counts["projector"] + counts["language model"]
    needs = {
        "float32": SLACK * (towers + 4 * rest),
        "float16 or bfloat16": SLACK * (towers + 2 * rest),
        "--load-4bit": SLACK * (towers + QUANTISED * rest),
    }
    fits = [f"{precision} {show_bytes(need)}" for precision, need in needs.items() if need <= free]
    about = f"{show_bytes(free)} free on {device}; {name}"
    if fits:
        return Finding("memory", OK, f"{about} fits in {', '.join(fits)}")
    return Finding("memory", NOTE, f"{about} does not fit: {show_bytes(needs['--load-4bit'])} with --load-4bit")


def show_bytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.0f} MB"


def look_at_disk() -> Iterator[Finding]:
    """Say how much the hub's cache can still take."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    there = next(place for place in (folder, *folder.parents) if place.exists())
    yield Finding("disk", OK, f"{shutil.disk_usage(there).free / 1e9:.0f} GB free for the hub's cache, {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llava.doctor", description="Say what this machine can do for llava, and what to mend."
    )
    parser.add_argument("checkpoint", metavar="CKPT", nargs="?", help="does this folder, or llava-v1.5-7b, fit?")
    checkpoint = parser.parse_args().checkpoint
    if checkpoint is not None:
        read_source(checkpoint)  # a mistaken name is told before anything else
    num_faults = 0
    for finding in examine(checkpoint):
        sys.stdout.write(f"{finding}\n")
        sys.stdout.flush()
        num_faults += finding.state == FAULT
    if num_faults:
        sys.stderr.write(f"{num_faults} fault{'s' if num_faults > 1 else ''}\n")
        raise SystemExit(2)


if __name__ == "__main__":
    run_command(main)
