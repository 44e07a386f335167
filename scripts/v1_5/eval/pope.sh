#!/usr/bin/env bash
# POPE: bash scripts/v1_5/eval/pope.sh CKPT MODEL_DIR [RESULTS] [MODEL_BASE] [-- OPTIONS]; --help explains them.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../lib/python.sh" -m llava.eval run pope "$@"
