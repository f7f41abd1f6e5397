#!/bin/sh
# Clients of EST that no one here wrote, against the real service: Bouncy Castle's (Java) and strongSwan's
# `pki`, as Debian has them; and as a strict reader of PKCS#7 the `cryptography` of Python. By hand, since it
# installs a Java; docs/est.md says which others were tried, and how.
#
# usage: .ci/check-est-clients.sh
#
# MPL_BIN names the program; else target/release, else target/debug.
set -eu
me="est-clients"
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/../scripts/lib.sh"
service=
leave() {
    # shellcheck disable=SC2086 # none, or one
    end $service
    [ "$code" -eq 0 ] || tail -5 "$work/log" >&2
}

jars=/usr/share/java
tools curl openssl java:openjdk-17-jdk-headless pki:strongswan-pki python3
[ -e $jars/bcpkix.jar ] || debian libbcpkix-java
[ -e /usr/lib/ipsec/plugins/libstrongswan-openssl.so ] || debian libstrongswan-standard-plugins
python3 -c 'import cryptography' 2>/dev/null || debian python3-cryptography
find_service
make_work
port=$(free_port 23000)
ADMIN_API_KEY=$(openssl rand -hex 16)
export ADMIN_API_KEY
HTTP_HOST=127.0.0.1 PORT=$port DATA_DIR=$work/data TLS=auto TLS_NAMES=localhost ENROLMENT=registered \
    "$bin" >"$work/log" 2>&1 &
service=$!
ca=$work/data/ca/root-ca.crt
server=localhost:$port
answers() { curl --silent --fail --cacert "$ca" --output "$work/cacerts" "https://$server/.well-known/est/cacerts"; }
await "it answers" "$service" answers
# register DEVICE: prints its secret.
register() { "$bin" device add "$1" --url "https://$server" --ca "$ca" | awk '{ print $2 }'; }

python3 - "$work/cacerts" <<'END' || fail "cryptography does not read what cacerts answers"
import base64, sys
from cryptography.hazmat.primitives.serialization import pkcs7
assert len(pkcs7.load_der_pkcs7_certificates(base64.b64decode(open(sys.argv[1]).read()))) == 1
END
ok "cryptography $(python3 -c 'import cryptography; print(cryptography.__version__)') reads what cacerts answers"

for device in java-1 java:2; do
    EST_SECRET=$(register $device)
    export EST_SECRET
    java -cp $jars/bcpkix.jar:$jars/bcprov.jar:$jars/bcutil.jar "$root/.ci/EstClient.java" "$server" $device \
        <"$ca" >"$work/java" 2>&1 || fail "Bouncy Castle: $(cat "$work/java")"
    grep -q "^simplereenroll: CN=$device " "$work/java" || fail "Bouncy Castle: $(cat "$work/java")"
done
ok "Bouncy Castle, $(basename "$(realpath $jars/bcpkix.jar)"), has enrolled and enrolled again"

# Before 5.9.11 it takes line breaks in base64 for base64 (RFC 8951, 3.1 says that there may be some).
swan=$(pki --version 2>/dev/null | sed -n 's/.*strongSwan \([0-9.]*\).*/\1/p')
[ -n "$swan" ] || swan=$(pki --help 2>&1 | sed -n 's/.*strongSwan \([0-9.]*\).*/\1/p')
if [ "$(printf '%s\n' 5.9.11 "$swan" | sort -V | head -1)" != 5.9.11 ]; then
    echo "strongSwan $swan reads no base64 with line breaks, which 5.9.11 does: left out"
    exit 0
fi
pki --gen --type ecdsa --size 256 --outform pem >"$work/key" 2>>"$work/swan"
pki --req --type priv --in "$work/key" --dn CN=swan-1 >"$work/request" 2>>"$work/swan"
swan() { pki --est --url "https://$server" --cacert "$ca" --in "$work/request" --outform pem "$@" 2>>"$work/swan"; }
# Its only way to be told a secret is an argument.
swan --userpass "swan-1:$(register swan-1)" >"$work/first" || fail "strongSwan: $(cat "$work/swan")"
swan --cert "$work/first" --key "$work/key" >"$work/second" || fail "strongSwan: $(cat "$work/swan")"
openssl verify -CAfile "$ca" "$work/first" "$work/second" >/dev/null || fail "what strongSwan has got is not ours"
ok "strongSwan $swan has enrolled and enrolled again"
