#!/usr/bin/env bash
# Run the tests of programs that use llava, such as lmms-eval, in an environment of their own:
#   bash scripts/test_clients.sh FOLDER [PYTEST ARGUMENTS]
# FOLDER gets an environment with this package and scripts/clients.txt, in the versions that pip chooses (some minutes and
# 6 GB; once). Without lmms-eval, as in scripts/test.sh, these tests are skipped.
# shellcheck source=scripts/lib/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
name_environment "$@"
shift
fill_environment scripts/clients.txt
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUTF8=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$venv/bin/python" -m pytest -rs tests/clients tests/model/test_tokenizer.py "$@"
