#!/bin/sh
# The device's side of mqtt-publisher-lite; see usage below. POSIX sh: runs under busybox ash.
set -eu
umask 077

usage() {
    cat <<'END'
usage: enroll.sh --url URL --device-id ID --dir DIR [options]

Gets the device its certificate for MQTT, and renews it. Writes DIR/device.key (made here; it never
leaves the device), DIR/device.crt and DIR/ca.crt. Run it again whenever you like, from cron for
instance: it does nothing until a third of the certificate's lifetime is left, then it renews.

  --url URL               the service, http://HOST[:PORT] or https://HOST[:PORT]
  --device-id ID          the device's name
  --dir DIR               where the files are; made if it is missing
  --api-key-file FILE     holds the key that onboarding asks for
  --ca-fingerprint SHA256 the CA to trust, as the service logs it at its start; without it the CA
                          that the service hands out the first time is trusted, with a warning
  --server-ca FILE        over HTTPS: the CA of the server's certificate, if that is another one
  --splay SECONDS         wait a random time up to this before asking the service, so that a fleet
                          with one crontab does not come at once
  --tries N               attempts before giving up until the next run (default 6)
  --help                  this text

Needs openssl, and curl or wget. Over HTTPS the server is verified with the CA; without curl, whose
place wget cannot take there (busybox's verifies nothing), all requests go through openssl s_client.
Renewal needs HTTPS. Over plain HTTP a device gets its next certificate by onboarding again, which
the service allows when the old one has ended (or with REENROLL=allow). Under busybox's wget, so
over plain HTTP only, an API key stands in the process list while it is sent.

Two attempts are 1 to 60 seconds apart, more and more, by chance. What a lost answer or a power cut
has interrupted is taken up by the next run: DIR/device.key.new is a key whose certificate may
already be signed. To trust another CA, remove DIR/ca.crt.

exit codes:
  0  the certificate is there and good: kept, got or renewed
  1  something here failed: a file, a program that is missing, another run in progress
  2  wrong usage
  3  the service cannot be reached or cannot answer now; what there was is still there: run it again
  4  the service refuses for good: key, name, a certificate that is active or revoked; the code says
  5  the CA or the server is not the one to trust, or the certificate is not what was asked for
END
}

LOCAL=1 USAGE=2 LATER=3 REFUSED=4 UNTRUSTED=5

say() { echo "enroll: $*"; }
warn() { echo "enroll: $*" >&2; }
fail() {
    failure=$1
    shift
    warn "$*"
    exit "$failure"
}

# --- what was asked for

url='' id='' dir='' key_file='' pin='' server_ca='' splay=0 tries=6
while [ $# -gt 0 ]; do
    case $1 in
    --help)
        usage
        exit 0
        ;;
    --url | --device-id | --dir | --api-key-file | --ca-fingerprint | --server-ca | --splay | --tries) ;;
    *) fail $USAGE "unknown option $1, see --help" ;;
    esac
    [ $# -ge 2 ] || fail $USAGE "$1 needs a value"
    case $1 in
    --url) url=${2%/} ;;
    --device-id) id=$2 ;;
    --dir) dir=$2 ;;
    --api-key-file) key_file=$2 ;;
    --ca-fingerprint) pin=$(printf %s "$2" | tr -d ': ' | tr A-F a-f) ;;
    --server-ca) server_ca=$2 ;;
    --splay) splay=$2 ;;
    --tries) tries=$2 ;;
    esac
    shift 2
done
if [ -z "$url" ] || [ -z "$id" ] || [ -z "$dir" ]; then
    fail $USAGE "--url, --device-id and --dir are needed, see --help"
