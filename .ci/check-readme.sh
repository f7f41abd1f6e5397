#!/bin/sh
# Runs the commands of README.md, or of another page, as a reader would: the fenced blocks of shell
# commands, in order, in one shell and one temporary folder. What stands behind "```sh" says how:
#
#   run          it is run, and fails if any of its commands does
#   run keys     the same, while the service that was started last has both API keys; $ONBOARDING_API_KEY
#                and $ADMIN_API_KEY hold them
#   run package  the same as run; .ci/check-deb.sh runs it, too, after the installation of the package
#   server PORT  it is run beside the others, as in a terminal of its own, and has to listen on PORT; an
#                earlier one on that port is stopped first
#   settings     lines NAME=value, which `check-config --offline` has to accept
#
# Anything else is not run here (tests/house/docs.rs knows who does).
#
# usage: .ci/check-readme.sh [PAGE]
#
# A block is run as it stands, but each PORT of the page, and 6379, becomes a free one. `cargo run
# --release` and target/release/mqtt-publisher-lite are the program that MPL_BIN names; else
# target/release, else target/debug. A page that names Redis gets one. It needs curl and what the page
# uses.
set -eu
me="page"
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/../scripts/lib.sh"
page=${1:-$root/README.md}
page=$(cd "$(dirname "$page")" && pwd)/$(basename "$page")
me=$(basename "$page")
make_work

# end_group PORT: stops what was started to listen there.
end_group() {
    [ -e "$work/pid.$1" ] || return 0
    kill -- "-$(cat "$work/pid.$1")"
    while kill -0 -- "-$(cat "$work/pid.$1")" 2>/dev/null; do sleep 0.05; done
    rm "$work/pid.$1"
}

leave() {
    for file in "$work"/pid.*; do
        [ -e "$file" ] || continue
        end_group "${file##*.}" 2>/dev/null || true
        [ "$code" -eq 0 ] || sed "s/^/${file##*.}: /" "$work/log.${file##*.}" >&2
    done
}

find_service

# One file for each block, named by its number and what it is: 01.run, 02.server.3002 …
awk -v dir="$work" '
    /^ *```sh (run|server|settings)/ {
        n++
        kind = $2
        if ($3 != "") kind = kind "." $3
        file = sprintf("%s/%02d.%s", dir, n, kind)
        printf "# %s, block %d, line %d\n", kind, n, NR >file
        next
    }
    /^ *```/ { file = "" }
    file != "" { sub(/^ *\$ /, ""); print >file }
' "$page"
blocks=$(find "$work" -name '[0-9]*' | wc -l)
[ "$blocks" -gt 0 ] || fail "no block is marked as one to run"

# Free ports in the place of those of the page.
last=$((20000 + $$ % 12000))
: >"$work/ports"
for port in 6379 $(find "$work" -name '*.server.*' | sed 's/.*\.//' | sort -u); do
    last=$((last + 1))
    last=$(free_port "$last")
    echo "$port $last" >>"$work/ports"
    for block in "$work"/[0-9]*; do
        sed "1!{ s/\\([^0-9]\\)$port\\([^0-9]\\)/\\1$last\\2/g; s/\\([^0-9]\\)$port\$/\\1$last/; }" "$block" >"$work/new"
        mv "$work/new" "$block"
    done
done
# port N: what has become of it.
port() { sed -n "s/^$1 //p" "$work/ports"; }

# What the reader has: the source's folders, the program in its place, and Redis where it usually is.
mkdir -p "$work/run/target/release" "$work/bin" "$work/etc"
ln -s "$root/contrib" "$root/scripts" "$work/run/"
ln -s "$bin" "$work/run/target/release/mqtt-publisher-lite"
cat >"$work/bin/cargo" <<END
#!/bin/sh
[ "\$*" = "run --release" ] || { echo "cargo \$*: only to run the program" >&2; exit 1; }
exec "$bin"
END
cat >"$work/bin/redis-cli" <<END
#!/bin/sh
exec "$(command -v redis-cli || echo redis-cli)" -p $(port 6379) "\$@"
END
chmod 755 "$work/bin/cargo" "$work/bin/redis-cli"
PATH=$work/bin:$PATH
ONBOARDING_API_KEY=onboarding-key-of-the-page
ADMIN_API_KEY=admin-key-of-the-page
export PATH

