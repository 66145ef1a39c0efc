#!/usr/bin/env bash
# The whole chain as Slurm jobs: slurm/pipeline.sh CONFIG [key=value ...] [--force]
# Run it again at any time: finished stages are left out, jobs still in the queue are kept, the rest is submitted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -n "${SLURM_JOB_ID:-}" ]; then # inside an interactive job, whose variables would reach the jobs of the chain
  for name in "${!SLURM_@}"; do [ "$name" = SLURM_CONF ] || unset "$name"; done
fi
# shellcheck source=slurm/site.sh
source "${TRSR_SITE:-slurm/site.sh}"
# shellcheck source=slurm/outputs.sh
source slurm/outputs.sh
if declare -F trsr_environment >/dev/null; then trsr_environment; fi
[ $# -ge 1 ] || { sed -n '2,3s/^# //p' "$0"; exit 2; }
refuse_dry_run "$@"
settings=(--config "$1" "${@:2}")

setting() { python tools/setting.py "${settings[@]}" --key "$1"; }
run=$(setting run.dir)
split=$(setting evaluate.split)
merged_config=$(python tools/setting.py "${settings[@]}")
mkdir -p "$run/logs"
tag=$(realpath "$run" | cksum | cut -d' ' -f1) # jobs of this run folder, among all of the user's
previous='' jobs=()

# submit STAGE "OPTIONS" SCRIPT ARGUMENTS...: after the previous job; a dependency that can no longer come true ends it
submit() {
  local name=trsr-$1-$tag job after=()
  job=$(squeue -h --me -n "$name" -o %F | sort -n | tail -n 1) # of an array the number that means all elements
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

# stage NAME "OPTIONS" SCRIPT [ARGUMENT]: unless it is finished and nothing before it is to be done
stage() {
  if [ -z "$previous" ] && finished "$1"; then echo "$1: finished already"; return; fi
  submit "$1" "$2" "${@:3}" "${settings[@]:1}"
}

stage prepare "$TRSR_PREPARE_OPTIONS" slurm/single.sbatch prepare
stage summarize "$TRSR_SUMMARIZE_OPTIONS" "$TRSR_SUMMARIZE_SCRIPT"
if [ "$(setting model.name_or_path)" = RUN/base ]; then
  stage base "$TRSR_MERGE_OPTIONS" slurm/single.sbatch base
fi
stage train "$TRSR_TRAIN_OPTIONS" slurm/train.sbatch
stage merge "$TRSR_MERGE_OPTIONS" slurm/single.sbatch merge
stage evaluate "$TRSR_EVALUATE_OPTIONS" slurm/evaluate.sbatch
if [ ${#jobs[@]} = 0 ]; then echo "everything is finished: $run/evaluation/$split.json"; exit 0; fi
list=$(IFS=,; echo "${jobs[*]}")
printf 'watch:  squeue -j %s\n        tail -F %q/logs/*.out\n        python tools/status.py %q\nstop:   scancel %s\n' \
  "$list" "$run" "$run" "${jobs[*]}"
