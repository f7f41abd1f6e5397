#!/bin/sh
# A day in ten minutes: a steady load on tokens that last seconds, and whether anything grows.
#
# usage: scripts/soak.sh [--outage] [MINUTES]      (default 10, 3 at least)
#
# A day is 288 lives of a token that lasts 300 s; at 2 s it is ten minutes. The lifetime is one setting
# of a process, so three instances run side by side, with 1, 3 and 5 s, on one Redis and under one CA:
# each also redeems what another issued. The third speaks HTTPS, where devices renew. The load of tools/
# sends them 500 requests a second in all, three of four of them onboardings of ever new devices, and
# checks each answer. Every 5 s this reads of each instance its VmRSS, threads, descriptors and
# certificates, and of Redis the live tokens and the keys; after that it sends SIGHUP, so that all files
# are read again.
#
# The first half of the time is for warming up: an allocator takes minutes to see the worst mixture of
# sizes (what was redeemed is known for a minute longer than it lives, and so is 80 s the least). It
# ends with 1 if in the second half
#   - VmRSS grows by more than LIMIT KiB a minute, by least squares. Two things are meant to grow: the
#     record of certificates, of which one device in 300 gets one, and the rows of devices whose token
#     was replaced, one in 40, which stay for a day. For each 200 and 100 bytes are taken off; but
#     their tables double now and then, which can look like half of the limit. 32 KiB a minute are 3
#     bytes for each request that an instance is sent;
#   - the number of threads changes, or is higher than before the load;
#   - there are more descriptors than before the load and the load's own, or any more than before when
#     it is over;
# or if the log has a warning or an error at any time, or an answer was not as it had to be.
# With --outage Redis is killed in the middle and comes back, empty, after ten seconds; until 20 s later
# warnings, errors and answers 503 are not counted, and the second half begins a minute later.
#   MPL_BIN    the program; else target/release
#   SOAK_BIN   the load, `soak` of tools/; else target/release/soak
#   RATE       requests a second, 500
#   LIMIT      32
#   SOAK_KEEP  a file for all samples: second, lifetime of tokens, KiB, threads, descriptors,
#              certificates, rows, live tokens, keys
# It needs redis-server, redis-cli and curl.
set -eu
me="soak"
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
outage=
case ${1:-} in
    --outage)
        outage=--outage
        shift
        ;;
    -*) usage ;;
esac
minutes=${1:-10}
warm=$((minutes * 30))
[ -z "$outage" ] || warm=$((warm + 60))
[ "$warm" -ge 80 ] || warm=80
rate=${RATE:-500}
limit=${LIMIT:-32}
record=200
row=100
every=5
redis=
servers=
loading=
make_work

leave() {
    # shellcheck disable=SC2086 # those that run
    end $loading $servers $redis
    [ "$code" -eq 0 ] || tail -n 1 "$work"/log.* "$work/redis.log" >&2
}

[ "$minutes" -ge 3 ] || fail "less than three minutes show nothing"
[ -n "${MPL_BIN:-}${SOAK_BIN:-}" ] || [ -x "$build/release/soak" ] ||
    fail "cargo build --release -p mqtt-publisher-lite -p tools --bin mqtt-publisher-lite --bin soak"
bin=$(program "${MPL_BIN:-$build/release/mqtt-publisher-lite}")
load=$(program "${SOAK_BIN:-$build/release/soak}")
tools redis-server redis-cli:redis-tools curl

ask_redis() { redis-cli -p "$redis_port" "$@"; }

answers_redis() { ask_redis ping >/dev/null 2>&1; }

start_redis() {
    redis-server --port "$redis_port" --bind 127.0.0.1 --save '' --appendonly no --dir "$work" >>"$work/redis.log" &
    redis=$!
    await "Redis answers" "$redis" answers_redis
}

