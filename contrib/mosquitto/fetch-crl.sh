#!/bin/sh
# Fetches the list of revoked certificates for a broker on another machine, from cron for instance, and
# puts it in place only if it is to be believed: signed by the CA, not ended, and not older than the one
# that is there. (`openssl crl -verify` ends with 0 whatever it finds.) POSIX sh: runs under busybox ash.
#
# usage: fetch-crl.sh URL CA FILE [COMMAND [ARGUMENT...]]
#
#   URL      as http://ca.example:3002/api/v1/crl; over https the server is verified with CA
#   CA       PEM file; its first certificate is the CA that has to have signed the list
#   FILE     the list that the broker reads; left as it is unless the new one is good
#   COMMAND  run if FILE has changed, as `systemctl reload mosquitto`
#
# Ends with 0 if FILE is the newest list, else with 1 and the reason, or with the command's code.
set -eu
LC_ALL=C
export LC_ALL

if [ $# -lt 3 ]; then
    sed -n 's/^# usage: /usage: /p' "$0" >&2
    exit 2
fi
url=$1 ca=$2 file=$3
shift 3

fail() {
    echo "fetch-crl: $*" >&2
    exit 1
}

new=$file.new
work=$(mktemp -d) || fail "no temporary folder"
trap 'rm -rf "$work" "$new"' EXIT
trap 'exit 1' INT TERM HUP
mkdir "$work/none"
openssl x509 -in "$ca" -out "$work/ca" 2>/dev/null || fail "$ca holds no certificate"

# SECURITY: without -CApath, openssl believes each CA of the system, too, by its directory of certificates.
believed() {
    SSL_CERT_DIR=$work/none openssl crl -noout -verify -CAfile "$work/ca" -CApath "$work/none" -in "$1" 2>&1 |
        grep -qx 'verify OK'
}

# The date of a list as 2025-11-25 00:33:00, from one like `lastUpdate=Nov 25 00:33:00 2025 GMT`.
date_of() {
    openssl crl -noout "-$1" -in "$2" | sed 's/.*=//' | awk '
        { printf "%s-%02d-%02d %s\n", $4, (index("JanFebMarAprMayJunJulAugSepOctNovDec", $1) + 2) / 3, $2, $3 }'
}

# Whether date $1 is later than date $2.
is_later() { [ "$1" != "$2" ] && printf '%s\n' "$2" "$1" | sort -c 2>/dev/null; }

case $(command -v curl) in
'') wget -q -O "$new" "$url" || fail "$url: no answer" ;;
*)
    curl -q --silent --show-error --fail --max-time 60 --cacert "$work/ca" --capath "$work/none" \
        --output "$new" "$url" || fail "$url: no answer"
    ;;
esac
now=$(date -u '+%Y-%m-%d %H:%M:%S')
believed "$new" || fail "what $url sends is no list that the CA has signed"
is_later "$(date_of nextupdate "$new")" "$now" || fail "the list of $url has ended, or the clock is wrong"
if [ -s "$file" ] && believed "$file"; then
    there=$(date_of lastupdate "$file")
    # One of the future, by a clock that was ahead, keeps nothing out.
    if is_later "$there" "$(date_of lastupdate "$new")" && is_later "$now" "$there"; then
        fail "the list of $url is older than $file"
    fi
fi
if cmp -s "$new" "$file"; then exit 0; fi
chmod 644 "$new"
sync
mv "$new" "$file"
[ $# -eq 0 ] || "$@"
