#!/bin/sh
# What Redis needs for a fleet: memory a token and a certificate, commands and processor time an enrolment,
# and how many enrolments a second one server and a cluster of three masters take from one instance.
#
# usage: scripts/redis-scale.sh [FLOWS [CONNECTIONS]]      (default 4000 and 32)
#
# All share the processors of this machine: compare the figures of one run only.
#   MPL_BIN     the program; else target/release or target/debug
#   TOOLS_BIN   the folder with `load` of tools/; else beside it
# It needs redis-server, redis-cli and curl.
set -eu
me="redis-scale"
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
case ${1:-} in -*) usage ;; esac
flows=${1:-4000}
connections=${2:-32}
tokens=100000
tools redis-server redis-cli:redis-tools curl
find_service
load=$(program "${TOOLS_BIN:-$(dirname "$bin")}/load")
running=
make_work

leave() {
    # shellcheck disable=SC2086 # one word for each process
    end $running
}

next_port=$((20000 + $$ % 9000))
# server [SETTING…]: starts a Redis; its port is in $port.
server() {
    port=$(free_port $next_port)
    next_port=$((port + 1))
    mkdir "$work/$port"
    redis-server --port "$port" --bind 127.0.0.1 --save '' --dir "$work/$port" "$@" >"$work/$port.log" 2>&1 &
    running="$running $!"
    await "Redis answers" $! answers "$port"
}
answers() { redis-cli -p "$1" ping >/dev/null 2>&1; }
# sum FIELD SECTION PORT…: of what these servers say.
sum() {
    field=$1
    section=$2
    shift 2
    for each; do redis-cli -p "$each" info "$section"; done |
        tr -d '\r' | awk -F: -v field="$field" '$1 == field { sum += $2 } END { printf "%.6f", sum }'
}
# spent PORT…: the processor time of these servers in seconds.
spent() { awk "BEGIN { print $(sum used_cpu_user cpu "$@") + $(sum used_cpu_sys cpu "$@") }"; }
# instance [VARIABLE=VALUE…]: starts the service; its port is in $http.
instance() {
    http=$(free_port $next_port)
    next_port=$((http + 1))
    env HTTP_HOST=127.0.0.1 PORT="$http" DATA_DIR="$work/data-$http" LOG_LEVEL=error \
        MAX_CONNECTIONS_PER_IP=1024 "$@" "$bin" >"$work/$http.log" 2>&1 &
    running="$running $!"
    await "the service answers" $! healthy "$http"
}
# measure NAME PORT…: whole enrolments, and what they cost these servers.
measure() {
    name=$1
    shift
    "$load" flow "127.0.0.1:$http" "$connections" 500 "warm" >/dev/null
    before=$(sum total_commands_processed stats "$@")
    cpu=$(spent "$@")
    "$load" flow "127.0.0.1:$http" "$connections" "$flows" "fleet" >"$work/flows"
    commands=$(sum total_commands_processed stats "$@")
    echo "$name: $(head -n 1 "$work/flows")"
    awk "BEGIN { printf \"  %.1f commands and %.0f us of the processors of Redis each\n\",
        ($commands - $before) / $flows, ($(spent "$@") - $cpu) * 1000000 / $flows }"
}
# bytes KEY: what a key takes, each of its fields.
bytes() {
    all=$(redis-cli -p "$single" memory usage "$1" samples 0)
    case $(redis-cli -p "$single" type "$1") in
        hash) fields=$(redis-cli -p "$single" hlen "$1") ;;
        stream) fields=$(redis-cli -p "$single" xlen "$1") ;;
        *) fields=1 ;;
    esac
    awk "BEGIN { printf \"%.0f\", $all / $fields }"
}
one_of() { redis-cli -p "$single" --scan --pattern "mqtt-lite:$1*" | head -n 1; }

server
single=$port
instance REDIS_HOST=127.0.0.1 REDIS_PORT="$single"
measure "one server" "$single"
certificate=$(bytes "$(one_of certs:)")
echo "  a certificate $certificate bytes, for as long as the record is kept"
echo "  a mark $(bytes "$(one_of used:)") bytes for 6 minutes, a holder $(bytes "$(one_of holder:)") for 10"

answer=$(curl --silent --data '{"device_id":"scale-00000000"}' --header 'Content-Type: application/json' \
    "http://127.0.0.1:$http/api/v1/onboarding")
token=$(echo "$answer" | sed -n 's/.*"provisioning_token":"\([^"]*\)".*/\1/p')
[ -n "$token" ] || fail "no token: $answer"
begin=$(sum used_memory memory "$single")
# As long as they really are, under other names.
awk -v token="$token" -v tokens=$tokens 'BEGIN {
    stem = substr(token, 1, length(token) - 8)
    fill = sprintf("%*s", 66, ""); gsub(/ /, "x", fill)
    for (n = 0; n < tokens; n++) {
        name = sprintf("%s%08d", stem, n); device = sprintf("scale-%08d", n)
        printf "SET mqtt-lite:token:%s %s%s%s PX 600000\r\n", name, device, name, fill
        printf "SET mqtt-lite:device:%s %s PX 600000\r\n", device, name
        printf "ZADD mqtt-lite:live 1 %022d\r\n", n
    }
}' | redis-cli -p "$single" --pipe >/dev/null
a_token=$(awk "BEGIN { printf \"%.0f\", ($(sum used_memory memory "$single") - $begin) / $tokens }")
echo "  a live token with its lease and its count $a_token bytes, for 5 minutes"

nodes=
for _ in 1 2 3; do
    bus=$(free_port $((next_port + 1000)))
    server --cluster-enabled yes --cluster-port "$bus"
    next_port=$((next_port + 1))
    nodes="$nodes $port"
done
# shellcheck disable=SC2086,SC2046 # one word for each port
redis-cli --cluster create $(printf ' 127.0.0.1:%s' $nodes) --cluster-yes >/dev/null
# shellcheck disable=SC2086
set -- $nodes
whole() { for each; do redis-cli -p "$each" cluster info | grep -q cluster_state:ok || return 1; done; }
patience=600 await "the cluster is whole" "${running##* }" whole "$@"
instance REDIS_CLUSTER=true REDIS_HOST=127.0.0.1 REDIS_PORT="$1"
measure "a cluster of three" "$@"

awk "BEGIN {
    printf \"10,000,000 devices: %.1f GB of certificates, %.1f GB on each of three masters\n\",
        $certificate / 100, $certificate / 300
    printf \"  all enrolled within a day, 116 a second: %.0f MB of live tokens at most\n\",
        116 * 300 * $a_token / 1000000
}"
