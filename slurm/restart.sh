# When a job runs again, and when not; sourced by common.sh.
# shellcheck shell=bash disable=SC2154

# What the stages have written so far, as one word. Logs, leases, signs of life and settings are no progress.
progress_mark() {
  find "$run" -type f -size +0 ! -path '*/.*' ! -path '*/leases/*' ! -path "$run/logs/*" ! -path "$run/config/*" \
    ! -path "$run/summaries/progress/*" ! -path "$run/heartbeats/*" ! -path "$run/tensorboard/*" \
    ! -name metrics.jsonl -printf '%P %s\n' 2>/dev/null | sort | cksum | tr ' ' -
}

# Each start remembers the mark it found; too many starts that found the same one end the job.
count_idle_restarts() {
  local before=none idle=0
  mark=$(progress_mark)
  if [ -f "$logs/progress" ]; then read -r before idle <"$logs/progress"; fi
  if [ "$mark" = "$before" ]; then idle=$((idle + 1)); else idle=0; fi
  echo "$mark $idle" >"$logs/progress"
  if [ "$idle" -gt "$TRSR_IDLE_RESTARTS" ]; then
    say "given up after $idle restarts that brought nothing new in $run; read $logs"
    exit 1
  fi
}

# run_again REASON [NODES]: requeue this job, without NODES
run_again() {
  if [ "$ended" = 1 ] || [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T 2>/dev/null)" != RUNNING ]; then
    say "$1; Slurm itself ends or requeues this job"
    exit "$EXIT_REQUEUE"
  fi
  say "$1; requeued"
  trap '' TERM # the requeue ends this script; scontrol inherits the deafness and can finish
  local try
  for try in {1..30}; do # the controller may be restarting
    if scontrol requeue "$SLURM_JOB_ID"; then
      if [ -n "${2:-}" ]; then scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$2" || true; fi
      exit "$EXIT_REQUEUE"
    fi
    sleep 10
  done
  say "cannot be requeued after $try tries (was it submitted with --no-requeue?); submit it again to go on"
  exit "$EXIT_REQUEUE"
}

# finish_stage [FILE...]: leave as the step's end demands; a success without its files is none
finish_stage() {
  local file first
  if [ "$status" = 0 ]; then
    for file in "$@"; do
      [ -e "$file" ] || { say "ended with status 0 but without $file"; exit 1; }
    done
    say "done"
    exit 0
  fi
  # srun answers with the highest status, but the task that ended first is the cause; the others were told to stop.
  first=$(grep -m 1 -E 'tasks? [0-9,-]+: ' "$errors" || true)
  case $first in
  *"exit code $EXIT_REQUEUE"*) run_again "the step saved its work and asks to be run again" ;;
  *'exit code'* | '') ;;
  *) run_again "a task was ended by a signal (${first#srun: error: })" ;;
  esac
  if [ "$(progress_mark)" != "$mark" ]; then run_again "failed with status $status after some progress"; fi
  show_culprit "$first"
  say "failed with status $status; read $logs"
  exit 1
}

# show_culprit SRUN_LINE: the last words of the task that ended first; the job's output has those of task 0 only
show_culprit() {
  local task log
  task=$(sed -nE 's/.*tasks? ([0-9]+).*/\1/p' <<<"$1")
  log=$logs/task-$(printf %04d "${task:-0}")-restart-$restart.log
  if [ "${task:-0}" != 0 ] && [ -f "$log" ]; then
    say "task $task ended first; its last lines:"
    tail -n 20 "$log"
  fi
}
