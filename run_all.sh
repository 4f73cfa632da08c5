#!/usr/bin/env bash
# Train and evaluate all fifteen experiments into runs/<name>/, then write runs/results.{md,csv,png}.
#
#   bash run_all.sh                                      everything that is not done yet
#   bash run_all.sh --data sample --epochs 1             flags of train.py, passed to every run
#   ONLY="vgg16_*" bash run_all.sh                       some, by name without the number
#   sbatch --array=1-15 run_all.sh                       one a task, on a cluster
#
# RUNS names another folder than runs. An experiment that fails does not stop the others; its reason is
# in the results table and the exit status is 1. What was interrupted goes on where it stopped.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")}"
runs=${RUNS:-runs}
configs=(configs/[0-9][0-9]_*.yaml)
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  configs=("${configs[SLURM_ARRAY_TASK_ID - 1]:?SLURM_ARRAY_TASK_ID is 1 to ${#configs[@]}}")
fi

failed=0 matched=0 number=0 done_before=0 start=$SECONDS
for config in "${configs[@]}"; do
  name=$(basename "$config" .yaml) number=$((number + 1))
  # shellcheck disable=SC2053  # ONLY is a pattern
  [[ ${name#*_} == ${ONLY:-*} || $name == ${ONLY:-*} ]] || continue
  matched=1 out=$runs/$name
  if [[ -f $out/metrics.json ]]; then
    echo "=== $name ($number of ${#configs[@]}): done" && done_before=$number
    continue
  fi
  left=""
  if ((number - done_before > 1)); then
    left=", about $(((SECONDS - start) * (${#configs[@]} - number + 1) / (number - done_before - 1) / 60)) min left"
  fi
  echo "=== $name ($number of ${#configs[@]}$left)"
  mkdir -p "$out"
  {
    python train.py --config "$config" --out "$out" --resume "$@" && python evaluate.py --ckpt "$out/best.pt"
  } 2> >(tee "$out/error.txt" >&2)
  status=$?
  if ((status > 128)); then
    exit $status # interrupted: the same command goes on
  elif ((status)); then
    failed=1
    echo "=== $name: failed with status $status" >&2
  else
    rm -f "$out/error.txt"
  fi
done
((matched)) || { echo "error: ONLY=$ONLY matches none of: ${configs[*]}" >&2 && exit 2; }
python evaluate.py --results "$runs" || exit
exit $failed
