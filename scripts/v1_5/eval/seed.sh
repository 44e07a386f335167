#!/usr/bin/env bash
# SEED-Bench: bash scripts/v1_5/eval/seed.sh CKPT MODEL_DIR [RESULTS] [MODEL_BASE] [-- OPTIONS]; --help explains them.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../lib/python.sh" -m llava.eval run seed "$@"
