#!/usr/bin/env bash
# Starts `python -m serving` in the background and waits until it is ready; the flags are those of `python -m serving`.
#
#   PYTHON=.venv/bin/python deploy/up.sh --base DIR --adapter NAME=DIR [--merged NAME=DIR] [--host H] [--port P] ...
#
# PYTHON: the interpreter (default python3). RUN_DIR: pid and log (default runs/serve).
# WAIT_S: seconds until it must be ready (default 300).
set -euo pipefail
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"  # spinning threads stall each other beside any busy process
# shellcheck source=deploy/process.sh
. "$(dirname "${BASH_SOURCE[0]}")/process.sh"

python="${PYTHON:-python3}"
wait_s="${WAIT_S:-300}"
probe="$ROOT/deploy/probe.py"

show_log() {
    echo "--- the end of $LOG_FILE ---" >&2
    tail -n 20 "$LOG_FILE" >&2 || true
    echo "---" >&2
}

# Says why a server that ended by itself did so: its own words, else its last error line, else the exit code.
reason() {
    local line
    line="$(grep '^python -m serving: ' "$LOG_FILE" | tail -n 1 || true)"
    if [ -z "$line" ]; then
        line="$(grep -iE '(error|exception)' "$LOG_FILE" | tail -n 1 || true)"
    fi
    if [ "$1" -eq 137 ]; then
        echo "it was killed (SIGKILL): most often for want of memory"
    elif [ -n "$line" ]; then
        echo "${line#python -m serving: }"
    else
        echo "exit code $1; the log says no more"
    fi
}

show_examples() {
    echo
    echo "Try it (stop it with deploy/down.sh, or make stop):"
    echo
    "$python" "$probe" examples "$url"
}

# Ends a server that never became ready: it has no request to finish.
give_up() {
    kill -TERM "$pid" 2>/dev/null || true
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        kill -0 "$pid" 2>/dev/null || break
        sleep 1
    done
    kill -KILL "$pid" 2>/dev/null || true
    forget
}

host="${GRAFT_HOST:-127.0.0.1}"
port="${GRAFT_PORT:-8000}"
arguments=()
while [ $# -gt 0 ]; do
    case "$1" in
        --host=*) host="${1#*=}" ;;
        --port=*) port="${1#*=}" ;;
        --host | --port)
            [ $# -ge 2 ] || fail "$1 needs a value"
            if [ "$1" = --host ]; then host="$2"; else port="$2"; fi
            shift
            ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
arguments+=(--host "$host" --port "$port")
case "$port" in
    '' | *[!0-9]*) fail "--port $port: must be a number" ;;
esac
case "$host" in
    0.0.0.0) url="http://127.0.0.1:$port" ;;
    ::) url="http://[::1]:$port" ;;
    *:*) url="http://[$host]:$port" ;;
    *) url="http://$host:$port" ;;
esac
command -v "$python" >/dev/null || fail "PYTHON=$python: there is no such interpreter; set PYTHON to that of Graft's environment"

mkdir -p "$RUN_DIR"
if command -v flock >/dev/null; then
    exec 9>"$RUN_DIR/lock"
    flock -n 9 || fail "another start is under way in $RUN_DIR; wait for it"
fi

# The server reads GRAFT_* as defaults of its flags, so they are inputs too.
digest="$("$python" "$probe" digest "${arguments[@]}" "$(env | grep '^GRAFT_' | sort || true)")"
pid="$(recorded_pid)"
if [ -n "$pid" ] && is_ours "$pid"; then
    if [ "$digest" != "$(cat "$DIGEST_FILE")" ]; then
        echo "the running server (process $pid) has other inputs (flags, files or source): restarting it"
    elif ! answer="$("$python" "$probe" ready "$url")"; then
        echo "the running server (process $pid) is not ready ($answer): restarting it"
    else
        echo "already running with the same inputs: $url (process $pid, log $LOG_FILE)"
        show_examples
        exit 0
    fi
    "$ROOT/deploy/down.sh"
fi
forget

if ! holder="$("$python" "$probe" port "$host" "$port")"; then
    fail "--port $port on $host: $holder; stop that, or choose another port"
fi

[ -f "$LOG_FILE" ] && mv "$LOG_FILE" "$LOG_FILE.1"
PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" nohup "$python" -m serving "${arguments[@]}" >"$LOG_FILE" 2>&1 </dev/null 9>&- &
pid=$!
echo "$pid" >"$PID_FILE"
echo "${arguments[*]}" >"$COMMAND_FILE"
echo "$digest" >"$DIGEST_FILE"
echo "$url" >"$URL_FILE"
trap 'echo "interrupted: stopping the server" >&2; give_up; exit 130' INT TERM

echo "starting the server (process $pid, log $LOG_FILE)"
started=$SECONDS
said=0
until answer="$("$python" "$probe" ready "$url")"; do
    waited=$((SECONDS - started))
    if ! kill -0 "$pid" 2>/dev/null; then
        code=0
        wait "$pid" || code=$?
        show_log
        forget
        fail "the server ended after $waited s: $(reason "$code")"
    fi
    if [ "$waited" -ge "$wait_s" ]; then
        give_up
        show_log
        fail "the server was not ready after $wait_s s ($answer) and was stopped; allow it more with WAIT_S"
    fi
    if [ $((waited - said)) -ge 5 ]; then
        echo "  waiting for it to be ready: $waited s ($answer)"
        said=$waited
    fi
    sleep 0.5
done
trap - INT TERM
kill -0 "$pid" 2>/dev/null || fail "something else answers at $url; see $LOG_FILE"
echo "ready after $((SECONDS - started)) s: $url"
show_examples
