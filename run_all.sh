#!/usr/bin/env bash
# Train and evaluate all fifteen experiments into runs/<name>/, measure the baselines that need no features, then
# write report.html, results.{md,csv,png} and grid.png to runs/.
#
#   bash run_all.sh                                      everything that is not done yet
#   bash run_all.sh --fast                               the same by an optimisation of its own for each
#   bash run_all.sh --data sample --epochs 1             flags of train.py, passed to every run
#   ONLY="vgg16_*" bash run_all.sh                       some, by name without the number
#   SEEDS="1 2 3" bash run_all.sh                        each with these seeds, into runs/<name>/seed1/ and so on
#   sbatch --array=1-15 run_all.sh                       one a task, on a cluster
#
# RUNS names another folder than runs. An experiment that fails does not stop the others; its reason is
# in the results table and the exit status is 1. What was interrupted goes on where it stopped.
set -uo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
if [[ ! -f $here/train.py ]]; then # sbatch runs a copy of this file, elsewhere
  here=${SLURM_SUBMIT_DIR:-$here}
fi
if [[ ! -f $here/train.py ]]; then
  echo "error: $here: has no train.py; start run_all.sh from the folder that it lies in" >&2 && exit 2
fi
cd "$here" || exit
runs=${RUNS:-runs}
if [[ ! ${SEEDS:-0} =~ ^[0-9][0-9[:space:]]*$ ]]; then
  echo "error: SEEDS=\"$SEEDS\": are whole numbers with spaces between them" >&2 && exit 2
fi
configs=(configs/[0-9][0-9]_*.yaml)
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  if ((SLURM_ARRAY_TASK_ID < 1 || SLURM_ARRAY_TASK_ID > ${#configs[@]})); then
    echo "error: SLURM_ARRAY_TASK_ID=$SLURM_ARRAY_TASK_ID is not 1 to ${#configs[@]}" >&2 && exit 2
  fi
  configs=("${configs[SLURM_ARRAY_TASK_ID - 1]}")
fi

evaluation=() data=() previous="" # flags that evaluate.py needs too; that its --baselines needs beside them
for flag; do
  case ${flag%%=*} in
    -h | --help) sed -n "2,/^set/{/^#/{s/^#//;s/^ //;p;};}" run_all.sh && exit ;;
    --out | --config)
      echo "error: $flag: every experiment has its own; RUNS=FOLDER names the folder of them all" >&2 && exit 2 ;;
    --seed)
      if [[ -n ${SEEDS:-} ]]; then echo "error: --seed: SEEDS=\"$SEEDS\" has them already" >&2 && exit 2; fi ;;
    --encoder | --layer | --decoder | --width | --mse-weight | --lpips-weight | --input-size | --mean | --std | --fusion)
      echo "error: $flag: is what makes an experiment; train another with train.py $flag …" >&2 && exit 2 ;;
    --quiet | --bars | --device | --cache) evaluation+=("$flag") ;;
    --data | --protocol) data+=("$flag") ;;
    *)
      case $previous in
        --device | --cache) evaluation+=("$flag") ;;
        --data | --protocol) data+=("$flag") ;;
      esac ;;
  esac
  previous=$flag
done

if [[ -t 2 ]]; then # below, standard error is a pipe
  set -- --bars "$@"
  evaluation+=(--bars)
fi

current() { # RESULT CHECKPOINT: whether the result is there, and of this checkpoint, if both are there to tell
  [[ -f $1 ]] || return 1
  if [[ ! -f $2 ]] || ! grep -q ckpt_sha256 "$1"; then return 0; fi
  grep -q "$(sha256sum < "$2" | cut -c -64)" "$1"
}