# start TTL [NAME=VALUE …]: an instance; its process id is in $started, its URL in $url.
start() {
    ttl=$1
    shift
    port=$(free_port $((port + 1)))
    url=http://127.0.0.1:$port
    case "$*" in *TLS_CERT*) url=https://127.0.0.1:$port ;; esac
    env -i PATH="$PATH" HTTP_HOST=127.0.0.1 PORT="$port" DATA_DIR="$work/$ttl" PROVISIONING_TOKEN_TTL="$ttl" \
        REDIS_HOST=127.0.0.1 REDIS_PORT="$redis_port" JWT_SECRET_FILE="$work/secret" TRUSTED_PROXIES=127.0.0.1 \
        ONBOARDING_API_KEY_FILE="$work/onboarding-key" ADMIN_API_KEY_FILE="$work/admin-key" \
        ONBOARDING_RATE_LIMIT=60 "$@" "$bin" >"$work/log.$ttl" 2>&1 &
    started=$!
    servers="$servers $started"
    await "an instance finds Redis" "$started" is_on_redis "$url"
}

is_on_redis() { health "$1" | grep -q '"storage":"redis"'; }

health() { curl --silent --fail --insecure --max-time 2 "$1/health"; }

of_status() { sed -n "s/^$1:[^0-9]*\\([0-9]*\\).*/\\1/p" "/proc/$2/status"; }

# descriptors PID
descriptors() { find "/proc/$1/fd" -mindepth 1 2>/dev/null | wc -l; }

# note_counts FILE: a line for each instance, its threads and descriptors.
note_counts() {
    ttl=1
    for id in $ids; do
        echo "$ttl $(of_status Threads "$id") $(descriptors "$id")" >>"$1"
        ttl=$((ttl + 2))
    done
}

now() { date -u +%Y-%m-%dT%H:%M:%S.000Z; }

(
    umask 077
    for name in secret onboarding-key admin-key; do head -c 24 /dev/urandom | base64 >"$work/$name"; done
)
port=$((20000 + $$ % 6000))
redis_port=$(free_port $((26000 + $$ % 6000)))
start_redis
start 1
ids=$started urls=$url
DATA_DIR="$work/1" "$bin" server-certificate 127.0.0.1 --out "$work/tls" >/dev/null
for ttl in 3 5; do
    mkdir -p "$work/$ttl/ca"
    cp "$work/1/ca/root-ca.crt" "$work/1/ca/root-ca.key" "$work/$ttl/ca"
done
start 3
ids="$ids $started" urls="$urls $url"
start 5 TLS_CERT="$work/tls/server.crt" TLS_KEY="$work/tls/server.key"
ids="$ids $started" urls="$urls $url"
sleep 1
note_counts "$work/before"

# sample: one line for each instance. The load replaces a device's token once, so each line of devices.txt
# is of another one.
sample() {
    tokens=$(health "${urls%% *}" | sed -n 's/.*"tokenCount":\([0-9]*\).*/\1/p')
    keys=$(ask_redis dbsize 2>/dev/null) || keys=
    ttl=1
    for id in $ids; do
        kill -0 "$id" 2>/dev/null || fail "the instance with $ttl s has ended: $(tail -1 "$work/log.$ttl")"
        echo "$elapsed $ttl $(of_status VmRSS "$id") $(of_status Threads "$id") $(descriptors "$id")" \
            "$(wc -l <"$work/$ttl/ca/index.txt") $(wc -l <"$work/$ttl/devices.txt") ${tokens:--} ${keys:--}" >>"$work/samples"
        kill -HUP "$id"
        ttl=$((ttl + 2))
    done
}

echo "$minutes minutes, $rate requests/s, load average $(cut -d ' ' -f 1-3 /proc/loadavg), $(nproc) cores"
# shellcheck disable=SC2086 # an option that may be absent, and words
"$load" $outage "$rate" $((minutes * 60)) "$work/1/ca/root-ca.crt" \
    "$(cat "$work/onboarding-key")" "$(cat "$work/admin-key")" $urls >"$work/load" 2>&1 &
loading=$!
begin=$(date +%s)
elapsed=0
from=~ until=
while kill -0 "$loading" 2>/dev/null && [ "$elapsed" -lt $((minutes * 60)) ]; do
    sample
    if [ -n "$outage" ] && [ "$elapsed" -ge $((minutes * 30)) ]; then
        outage=
        from=$(now)
        kill -9 "$redis"
        wait "$redis" 2>/dev/null || true
        sleep 10
        start_redis
        until=$(date -u -d '+20 seconds' +%Y-%m-%dT%H:%M:%S.000Z)
    fi
    sleep "$every"
    elapsed=$(($(date +%s) - begin))
