#!/usr/bin/env bash
# A vLLM server for as long as a command runs: with_vllm.sh LOG_FOLDER MODEL COMMAND...
# The command finds the server in OPENAI_BASE_URL.
set -euo pipefail
log=$1/server-$(printf %04d "$SLURM_PROCID")-restart-${SLURM_RESTART_COUNT:-0}.log model=$2
shift 2

port=$((20000 + (SLURM_JOB_ID * 64 + SLURM_PROCID) % 12000)) # below the ports that clients get
while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
read -ra options <<<"$TRSR_VLLM_OPTIONS"
"$TRSR_VLLM" serve "$model" --host 127.0.0.1 --port "$port" "${options[@]}" >"$log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" || true' EXIT

answers() {
  local line=''
  { exec 3<>"/dev/tcp/127.0.0.1/$port" && printf 'GET /health HTTP/1.0\r\n\r\n' >&3 && read -r line <&3; } 2>/dev/null
  [[ $line == *' 200 '* ]]
}

until (answers); do
  if ! kill -0 "$server" 2>/dev/null; then
    tail -n 20 "$log" >&2
    echo "$(hostname): the server ended before it answered; read $log" >&2
    exit 1
  fi
  sleep 1
done

export OPENAI_BASE_URL=http://127.0.0.1:$port/v1 NO_PROXY=127.0.0.1${NO_PROXY:+,$NO_PROXY}
export no_proxy=127.0.0.1${no_proxy:+,$no_proxy} # where both are set, this one counts
"$@" &
command=$!
trap 'kill -TERM "$command" 2>/dev/null || true' TERM
while :; do # a signal cuts wait short, not the command
  status=0
  wait "$command" || status=$?
  kill -0 "$command" 2>/dev/null || break
done
status=0
wait "$command" || status=$?
exit "$status"
