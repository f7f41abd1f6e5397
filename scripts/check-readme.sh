#!/bin/sh
# Runs the commands of README.md as a reader would: every fenced block that opens with "```sh run",
# in order, in one shell, in a temporary folder, against a fresh server.
#
# usage: scripts/check-readme.sh [README.md]
#
# The server is the program's default (from memory) on a free port, which takes the place of 3002
# in the blocks. MPL_BIN names the program; else target/release, else target/debug. A block fails
# if any of its commands does.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
readme=${1:-$root/README.md}
readme=$(cd "$(dirname "$readme")" && pwd)/$(basename "$readme")
work=$(mktemp -d)
server=

finish() {
    code=$?
    trap - EXIT
    if [ -n "$server" ]; then
        kill "$server" 2>/dev/null || true
        wait "$server" 2>/dev/null || true
        [ "$code" -eq 0 ] || sed 's/^/server: /' "$work/server.log" >&2
    fi
    rm -rf "$work"
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

fail() {
    echo "README: $*" >&2
    exit 1
}

build=${CARGO_TARGET_DIR:-$root/target}
bin=${MPL_BIN:-}
for candidate in "$build/release/mqtt-publisher-lite" "$build/debug/mqtt-publisher-lite"; do
    [ -n "$bin" ] || [ ! -x "$candidate" ] || bin=$candidate
done
[ -n "$bin" ] || fail "no program: build it or set MPL_BIN"
case $bin in /*) ;; *) bin=$PWD/$bin ;; esac

port=$((20000 + $$ % 12000))
while curl --silent --max-time 1 "http://127.0.0.1:$port/" >/dev/null 2>&1; do
    port=$((port + 1))
done

awk '
    /^```sh run *$/ { inside = 1; n++; printf "echo \"--- block %d, line %d\"\n", n, NR; next }
    /^```/ { inside = 0 }
    inside { sub(/^\$ /, ""); print }
' "$readme" | sed "s/\\([^0-9]\\)3002\\([^0-9]\\)/\\1$port\\2/g" >"$work/blocks.sh"
blocks=$(grep -c '^echo "--- block' "$work/blocks.sh") || fail "no block is marked with \`\`\`sh run"

mkdir "$work/run"
cd "$work/run"
env -i PATH="$PATH" PORT="$port" "$bin" >"$work/server.log" 2>&1 &
server=$!
tries=0
until curl --silent --fail --max-time 2 --output /dev/null "http://127.0.0.1:$port/health"; do
    kill -0 "$server" 2>/dev/null || fail "the server ended at its start"
    tries=$((tries + 1))
    [ "$tries" -lt 100 ] || fail "the server does not answer"
    sleep 0.1
done

sh -eu "$work/blocks.sh" || fail "a command failed, see above"
echo "README: $blocks blocks ran"
