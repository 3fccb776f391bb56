#!/usr/bin/env bash
# The whole study of patch-aligned training, into a folder: examples/patches/run.sh runs/study
# Finished steps are skipped, and interrupted ones resume.
set -euo pipefail
folder=${1:?folder}
seeds=${SEEDS:-0 1 2}
arms=(llava patch ola ola_patch)
here=$(dirname "$0")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

for seed in $seeds; do
  python "$here/make.py" "$folder" --seed "$seed"
  for arm in "${arms[@]}"; do
    probing align "$folder/models/stages/seed_$seed/$arm/ift" --data "coco:$folder/world" \
      --teacher depth="$folder/models/depth" --teacher seg="$folder/models/seg" --teacher gen="$folder/models/gen" \
      --out "$folder/words/$arm/seed_$seed" data.eval_split=test2017 pictures=1
  done
done
for arm in "${arms[@]}"; do
  probing evaluate "$folder/words/$arm" # pools the seeds
done
probing compare "${arms[@]/#/$folder/words/}" --out "$folder/words/report"
