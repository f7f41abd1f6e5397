# What the scripts here and in .ci/ share. Each sets $me, the name in front of its messages, and reads
# this with `.`; enroll.sh does not, since it is installed alone.
# shellcheck shell=sh
root=$(cd "$(dirname "$0")/.." && pwd)
build=${CARGO_TARGET_DIR:-$root/target}
case $build in /*) ;; *) build=$PWD/$build ;; esac

fail() {
    echo "${me:?}: $*" >&2
    exit 1
}

# Prints what stands atop the script, and ends it.
usage() {
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

ok() { echo "ok: $*"; }

has() { command -v "$1" >/dev/null 2>&1; }

# debian PACKAGE…: installs what is missing, where that can be done.
debian() {
    if ! has apt-get || [ "$(id -u)" -ne 0 ]; then
        fail "missing: $* (these are Debian's names; as root on Debian, this script installs them)"
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# tools COMMAND[:PACKAGE]…: each is there afterwards, or the script ends.
tools() {
    missing=
    for tool; do has "${tool%:*}" || missing="$missing ${tool#*:}"; done
    # shellcheck disable=SC2086 # one word for each package
    [ -z "$missing" ] || debian $missing
    for tool; do has "${tool%:*}" || fail "${tool%:*} is not installed"; done
}

# program FILE: prints where it is, from the root.
program() {
    [ -x "$1" ] || fail "no program $1"
    case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac
}

# Finds the service, for $bin: MPL_BIN, else that of a release's tarball, else target/release, else
# target/debug.
find_service() {
    bin=${MPL_BIN:-}
    for candidate in "$root/mqtt-publisher-lite" "$build/release/mqtt-publisher-lite" "$build/debug/mqtt-publisher-lite"; do
        [ -n "$bin" ] || [ ! -x "$candidate" ] || bin=$candidate
    done
    [ -n "$bin" ] || fail "no program: build it (cargo build --release) or set MPL_BIN"
    bin=$(program "$bin")
}

# Makes $work, a folder that goes when the script ends. A script that has more to end says how in its
# own `leave`, which sees the exit code in $code.
make_work() {
    work=$(mktemp -d)
    trap finish EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
}

finish() {
    code=$?
    trap - EXIT
    leave || true
    rm -rf "$work"
    exit "$code"
}

leave() { :; }

# end PID…: stops these and waits for their ends.
end() {
    for process; do
        kill "$process" 2>/dev/null || true
        wait "$process" 2>/dev/null || true
    done
}

# free_port FIRST: prints the first port from there on that no socket of this machine has.
free_port() {
    free=$1
    while grep -qs "^ *[0-9]*: [0-9A-F]*:$(printf %04X "$free") " /proc/net/tcp /proc/net/tcp6; do
        free=$((free + 1))
    done
    echo "$free"
}

# await WHAT PID COMMAND…: runs the command every tenth of a second until it succeeds; fails after 20 s, or
# $patience tenths of one, or when the process has ended.
await() {
    awaited=$1
    process=$2
    shift 2
    tries=0
    until "$@"; do
        kill -0 "$process" 2>/dev/null || fail "it ended before $awaited"
        tries=$((tries + 1))
        [ "$tries" -lt "${patience:-200}" ] || fail "waited in vain until $awaited"
        sleep 0.1
    done
}

# healthy PORT: whether a server there answers /health with 200.
healthy() { curl --silent --fail --max-time 2 --output /dev/null "http://127.0.0.1:$1/health"; }
