#!/usr/bin/env bash
# Run the fast tests on the lowest versions that pyproject.toml allows, without the packages that only one part needs:
#   bash scripts/test_lower_bounds.sh FOLDER [PYTEST ARGUMENTS]
# FOLDER gets an environment with scripts/lower_bounds.txt (some minutes; once). Tests of absent packages are skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/environment.sh
source scripts/lib/environment.sh
if [[ $# -eq 0 || "$1" == -* ]]; then
    echo "error: name a folder for the environment: bash scripts/test_lower_bounds.sh FOLDER [PYTEST ARGUMENTS]" >&2
    exit 2
fi
venv="$1"
shift
if ! cmp -s scripts/lower_bounds.txt "$venv/.installed"; then
    [[ -x "$venv/bin/python" ]] || "$(find_base_python)" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r scripts/lower_bounds.txt
    cp scripts/lower_bounds.txt "$venv/.installed"
fi
export PYTHONPATH="$PWD" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$venv/bin/python" -m pytest -m "not slow" -rs "$@"
