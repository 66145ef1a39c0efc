# What every stage's job shares; sourced by the sbatch files, from the repository's folder.
# shellcheck shell=bash disable=SC2034,SC2154,SC2119
set -euo pipefail
EXIT_REQUEUE=75 # as in trsr_dist/cli.py: the work is saved and asks to be run again
EXIT_STUCK=74 # as in trsr_dist/train/lifecycle.py
arguments=("$@") # of the job's script
# shellcheck source=slurm/site.sh
source "${TRSR_SITE:-slurm/site.sh}"
# shellcheck source=slurm/restart.sh
source slurm/restart.sh
# shellcheck source=slurm/watch.sh
source slurm/watch.sh
# shellcheck source=slurm/outputs.sh
source slurm/outputs.sh
if declare -F trsr_environment >/dev/null; then trsr_environment; fi

say() { printf '%(%F %T)T [%s] %s\n' -1 "${stage:-slurm}" "$*"; }

# open_stage NAME CONFIG [key=value ...]: the run folder, the ranks' addresses, the count of idle restarts
open_stage() {
  stage=$1
  refuse_dry_run "$@"
  # The last element of an array has the array's own number as SLURM_JOB_ID, by which Slurm means all elements.
  job_id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  job_id=${job_id:-$SLURM_JOB_ID}
  settings=(--config "${2:?usage: sbatch slurm/$1.sbatch CONFIG [key=value ...]}" "${@:3}")
  run=$(python tools/setting.py "${settings[@]}" --key run.dir)
  logs=$run/logs/$stage-$job_id
  mkdir -p "$logs"
  restart=$((${SLURM_RESTART_COUNT:-0} + $(restarts_here))) # higher than all before it, whoever asked for them
  asked=("${settings[@]}")
  without_used_force
  tasks=()
  if [ -n "${SLURM_GPUS_ON_NODE:-}" ] && [ -z "${SLURM_NTASKS:-}" ]; then
    tasks=("--ntasks-per-node=$SLURM_GPUS_ON_NODE") # one task per GPU
  fi
  # srun does not take it from sbatch; unasked, it would contradict --cpus-per-gpu.
  if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  MASTER_ADDR=${nodes[0]} MASTER_PORT=$((12000 + SLURM_JOB_ID % 20000))
  while (exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
  TRSR_CACHE=$TRSR_SCRATCH/trsr-$(id -un) # on every node its own
  export MASTER_ADDR MASTER_PORT TRSR_CACHE
  say "job $job_id, restart $restart, on $SLURM_JOB_NODELIST; run folder $run; logs of all tasks in $logs"
  count_idle_restarts
  ended=0
  trap 'ended=1' TERM # handlers of builtins only: bash 5.2 aborts when a signal interrupts a handler's $(...)
}

# run_step COMMAND...: one task per rank; $status is srun's, $gone says that tasks are gone without Slurm's notice.
# Signals cut bash's wait short, not the step.
run_step() {
  errors=$logs/srun-restart-$restart.log status=0 gone=0
  if [[ " $* " == *' --force '* ]]; then touch "$logs/forced"; fi
  TRSR_SIGNS=$(mktemp -d "$logs/alive-XXXXXX")
  export TRSR_SIGNS TRSR_BEAT_SECONDS=$((TRSR_TASK_SECONDS / BEATS))
  # --export: after sbatch --export=NONE a step would start without the variables that are set here.
  # shellcheck disable=SC2086
  SLURM_RESTART_COUNT=$restart srun --export=ALL --kill-on-bad-exit=1 --task-epilog="$PWD/slurm/ended.sh" \
    "${tasks[@]}" $TRSR_SRUN_OPTIONS bash slurm/task.sh "$logs" "$@" 2>"$errors" &
  local step=$! watch
  watch_tasks "$step" &
  watch=$!
  while :; do
    status=0
    wait "$step" || status=$?
    kill -0 "$step" 2>/dev/null || break
  done
  status=0
  wait "$step" || status=$?
  kill "$watch" 2>/dev/null || true
  if wait "$watch"; then gone=1; fi
  rm -rf "$TRSR_SIGNS"
  cat "$errors" >&2
}

# preflight [--no-network]: stop before hours are lost to a bad node
preflight() {
  local bad=$logs/bad-nodes-$restart
  if [ "$TRSR_PREFLIGHT" = 0 ] || [ -n "${TRSR_READY:-}" ]; then return; fi
  run_step python launch/preflight.py --run "$run" --reports "$logs/preflight-$restart" --bad-nodes "$bad" \
    --hosts "$(IFS=,; echo "${nodes[*]}")" --free-gb "$TRSR_FREE_GB" --scratch "$TRSR_CACHE" \
    --timeout-seconds "$TRSR_PREFLIGHT_SECONDS" "$@"
  if [ "$status" = 0 ]; then
    export TRSR_READY=1 # for what runs again on these nodes
    return
  fi
  # A node on which the check cannot even start is named by srun alone.
  if [ ! -s "$bad" ]; then sed -nE 's/^srun: error: ([^:]+): tasks? .*/\1/p' "$errors" | head -n 1 >"$bad"; fi
  if [ -s "$bad" ] && [ "$TRSR_EXCLUDE_BAD_NODES" = 1 ]; then
    run_again "preflight: bad nodes $(paste -sd, "$bad")" "$(paste -sd, "$bad")"
  fi
  say "preflight failed: bad nodes $(paste -sd, "$bad")"
  finish_stage
}
