#!/usr/bin/env bash
# The Python of the scripts: $PYTHON, else that of the repository's .venv, else python or python3.
#   bash scripts/lib/python.sh -m llava.eval ...   runs it, from any folder, with the package importable
#   source scripts/lib/python.sh                   sets $python
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-}
for candidate in "$repository/.venv/bin/python" python python3; do
    [[ -n $python ]] || python=$(command -v "$candidate" || true)
done
[[ -n $python ]] || { echo "error: no Python on the PATH; install one, or set PYTHON" >&2; exit 2; }
[[ ${BASH_SOURCE[0]} == "$0" ]] || return 0
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
exec "$python" "$@"
