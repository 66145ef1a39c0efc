#!/usr/bin/env bash
# One task of a step: its caches, its log file, then the command. task.sh LOG_FOLDER COMMAND...
set -euo pipefail
[ -d "$1" ] || { echo "$(hostname): $1 is not there; is the run folder on a disk of all nodes?" >&2; exit 1; }
log="$1/task-$(printf %04d "$SLURM_PROCID")-restart-${SLURM_RESTART_COUNT:-0}.log"
shift

# Compiled kernels go to the node's own disk: one cache on a shared disk is slow, and its lock can hang every rank.
export TRITON_CACHE_DIR=$TRSR_CACHE/triton TORCH_EXTENSIONS_DIR=$TRSR_CACHE/torch_extensions
export TORCHINDUCTOR_CACHE_DIR=$TRSR_CACHE/inductor
mkdir -p "$TRITON_CACHE_DIR" "$TORCH_EXTENSIONS_DIR" "$TORCHINDUCTOR_CACHE_DIR"

# A sign of life for slurm/watch.sh while this process, which becomes the command, lives: its end breaks the pipe, which
# children of the command may keep whole. slurm/ended.sh removes the sign. A task that has lost its slurmstepd is beyond
# Slurm's reach and would hold its locks and GPU for as long as it likes, so it is ended here.
sign=$TRSR_SIGNS/$SLURM_PROCID-$(hostname)
if : >"$sign"; then
  exec 9> >(
    exec &>/dev/null
    trap '' TERM INT USR1 USR2 HUP
    signal=TERM
    while kill -0 $$; do
      read -r -t "$TRSR_BEAT_SECONDS" || (($? > 128)) || break
      parent=$PPID # builtins alone: where no process can be started, the task is not to blame
      while read -r name value; do
        if [ "$name" = PPid: ]; then parent=$value; fi
      done <"/proc/$$/status" || true
      if [ "$parent" = "$PPID" ]; then
        touch -c "$sign" || true
      else
        kill -s "$signal" $$ || true
        signal=KILL
      fi
    done
  )
fi

printf '%(%F %T)T task %s on %s: %s\n' -1 "$SLURM_PROCID" "$(hostname)" "$*" >>"$log"
if [ "$SLURM_PROCID" = 0 ]; then
  # tee outlives the signals that Slurm sends to every process of a task, so that the last lines are kept.
  exec "$@" > >(trap '' TERM INT USR1 USR2 HUP && exec tee -a "$log") 2>&1
fi
exec "$@" >>"$log" 2>&1
