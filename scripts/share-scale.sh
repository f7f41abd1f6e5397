#!/bin/sh
# What one record over three instances costs, and how soon they agree.
#
# usage: scripts/share-scale.sh [DEVICES [REVOCATIONS [FLOWS [LARGE]]]]      (default 300, 50, 2000 and 0)
#
# Starts Redis and three instances, and prints
#   - how long after the last answer all three agree about that many devices, which were onboarded and
#     signed at random over them while one was killed and started again; that their lists name the same
#     certificates; and that `openssl ca -status` says of some what the service says;
#   - how long after a DELETE at one instance the list of another names the certificate, under a load of
#     onboardings at the third;
#   - with LARGE, as many certificates more, one in ten of which is revoked while its instance is stopped:
#     what a start with this record costs, how soon the revocations are in the list of another, and how
#     soon a single one then is;
#   - what an empty instance costs that gets the whole record: time, and bytes through Redis;
#   - what a certificate takes in Redis;
#   - whole onboardings a second with and without SHARE_RECORD, in turns.
# All share the processors of this machine: compare the figures of one run only.
#   MPL_BIN     the program; else target/release or target/debug
#   TOOLS_BIN   the folder with `share` and `load` of tools/; else beside it
# It needs redis-server, redis-cli, curl and openssl.
set -eu
me="share-scale"
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
case ${1:-} in -*) usage ;; esac
devices=${1:-300}
revocations=${2:-50}
flows=${3:-2000}
large=${4:-0}
tools redis-server redis-cli:redis-tools curl openssl
find_service
share=$(program "${TOOLS_BIN:-$(dirname "$bin")}/share")
load=$(program "${TOOLS_BIN:-$(dirname "$bin")}/load")
admin=share_scale_admin_key
secret=share_scale_secret_of_48_characters_that_nobody_keeps
running=
make_work

leave() {
    # shellcheck disable=SC2086 # one word for each process
    end $running
}

first_port=$((20000 + $$ % 12000))
redis_port=$(free_port $first_port)
redis-server --port "$redis_port" --bind 127.0.0.1 --save '' --dir "$work" >"$work/redis.log" 2>&1 &
running=$!
redis() { redis-cli -p "$redis_port" "$@"; }
redis_answers() { redis ping >/dev/null 2>&1; }
await "Redis answers" $! redis_answers

# start NAME PORT [VARIABLE=VALUE…]: starts an instance in a folder of its own, with the CA of `a` if there
# is one, and leaves its process in $instance. A token whose answer is lost is in nobody's way for long.
start() {
    name=$1
    port=$2
    shift 2
    if [ ! -d "$work/$name" ]; then
        mkdir -p "$work/$name/ca"
        [ "$name" = a ] || cp "$work/a/ca/root-ca.crt" "$work/a/ca/root-ca.key" "$work/$name/ca/"
    fi
    env -i PATH="$PATH" HTTP_HOST=127.0.0.1 PORT="$port" DATA_DIR="$work/$name" ADMIN_API_KEY=$admin JWT_SECRET=$secret PROVISIONING_TOKEN_TTL=5 \
        REDIS_HOST=127.0.0.1 REDIS_PORT="$redis_port" "$@" \
        "$bin" >>"$work/$name.log" 2>&1 &
    instance=$!
    running="$running $instance"
    await "$name answers" "$instance" healthy "$port"
}
shares() { curl --silent "http://127.0.0.1:$1/health" | grep -q '"record":{"shared":true'; }
milliseconds() { echo $(($(date +%s%N) / 1000000)); }
# known NAME: serial, device and state of all that the instance has recorded.
known() { awk -F '\t' '{ print $4, $6, $1 }' "$work/$1/ca/index.txt" | sort; }
listed() { openssl crl -noout -text -in "$work/$1/ca/crl.pem" | sed -n 's/.*Serial Number: //p' | sort; }

a=$(free_port $((first_port + 1)))
start a "$a"
of_a=$instance
await "a shares" "$instance" shares "$a"
b=$(free_port $((a + 1)))
start b "$b"
of_b=$instance
await "b shares" "$instance" shares "$b"
c=$(free_port $((b + 1)))
start c "$c"
of_c=$instance
await "c shares" "$instance" shares "$c"

"$share" flow fleet "$devices" "$a" "$b" "$c" >"$work/flow" &
flow=$!
has_some() { [ "$(known a | wc -l)" -ge $((devices / 4)) ]; }
await "a quarter is signed" $flow has_some
kill -9 "$of_b"
wait "$of_b" 2>/dev/null || true
start b "$b"
wait "$flow" || fail "not every device has a certificate: $(tail -n 5 "$work/b.log")"
echo "one of three killed meanwhile: $(cat "$work/flow")"
"$share" agree fleet "$devices" "$a" "$b" "$c"

