"""The embedded world in the official file layouts of the twelve benchmarks, one module each.

Each module's `write(folder, drawings, chooser)` makes the folder that the benchmark's script reads.
"""

from playground.shapes.benchmark import (
    gqa,
    llavabench,
    mmbench,
    mmbench_cn,
    mme,
    mmvet,
    pope,
    seed,
    sqa,
    textvqa,
    vizwiz,
    vqav2,
)

FOLDERS = {
    "vqav2": (vqav2, "vqav2"),
    "gqa": (gqa, "gqa"),
    "vizwiz": (vizwiz, "vizwiz"),
    "sqa": (sqa, "scienceqa"),
    "textvqa": (textvqa, "textvqa"),
    "pope": (pope, "pope"),
    "mme": (mme, "MME"),
    "mmbench": (mmbench, "mmbench"),
    "mmbench_cn": (mmbench_cn, "mmbench"),
    "seed": (seed, "seed_bench"),
    "llavabench": (llavabench, "llava-bench-in-the-wild"),
    "mmvet": (mmvet, "mm-vet"),
}
"""Name in `python -m llava.eval list`: the module that writes the benchmark, and its folder under the data root."""
