#!/usr/bin/env bash
# VizWiz: bash scripts/v1_5/eval/vizwiz.sh CKPT MODEL_DIR [RESULTS] [MODEL_BASE] [-- OPTIONS]
# Answers and scores val where its annotations are at hand, else test, which only the server scores; -- --split test
# says otherwise. For test the upload file is written.
# shellcheck source=scripts/lib/eval.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../lib/eval.sh"
# shellcheck source=scripts/lib/split.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../lib/split.sh"

split=$(choose_split val test "vizwiz/val.json vizwiz/Annotations/val.json" "$@")
if [[ $split == val ]]; then
    eval_benchmark vizwiz vizwiz answers/val/%s.jsonl "$@"
else
    eval_benchmark --export answers_upload/%s vizwiz vizwiz answers/%s.jsonl "$@"
fi
