#!/usr/bin/env bash
# The main job, small and real: POPE on the embedded world of shapes with the checkpoints that the repository keeps.
# Runs the pocket LLaVA without reduction, with TRIM training-free, finetuned with TRIM, and with random patches at
# the same mean budget; ends with one table, the same as JSON, and pictures of the patches that were kept.
#   bash scripts/demo.sh
#   DEMO_IMAGES=200 DEMO_OUT=somewhere bash scripts/demo.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib/environment.sh
source scripts/lib/environment.sh
use_environment

IMAGES=${DEMO_IMAGES:-60} # 18 questions each
OUT=${DEMO_OUT:-results/demo}
CHECKPOINTS=playground/shapes/checkpoints
PLAIN=$CHECKPOINTS/llava-shapes
TRIMMED=$CHECKPOINTS/llava-shapes-trim
[[ $OUT == /* ]] || OUT=$PWD/$OUT
DATA=$OUT/data
export LLAVA_EVAL_ROOT=$DATA/eval HF_HUB_OFFLINE=1
mkdir -p "$OUT"

echo "== $IMAGES pictures, $((IMAGES * 18)) questions"
"$PYTHON" -m playground.shapes.generate --out "$DATA" --train-images 0 --eval-images "$IMAGES" --seed 7

run_pope() { # NAME CHECKPOINT REDUCTION
    echo "== $1: $(basename "$2") with ${3}"
    bash scripts/v1_5/eval/pope.sh "$1" "$2" "$OUT/results.txt" -- --reduce "$3" --batch-size 32
    cp "$LLAVA_EVAL_ROOT/pope/answers/$1/merge.scores.json" "$OUT/$1.json"
}

mean_tokens() { # RESULT: the mean number of tokens kept, rounded up, so that random patches are never fewer
    "$PYTHON" -c 'import json, math, sys; print(math.ceil(json.load(open(sys.argv[1]))["tokens"]["mean_tokens"]))' "$1"
}

run_pope plain "$PLAIN" none
run_pope plain-trim "$PLAIN" TRIM:-1
run_pope finetuned-trim "$TRIMMED" TRIM:-1
BUDGET=$(mean_tokens "$OUT/plain-trim.json")
run_pope plain-random "$PLAIN" "Random:$BUDGET"
BUDGET=$(mean_tokens "$OUT/finetuned-trim.json")
run_pope finetuned-random "$TRIMMED" "Random:$BUDGET"

echo "== what was kept"
for number in 0 1 2; do
    "$PYTHON" -m playground.shapes.example --data "$DATA" --number "$number" >"$OUT/example.txt"
    { read -r image && read -r question; } <"$OUT/example.txt"
    "$PYTHON" -m llava.visualize --model-path "$TRIMMED" --image-file "$image" --query "$question" \
        --out "$OUT/kept_$number.png"
done
rm -f "$OUT/example.txt"

echo
"$PYTHON" -m llava.eval report --json "$OUT/table.json" \
    "no reduction=$OUT/plain.json" \
    "TRIM:-1, training-free=$OUT/plain-trim.json" \
    "TRIM:-1, finetuned=$OUT/finetuned-trim.json" \
    "Random, training-free=$OUT/plain-random.json" \
    "Random, on the finetuned=$OUT/finetuned-random.json"
echo
echo "The same as JSON: $OUT/table.json"
echo "What was kept:    $OUT/kept_0.png  $OUT/kept_1.png  $OUT/kept_2.png"
echo "These scores speak of shapes only: a demonstration and a regression instrument, see playground/shapes/README.md"
