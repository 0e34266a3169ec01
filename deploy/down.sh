#!/usr/bin/env bash
# Stops the server that up.sh started. STOP_S: seconds it may take to finish its requests (default 60).
set -euo pipefail
# shellcheck source=deploy/process.sh
. "$(dirname "${BASH_SOURCE[0]}")/process.sh"

stop_s="${STOP_S:-60}"
pid="$(recorded_pid)"
if [ -z "$pid" ]; then
    forget
    echo "no server is running"
    exit 0
fi
if ! is_ours "$pid"; then
    actual="$(command_line "$pid")"
    forget
    if [ -n "$actual" ]; then
        echo "the server is gone; process $pid is now another one and was left alone: $actual"
    else
        echo "the server (process $pid) had already ended; its log is $LOG_FILE"
    fi
    exit 0
fi

echo "stopping the server (process $pid)"
kill -TERM "$pid"
waited=0
while is_ours "$pid"; do
    if [ "$waited" -ge "$stop_s" ]; then
        fail "process $pid has not ended $stop_s s after SIGTERM; see $LOG_FILE, wait longer (STOP_S), or end it with: kill -KILL $pid"
    fi
    sleep 1
    waited=$((waited + 1))
    if [ $((waited % 5)) -eq 0 ]; then echo "  still finishing requests: $waited s"; fi
done
forget
echo "stopped after $waited s"
