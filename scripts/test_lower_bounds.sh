#!/usr/bin/env bash
# Run the fast tests on the lowest versions that pyproject.toml allows, without the packages that only one part needs:
#   bash scripts/test_lower_bounds.sh FOLDER [PYTEST ARGUMENTS]
# FOLDER gets an environment with scripts/lower_bounds.txt (some minutes; once). Tests of absent packages are skipped.
# shellcheck source=scripts/lib/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
name_environment "$@"
shift
fill_environment scripts/lower_bounds.txt
export PYTHONPATH="$PWD" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$venv/bin/python" -m pytest -m "not slow" -rs "$@"
