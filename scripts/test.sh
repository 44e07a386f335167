#!/usr/bin/env bash
# Lint, unit tests, then the slow tier, which runs the real scripts. CI runs this and scripts/test_clients.sh.
#   bash scripts/test.sh                             everything
#   bash scripts/test.sh -m "not slow" -k splice     arguments go to pytest
# shellcheck source=scripts/lib/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
show_help "$@"
use_environment

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
shellcheck=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')/shellcheck
git ls-files -z '*.sh' .ci/run | xargs -0 "$shellcheck" -x
# UTF-8 whatever the locale is: the tests' own files are. Two processes, a file of tests each at a time, with one thread
# each where nothing else is asked for.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUTF8=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$PYTHON" -m pytest --numprocesses 2 --dist loadfile "$@"
