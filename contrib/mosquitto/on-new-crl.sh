#!/bin/sh
# Has the broker read crl.pem again, where the service's own user may not signal it: runs a command, as
# the user that starts this, each time the file has changed. POSIX sh: runs under busybox ash.
#
# usage: on-new-crl.sh [--once STAMP] FILE COMMAND [ARGUMENT...]
#
# It looks every five seconds, for ever. With --once it looks a single time, for cron, and keeps what it
# saw in the file STAMP. The command also runs the first time, since the broker may have begun with an
# older list, and again until it has succeeded.
set -eu

stamp=''
if [ "${1:-}" = --once ] && [ $# -ge 2 ]; then
    stamp=$2
    shift 2
fi
if [ $# -lt 2 ]; then
    sed -n 's/^# usage: /usage: /p' "$0" >&2
    exit 2
fi
file=$1
shift
now='' failed=''

# Of the content: the file is replaced, and times and inodes come again. OpenWrt has no cksum.
sum() { [ -f "$file" ] && { sha256sum 2>/dev/null || cksum; } <"$file" 2>/dev/null; }

# look COMMAND...: runs it if the file is another one than $now, and keeps there what it has run for.
look() {
    found=$(sum) || return 0
    [ "$found" != "$now" ] || return 0
    if "$@"; then
        now=$found failed=''
    else
        [ -n "$failed" ] || echo "on-new-crl: $file has changed, but $1 failed" >&2
        failed=yes
    fi
}

if [ -n "$stamp" ]; then
    now=$(cat "$stamp" 2>/dev/null) || now=''
    look "$@"
    printf %s "$now" >"$stamp.new"
    mv "$stamp.new" "$stamp"
    exit 0
fi
while :; do
    look "$@"
    sleep 5
done