fi
case $id in
. | .. | *[!A-Za-z0-9._:-]*) fail $USAGE "--device-id may hold A-Z a-z 0-9 . _ : - only" ;;
esac
[ ${#id} -le 64 ] || fail $USAGE "--device-id may have 64 characters at most"
case $splay$tries in *[!0-9]*) fail $USAGE "--splay and --tries are numbers" ;; esac
case $pin in
'') ;;
*[!0-9a-f]*) fail $USAGE "--ca-fingerprint is 64 hexadecimal digits" ;;
*) [ ${#pin} -eq 64 ] || fail $USAGE "--ca-fingerprint is 64 hexadecimal digits" ;;
esac
case $url in
http://*) scheme=http port=80 ;;
https://*) scheme=https port=443 ;;
*) fail $USAGE "--url must begin with http:// or https://" ;;
esac
authority=${url#*://}
prefix=
case $authority in
*/*)
    prefix=/${authority#*/}
    authority=${authority%%/*}
    ;;
esac
case $authority in
*[!]A-Za-z0-9.:_[-]* | '' | :*) fail $USAGE "--url must name a host and, if need be, a port" ;;
esac
host=$authority
case $authority in
\[*\]) ;;
\[*\]:*) host=${authority%:*} port=${authority##*:} ;;
*:*) host=${authority%:*} port=${authority##*:} ;;
esac
[ -z "$key_file" ] || [ -r "$key_file" ] || fail $LOCAL "cannot read $key_file"
[ -z "$server_ca" ] || [ -r "$server_ca" ] || fail $LOCAL "cannot read $server_ca"

# --- tools

has() { command -v "$1" >/dev/null 2>&1; }
has openssl || fail $LOCAL "openssl is missing"
if has curl; then
    transport=curl
elif [ $scheme = https ]; then
    transport=openssl
elif has wget; then
    transport=wget
else
    fail $LOCAL "curl or wget is missing"
fi
limit=
if has timeout; then limit='timeout 60'; fi

work=$(mktemp -d) || fail $LOCAL "no temporary folder"
locked=
finish() {
    rm -rf "$work"
    [ -z "$locked" ] || rm -rf "$dir/.enroll.lock"
}
trap finish EXIT
trap 'exit 1' INT TERM HUP

# One run at a time; the lock of a run that was killed does not count.
lock() {
    [ -z "$locked" ] || return 0
    if ! mkdir "$dir/.enroll.lock" 2>/dev/null; then
        other=$(cat "$dir/.enroll.lock/pid" 2>/dev/null) || other=
        if [ -n "$other" ] && kill -0 "$other" 2>/dev/null; then
            fail $LOCAL "another run (process $other) is in progress"
        fi
        rm -rf "$dir/.enroll.lock"
        mkdir "$dir/.enroll.lock" || fail $LOCAL "cannot write to $dir"
    fi
    locked=yes
    echo $$ >"$dir/.enroll.lock/pid"
}

# --- asking the service

# Leaves the answer's status in $status (000 for none), its code in $code, its body in $work/body, and
# what to say of it in $answer.
# ask METHOD PATH [BODY-FILE [HOW]], where HOW is `key` (send the API key), `certificate` (show ours)
# or `unverified`.
ask() {
    method=$1 path=$2 data=${3:-} how=${4:-}
    for file in body head said; do : >"$work/$file"; done
    status=000 code='' after=''
    ask_$transport
    [ -n "$status" ] || status=000
    if [ "$status" = 000 ]; then
        warn "$method $path: no answer $(tail -n 1 "$work/said")"
    else
        code=$(sed -n 's/^ *[Xx]-[Ee]rror-[Cc]ode: *\([A-Z_0-9]*\).*/\1/p' "$work/head")
        after=$(sed -n 's/^ *[Rr]etry-[Aa]fter: *\([0-9]*\).*/\1/p' "$work/head")
    fi
    case $path in
    /api/v1/certificates/*) ;; # looked up beside the request that is tried again
    *) if [ "$status" = 000 ]; then answer='no answer'; else answer=$status${code:+ $code}; fi ;;
    esac
}

distrust() { fail $UNTRUSTED "the server at $authority is not verified by $tls_ca: $*"; }

# Keys and tokens go through files and pipes: the process list shows everyone what stands in a
# command line.
ask_curl() {
    {
        printf 'silent\nshow-error\nhttp1.1\nmax-time = 30\nrequest = "%s"\n' "$method"
        printf 'url = "%s%s"\noutput = "%s/body"\ndump-header = "%s/head"\n' "$url" "$path" "$work" "$work"
        if [ -n "$data" ]; then
            printf 'header = "Content-Type: application/json"\ndata-binary = "@%s"\n' "$data"
        fi
        case $how in
        key) printf 'header = "Authorization: Bearer %s"\n' "$(cat "$key_file")" ;;
        certificate) printf 'cert = "%s/device.crt"\nkey = "%s/device.key"\n' "$dir" "$dir" ;;
        unverified) echo insecure ;;
        esac
        [ "$how" = unverified ] || [ $scheme = http ] || printf 'cacert = "%s"\n' "$tls_ca"
    } >"$work/curlrc"
    asked=0
    status=$(curl -q --config "$work/curlrc" --write-out '%{http_code}' 2>"$work/said") || asked=$?
    case $asked in
    0) ;;
    51 | 60) distrust "$(cat "$work/said")" ;;
    *) status=000 ;;
    esac
    tr -d '\r' <"$work/head" >"$work/plain"
    mv "$work/plain" "$work/head"
}

ask_openssl() {
    {
        printf '%s %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n' "$method" "$prefix$path" "$authority"
        [ "$how" != key ] || printf 'Authorization: Bearer %s\r\n' "$(cat "$key_file")"
        if [ -n "$data" ]; then
            printf 'Content-Type: application/json\r\nContent-Length: %d\r\n' "$(wc -c <"$data")"
        fi
        printf '\r\n'
        [ -z "$data" ] || cat "$data"
    } >"$work/request"
    name=${host#\[}
    name=${name%\]}
    set -- -quiet -connect "$host:$port"
    check=-verify_hostname
    case $name in
    *:*) check=-verify_ip ;;
    *[!0-9.]*) ;;
    *) check=-verify_ip ;;
    esac
    case $check in
    -verify_ip) set -- "$@" -noservername ;;
    *) set -- "$@" -servername "$name" ;;
    esac
    if [ "$how" != unverified ]; then
        set -- "$@" -CAfile "$tls_ca" -verify_return_error "$check" "$name"
    fi
    [ "$how" != certificate ] || set -- "$@" -cert "$dir/device.crt" -key "$dir/device.key"
    $limit openssl s_client "$@" <"$work/request" >"$work/answer" 2>"$work/said" || true
    if [ ! -s "$work/answer" ] && grep -q 'verify error\|verify failed' "$work/said"; then
        distrust "$(grep 'verify error\|verify failed' "$work/said" | head -n 1)"
    fi
    tr -d '\r' <"$work/answer" >"$work/plain"
    sed -n '1,/^$/p' "$work/plain" >"$work/head"
    sed '1,/^$/d' "$work/plain" >"$work/body"
    status=$(sed -n '1s,^HTTP/1\.[01] \([0-9][0-9][0-9]\).*,\1,p' "$work/head")
}

# Plain HTTP only. busybox's shows neither body nor fields of an error.
ask_wget() {
    set -- -S -O "$work/body"
    if wget --version 2>/dev/null | grep -q GNU; then
        set -- "$@" --tries=1 --timeout=30 --config="$work/wgetrc"
        : >"$work/wgetrc"
        [ "$how" != key ] || printf 'header = Authorization: Bearer %s\n' "$(cat "$key_file")" >"$work/wgetrc"
    elif [ "$how" = key ]; then
        set -- "$@" --header "Authorization: Bearer $(cat "$key_file")"
    fi
    [ -z "$data" ] || set -- "$@" --header 'Content-Type: application/json' --post-file "$data"
    $limit wget "$@" "$url$path" 2>"$work/said" || true
    cp "$work/said" "$work/head"
    status=$(sed -n 's,.*HTTP/1\.[01] \([0-9][0-9][0-9]\).*,\1,p' "$work/said" | tail -n 1)
}

# A text field of the answer, with its line breaks.
field() {
    printf %b "$(sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p" "$work/body")"
}

random() { echo $((0x$(openssl rand -hex 3) % $1)); }

# Sleeps before attempt number $1 + 1; half of the time by chance, and not less than was asked for.
pause() {
    [ "$1" -lt "$tries" ] || fail $LATER "$answer: giving up for now after $tries attempts"
    longest=60
    [ "$1" -gt 5 ] || longest=$((1 << $1))
    wait=$((longest / 2 + $(random $((longest / 2 + 1)))))
    [ -z "$after" ] || [ "$after" -le "$wait" ] || wait=$after
    [ "$wait" -ge 1 ] || wait=1
    [ "$wait" -le 60 ] || wait=60
    warn "$answer: trying again in $wait s"
    sleep "$wait"
}

# --- keys and certificates

fingerprint() {
    openssl x509 -noout -fingerprint -sha256 -in "$1" 2>/dev/null | sed 's/.*=//' | tr -d : | tr A-F a-f
}

# Whether certificate $1 is for key $2.
goes_with() {
    [ -s "$1" ] && [ -s "$2" ] || return 1
    openssl x509 -noout -pubkey -in "$1" >"$work/pub.crt" 2>/dev/null || return 1
    openssl pkey -pubout -in "$2" >"$work/pub.key" 2>/dev/null || return 1
    cmp -s "$work/pub.crt" "$work/pub.key"
}

# Whether certificate $1 is this device's, from the CA, whatever its dates. (`-no_check_time` keeps
# openssl from looking at them.)
is_ours() {
    openssl verify -no_check_time -purpose sslclient -CAfile "$ca" "$1" >/dev/null 2>&1 || return 1
    subject=$(openssl x509 -noout -subject -nameopt RFC2253 -in "$1") || return 1
    [ "$subject" = "subject=CN=$id" ]
}

# The certificate's lifetime in seconds, from dates like `Nov 25 00:33:00 2025 GMT`.
lifetime() {
    openssl x509 -noout -startdate -enddate -in "$1" | awk '
        { sub(/^[^=]*=/, ""); split($3, t, ":")
          m = (index("JanFebMarAprMayJunJulAugSepOctNovDec", $1) + 2) / 3
          y = $4; if (m <= 2) { y--; m += 12 }
          day = 365 * y + int(y / 4) - int(y / 100) + int(y / 400) + int((153 * (m - 3) + 2) / 5) + $2
          s[NR] = day * 86400 + t[1] * 3600 + t[2] * 60 + t[3] }
        END { print s[2] - s[1] }'
}

# What is begun is finished: both new files were complete on disk before the first was renamed.
finish_replacement() {
    if [ -e "$dir/device.crt.new" ]; then
        if goes_with "$dir/device.crt.new" "$dir/device.key.new"; then
            mv "$dir/device.key.new" "$dir/device.key"
            mv "$dir/device.crt.new" "$dir/device.crt"
        elif goes_with "$dir/device.crt.new" "$dir/device.key"; then
            mv "$dir/device.crt.new" "$dir/device.crt"
        else
            rm -f "$dir/device.crt.new"
        fi
        sync
    fi
}

# Takes certificate $1, which belongs to the new key.
take() {
    goes_with "$1" "$dir/device.key.new" || fail $UNTRUSTED "the certificate is not for our key"
    is_ours "$1" || fail $UNTRUSTED "the certificate is not $id's, or not from the CA $(fingerprint "$ca")"
    keep_ca
    cp "$1" "$dir/.device.crt.part"
    chmod 644 "$dir/.device.crt.part"
    sync
    mv "$dir/.device.crt.part" "$dir/device.crt.new"
    sync
    finish_replacement
    say "$dir/device.crt is valid until $(openssl x509 -noout -enddate -in "$dir/device.crt" | sed 's/.*=//')"
    exit 0
}

keep_ca() {
    [ "$ca" != "$dir/ca.crt" ] || return 0
    cp "$ca" "$dir/.ca.crt.part"
    chmod 644 "$dir/.ca.crt.part"
    sync
    mv "$dir/.ca.crt.part" "$dir/ca.crt"
    ca=$dir/ca.crt
}

# Makes the key for the next certificate, unless there is one whose certificate may already be
# signed: then that is looked for.
make_key() {
    if [ -s "$dir/device.key.new" ] && openssl pkey -noout -in "$dir/device.key.new" 2>/dev/null; then
        recover
    else
        openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$dir/.device.key.part" \
            2>"$work/said" || fail $LOCAL "openssl genpkey: $(cat "$work/said")"
        sync
        mv "$dir/.device.key.part" "$dir/device.key.new"
        sync
    fi
    printf '[req]\ndistinguished_name = dn\n[dn]\n' >"$work/req.cnf"
    openssl req -new -sha256 -config "$work/req.cnf" -key "$dir/device.key.new" -subj "/CN=$id" \
        -out "$work/csr" 2>"$work/said" || fail $LOCAL "openssl req: $(cat "$work/said")"
    csr=$(awk '{ printf "%s\\n", $0 }' "$work/csr")
}

# Certificates are public: one whose answer was lost can be had again.
recover() {
    ask GET "/api/v1/certificates/$id/download?format=pem"
    [ "$status" = 200 ] && openssl x509 -in "$work/body" -out "$work/found.crt" 2>/dev/null || return 0
    if goes_with "$work/found.crt" "$dir/device.key.new"; then take "$work/found.crt"; fi
}

# --- the work

# Decides which CA counts, in $ca, before anything is written.
trust() {
    tls_ca=$server_ca
    if [ -s "$dir/ca.crt" ]; then
        ca=$dir/ca.crt
    else
        ca=$work/ca.crt
        if [ -n "$tls_ca" ] || [ $scheme = http ]; then how_ca=''; else how_ca=unverified; fi
        attempt=1
        until
            ask GET /api/v1/ca '' "$how_ca"
            [ "$status" = 200 ]
        do
            case $status in
            000 | 429 | 5??) pause $attempt ;;
            *) fail $REFUSED "there is no CA at $url: $status $code" ;;
            esac
            attempt=$((attempt + 1))
        done
        openssl x509 -in "$work/body" -out "$ca" 2>/dev/null || fail $UNTRUSTED "what $url calls its CA is no certificate"
    fi
    [ -n "$tls_ca" ] || tls_ca=$ca
    found=$(fingerprint "$ca")
    if [ -n "$pin" ]; then
        [ "$found" = "$pin" ] || fail $UNTRUSTED "the CA is $found, not $pin"
    elif [ "$ca" != "$dir/ca.crt" ]; then
        warn "WARNING: trusting the CA that the service handed out, $found; give --ca-fingerprint to be sure"
    fi
}

# Ends the run if the service has refused for good.
refused() {
    case $status in
    000 | 429 | 5??) ;;
    *) fail $REFUSED "$1: $status $code $(field error)" ;;
    esac
}

onboard() {
    how_key=
    body="{\"device_id\":\"$id\"$replace}"
    [ -z "$key_file" ] || how_key=key
    printf %s "$body" >"$work/data"
    ask POST /api/v1/onboarding "$work/data" "$how_key"
    case $status in
    200) token=$(field provisioning_token) ;;
    409) conflict ;;
    *) refused onboarding ;;
    esac
}

# Another token is live, which ends soon (and with the API key is replaced), or the device has a
# certificate, which may be the one that we wait for. busybox's wget does not say which.
conflict() {
    case $code in
    TOKEN_ALREADY_ACTIVE) ;;
    DEVICE_HAS_ACTIVE_CERTIFICATE) has_certificate ;;
    *)
        ask GET "/api/v1/certificates/$id/status"
        [ "$(field status)" != active ] || has_certificate
        ;;
    esac
    token=
    [ -z "$key_file" ] || replace=',"replace":true'
}

has_certificate() {
    recover
    [ $state = none ] || fail $REFUSED "renewal needs https, or the certificate's end: $id has an active one"
    fail $REFUSED "$id has an active certificate for another key; have it revoked first"
}

sign() {
    printf '{"device_id":"%s","provisioning_token":"%s","csr":"%s"}' "$id" "$token" "$csr" >"$work/data"
    ask POST /api/v1/sign-csr "$work/data"
    case $status in
    200)
        field certificate >"$work/new.crt"
        take "$work/new.crt"
        ;;
    401) # used, perhaps by an attempt of ours whose answer was lost, or it has ended
        recover
        token=
        ;;
    409) conflict ;;
    *) refused signing ;;
    esac
}

enroll() {
    make_key
    token='' replace='' attempt=1
    while :; do
        if [ -z "$token" ]; then onboard; fi
        if [ -n "$token" ]; then sign; fi
        pause $attempt
        attempt=$((attempt + 1))
    done
}

renew() {
    make_key
    printf '{"csr":"%s"}' "$csr" >"$work/data"
    attempt=1
    while :; do
        ask POST /api/v1/renew "$work/data" certificate
        case $status in
        200)
            field certificate >"$work/new.crt"
            take "$work/new.crt"
            ;;
        000) recover ;;
        401)
            [ "$code" != CLIENT_CERTIFICATE_EXPIRED ] || return 0
            refused renewal
            ;;
        *) refused renewal ;;
        esac
        pause $attempt
        attempt=$((attempt + 1))
    done
}

dir=${dir%/}
[ ! -d "$dir" ] || lock
[ ! -d "$dir" ] || finish_replacement
ca=$dir/ca.crt
state=none
if goes_with "$dir/device.crt" "$dir/device.key" && [ -s "$ca" ] && is_ours "$dir/device.crt"; then
    if [ -n "$pin" ] && [ "$(fingerprint "$ca")" != "$pin" ]; then
        fail $UNTRUSTED "the CA in $dir is $(fingerprint "$ca"), not $pin"
    fi
    third=$(($(lifetime "$dir/device.crt") / 3))
    if openssl x509 -noout -checkend "$third" -in "$dir/device.crt" >/dev/null; then
        say "$dir/device.crt is good until $(openssl x509 -noout -enddate -in "$dir/device.crt" | sed 's/.*=//')"
        exit 0
    fi
    state=due
fi
[ "$splay" -eq 0 ] || sleep "$(random $((splay + 1)))"
trust
[ -d "$dir" ] || mkdir -p "$dir" || fail $LOCAL "cannot make $dir"
lock
if [ $state = due ] && [ $scheme = https ]; then renew; fi
enroll
