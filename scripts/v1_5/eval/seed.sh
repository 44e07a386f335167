#!/usr/bin/env bash
# SEED-Bench: bash scripts/v1_5/eval/seed.sh CKPT MODEL_DIR [RESULTS] [MODEL_BASE] [-- OPTIONS]
# Without the videos' frames only the questions about pictures are asked, which are the headline; -- --split image, video
# or all says otherwise. The file for the leaderboard is written, too.
# shellcheck source=scripts/lib/eval.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../lib/eval.sh"

eval_benchmark --export answers_upload/%s seed seed_bench answers/%s/merge.jsonl "$@"
