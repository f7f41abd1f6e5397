#!/bin/sh
# Runs the static program on a root file system that holds nothing else: the program, /etc/hosts,
# /etc/resolv.conf and a data folder; no shell, no CA bundle, no /tmp, no /proc, and nothing but the
# data folder can be written to. Laid out and run as contrib/docker/Dockerfile says: its COPY, ENV,
# USER, ENTRYPOINT and HEALTHCHECK; and as an engine would run it, as process 1 of its own.
#
# usage: .ci/check-chroot.sh [PROGRAM]
#
# PROGRAM is dist/x86_64-unknown-linux-musl/mqtt-publisher-lite (scripts/build-static.sh) unless
# named; one for ARM runs under qemu-user-static, which is then in the root too. Needs root (chroot,
# mount, unshare), redis-server with TLS, openssl and curl.
set -eu
me="chroot"
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/../scripts/lib.sh"
bin=${1:-$root/dist/x86_64-unknown-linux-musl/mqtt-publisher-lite}
dockerfile=$root/contrib/docker/Dockerfile
engine=
redis=
make_work
new=$work/root

leave() {
    [ -z "$engine" ] || server_in "$engine" >"$work/server" 2>/dev/null || true
    for process in $(cat "$work/server" 2>/dev/null) $redis; do kill -KILL "$process" 2>/dev/null || true; done
    wait
    [ "$code" -eq 0 ] || [ ! -e "$work/log" ] || sed 's/^/server: /' "$work/log" >&2
    umount "$new/data" 2>/dev/null || true
    umount "$new" 2>/dev/null || true
}

# server_in ENGINE: the process that it started, by its number outside.
server_in() { tr -d ' ' <"/proc/$1/task/$1/children"; }

[ "$(id -u)" -eq 0 ] || fail "chroot, mount and unshare need root"
[ -x "$bin" ] || fail "no program at $bin: scripts/build-static.sh makes it"
tools file redis-server openssl curl chroot:coreutils mount unshare:util-linux

# of INSTRUCTION: what stands behind it in the Dockerfile.
of() { sed -n "s/^$1 //p" "$dockerfile"; }

# The words of a list in JSON.
words() { sed 's/^\[//; s/\]$//; s/", "/ /g; s/"//g'; }

user=$(of USER)
entry=$(of ENTRYPOINT | words)
check=$(of HEALTHCHECK | sed 's/.* CMD //' | words)
setting=$(of ENV)

# --- The root, as the Dockerfile copies it.
mkdir "$new" "$work/context" "$work/context/data" "$work/volume"
cp "$bin" "$work/context/mqtt-publisher-lite"
of COPY | while read -r line; do
    owner=
    case $line in --chown=*) owner=${line%% *} owner=${owner#--chown=} line=${line#* } ;; esac
    cp -R "$work/context/${line%% *}" "$new${line#* }"
    [ -z "$owner" ] || chown -R "$owner" "$new${line#* }"
done
mkdir "$new/etc"
case $(uname -m)-$(file -b "$bin") in
    x86_64*"ARM aarch64"*) emulator=aarch64 ;;
    x86_64*ARM*) emulator=arm ;;
    *) emulator= ;;
esac
if [ -n "$emulator" ]; then
    cp "$(command -v "qemu-$emulator-static")" "$new/qemu"
    entry="/qemu $entry" check="/qemu $check"
fi
# What a container engine puts there, and one name that stands nowhere else.
printf '127.0.0.1 localhost\n127.0.0.1 redis.chroot.test\n' >"$new/etc/hosts"
echo 'nameserver 127.0.0.1' >"$new/etc/resolv.conf"

# --- Redis with TLS, its certificate by a private CA for that name.
cd "$work"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=ca \
    -days 2 -keyout ca.key -out ca.crt 2>/dev/null
openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=redis \
    -keyout redis.key -out redis.csr 2>/dev/null
