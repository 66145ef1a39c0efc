# Tasks that are gone without Slurm's notice; sourced by common.sh.
# shellcheck shell=bash disable=SC2154
BEATS=6 # of a task within TRSR_TASK_SECONDS

# watch_tasks SRUN: end an srun that waits for a task without a sign of life, or for none; status 0 then. Slurm 22.05
# waits for ever when a task's slurmstepd was killed, or when its node went and came back before Slurm missed it. A sign
# counts when it changes, whatever the nodes' clocks say; time counts in beats in which this script could write to the
# disk itself.
watch_tasks() {
  local before beat still
  while :; do
    before=$(signs_of_life)
    for ((beat = 0; beat < BEATS; beat++)); do
      sleep "$TRSR_BEAT_SECONDS" &>/dev/null
      touch "$TRSR_SIGNS/.watch" || continue 2
    done
    still=$(comm -12 <(echo "$before") <(signs_of_life))
    if [ -n "$still" ]; then
      still=$(cut -d' ' -f1 <<<"$still" | paste -sd' ')
      say "Slurm waits for tasks without a sign of life for $TRSR_TASK_SECONDS s: $still"
      kill -9 "$1"
      return
    fi
  done
}

# signs_of_life: TASK-HOST and stamp of every task that has begun and not ended; one constant line when all have ended
signs_of_life() {
  local files=("$TRSR_SIGNS"/ended-*)
  local number=${files[0]##*/ended-}
  if [ "${number%-*}" = "${#files[@]}" ]; then echo all-ended; fi
  find "$TRSR_SIGNS" -name '[0-9]*' -printf '%f %T@\n' | sort
}
