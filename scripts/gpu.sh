#!/usr/bin/env bash
# Measure and check what only a GPU can show; every part can be run again, and goes on where it was:
#   bash scripts/gpu.sh OUT [parity|stages|methods|loop|serve|training|tests ...] [--rehearse]
#   python -m scripts.gpu.report OUT        the figures as Markdown, for docs/performance.md
# Needs torch, torchvision and transformers (training: also peft; serve: .[serve]); installs nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec bash scripts/lib/python.sh -m scripts.gpu "$@"
