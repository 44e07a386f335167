#!/usr/bin/env bash
# Use the page of llava.serve.demo in a real Chromium, as a person does:
#   bash scripts/test_page.sh FOLDER [PYTEST ARGUMENTS]
# FOLDER gets an environment with gradio and playwright over the repository's packages (some minutes; once). Chromium is
# the one that CHROMIUM names, or the system's (apt-get install chromium). PAGE_SCREENSHOTS=DIR keeps what it looked like.
# shellcheck source=scripts/lib/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/environment.sh"
name_environment "$@"
shift
for name in "${CHROMIUM:-}" chromium chromium-browser google-chrome; do
    if [[ -n "$name" ]] && CHROMIUM=$(command -v "$name"); then break; fi
done
if [[ -z "${CHROMIUM:-}" ]]; then
    die "there is no Chromium: apt-get install chromium, or set CHROMIUM to its file"
fi
use_environment
# gradio 6 wants an older Pillow than the tested set has: its own stands before the repository's packages.
packages=("gradio==6.31.0" "pillow<13" "playwright==1.65.2")
if [[ "$(cat "$venv/.installed" 2>/dev/null)" != "${packages[*]}" ]]; then
    [[ -x "$venv/bin/python" ]] || "$PYTHON" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${packages[@]}"
    purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
    "$PYTHON" -c "$purelib" >"$("$venv/bin/python" -c "$purelib")/repository.pth"
    echo "${packages[*]}" >"$venv/.installed"
fi
export CHROMIUM PYTHONPATH="$PWD" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$venv/bin/python" -m pytest -rs tests/page "$@"
