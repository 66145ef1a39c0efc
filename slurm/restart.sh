# When a job runs again, and when not; sourced by common.sh.
# shellcheck shell=bash disable=SC2154
LAST_SECONDS=300 # before a time limit: the signal that announces it may have come already

# progress_files [FIND_TEST...]: what the stages have written, with sizes. Logs, leases, signs of life and settings are
# no progress. Names are seen from inside the run folder, however that is spelled; files may vanish meanwhile.
progress_files() (
  CDPATH='' cd -- "$run" || exit
  find . -type f -size +0 ! -path '*/.*/*' ! -name '.*' ! -path '*/leases/*' ! -path './logs/*' ! -path './config/*' \
    ! -path '*/summaries/progress/*' ! -path './heartbeats/*' ! -path '*/tensorboard/*' ! -name metrics.jsonl "$@" \
    -printf '%P %s\n' 2>/dev/null || true
)

# progress_mark: the same as one word, with the finished pieces of a preparation: to --force they are nothing new yet
progress_mark() {
  { progress_files; run=$run/.histories.work progress_files 2>/dev/null || true; } | sort | cksum | tr ' ' -
}

# without_used_force: once --force has brought something new, a restart that honoured it again would remove just that
without_used_force() {
  local word kept=()
  if [ "$restart" = 0 ] || [ ! -e "$logs/forced" ]; then return; fi
  if [ -z "$(progress_files -newer "$(realpath "$logs/forced")")" ]; then return; fi
  for word in "${settings[@]}"; do
    if [ "$word" != --force ]; then kept+=("$word"); fi
  done
  settings=("${kept[@]}")
}

# Each start remembers the mark it found; too many starts that found the same one end the job.
count_idle_restarts() {
  local before=none
  idle=0
  mark=$(progress_mark)
  if [ -s "$logs/progress" ]; then read -r before idle <"$logs/progress"; fi
  if [ "$mark" = "$before" ]; then idle=$((idle + 1)); else idle=0; fi
  echo "$mark $idle" >"$logs/progress"
  if [ "$idle" -gt "$TRSR_IDLE_RESTARTS" ]; then
    say "given up after $idle restarts that brought nothing new in $run; read $logs"
    exit 1
  fi
}

# ends_anyway: Slurm itself is ending this job. A controller that does not answer says nothing of it.
ends_anyway() {
  local state
  [ "$ended" = 1 ] || { state=$(squeue -h -j "$job_id" -o %T 2>/dev/null) && [ "$state" != RUNNING ]; }
}

# restarts_here: how often this job has run again without leaving its nodes. Empty files also fit on a full disk.
restarts_here() { find "$logs" -name 'again-*' | wc -l; }

# run_here REASON: start this job's script over on the same nodes, which spares Slurm's requeue of two minutes. Returns
# where it must not: the restart before it brought nothing new, so that the nodes may be at fault; Slurm does not say
# that the job goes on for a while; or a node does not start what it is asked to.
run_here() {
  local state end
  if [ "$idle" != 0 ] || [ "$ended" = 1 ] || [ -e "$run/STOP" ]; then return; fi
  read -r state end < <(squeue -h -j "$job_id" -o '%T %e' 2>/dev/null) || return 0
  end=$(date -d "$end" +%s 2>/dev/null) || end=$((EPOCHSECONDS + 2 * LAST_SECONDS)) # without a limit
  if [ "$state" != RUNNING ] || [ "$end" -lt $((EPOCHSECONDS + LAST_SECONDS)) ]; then return; fi
  if ! timeout 30 srun --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" true; then return; fi
  touch "$logs/again-after-$restart" || return 0
  say "$1; run again on the same nodes"
  exec "$BASH" "$0" "${arguments[@]}"
}

run_here_or_again() {
  run_here "$1"
  run_again "$1"
}

# run_again REASON [NODES]: requeue this job, without NODES
run_again() {
  if [ -e "$run/STOP" ]; then
    say "$1; not requeued, since $run/STOP is there: remove it and submit again to go on"
    exit "$EXIT_REQUEUE"
  fi
  trap '' TERM # the requeue ends this script; scontrol inherits the deafness and can finish
  local try
  for try in {1..30}; do # the controller may be restarting
    if ends_anyway; then
      say "$1; Slurm itself ends or requeues this job"
      exit "$EXIT_REQUEUE"
    fi
    if [ "$try" = 1 ]; then say "$1; requeued"; fi
    if scontrol requeue "$job_id"; then
      if [ -n "${2:-}" ]; then scontrol update "JobId=$job_id" "ExcNodeList=$2" || true; fi
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
    keep_settings
    say "done"
    exit 0
  fi
  if [ "$gone" = 1 ]; then run_again "tasks are gone"; fi # the step is never over for Slurm
  # srun answers with the highest status, but the task that ended first is the cause; the others were told to stop.
  first=$(grep -m 1 -E 'tasks? [0-9,-]+: ' "$errors" || true)
  case $first in
  *"exit code $EXIT_REQUEUE"*) run_again "the step saved its work and asks to be run again" ;;
  *"exit code $EXIT_STUCK"*) run_here_or_again "a rank was stuck" ;;
  *'exit code '*) status=${first##*exit code } status=${status%%[!0-9]*} ;;
  '') ;;
  *) run_here_or_again "a task was ended by a signal (${first#srun: error: })" ;;
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
