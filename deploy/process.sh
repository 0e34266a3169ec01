# shellcheck shell=bash
# What up.sh and down.sh share: where the server's state lies, and whether a process is that server.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
RUN_DIR="${RUN_DIR:-$ROOT/runs/serve}"
PID_FILE="$RUN_DIR/server.pid"
COMMAND_FILE="$RUN_DIR/server.command"
DIGEST_FILE="$RUN_DIR/server.digest"
URL_FILE="$RUN_DIR/server.url"
LOG_FILE="$RUN_DIR/server.log"

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Prints a process's command line; nothing where it is gone or a zombie.
command_line() {
    if [ -r "/proc/$1/cmdline" ]; then
        tr '\0' ' ' 2>/dev/null <"/proc/$1/cmdline" || true
    elif [ ! -d /proc/self ]; then
        ps -p "$1" -o args= 2>/dev/null || true
    fi
}

# Prints the recorded pid, where it is a number.
recorded_pid() {
    local pid=""
    [ -f "$PID_FILE" ] && read -r pid <"$PID_FILE" || true
    case "$pid" in
        '' | *[!0-9]*) ;;
        *) printf '%s' "$pid" ;;
    esac
}

# A pid is used again, after a restart of the machine for one: only the recorded command makes it ours.
is_ours() {
    local actual
    [ -f "$COMMAND_FILE" ] || return 1
    actual="$(command_line "$1")"
    case "$actual" in
        *" -m serving "*) ;;
        *) return 1 ;;
    esac
    actual="${actual#* -m serving }"
    [ "${actual% }" = "$(cat "$COMMAND_FILE")" ]
}

forget() {
    rm -f "$PID_FILE" "$COMMAND_FILE" "$DIGEST_FILE" "$URL_FILE"
}
