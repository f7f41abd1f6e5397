#!/bin/sh
# Attacks a server of its own, on loopback, and asks meanwhile how the others are served.
#
# usage: scripts/attack.sh [SECONDS [PATH]]
#
# Every attack has a fresh server (from memory, in a temporary folder) and lasts SECONDS (15). PATH
# (/api/v1/crl, which has half a megabyte here) is what those ask for who never read. Beside each
# attack a probe asks for /health every 100 ms, and another asks a second server that nobody attacks:
# what that one waits for is the machine, which attackers and servers share. It prints one table and
# ends with 0 if no probe failed, p99 stayed under 50 ms (more than the other server's), memory under
# 16 MiB, no thread was added, the server answered afterwards, the log grew by less than 100 KB a second,
# and everyone of a burst was answered. In the row "full log" the log is a pipe that is full and that
# nobody reads.
# Last it has one device renew its certificate as fast as it can, for 30 s, and counts what was made.
# The rows under "RSA 4096" and "P-256" are over HTTPS with such a key: the probe makes a handshake
# each time, and its second row, "(kept)", is for a connection that was there before.
#   MPL_BIN       the program; else it is built
#   ATTACK_BIN    the attacker, of tools/; else it is built
#   ATTACK_ONLY   run only the attacks whose names match this pattern of the shell
#   ATTACK_NOTES  a file for what the attackers themselves report
# It needs slowhttptest (on Debian, as root, it is installed), 2 GB of memory, and 20,000 descriptors.
set -eu
me="attack"
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
seconds=${1:-15}
path=${2:-/api/v1/crl}
only=${ATTACK_ONLY:-*}
server=
twin=
failed=0
make_work
: >"$work/notes"

stop_servers() {
    # shellcheck disable=SC2086 # those that run
    end $server $twin
    server=
    twin=
}

leave() {
    [ "$code" -eq 0 ] || [ ! -s "$work/server.log" ] || sed 's/^/server: /' "$work/server.log" >&2
    stop_servers
}

tools slowhttptest curl openssl prlimit:util-linux

# Built together, so that what both need is built once.
if [ -z "${MPL_BIN:-}" ] || [ -z "${ATTACK_BIN:-}" ]; then
    (cd "$root" && nice cargo build --locked --release -p mqtt-publisher-lite -p tools --bin mqtt-publisher-lite --bin attack)
fi
bin=$(program "${MPL_BIN:-$build/release/mqtt-publisher-lite}")
attack=$(program "${ATTACK_BIN:-$build/release/attack}")

# The attacked server's limit on open files, when it has another than ours.
files=
# A variable for it.
setting=
# Where its log goes, when nobody reads it.
pipe=
# The files of its certificate and key, but for their endings, when it serves HTTPS.
tls=

start_server() {
    port=$(free_port $((20000 + $$ % 6000)))
    rm -rf "$work/data"
    : >"$work/server.log"
    cp -R "$work/template" "$work/data"
    env -i PATH="$PATH" HTTP_HOST=127.0.0.1 PORT="$port" DATA_DIR="$work/data" \
        ${setting:+"$setting"} ${tls:+"TLS_CERT=$tls.crt" "TLS_KEY=$tls.key"} ${files:+prlimit "--nofile=$files"} "$bin" >"${pipe:-$work/server.log}" 2>&1 &
    server=$!
    await "the server answers" "$server" answers
}

# answers: whether the attacked server does.
answers() {
    if [ -z "$tls" ]; then
        healthy "$port"
    else
        curl --silent --insecure --fail --max-time 2 --output /dev/null "https://127.0.0.1:$port/health"
    fi
}

# certificate NAME ALGORITHM…: makes $work/NAME.crt and .key.
certificate() {
    tls=$work/$1
    shift
    openssl req -x509 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost \
        -addext basicConstraints=critical,CA:FALSE -newkey "$@" \
        -keyout "$tls.key" -out "$tls.crt" 2>/dev/null
}

# The one that nobody attacks.
start_twin() {
    twin_port=$(free_port $((26000 + $$ % 6000)))
    rm -rf "$work/twin"
    env -i PATH="$PATH" HTTP_HOST=127.0.0.1 PORT="$twin_port" DATA_DIR="$work/twin" \
        "$bin" >"$work/twin.log" 2>&1 &
    twin=$!
    await "the other one answers" "$twin" healthy "$twin_port"
}

# A CA with so many revoked certificates that its CRL has half a megabyte.
make_template() {
    mkdir "$work/template"
    start_server
    stop_servers
    mv "$work/data" "$work/made"
    rmdir "$work/template"
    mv "$work/made" "$work/template"
    awk 'BEGIN {
        for (i = 1; i <= 10000; i++)
            printf "R\t401231235959Z\t261101000000Z\t7A%030X\tunknown\t/CN=revoked-%d\n", i, i
    }' >>"$work/template/ca/index.txt"
    rm -f "$work/template/ca/crl.pem"
}

# of_server FIELD: a number from the server's status.
of_server() { sed -n "s/^$1:[^0-9]*\\([0-9]*\\).*/\\1/p" "/proc/$server/status"; }

