#!/usr/bin/env bash
# The whole study, into a folder: examples/study/run.sh runs/study
# Finished steps are skipped, and interrupted ones resume. SEEDS="1 3" does some of the seeds; the last lines need all.
set -euo pipefail
folder=${1:?folder}
seeds=${SEEDS:-0 1 2 3 4}
here=$(dirname "$0")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

train() { # checkpoint, run, further options
  probing train --recipe "$here/probe.yaml" --checkpoint "$1" --data "coco:$folder/world" --out "$2" "${@:3}" \
    --teacher depth="$folder/models/depth" --teacher seg="$folder/models/seg" --teacher gen="$folder/models/gen"
  probing evaluate "$2" --metric cosine --metric code_length
}

for seed in $seeds; do
  python "$here/make.py" "$folder" --seed "$seed"
  for arm in llava ola multi untrained; do
    checkpoint=$folder/models/stages/seed_$seed/$arm
    [[ -d $checkpoint/ift ]] && checkpoint=$checkpoint/ift
    run=$folder/runs/$arm/seed_$seed
    train "$checkpoint" "$run"
    probing evaluate "$run" --metric da2k --da2k "$folder/world/da2k" --metric miou --protocol blind --images 200
    if [[ $arm == llava || $arm == ola ]]; then
      probing erase "$run" --conversations "$folder/world/conversations_test2017.json" --images 600
    fi
  done
done

[[ -n ${SEEDS:-} ]] && exit
# The multi-encoder model with random weights, which are the same for all seeds; for ridge, which needs one epoch.
train "$folder/models/stages/seed_0/multi/ift" "$folder/runs/multi_random" --control random fit.epochs=1
for arm in llava ola multi untrained; do
  probing evaluate "$folder/runs/$arm" # pools the seeds
done
probing compare "$folder"/runs/{llava,ola,multi,untrained} --out "$folder/report"

truth=()
for seed in $seeds; do
  stages=$folder/models/stages/seed_$seed
  truth+=("LLaVA=$stages/llava/ift" "OLA=$stages/ola/ift" "multi-encoder=$stages/multi/ift")
done
python "$here/../toy/ground_truth.py" "$folder/ground_truth" "${truth[@]}"
