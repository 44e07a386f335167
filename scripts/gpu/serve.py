"""The server on the accelerator with the torch engine, under load, beside the plain loop: `scripts.bench.serve`.

The pocket model: its language model is small, so that the figures show the server, not the arithmetic. The same
benchmark takes any checkpoint (docs/serving.md).
"""

import subprocess
import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from llava.files import read_json
from scripts.gpu.parts import REDUCTIONS, Figures, Scale, Skip, Steps

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "openai")
MAX_TOKENS = 32


def make_steps(scale: Scale, out: Path) -> Steps:
    dtypes = ("float32",) if scale.is_rehearsal else ("float32", "bfloat16")
    return {
        f"pocket model, {dtype}, {reduction}": partial(measure, scale, dtype, reduction)
        for dtype in dtypes
        for reduction in REDUCTIONS
    }


def measure(scale: Scale, dtype: str, reduction: str) -> Figures:
    """Ask the plain loop and the server, by one client and by many at a time."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise Skip(f"{missing[0]} is not installed: pip install -e '.[serve]'")
    clients, requests = (("4",), "8") if scale.is_rehearsal else (("1", "16", "64"), "1024")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "serve.json"
        command = [
            *(sys.executable, "-m", "scripts.bench.serve", "--device", str(scale.device), "--dtype", dtype),
            *("--reduce", reduction, "--requests", requests, "--max-tokens", str(MAX_TOKENS), "--max-batch", "64"),
            *("--clients", *clients, "--json", str(file)),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        figures = read_json(file)
    return {
        "runs": figures["runs"],
        "answers_differing": figures["answers_differing"],
        "answers": len(clients) * int(requests),
    }