slow() {
    mode=$1
    shift
    nice slowhttptest "$mode" -c 1000 -r 500 -l "$seconds" -p 3 -v 0 "$@" >/dev/null 2>&1
}

# The attacks. Each is to last about as long as the probe; `nice`, because real attackers bring
# processors of their own.
run() {
    at=127.0.0.1:$port
    case $1 in
        nothing) sleep "$seconds" ;;
        slow-headers) slow -H -i 2 -x 24 -u "http://$at/health" ;;
        slow-body) slow -B -i 2 -s 65536 -x 24 -u "http://$at/api/v1/onboarding" ;;
        range) slow -R -a 5 -b 3000 -t GET -u "http://$at$path" ;;
        slow-read) slow -X -w 1 -y 512 -n 1 -z 5 -k 3 -u "http://$at$path" ;;
        idle-10000) nice "$attack" "$at" idle 10000 "$seconds" ;;
        body-1000) nice "$attack" "$at" body 1000 "$seconds" ;;
        flood-50) nice "$attack" "$at" flood 50 "$seconds" ;;
        refuse-64) nice "$attack" "$at" refuse 64 "$seconds" ;;
        hoard-500) nice "$attack" "$at" hoard 500 "$seconds" ;;
        hello-250) nice "$attack" "$at" hello 250 "$seconds" ;;
        read-256) nice "$attack" "$at" read 256 "$seconds" "$path" ;;
        read-1000) nice "$attack" "$at" read 1000 "$seconds" "$path" ;;
    esac
}

# row WHERE ATTACK: one line of the table.
row() {
    # shellcheck disable=SC2254 # it is a pattern
    case $2 in $only) ;; *) return 0 ;; esac
    start_server
    start_twin
    rss=$(of_server VmRSS)
    threads=$(of_server Threads)
    run "$2" >"$work/attack.log" 2>&1 &
    attacker=$!
    "$attack" "127.0.0.1:$twin_port" probe "$seconds" >"$work/probe.twin" 2>&1 &
    beside=$!
    if [ -z "$tls" ]; then
        "$attack" "127.0.0.1:$port" probe "$seconds" >"$work/probe" 2>&1 || true
    else
        "$attack" "127.0.0.1:$port" probe-tls "$seconds" "$tls.crt" >"$work/probe" 2>&1 || true
    fi
    logged=$(($(wc -c <"$work/server.log") / seconds))
    peak=$(of_server VmHWM)
    after=$(of_server Threads)
    wait "$attacker" || true
    wait "$beside" || true
    machine=$(sed -n 's/^probe: .* p99 \([^ ]*\) .*/\1/p' "$work/probe.twin")
    judge "$1" "$2" probe
    [ -z "$tls" ] || judge "$1" "(kept)" kept
    { cat "$work/attack.log" "$work/probe"; echo "log: $logged bytes a second"; } |
        sed "s/^/$1, $2: /" >>"$work/notes"
    stop_servers
}

# judge WHERE ATTACK PROBE: prints what this probe saw, and whether that is fine.
judge() {
    verdict=ok
    answers || verdict="does not answer"
    line=$(sed -n "s/^$3: count //p" "$work/probe")
    # shellcheck disable=SC2086 # words of: COUNT failures N p50 X p99 X max X ms
    set -- "$1" "$2" $line
    [ "${5:-1}" -eq 0 ] || verdict="probes failed"
    awk "BEGIN { exit !(${9:-1000} < 50 + $machine) }" || verdict="p99 is high"
    [ "$peak" -lt 16384 ] || verdict="memory is high"
    [ "$after" -le "$threads" ] || verdict="more threads"
    [ "$logged" -lt 100000 ] || verdict="$logged bytes a second are logged"
    [ "$verdict" = ok ] || failed=1
    printf '| %-8s | %-12s | %4s of %4s | %6s | %6s | %6s | %7s | %5.1f | %5.1f | %3s | %3s | %s |\n' \
        "$1" "$2" "${5:-}" "${3:-}" "${7:-}" "${9:-}" "$machine" "${11:-}" "$(mib "$rss")" "$(mib "$peak")" \
        "$threads" "$after" "$verdict"
}

mib() { awk "BEGIN { print $1 / 1024 }"; }

make_template
echo "load average $(cut -d ' ' -f 1-3 /proc/loadavg), $(nproc) cores, $seconds s each, read: $path"
echo "| limits   | attack       | no answer    | p50 ms | p99 ms | (twin) | max ms  | MiB   | peak  | threads   | |"
echo "|----------|--------------|--------------|--------|--------|--------|---------|-------|-------|-----|-----|---|"
for name in nothing slow-headers slow-body range slow-read idle-10000 body-1000 read-256 read-1000 flood-50 refuse-64; do
    row default "$name"
done
# slowhttptest has one address only: here it may have all connections.
setting=MAX_CONNECTIONS_PER_IP=1024
for name in slow-headers slow-body range slow-read; do
    row "all one" "$name"
done
setting=
files=256
for name in slow-headers slow-body range slow-read idle-10000 body-1000 read-256; do
    row "256 fds" "$name"
