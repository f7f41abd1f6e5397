#!/bin/sh
# The whole main job against a running server: onboarding, 409 on the second, a certificate by
# openssl, openssl verify, replay refused, health. Ends with 0 only if all of it held.
#
# usage: scripts/smoke.sh [URL]
#
# Without a URL it starts a server of its own, from memory, in a temporary folder:
#   MPL_BIN               the program; else target/release, else target/debug
# With a URL:
#   ONBOARDING_API_KEY    sent with the onboarding, if the server wants one
#   CURL_CA_BUNDLE        the CA of a server that speaks HTTPS (read by curl itself)
#   SMOKE_DEVICE          the device's name; else a new one for each run
set -eu
me="smoke"
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
url=${1:-}
device=${SMOKE_DEVICE:-smoke-$(date +%s)-$$}
server=
make_work

leave() {
    [ -z "$server" ] || end "$server"
    [ "$code" -ne 0 ] || return 0
    [ ! -s "$work/body" ] || printf 'answer: %s\n' "$(cat "$work/body")" >&2
    [ -z "$server" ] || sed 's/^/server: /' "$work/server.log" >&2
    echo "smoke test FAILED" >&2
}

tools curl openssl

# request STATUS PATH [JSON [AUTHORIZATION]]: asks and leaves the body in $work/body.
request() {
    expected=$1
    path=$2
    set -- "${3:-}" "${4:-}"
    {
        echo "silent"
        echo "show-error"
        echo "max-time = 20"
        [ -z "$1" ] || echo 'header = "Content-Type: application/json"'
        [ -z "$2" ] || printf 'header = "Authorization: Bearer %s"\n' "$2"
        [ -z "$1" ] || printf 'data-binary = "@%s"\n' "$work/request"
    } >"$work/curl" # a file, so that no key or token is in the process list
    printf '%s' "$1" >"$work/request"
    : >"$work/body"
    status=$(curl --config "$work/curl" --output "$work/body" --write-out '%{http_code}' "$url$path") ||
        fail "$path: no answer"
    [ "$status" = "$expected" ] || fail "$path: $status, expected $expected"
}

# field NAME: a text field of the answer, with its line breaks.
field() {
    value=$(sed -n "s/.*\"$1\":\"\\([^\"]*\\)\".*/\\1/p" "$work/body")
    [ -n "$value" ] || fail "the answer has no $1"
    printf '%b' "$value"
}

# code CODE: the answer is this error.
code() { [ "$(field code)" = "$1" ] || fail "code $(field code), expected $1"; }

start_server() {
    find_service
    port=$(free_port $((20000 + $$ % 12000)))
    url=http://127.0.0.1:$port
    env -i PATH="$PATH" HTTP_HOST=127.0.0.1 PORT="$port" DATA_DIR="$work/data" \
        "$bin" >"$work/server.log" 2>&1 &
    server=$!
    await "the server answers" "$server" healthy "$port"
}

[ -n "$url" ] || start_server
url=${url%/}
echo "testing $url with device $device"

request 200 /health
[ "$(field status)" = ok ] || fail "health is $(field status)"
ok "health: $(cat "$work/body")"

onboarding="{\"device_id\":\"$device\"}"
request 200 /api/v1/onboarding "$onboarding" "${ONBOARDING_API_KEY:-}"
token=$(field provisioning_token)
ok "onboarding gives a token"

request 409 /api/v1/onboarding "$onboarding" "${ONBOARDING_API_KEY:-}"
code TOKEN_ALREADY_ACTIVE
grep -q "$token" "$work/body" && fail "the live token was shown again"
ok "a second onboarding is refused"

openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -sha256 \
    -subj "/CN=$device" -keyout "$work/device.key" -out "$work/device.csr" 2>"$work/openssl.log" ||
    fail "openssl req: $(cat "$work/openssl.log")"
signing="{\"device_id\":\"$device\",\"csr\":\"$(awk '{printf "%s\\n", $0}' "$work/device.csr")\"}"

request 400 /api/v1/sign-csr '{"csr":"garbage"}' "$token"
code INVALID_CSR
ok "garbage is no request for a certificate, and costs no token"

request 200 /api/v1/sign-csr "$signing" "$token"
field certificate >"$work/device.crt"
field ca_certificate >"$work/ca.crt"
serial=$(field serial_number)
openssl verify -purpose sslclient -CAfile "$work/ca.crt" "$work/device.crt" >"$work/openssl.log" 2>&1 ||
    fail "openssl verify: $(cat "$work/openssl.log")"
subject=$(openssl x509 -noout -subject -nameopt RFC2253 -in "$work/device.crt")
[ "$subject" = "subject=CN=$device" ] || fail "the certificate's $subject"
openssl x509 -noout -pubkey -in "$work/device.crt" >"$work/in.crt"
openssl pkey -pubout -in "$work/device.key" >"$work/in.key" 2>/dev/null
cmp -s "$work/in.crt" "$work/in.key" || fail "the certificate is for another key"
ok "certificate $serial, accepted by openssl verify"

request 401 /api/v1/sign-csr "$signing" "$token"
code TOKEN_ALREADY_USED
ok "the token works once only"

request 200 /api/v1/ca
openssl x509 -noout -fingerprint -sha256 -in "$work/body" >"$work/one"
openssl x509 -noout -fingerprint -sha256 -in "$work/ca.crt" >"$work/two"
cmp -s "$work/one" "$work/two" || fail "/api/v1/ca is another CA"
ok "the CA certificate is the one that signed"

request 200 "/api/v1/certificates/$device/status"
[ "$(field status)" = active ] || fail "the certificate is $(field status)"
request 200 "/api/v1/certificates/$serial/download?format=pem"
openssl x509 -noout -serial -in "$work/body" | grep -qi "=$serial\$" || fail "download of $serial"
ok "status and download"

request 404 /nowhere
code NOT_FOUND
ok "all passed"