# begin PORT COMMAND…: starts it in a process group of its own, which can be ended with all in it.
begin() {
    here=$1
    shift
    end_group "$here"
    (cd "$work/run" && exec setsid "$@") >>"$work/log.$here" 2>&1 &
    echo $! >"$work/pid.$here"
    await "somebody listens on $here" "$(cat "$work/pid.$here")" listens "$here"
}

listens() {
    code=0
    curl --silent --max-time 2 --output "$work/answer" "http://127.0.0.1:$1/" || code=$?
    # Whatever the answer: 7 is that nobody takes the connection.
    [ "$code" -ne 7 ]
}

# serve FILE [NAME=VALUE …]: runs a block of the kind `server`.
serve() {
    served=$1
    shift
    redis=
    ! grep -q REDIS_HOST "$served" || redis=REDIS_PORT=$(port 6379)
    begin "$(port "${served##*.}")" env -i PATH="$PATH" PORT="$(port 3002)" ${redis:+"$redis"} "$@" sh -eu "$served"
    # The service listens before it has found its Redis.
    ! grep -q 'cargo run\|mqtt-publisher-lite' "$served" ||
        await "it is ready" "$(cat "$work/pid.$here")" ready "$here"
}

ready() {
    for scheme in http https; do
        ! curl --silent --fail --insecure --max-time 2 --output "$work/answer" "$scheme://127.0.0.1:$1/ready" || return 0
    done
    return 1
}

# accept FILE: what check-config says of the settings of a block; files that they name are made.
accept() {
    sed -n 's/^ *\([A-Z_]*=\)/\1/p' "$1" >"$work/settings"
    [ -s "$work/settings" ] || fail "no settings in $(head -1 "$1")"
    "$bin" --help >"$work/help"
    while IFS='=' read -r setting _; do
        grep -q "^ *${setting%_FILE}\\b" "$work/help" || fail "$setting is no setting"
    done <"$work/settings"
    echo 0123456789abcdef >"$work/etc/redis-password"
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=x \
        -keyout "$work/etc/redis-client.key" -out "$work/etc/redis-client.crt" 2>/dev/null
    cp "$work/etc/redis-client.crt" "$work/etc/redis-ca.crt"
    sed "s|=/etc/mqtt-publisher-lite/|=$work/etc/|" "$work/settings" >"$work/settings.here"
    # shellcheck disable=SC2046 # one word for each setting; none has spaces
    env -i $(cat "$work/settings.here") "$bin" check-config --offline
}

if grep -lq 'REDIS_HOST\|redis-cli' "$work"/*.run* "$work"/*.server* 2>/dev/null; then
    begin "$(port 6379)" redis-server --port "$(port 6379)" --bind 127.0.0.1 --save '' --appendonly no
fi

# The shell of all blocks is one with these functions and variables; its errors count, since it is not
# part of a condition.
(
    cd "$work/run"
    for block in "$work"/[0-9]*; do
        begun=$(date +%s%N)
        echo "--- $(sed -n '1s/^# //p' "$block")"
        case $block in
            *.server.*) serve "$block" ;;
            *.settings) accept "$block" ;;
            *.run.keys)
                serve "$served" ONBOARDING_API_KEY="$ONBOARDING_API_KEY" ADMIN_API_KEY="$ADMIN_API_KEY"
                # shellcheck disable=SC1090 # a block
                . "$block"
                serve "$served"
                ;;
            *)
                # shellcheck disable=SC1090 # a block
                . "$block"
                ;;
        esac
        printf '\n    (%d ms)\n' $((($(date +%s%N) - begun) / 1000000))
    done
) &
wait $! || fail "a command failed, see above"
echo "$me: $blocks blocks ran"
