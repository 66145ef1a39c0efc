#!/usr/bin/env bash
# The whole chain as Slurm jobs: slurm/pipeline.sh CONFIG [key=value ...]
# Run it again at any time: finished stages are left out, jobs still in the queue are kept, the rest is submitted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=slurm/site.sh
source "${TRSR_SITE:-slurm/site.sh}"
if declare -F trsr_environment >/dev/null; then trsr_environment; fi
[ $# -ge 1 ] || { sed -n '2,3s/^# //p' "$0"; exit 2; }
settings=(--config "$1" "${@:2}")

setting() { python tools/setting.py "${settings[@]}" --key "$1"; }
run=$(setting run.dir)
split=$(setting evaluate.split)
merged_config=$(python tools/setting.py "${settings[@]}")
mkdir -p "$run/logs"
tag=$(realpath "$run" | cksum | cut -d' ' -f1) # jobs of this run folder, among all of the user's
previous='' jobs=()

# finished STAGE FILE...: its output is there, made with exactly these settings
finished() {
  local file
  for file in "${@:2}"; do [ -e "$file" ] || return 1; done
  [ "$merged_config" = "$(cat "$run/config/$1.yaml" 2>/dev/null)" ]
}

# submit STAGE "OPTIONS" SCRIPT ARGUMENTS...: after the previous job; a dependency that can no longer come true ends it
submit() {
  local name=trsr-$1-$tag job after=()
  job=$(squeue -h --me -n "$name" -o %A | sort -n | tail -n 1)
  if [ -n "$job" ]; then
    echo "$1: job $job is in the queue already"
  else
    if [ -n "$previous" ]; then after=("--dependency=afterok:$previous" --kill-on-invalid-dep=yes); fi
    # shellcheck disable=SC2086
    job=$(sbatch --parsable --job-name="$name" --output="$run/logs/$1-%A.out" "${after[@]}" $2 "${@:3}")
    job=${job%%;*}
    echo "$1: job $job${previous:+, after job $previous}"
  fi
  previous=$job
  jobs+=("$job")
}

stage() { # stage NAME "OPTIONS" "FILES OF ITS OUTPUT" SCRIPT [ARGUMENT]
  # shellcheck disable=SC2086
  if [ -z "$previous" ] && finished "$1" $3; then echo "$1: finished already"; return; fi
  submit "$1" "$2" "${@:4}" "${settings[@]:1}"
}

stage prepare "$TRSR_PREPARE_OPTIONS" "$run/histories/manifest.json" slurm/single.sbatch prepare
stage summarize "$TRSR_SUMMARIZE_OPTIONS" "$(echo "$run"/shards/{train,valid,test}/manifest.json)" "$TRSR_SUMMARIZE_SCRIPT"
if [ "$(setting model.name_or_path)" = RUN/base ]; then
  stage base "$TRSR_PREPARE_OPTIONS" "$run/base/config.json" slurm/single.sbatch base
fi
stage train "$TRSR_TRAIN_OPTIONS" "$run/merged/config.json" slurm/train.sbatch
stage merge "$TRSR_MERGE_OPTIONS" "$run/merged/config.json" slurm/single.sbatch merge
stage evaluate "$TRSR_EVALUATE_OPTIONS" "$run/evaluation/$split.json" slurm/evaluate.sbatch
if [ ${#jobs[@]} = 0 ]; then echo "everything is finished: $run/evaluation/$split.json"; exit 0; fi
list=$(IFS=,; echo "${jobs[*]}")
printf 'watch:  squeue -j %s\n        tail -F %s\n        python tools/status.py %s\nstop:   scancel %s\n' \
  "$list" "$run/logs/*.out" "$run" "${jobs[*]}"