echo 'subjectAltName=DNS:redis.chroot.test' >san
openssl x509 -req -in redis.csr -CA ca.crt -CAkey ca.key -days 2 -extfile san -out redis.crt 2>/dev/null
port=$(free_port $((20000 + $$ % 6000)))
redis_port=$(free_port $((26000 + $$ % 6000)))
redis-server --port 0 --tls-port "$redis_port" --tls-cert-file redis.crt --tls-key-file redis.key \
    --tls-ca-cert-file ca.crt --tls-auth-clients no --bind 127.0.0.1 --save '' --dir "$work" \
    --requirepass secret-of-redis >"$work/redis.log" &
redis=$!
cp ca.crt "$new/etc/redis-ca.crt"

# --- Read-only, but for the volume.
mount --bind "$new" "$new"
mount --bind "$work/volume" "$new/data"
chown "$user" "$work/volume"
mount -o remount,bind,ro "$new"
if touch "$new/x" 2>/dev/null; then fail "the root can be written to"; fi

# inside COMMAND…: in the root, as the user, with nothing else in the environment; $as before it.
as=
inside() {
    # shellcheck disable=SC2086 # the settings are words, and so is what stands before the command
    exec env -i $setting $settings $as "$(command -v chroot)" --userspec="$user" --groups="${user#*:}" "$new" "$@"
}

# start: as process 1 of a namespace, for which the kernel ignores every signal that has no handler.
start() {
    # shellcheck disable=SC2086 # a command and its arguments
    (as="$(command -v unshare) --pid --fork" && inside $entry) >"$work/log" 2>&1 &
    engine=$!
}

stop() {
    kill -TERM "$(server_in "$engine")"
    wait "$engine" || fail "it ended with $?"
    engine=
}

# healthy_inside: what the health check says, by its exit code.
healthy_inside() {
    # shellcheck disable=SC2086 # a command and its arguments
    (inside $check) 2>"$work/unhealthy"
}

settings="HTTP_HOST=127.0.0.1 PORT=$port REDIS_HOST=redis.chroot.test REDIS_PORT=$redis_port"
settings="$settings REDIS_TLS=true REDIS_TLS_CA=/etc/redis-ca.crt REDIS_PASSWORD=secret-of-redis"
start
await "the health check is content" "$engine" healthy_inside
ok "the health check"
curl --silent --fail "http://127.0.0.1:$port/health" >"$work/health"
grep -q '"storage":"redis"' "$work/health" || fail "not with Redis: $(cat "$work/health")"
ok "Redis over TLS, by the name in /etc/hosts, with a private CA"
"$root/scripts/smoke.sh" "http://127.0.0.1:$port" >"$work/smoke" 2>&1 || fail "$(cat "$work/smoke")"
ok "onboarding and signing"
year=$(date -u +%Y)
grep -q "\"timestamp\":\"$year-" "$work/health" || fail "the time: $(cat "$work/health")"
owner=$(stat -c %u:%g "$work/volume/ca/root-ca.key")
[ "$owner" = "$user" ] || fail "files of $owner"
status=/proc/$(server_in "$engine")/status
[ "$(sed -n 's/^CapEff:\t0*$/none/p' "$status")" = none ] || fail "it has capabilities"
[ "$(sed -n 's/^NSpid:.*\t1$/one/p' "$status")" = one ] || fail "it is not process 1"
ok "process 1 without capabilities"
# Under an emulator it would be the emulator's.
[ -n "$emulator" ] || ok "$(sed -n 's/^VmRSS:[ \t]*/resident /p' "$status")"
stop
# The public roots are in the program: a name that nobody resolves is the only thing that is missed.
if grep -i 'no such file' "$work/log" >&2; then fail "it misses a file"; fi
ok "an orderly end"
code=0
healthy_inside || code=$?
[ $code -eq 1 ] || fail "the health check of a server that is gone ends with $code, for an engine that is 1"
ok "the health check fails: $(tail -1 "$work/unhealthy")"
settings="$settings REDIS_TLS_CA="
start
refuses_redis() { grep -qi 'Failed to connect to Redis: .*certificate' "$work/log"; }
await "a private CA is refused where the public roots count" "$engine" refuses_redis
ok "with the public roots, which are built in, the private CA is refused"
stop
echo "chroot: all passed"
