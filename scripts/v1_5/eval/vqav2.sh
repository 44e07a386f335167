#!/usr/bin/env bash
# VQAv2: bash scripts/v1_5/eval/vqav2.sh CKPT MODEL_DIR [RESULTS] [MODEL_BASE] [-- OPTIONS]
# Answers and scores val2014 where its annotations are at hand, else test-dev2015, which only the server scores;
# -- --split test says otherwise. For a test split the upload file is written.
# shellcheck source=scripts/lib/eval.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../lib/eval.sh"
# shellcheck source=scripts/lib/split.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../lib/split.sh"

split=$(choose_split val2014 test-dev2015 vqav2/v2_mscoco_val2014_annotations.json "$@")
upload=()
[[ $split == val2014 ]] || upload=(--export "answers_upload/llava_vqav2_mscoco_$split/%s")
eval_benchmark ${upload[@]+"${upload[@]}"} vqav2 vqav2 "answers/llava_vqav2_mscoco_$split/%s/merge.jsonl" "$@"