# Revocations at one that signed a third at most, under a load at another.
keep_busy() {
    batch=0
    while [ ! -e "$work/over" ]; do
        "$load" flow "127.0.0.1:$c" 8 500 "busy-$batch"
        batch=$((batch + 1))
    done
}
keep_busy >"$work/busy" &
busy=$!
"$share" revoke fleet "$revocations" $admin "$a" "$work/b/ca/crl.pem"
touch "$work/over"
wait "$busy"
awk '{ sum += $4 } END { printf "  under a load of %d onboardings a second\n", sum / NR }' "$work/busy"
"$share" agree fleet "$devices" "$a" "$b" "$c"
"$share" agree busy-0 500 "$a" "$b" "$c"
# The load's last certificates may be on their way.
same_as_a() {
    known a >"$work/one"
    known "$1" >"$work/other"
    cmp -s "$work/one" "$work/other"
}
for name in b c; do
    await "a and $name have recorded the same" "$of_a" same_as_a $name
    listed a >"$work/one"
    listed $name >"$work/other"
    cmp "$work/one" "$work/other" || fail "the lists of a and $name differ"
done
ok "one record, one list: $(known a | wc -l) certificates, $(listed a | wc -l) revoked"
cat >"$work/ca.cnf" <<END
[ca]
default_ca = ours
[ours]
database = index.txt
END
for name in a b c; do
    known $name | awk 'NR % 97 == 1' | while read -r serial _ state; do
        said=$(cd "$work/$name/ca" && openssl ca -config "$work/ca.cnf" -status "$serial" 2>&1) || true
        case $state$said in
            V*Valid* | R*Revoked*) ;;
            *) fail "openssl ca -status $serial at $name: $said" ;;
        esac
    done
done
ok "openssl ca -status agrees"

memory_of() { awk '/^VmRSS|^VmHWM/ { printf "%s %d KiB  ", $1, $2 }' "/proc/$1/status"; }
certificates=$(known a | wc -l)
if [ "$large" -gt 0 ]; then
    patience=9000
    certificates=$((certificates + large))
    end "$of_c"
    echo "$large more at a, read by b: $("$load" flow "127.0.0.1:$a" 16 "$large" large)"
    b_has_all() { [ "$(wc -l <"$work/b/ca/index.txt")" -ge "$certificates" ]; }
    await "b has the whole record" "$of_a" b_has_all
    end "$of_a"
    now=$(date -u +%y%m%d%H%M%SZ)
    awk -F '\t' -v OFS='\t' -v now="$now" '$1 == "V" && NR % 10 == 0 { $1 = "R"; $3 = now } { print }' \
        "$work/a/ca/index.txt" >"$work/revoked"
    cat "$work/revoked" >"$work/a/ca/index.txt"
    revoked=$(grep -c ^R "$work/revoked")
    begun=$(milliseconds)
    start a "$a"
    of_a=$instance
    echo "a start with $certificates certificates: answers after $(($(milliseconds) - begun)) ms, $(memory_of "$of_a")"
    lists_all() { [ "$(grep -c ^R "$work/b/ca/index.txt")" -ge "$revoked" ] && [ "$(listed b | wc -l)" -ge "$revoked" ]; }
    await "b lists all that is revoked" "$of_a" lists_all
    echo "b lists $revoked certificates $(($(milliseconds) - begun)) ms after that start"
    "$share" revoke large 9 $admin "$a" "$work/b/ca/crl.pem"
fi
memory=0
for key in $(redis keys 'mqtt-lite:certs:*'); do
    memory=$((memory + $(redis memory usage "$key" samples 0)))
done
echo "Redis memory: $((memory / certificates)) bytes a certificate"

# An empty instance, alone with Redis.
redis_process=${running%% *}
# shellcheck disable=SC2086 # one word for each process
end ${running#* }
running=$redis_process
traffic() { redis info stats | tr -d '\r' | sed -n 's/^total_net_.*put_bytes://p' | awk '{ sum += $1 } END { print sum }'; }
before=$(traffic)
begun=$(milliseconds)
start new "$a"
has_all() { [ "$(wc -l <"$work/new/ca/index.txt")" -ge "$certificates" ]; }
await "new has the whole record" "$instance" has_all
took=$(($(milliseconds) - begun))
await "new shares" "$instance" shares "$a"
echo "an empty instance has $certificates certificates after $took ms, $(($(traffic) - before)) bytes through Redis, $(memory_of "$instance")"
end "$instance"
running=$redis_process

start on "$b" REDIS_KEY_PREFIX=on: SHARE_RECORD=true
start off "$c" REDIS_KEY_PREFIX=off: SHARE_RECORD=false
for round in 1 2 3 4; do
    echo "round $round, shared: $("$load" flow "127.0.0.1:$b" 16 "$flows" "round-$round")"
    echo "round $round, not shared: $("$load" flow "127.0.0.1:$c" 16 "$flows" "round-$round")"
done