done
files=
pipe=$work/pipe
mkfifo "$pipe"
# Opened for both, it needs no reader; it is full when it takes no more within a second.
exec 3<>"$pipe"
timeout 1 dd if=/dev/zero of="$pipe" bs=4096 count=1000 2>/dev/null || true
row "full log" refuse-64
exec 3>&-
pipe=
certificate rsa rsa:4096
for name in nothing hello-250 hoard-500; do
    row "RSA 4096" "$name"
done
certificate p256 ec -pkeyopt ec_paramgen_curve:P-256
for name in nothing hello-250 hoard-500; do
    row "P-256" "$name"
done
tls=

# burst N: 50 fresh servers, each of which sees N clients at once.
burst() {
    # shellcheck disable=SC2254 # it is a pattern
    case burst-$1 in $only) ;; *) return 0 ;; esac
    times=0
    all=0
    while [ "$times" -lt 50 ]; do
        times=$((times + 1))
        start_server
        if "$attack" "127.0.0.1:$port" burst "$1" 1 >>"$work/notes"; then all=$((all + 1)); fi
        stop_servers
    done
    echo "burst of $1: on $all of $times fresh servers everyone was answered"
    [ "$all" -eq "$times" ] || failed=1
}

# json FIELD: the value of a text field of what comes in.
json() { sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p"; }

# renew_on: renews until $end, for 32 keys in turn, and goes on with what it got.
renew_on() {
    key=0
    number=0
    cp "$work/d.crt" "$work/newest.crt"
    while [ "$(date +%s)" -lt "$end" ]; do
        number=$(((number + 1) % 32))
        if ask "$url/renew" --cert "$work/newest.crt" --key "$work/key.$key" \
            --data "@$work/csr.$number" >"$work/renewal" 2>/dev/null; then
            json certificate <"$work/renewal" | sed 's/\\n/\n/g' >"$work/newest.crt"
            key=$number
            echo 200
        else
            echo no
        fi
    done
}

# renewals: one device renews as fast as it can: 15 s with the newest certificate each time, and 15 s with
# the first, by three clients.
renewals() {
    # shellcheck disable=SC2194,SC2254 # it is a pattern
    case renewals in $only) ;; *) return 0 ;; esac
    certificate p256 ec -pkeyopt ec_paramgen_curve:P-256
    setting=RENEW_REVOKES=true
    start_server
    url=https://127.0.0.1:$port/api/v1
    number=0
    : >"$work/renew"
    while [ "$number" -lt 32 ]; do
        openssl ecparam -genkey -noout -name prime256v1 -out "$work/key.$number"
        csr=$(openssl req -new -key "$work/key.$number" -subj /CN=d -outform DER | openssl base64 -A)
        printf '{"csr":"%s"}' "$csr" >"$work/csr.$number"
        printf '%s\n' silent insecure http1.1 "url = $url/renew" "cert = $work/d.crt" \
            "key = $work/key.0" 'header = "Content-Type: application/json"' \
            "data = @$work/csr.$number" 'output = /dev/null' 'write-out = "%{http_code}\n"' next \
            >>"$work/renew"
        number=$((number + 1))
    done
    ask() { curl --silent --insecure --fail --header 'Content-Type: application/json' "$@"; }
    token=$(ask "$url/onboarding" --data '{"device_id":"d"}' | json provisioning_token)
    ask "$url/sign-csr" --header "Authorization: Bearer $token" --data "@$work/csr.0" |
        json certificate | sed 's/\\n/\n/g' >"$work/d.crt"
    before=$(wc -l <"$work/data/ca/index.txt")
    written=$(sed -n 's/^write_bytes: //p' "/proc/$server/io")
    end=$(($(date +%s) + 15))
    renew_on >"$work/renewed.0"
    end=$(($(date +%s) + 15))
    clients=
    for client in 1 2 3; do
        while [ "$(date +%s)" -lt "$end" ]; do
            curl --config "$work/renew" >>"$work/renewed.$client" 2>/dev/null || true
        done &
        clients="$clients $!"
    done
    # shellcheck disable=SC2086 # one word for each
    wait $clients
    made=$(($(wc -l <"$work/data/ca/index.txt") - before))
    written=$((($(sed -n 's/^write_bytes: //p' "/proc/$server/io") - written) / 1024))
    asked=$(cat "$work"/renewed.* | wc -l)
    echo "renewals by one device in 30 s: $asked asked, $(cat "$work"/renewed.* | grep -c 200) answered, $made made, $written KiB written"
    # Four an hour, each a file, a line and, when it is shown, a database of 800 KB and a CRL of 500.
    { [ "$asked" -gt 100 ] && [ "$made" -le 4 ] && [ "$written" -le 8192 ]; } || failed=1
    stop_servers
    setting=
    tls=
}

renewals
for n in 1 8 64 256 1000; do
    burst "$n"
done
[ -z "${ATTACK_NOTES:-}" ] || cp "$work/notes" "$ATTACK_NOTES"
[ "$failed" -eq 0 ]
