#!/bin/sh
# What a large record costs: start-up time, memory, one revocation, a CRL with many entries.
#
# usage: scripts/record-scale.sh [CERTIFICATES [REVOKED]]      (default 100000 and 10000)
#
# Makes a record of that many certificates by hand (one real certificate under many serial numbers:
# what is read of each at start is its line), starts the program on it and measures; then one of as many
# that other instances have signed. MPL_BIN names the program; else target/release. Wants curl and
# openssl, and some 700 MB below TMPDIR, since each certificate is a file.
set -eu
me="record-scale"
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
count=${1:-100000}
revoked=${2:-10000}
bin=$(program "${MPL_BIN:-$build/release/mqtt-publisher-lite}")
server=
make_work

leave() {
    [ -z "$server" ] || end "$server"
}

port=$(free_port $((20000 + $$ % 12000)))
url=http://127.0.0.1:$port
admin=record-scale-admin-key

# Starts the program and leaves in $took the milliseconds until it answers.
start() {
    begun=$(date +%s%N)
    env -i PATH="$PATH" HTTP_HOST=127.0.0.1 PORT="$port" DATA_DIR="$work/data" ADMIN_API_KEY=$admin \
        "$bin" >>"$work/log" 2>&1 &
    server=$!
    until healthy "$port"; do
        kill -0 "$server" 2>/dev/null || { cat "$work/log" >&2; exit 1; }
        sleep 0.005
    done
    took=$((($(date +%s%N) - begun) / 1000000))
}
stop() {
    kill "$server"
    wait "$server" || true
    server=
}
# The processor time that the program has taken so far.
used() { awk '{ sum += $1 } END { printf "%d ms of processor time", sum / 1000000 }' /proc/"$server"/task/*/schedstat; }
memory() { awk '/^VmRSS|^VmHWM/ { printf "%s %d KiB  ", $1, $2 }' "/proc/$server/status"; }
# The milliseconds that curl took for a request.
timed() { curl --silent --show-error --fail --output "$work/answer" --write-out '%{time_total}' "$@" | awk '{ printf "%.1f ms", $1 * 1000 }'; }
sign() {
    token=$(curl --silent --fail --data "{\"device_id\":\"$1\"}" -H 'Content-Type: application/json' "$url/api/v1/onboarding" |
        sed 's/.*"provisioning_token":"\([^"]*\)".*/\1/')
    openssl req -new -key "$work/key" -subj "/CN=$1" -out "$work/csr" 2>/dev/null
    printf '{"csr":"%s"}' "$(awk '{ printf "%s\\n", $0 }' "$work/csr")" >"$work/body"
    timed -H "Authorization: Bearer $token" -H 'Content-Type: application/json' --data-binary "@$work/body" "$url/api/v1/sign-csr"
}

openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$work/key" 2>/dev/null
start
echo "empty record: answers after $took ms, $(memory)"
sign seed >/dev/null
stop

# A certificate of last month: what is older than a token can be is not read again at start.
ca=$work/data/ca
openssl req -new -key "$work/key" -subj /CN=old -out "$work/csr" 2>/dev/null
if command -v faketime >/dev/null 2>&1; then back="faketime -f -30d"; else back=; fi
old() {
    $back openssl x509 -req -in "$work/csr" -CA "$ca/root-ca.crt" -CAkey "$ca/root-ca.key" -days 90 \
        -set_serial "0x$1" 2>/dev/null
}
old 41 >"$work/old.pem"
mv "$ca/index.txt" "$work/last"
end=$(date -u -d '+60 days' +%y%m%d%H%M%SZ)
now=$(date -u +%y%m%d%H%M%SZ)
awk -v count="$count" -v revoked="$revoked" -v end="$end" -v now="$now" -v dir="$ca/certs" \
    -v index_file="$ca/index.txt" -v pem="$work/old.pem" '
    BEGIN {
        while ((getline line <pem) > 0) text = text line "\n"
        for (n = 0; n < count; n++) {
            serial = sprintf("41%030X", n)
            status = n < revoked ? "R\t" end "\t" now : "V\t" end "\t"
            printf "%s\t%s\tunknown\t/CN=device-%06d\n", status, serial, n >index_file
            file = dir "/" serial ".pem"
            printf "%s", text >file
            close(file)
        }
    }'
cat "$work/last" >>"$ca/index.txt"
echo "record of $count certificates, $revoked revoked, index.txt $(wc -c <"$ca/index.txt") bytes"

start
echo "first start: answers after $took ms, $(used), $(memory)"
stop
start
echo "second start: answers after $took ms, $(used), $(memory)"
echo "crl.pem: $(wc -c <"$ca/crl.pem") bytes, $(openssl crl -noout -text -in "$ca/crl.pem" | grep -c 'Serial Number') entries"
echo "GET /api/v1/crl: $(timed "$url/api/v1/crl"), $(timed "$url/api/v1/crl")"
echo "signing one: $(sign new-1), $(sign new-2), $(sign new-3)"
for n in 1 2 3; do
    name=$(printf 'device-%06d' $((count - n)))
    echo "one revocation, its CRL included: $(timed -X DELETE -H "Authorization: Bearer $admin" "$url/api/v1/certificates/$name")"
done
# From many clients at once.
begun=$(date +%s%N)
for n in $(seq 1 50); do
    printf 'next\nsilent\nfail\noutput = /dev/null\nrequest = DELETE\nheader = "Authorization: Bearer %s"\nurl = "%s/api/v1/certificates/device-%06d"\n' \
        "$admin" "$url" $((count - 3 - n))
done | sed 1d >"$work/many"
curl --parallel --parallel-max 16 --config "$work/many" 2>/dev/null || true
echo "50 revocations, 16 at a time: $((($(date +%s%N) - begun) / 1000000)) ms"
echo "after all that: $(memory)"
stop

# Others' certificates lie in one file. The last hundred are real ones, for a start reads some of them;
# and the last one is new, for those count as new that are of the same day.
rm -r "$ca/certs" "$ca/crl.pem"
mkdir "$ca/certs"
for n in $(seq 100); do
    [ "$n" -lt 100 ] || back=
    echo "Paid: 1700000000"
    old "$(printf '43%030X' "$n")"
done >"$work/real"
awk -v count="$count" -v revoked="$revoked" -v end="$end" -v now="$now" -v index_file="$ca/index.txt" \
    -v real="$work/real" -v others="$ca/certs/others.pem" '
    function add(n, text) {
        status = n <= revoked ? "R\t" end "\t" now : "V\t" end "\t"
        printf "%s\t43%030X\tothers.pem+%d\t/CN=device-%06d\n", status, n, length_, n >index_file
        printf "%s", text >others
        length_ += length(text)
    }
    BEGIN {
        while ((getline line <real) > 0) {
            if (line ~ /^Paid/) last++
            texts[last] = texts[last] line "\n"
        }
        printf "" >index_file
        for (n = last + 1; n <= count; n++) add(n, texts[1])
        for (n = 1; n <= last; n++) add(n, texts[n])
    }'
start
echo "others' certificates, first start: answers after $took ms, $(used), $(memory)"
stop
start
echo "others' certificates, second start: answers after $took ms, $(used), $(memory)"