names=() todo=()
for config in "${configs[@]}"; do
  name=$(basename "$config" .yaml)
  # shellcheck disable=SC2053  # ONLY is a pattern
  [[ ${name#*_} == ${ONLY:-*} || $name == ${ONLY:-*} ]] || continue
  if [[ -n ${SEEDS:-} && -f $runs/$name/metrics.json ]]; then
    echo "error: $runs/$name: holds a run without SEEDS, which would hide theirs; remove it, or name another" \
      "folder by RUNS" >&2 && exit 2
  fi
  seeded=("$runs/$name"/seed*/metrics.json)
  if [[ -z ${SEEDS:-} && -f ${seeded[0]} ]]; then
    echo "error: $runs/$name: holds runs of SEEDS, which one without would hide; give SEEDS, or name another" \
      "folder by RUNS" >&2 && exit 2
  fi
  for seed in ${SEEDS:-""}; do
    run=$name${seed:+/seed$seed}
    names+=("$run")
    if current "$runs/$run"/{metrics.json,best.pt}; then
      echo "=== $run: done (rm -r $runs/$run, or another RUNS, to do it again)"
    else
      todo+=("$run")
    fi
  done
done
((${#names[@]})) || { echo "error: ONLY=$ONLY matches none of: ${configs[*]}" >&2 && exit 2; }

# A batch system may send its signal to this shell alone, which would look at it only when the command is done:
# the command runs in the background, in a group of its own, and is sent what arrives here.
set -m
child="" received=""
pass_on() {
  received=$1
  if [[ -n $child ]]; then kill -s "$1" -- "-$child"; fi
}
for signal in INT TERM USR1; do
  # shellcheck disable=SC2064  # now
  trap "pass_on $signal" "$signal"
done
run() { # its standard error goes to the file $log too
  if [[ -n $received ]]; then return 143; fi
  exec 4>> "$log" # here, not when tee comes to it: until then the file may have another name
  "$@" 2> >(tee -a /dev/fd/4 >&2) 4>&- &
  child=$!
  exec 4>&-
  wait "$child"
  local status=$?
  while kill -0 "$child" 2> /dev/null; do # it was the trap that ended the wait
    wait "$child"
    status=$?
  done
  child=""
  return "$status"
}

stopped() { # whether a status is that of SIGINT, SIGUSR1 or SIGTERM
  (($1 == 130 || $1 == 138 || $1 == 143))
}

check() { # what ended, and its status: past a failure it goes on
  if stopped "$2"; then
    exit "$2" # the same command goes on
  elif (($2)); then
    failed=1
    echo "=== $1: failed with status $2" >&2
  fi
}

failed=0 ran=0 left="" start=$SECONDS
for name in ${todo[@]+"${todo[@]}"}; do # an empty array is an error in bash 4.3 and before
  out=$runs/$name
  if ((ran)); then
    left=", about $(((SECONDS - start) * (${#todo[@]} - ran) / ran / 60)) min left for all"
  fi
  ran=$((ran + 1))
  echo "=== $name (experiment $((${#names[@]} - ${#todo[@]} + ran)) of ${#names[@]}$left)"
  log=$out/.error.txt # without the dot where it has failed
  mkdir -p "$out"
  rm -f "$log" "$out/error.txt"
  seed=() # of a name that ends in one
  if [[ $name == */seed* ]]; then seed=(--seed "${name##*/seed}"); fi
  run python train.py --config "configs/${name%%/*}.yaml" --out "$out" --resume "$@" ${seed[@]+"${seed[@]}"} &&
    run python evaluate.py --ckpt "$out/best.pt" ${evaluation[@]+"${evaluation[@]}"}
  status=$?
  if ((!status)) || stopped $status; then
    rm -f "$log"
  else
    mv "$log" "$out/error.txt"
  fi
  check "$name" $status
done
if [[ ! -f $runs/baselines.json ]]; then
  echo "=== baselines"
  log=/dev/null
  run python evaluate.py --baselines --out "$runs" ${data[@]+"${data[@]}"} ${evaluation[@]+"${evaluation[@]}"}
  check baselines $?
else
  of=$(sed -n 's/^ *"data": "\(.*\)",*$/\1/p' "$runs/baselines.json")
  echo "=== baselines: done, of ${of:-?} (rm $runs/baselines.json to measure them again)"
fi
python evaluate.py --report "$runs" || exit
exit $failed