done
status=0
wait "$loading" || status=$?
loading=
cat "$work/load"
[ "$status" -eq 0 ] || fail "the load ended with $status"
sleep 2
note_counts "$work/after"
[ -z "${SOAK_KEEP:-}" ] || cp "$work/samples" "$SOAK_KEEP"

echo
echo "| minute | VmRSS KiB, 1 s | 3 s | 5 s | descriptors | threads | certificates | rows | live tokens | keys |"
echo "|---|---|---|---|---|---|---|---|---|---|"
awk '
    { id = $2 }
    id == 1 { rss = $3; threads = $4; fds = $5; certificates = $6; rows = $7 }
    id != 1 {
        rss = rss " | " $3; threads = threads ", " $4; fds = fds ", " $5
        certificates = certificates ", " $6; rows = rows ", " $7
    }
    id == 5 && int($1 / 60) >= next_minute {
        next_minute = int($1 / 60) + 1
        printf "| %.1f | %s | %s | %s | %s | %s | %s | %s |\n", \
            $1 / 60, rss, fds, threads, certificates, rows, $8, $9
    }' "$work/samples"

echo
echo "from second $warm on:"
ttl=1
failed=0
for id in $ids; do
    # What a log says in the span of the outage is not counted.
    complaints=$(awk -v from="$from" -v until="$until" '
        ($2 == "WARN" || $2 == "ERROR") && !($1 >= from && $1 <= until)' "$work/log.$ttl" | tee "$work/complaints" | wc -l)
    awk -v ttl="$ttl" -v warm="$warm" -v record="$record" -v row="$row" -v limit="$limit" -v complaints="$complaints" \
        -v before="$(sed -n "s/^$ttl //p" "$work/before")" -v after="$(sed -n "s/^$ttl //p" "$work/after")" '
        $2 == ttl && $1 >= warm {
            x = $1 / 60; y = $3; z = ($6 * record + $7 * row) / 1024
            n++; sx += x; sxx += x * x; sy += y; sxy += x * y; sz += z; sxz += x * z
            if (n == 1) { min_threads = max_threads = $4; min_fds = max_fds = $5; first = y }
            if ($4 < min_threads) min_threads = $4
            if ($4 > max_threads) max_threads = $4
            if ($5 < min_fds) min_fds = $5
            if ($5 > max_fds) max_fds = $5
            last = y
        }
        END {
            split(before, b, " "); split(after, a, " ")
            below = n * sxx - sx * sx
            slope = (n * sxy - sx * sy) / below
            meant = (n * sxz - sx * sz) / below
            net = slope - meant
            printf "tokens of %d s: VmRSS %d to %d KiB, %+.1f KiB/min, %+.1f for record and rows and %+.1f else (%+.1f MiB a day);", \
                ttl, first, last, slope, meant, net, net * 1440 / 1024
            printf " threads %d to %d; descriptors %d to %d, %d before and %d after; %d warnings and errors\n", \
                min_threads, max_threads, min_fds, max_fds, b[2], a[2], complaints
            if (net > limit) wrong = wrong " VmRSS grows by more than " limit " KiB/min."
            if (min_threads != max_threads || max_threads > b[1]) wrong = wrong " The number of threads changes."
            # Each of 12 clients has a connection, and now and then a second one; and there is ours.
            if (max_fds > b[2] + 26) wrong = wrong " More descriptors than the load has connections."
            if (a[2] > b[2]) wrong = wrong " Descriptors are left over."
            if (complaints > 0) wrong = wrong " The log complains."
            if (wrong != "") { print "soak: tokens of " ttl " s:" wrong; exit 1 }
        }' "$work/samples" || failed=1
    [ "$complaints" -eq 0 ] || head -5 "$work/complaints"
    ttl=$((ttl + 2))
done
[ "$failed" -eq 0 ] || fail "not flat"
echo "soak: flat"
