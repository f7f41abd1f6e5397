#!/bin/sh
# The device's side of mqtt-publisher-lite; see usage below. POSIX sh: runs under busybox ash.
set -eu
umask 077
# Programs answer in one language, and `A-Z` means those letters only.
LC_ALL=C
export LC_ALL
# Who starts this may have closed what it reads and writes, or may be gone: that ends nothing.
(: 3>&2) || exec 2>/dev/null
(: 3>&1) 2>/dev/null || exec >/dev/null
(: 3<&0) 2>/dev/null || exec </dev/null
trap : PIPE

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
  --secret-file FILE      holds the secret of the device's registration, instead of a key
  --ca-fingerprint SHA256 the CA to trust, as the service logs it at its start; without it the CA
                          that the service hands out the first time is trusted, with a warning
  --server-ca FILE        over HTTPS: the CA of the server's certificate, if that is another one
  --splay SECONDS         wait a random time up to this before asking the service, so that a fleet
                          with one crontab does not come at once
  --tries N               attempts before giving up until the next run (default 6)
  --help                  this text

Needs openssl (1.0.2 or newer), and curl or wget. Over HTTPS the server is verified with the CA, and
with no other that this device may trust; without curl, whose place wget cannot take there (busybox's
verifies nothing), all requests go through openssl s_client. Renewal needs HTTPS. Over plain HTTP a
device gets its next certificate by onboarding again, which the service allows when the old one has
ended (or with REENROLL=allow). Under the wget of busybox or OpenWrt, so over plain HTTP only, an API
key stands in the process list while it is sent; a secret is not sent by them at all.

Two attempts are 1 to 60 seconds apart, more and more, by chance. What a lost answer or a power cut
has interrupted is taken up by the next run: DIR/device.key.new is a key whose certificate may
already be signed. To trust another CA, remove DIR/ca.crt. The CA may be one that another has signed:
the fingerprint is its own, and DIR/ca.crt then holds the chain as the service hands it out.

exit codes:
  0  the certificate is there and good: kept, got or renewed
  1  something here failed: a file, a program that is missing, another run in progress
  2  wrong usage
  3  the service cannot be reached or cannot answer now, or this device's clock is wrong; what there
     was is still there: run it again
  4  the service refuses for good: key, name, a certificate that is active or revoked; the code says
  5  the CA or the server is not the one to trust, or the certificate is not what was asked for
END
}

LOCAL=1 USAGE=2 LATER=3 REFUSED=4 UNTRUSTED=5

# SECURITY: what a server has sent may stand in a message. It stays one line of plain text, whatever
# commands to a terminal it holds.
say() { printf 'enroll: %s\n' "$(printf '%.500s' "$*" | tr -c ' -~' '?')" 2>/dev/null || true; }
warn() { say "$*" >&2; }
fail() {
    failure=$1
    shift
    warn "$*"
    exit "$failure"
}

# --- what was asked for

url='' id='' dir='' key_file='' secret_file='' pin='' server_ca='' splay=0 tries=6
while [ $# -gt 0 ]; do
    case $1 in
    --help)
        usage
        exit 0
        ;;
    --url | --device-id | --dir | --api-key-file | --secret-file | --ca-fingerprint | --server-ca | --splay | --tries) ;;
    *) fail $USAGE "unknown option $1, see --help" ;;
    esac
    [ $# -ge 2 ] || fail $USAGE "$1 needs a value"
    case $1 in
    --url) url=${2%/} ;;
    --device-id) id=$2 ;;
    --dir) dir=${2%/} ;;
    --api-key-file) key_file=$2 ;;
    --secret-file) secret_file=$2 ;;
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
for number in "$splay" "$tries"; do
    case $number in '' | *[!0-9]* | 0?* | ??????????*) fail $USAGE "--splay and --tries are numbers" ;; esac
done
case $pin in
'') ;;
*[!0-9a-f]*) fail $USAGE "--ca-fingerprint is 64 hexadecimal digits" ;;
*) [ ${#pin} -eq 64 ] || fail $USAGE "--ca-fingerprint is 64 hexadecimal digits" ;;
esac
case $url in *[!!-~]*) fail $USAGE "--url may hold no spaces" ;; esac
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
[ -z "$key_file" ] || [ -z "$secret_file" ] || fail $USAGE "--api-key-file and --secret-file exclude each other"
key='' credential=$key_file$secret_file
[ -z "$server_ca" ] || [ -r "$server_ca" ] || fail $LOCAL "cannot read $server_ca"

# --- tools

has() { command -v "$1" >/dev/null 2>&1; }
for tool in awk cat chmod cmp cp cut date grep head mkdir mktemp mv openssl rm sed sleep sync tail tr wc; do
    has $tool || fail $LOCAL "$tool is missing"
done
if has curl; then
    transport=curl
elif [ $scheme = https ]; then
    transport=openssl
else
    transport=wget
    has wget || fail $LOCAL "curl or wget is missing"
    case $(wget --help 2>&1) in
    *GNU*) wget=gnu ;;
    *BusyBox*--header*--post-file*) wget=busybox ;;
    *BusyBox*) fail $LOCAL "this wget is too old: curl is needed" ;;
    *--header*--post-file*) wget=uclient ;; # OpenWrt's
    *) fail $LOCAL "this wget cannot send JSON: curl is needed" ;;
    esac
    # SECURITY: they take a field of the head as an argument only, which every process can read.
    [ "$wget" = gnu ] || [ -z "$secret_file" ] || fail $LOCAL "this wget would show the secret: curl is needed, or https"
fi

work=$(mktemp -d) || fail $LOCAL "no temporary folder"
folder_lock='' asleep=''
finish() {
    [ -z "$asleep" ] || kill "$asleep" 2>/dev/null || true
    rm -rf "$work"
    [ -z "$folder_lock" ] || rm -rf "$folder_lock"
}
trap finish EXIT
trap 'exit 1' INT TERM HUP

# Sleeps $1 seconds. A shell that itself waited for a command would hear a signal only after that.
nap() {
    sleep "$1" >/dev/null 2>&1 9<&- &
    asleep=$!
    wait "$asleep" || true
    asleep=''
}

# SECURITY: nobody counts as a CA but whom we name. Most programs look into the system's store, too,
# unless they are given another one; and not every option for that is in every openssl.
store=$work/store
mkdir "$store"
SSL_CERT_DIR=$store
SSL_CERT_FILE=/dev/null
export SSL_CERT_DIR SSL_CERT_FILE

# One run at a time. What flock holds is free when the run ends, however it ends, and leaves no file.
# Elsewhere a folder is the lock. A power cut leaves that behind, so it names its run.
locked=''
lock() {
    [ -z "$locked" ] || return 0
    locked=yes
    if has flock; then
        exec 9<"$dir"
        held=0
        flock -n 0 <&9 2>/dev/null || held=$?
        case $held in
        0)
            rm -rf "$dir/.enroll.lock"
            return
            ;;
        1) fail $LOCAL "another run is in progress" ;;
        esac # else a file system has no such locks
    fi
    if ! mkdir "$dir/.enroll.lock" 2>/dev/null; then
        [ -s "$dir/.enroll.lock/run" ] || sleep 1 # that run may be about to write its name
        other=$(cat "$dir/.enroll.lock/run" 2>/dev/null) || other=''
        if [ -n "$other" ] && [ "$(run_of "${other%% *}")" = "$other" ]; then
            fail $LOCAL "another run (process ${other%% *}) is in progress"
        fi
        rm -rf "$dir/.enroll.lock"
        mkdir "$dir/.enroll.lock" || fail $LOCAL "cannot write to $dir"
    fi
    folder_lock=$dir/.enroll.lock
    run_of $$ >"$folder_lock/run"
}

# Names a process so that no later one is taken for it: ids are used again, in a container at each
# start, but not with the same boot and moment. Where there is no /proc, the id alone counts.
run_of() {
    kill -0 "$1" 2>/dev/null || return 0
    boot=$(cat /proc/sys/kernel/random/boot_id 2>/dev/null) || boot=''
    begun=$(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 20) || begun=''
    echo "$1 $boot $begun"
}

# --- asking the service

# Leaves the answer's status in $status (000 for none), its code in $code, its body in $work/body, and
# what to say of it in $answer.
# ask METHOD PATH [BODY-FILE [HOW]], where HOW is `key` (send the API key), `certificate` (show ours)
# or `unverified`.
ask() {
    method=$1 path=$2 data=${3:-} how=${4:-}
    for file in body head said; do : >"$work/$file"; done
    rm -f "$work/cut"
    status=000 code='' after=''
    ask_$transport
    if [ -e "$work/cut" ]; then
        status=''
        echo "within a minute and 1 MiB" >"$work/said"
    fi
    status=${status:-000}
    if [ "$status" = 000 ]; then
        warn "$method $path: no answer $(tail -n 1 "$work/said")"
    else
        code=$(sed -n 's/^ *[Xx]-[Ee]rror-[Cc]ode: *\([A-Z_0-9]*\).*/\1/p' "$work/head" | head -n 1)
        after=$(sed -n 's/^ *[Rr]etry-[Aa]fter: *\([1-9][0-9]\{0,3\}\)[^0-9]*$/\1/p' "$work/head" | head -n 1)
    fi
    case $path in
    /api/v1/certificates/*) ;; # looked up beside the request that is tried again
    *) if [ "$status" = 000 ]; then answer='no answer'; else answer=$status${code:+ $code}; fi ;;
    esac
}

# Runs a command that talks to the server, for a minute and for 1 MiB at most. Not every device has
# `timeout`, and some have one with other options.
bounded() (
    exec 3<&0 9<&- # without the lock, which else would last as long as this
    (
        # shellcheck disable=SC3045 # a shell that knows no such limit goes on without
        ulimit -c 0 2>/dev/null || true
        ulimit -f 2048 2>/dev/null || true
        exec "$@"
    ) <&3 &
    running=$!
    (
        trap 'kill $!; exit' TERM
        sleep 60 &
        wait $!
        kill "$running"
    ) >/dev/null 2>&1 3<&- &
    watching=$!
    ended=0
    wait "$running" || ended=$?
    kill "$watching" 2>/dev/null || true
    [ "$ended" -le 128 ] || : >"$work/cut"
    exit "$ended"
)

distrust() {
    case $* in
    *'not yet valid'* | *expired* | *'activation date'* | *'expiration date'* | *BADCERT_FUTURE* | *_DATE_E*)
        fail $LATER "the server at $authority is not verified at this time, $(date -u): $*"
        ;;
    esac
    fail $UNTRUSTED "the server at $authority is not verified by ${server_ca:-the CA $found}: $*"
}

# For a string in quotes of curl's configuration.
quoted() { printf %s "$1" | sed 's/[\\"]/\\&/g'; }
# For the file of a client certificate, where curl takes what follows a colon for a password.
quoted_cert() { quoted "$(printf %s "$1" | sed 's/[\\:]/\\&/g')"; }

# Keys and tokens go through files and pipes: the process list shows everyone what stands in a
# command line.
ask_curl() {
    folder=$(quoted "$work")
    {
        printf 'silent\nshow-error\ngloboff\nhttp1.1\nmax-time = 30\nrequest = "%s"\n' "$method"
        printf 'url = "%s"\noutput = "%s/body"\n' "$(quoted "$url$path")" "$folder"
        printf 'dump-header = "%s/head"\n' "$folder"
        if [ -n "$data" ]; then
            printf 'header = "Content-Type: application/json"\ndata-binary = "@%s"\n' "$(quoted "$data")"
        fi
        case $how in
        key) printf 'header = "Authorization: Bearer %s"\n' "$(quoted "$key")" ;;
        certificate)
            printf 'cert = "%s"\n' "$(quoted_cert "$dir/device.crt")"
            printf 'key = "%s"\n' "$(quoted "$dir/device.key")"
            ;;
        unverified) echo insecure ;;
        esac
        if [ "$how" != unverified ] && [ $scheme = https ]; then
            cp "$tls_ca" "$store/ca.pem" # with wolfSSL, curl takes no empty store
            printf 'cacert = "%s"\ncapath = "%s/store"\n' "$(quoted "$tls_ca")" "$folder"
        fi
    } >"$work/curlrc"
    asked=0
    bounded curl -q --config "$work/curlrc" --write-out '%{http_code}' >"$work/status" 2>"$work/said" || asked=$?
    case $asked in
    0) status=$(cat "$work/status") ;;
    51 | 60) distrust "$(head -n 1 "$work/said")" ;;
    esac
    tr -d '\r' <"$work/head" >"$work/plain"
    mv "$work/plain" "$work/head"
}

ask_openssl() {
    {
        printf '%s %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n' "$method" "$prefix$path" "$authority"
        [ "$how" != key ] || printf 'Authorization: Bearer %s\r\n' "$key"
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
    *[!0-9.]*) set -- "$@" -servername "$name" ;;
    *) check=-verify_ip ;;
    esac
    if [ "$how" != unverified ]; then
        # SECURITY: without -verify, 1.0.2 goes on whatever it finds.
        # shellcheck disable=SC2086 # one option, or none
        set -- "$@" -CAfile "$tls_ca" -CApath "$store" $partial -verify 9 -verify_return_error "$check" "$name"
    fi
    [ "$how" != certificate ] || set -- "$@" -cert "$dir/device.crt" -key "$dir/device.key"
    bounded openssl s_client "$@" <"$work/request" >"$work/answer" 2>"$work/said" || true
    if [ ! -s "$work/answer" ]; then
        ! grep -qi 'unknown option' "$work/said" || fail $LOCAL "this openssl cannot verify a server's name: curl is needed"
        if grep -q 'verify error\|verify failed' "$work/said"; then
            distrust "$(grep 'verify error\|verify failed' "$work/said" | head -n 1)"
        fi
    fi
    end=$(printf '^\r*$') # of the head
    sed "/$end/q" "$work/answer" | tr -d '\r' >"$work/head"
    sed "1,/$end/d" "$work/answer" >"$work/body"
    status=$(sed -n '1s,^HTTP/1\.[01] \([0-9][0-9][0-9]\).*,\1,p' "$work/head")
    length=$(sed -n 's/^[Cc]ontent-[Ll]ength: *\([0-9]\{1,9\}\)$/\1/p' "$work/head" | head -n 1)
    [ "$(wc -c <"$work/body")" -ge "${length:-0}" ] || status=000 # the rest of it is lost
}

# Plain HTTP only. Of an error, busybox's shows neither body nor fields, and OpenWrt's the status alone.
ask_wget() {
    set -- -O "$work/body"
    [ "$wget" = uclient ] || set -- "$@" -S
    if [ "$wget" = gnu ]; then
        set -- "$@" --tries=1 --timeout=30 --max-redirect=0 --config="$work/wgetrc"
        : >"$work/wgetrc"
        [ "$how" != key ] || printf 'header = Authorization: Bearer %s\n' "$key" >"$work/wgetrc"
    elif [ "$how" = key ]; then
        set -- "$@" --header "Authorization: Bearer $key"
    fi
    [ -z "$data" ] || set -- "$@" --header 'Content-Type: application/json' --post-file "$data"
    asked=0
    bounded wget "$@" "$url$path" 2>"$work/said" || asked=$?
    tr -d '\r' <"$work/said" >"$work/head"
    status=$(sed -n 's,.*HTTP\(/1\.[01]\| error\) \([0-9][0-9][0-9]\).*,\2,p' "$work/said" | tail -n 1)
    case $asked-$status in
    0-) status=200 ;;
    [1-9]*-2??) status='' ;; # it has begun well only
    esac
}

# A text field of the answer, with its line breaks.
field() {
    printf %b "$(sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p" "$work/body" | head -n 1)"
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
    nap "$wait"
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

# When certificate $1 begins (startdate) or ends (enddate), in seconds since 1970, from a date like
# `notBefore=Nov 25 00:33:00 2025 GMT`.
seconds() {
    openssl x509 -noout "-$2" -in "$1" | awk '
        { sub(/^[^=]*=/, ""); split($3, t, ":")
          m = (index("JanFebMarAprMayJunJulAugSepOctNovDec", $1) + 2) / 3
          y = $4; if (m <= 2) { y--; m += 12 }
          day = 365 * y + int(y / 4) - int(y / 100) + int(y / 400) + int((153 * (m - 3) + 2) / 5) + $2 - 719469
          printf "%.0f\n", day * 86400 + t[1] * 3600 + t[2] * 60 + t[3] }'
}

# Whether certificate $1 is signed by a CA of the file $2, whatever the dates; what follows are more
# options. Old ones say of an error that it is one, and then OK.
signed() {
    certificate=$1 by=$2
    shift 2
    [ "$dates" != -attime ] || set -- "$@" -attime "$(($(seconds "$certificate" startdate) + 600))"
    [ "$dates" != -no_check_time ] || set -- "$@" -no_check_time
    # shellcheck disable=SC2086 # one option, or none
    openssl verify "$@" $partial -CAfile "$by" -CApath "$store" "$certificate" >"$work/said" 2>&1 &&
        grep -q ': OK$' "$work/said" && ! grep -q '^error [0-9]' "$work/said"
}

# How this openssl is told not to look at the clock, and that a CA need not be a root, tried on the
# file $1 of a CA: not every openssl knows each option. Without the second one, a chain must have a root.
learn() {
    for partial in -partial_chain ''; do
        for dates in -no_check_time -attime; do
            ! signed "$1" "$1" || return 0
        done
    done
    fail $LOCAL "openssl cannot verify by the CA $(fingerprint "$1"): $(tail -n 1 "$work/said")"
}

# Whether certificate $1 is this device's, from the CA (or from $2).
is_ours() {
    signed "$1" "${2:-$trusted}" -purpose sslclient || return 1
    issuer=$(openssl x509 -noout -issuer_hash -in "$1") || return 1
    [ "$issuer" = "$(openssl x509 -noout -subject_hash -in "${2:-$anchor}")" ] || return 1
    subject=$(openssl x509 -noout -subject -nameopt RFC2253 -in "$1" | sed 's/^subject= *//')
    [ "$subject" = "CN=$id" ]
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
    openssl x509 -in "$1" -out "$work/device.crt" 2>/dev/null || fail $UNTRUSTED "what was answered is no certificate"
    goes_with "$work/device.crt" "$dir/device.key.new" || fail $UNTRUSTED "the certificate is not for our key"
    is_ours "$work/device.crt" || fail $UNTRUSTED "the certificate is not $id's, or not from the CA $found"
    keep_ca
    keep "$work/device.crt" device.crt.new
    finish_replacement
    say "$dir/device.crt is valid until $(openssl x509 -noout -enddate -in "$dir/device.crt" | sed 's/.*=//')"
    exit 0
}

keep_ca() {
    [ "$ca" != "$dir/ca.crt" ] || return 0
    keep "$ca" ca.crt
    ca=$dir/ca.crt
}

# Puts a copy of the public file $1 into DIR as $2, whole or not at all.
keep() {
    cp "$1" "$dir/.$2.part"
    chmod 644 "$dir/.$2.part"
    sync
    mv "$dir/.$2.part" "$dir/$2"
    sync
}

# Makes the key for the next certificate, unless there is one whose certificate may already be
# signed: then that is looked for.
make_key() {
    if [ -s "$dir/device.key.new" ] && openssl pkey -noout -in "$dir/device.key.new" 2>/dev/null; then
        recover
    else
        openssl ecparam -name prime256v1 -genkey -noout -out "$dir/.device.key.part" \
            2>"$work/said" || fail $LOCAL "openssl ecparam: $(cat "$work/said")"
        sync
        mv "$dir/.device.key.part" "$dir/device.key.new"
        sync
    fi
    printf '[req]\ndistinguished_name = dn\nstring_mask = utf8only\n[dn]\n' >"$work/req.cnf"
    openssl req -new -sha256 -config "$work/req.cnf" -key "$dir/device.key.new" -subj "/CN=$id" \
        -out "$work/csr" 2>"$work/said" || fail $LOCAL "openssl req: $(cat "$work/said")"
    csr=$(awk '{ printf "%s\\n", $0 }' "$work/csr")
    rehearse
}

# A token is spent by the first certificate that is signed for it, so what `take` will do is tried
# before one is asked for, on a certificate of our own making.
rehearse() {
    openssl req -x509 -new -sha256 -days 2 -config "$work/req.cnf" -key "$dir/device.key.new" \
        -subj "/CN=$id" -out "$work/trial" 2>"$work/said" || fail $LOCAL "openssl req: $(cat "$work/said")"
    if ! goes_with "$work/trial" "$dir/device.key.new" || ! is_ours "$work/trial" "$work/trial"; then
        fail $LOCAL "this openssl cannot verify a certificate: $(tail -n 1 "$work/said")"
    fi
}

# Certificates are public: one whose answer was lost can be had again.
recover() {
    ask GET "/api/v1/certificates/$id/download?format=pem"
    [ "$status" = 200 ] && openssl x509 -in "$work/body" -out "$work/found.crt" 2>/dev/null || return 0
    if goes_with "$work/found.crt" "$dir/device.key.new"; then take "$work/found.crt"; fi
}

# --- the CA

# Writes the certificates of the PEM file $1, without those before number $2, and nothing else that
# stands there.
certificates() {
    tr -d '\r' <"$1" | awk -v from="$2" '
        { sub(/[ \t]+$/, "") }
        /^-----BEGIN CERTIFICATE-----$/ { n++; inside = 1 }
        inside && n >= from && /^([A-Za-z0-9+\/=]+|-----(BEGIN|END) CERTIFICATE-----)$/ { print }
        /^-----END CERTIFICATE-----$/ { inside = 0 }'
}

# Takes the file $1, which is called $2, as that of the CA: its first certificate is the one that we trust.
adopt() {
    ca=$1 anchor=$work/anchor.crt
    openssl x509 -in "$ca" -out "$anchor" 2>/dev/null || fail $UNTRUSTED "$2 is no certificate"
    found=$(fingerprint "$anchor")
    [ -z "$pin" ] || [ "$found" = "$pin" ] || fail $UNTRUSTED "$2 is $found, not $pin"
    learn "$ca"
    trusted=$anchor
    [ -n "$partial" ] || trusted=$ca
    tls_ca=${server_ca:-$trusted}
    # A CA that is no root is enough for curl since 7.68 only.
    if [ "$scheme$transport" = httpscurl ] && ! is_root && [ "$(curl_version)" -lt 7068 ]; then
        transport=openssl
    fi
}

is_root() {
    [ "$(openssl x509 -noout -issuer_hash -in "$anchor")" = "$(openssl x509 -noout -subject_hash -in "$anchor")" ]
}

# 7068 for 7.68.0.
curl_version() {
    curl --version | awk 'NR == 1 { split($2, v, "."); print v[1] * 1000 + v[2] }'
}

# Behind the CA may stand what has signed it, up to the root.
# SECURITY: each must be signed by one behind it, else whoever answers could add a CA of his own, which
# the MQTT client, or an openssl that wants a root, would trust.
chain_holds() {
    n=1
    while
        certificates "$ca" $((n + 1)) >"$work/behind"
        [ -s "$work/behind" ]
    do
        certificates "$ca" $n | openssl x509 >"$work/link" 2>/dev/null || return 1
        signed "$work/link" "$work/behind" || return 1
        n=$((n + 1))
        [ $n -le 9 ] || return 1
    done
}

# Asks the service for its CA, which decides what is trusted if there was none. Nothing is written yet.
trust() {
    [ -z "$server_ca" ] || [ -n "$ca" ] || learn "$server_ca"
    how_ca=''
    [ -n "$tls_ca" ] || [ $scheme = http ] || how_ca=unverified
    attempt=1
    until
        [ -z "$tls_ca" ] || [ $scheme = http ] || check_clock
        ask GET /api/v1/ca '' "$how_ca"
        [ "$status" = 200 ]
    do
        case $status in
        000 | 429 | 5??) pause $attempt ;;
        *) fail $REFUSED "there is no CA at $url: $status $code" ;;
        esac
        attempt=$((attempt + 1))
    done
    if [ -n "$ca" ]; then
        [ "$(fingerprint "$work/body")" = "$found" ] ||
            fail $UNTRUSTED "what $url calls its CA is $(fingerprint "$work/body"), not $found of $ca"
        return
    fi
    certificates "$work/body" 1 >"$work/ca.crt"
    adopt "$work/ca.crt" "what $url calls its CA"
    chain_holds || fail $UNTRUSTED "what $url sends with its CA is not what has signed it"
    openssl x509 -noout -purpose -in "$anchor" | grep -q '^SSL client CA : Yes' ||
        fail $UNTRUSTED "the CA $found may not sign certificates of clients"
    [ $scheme = http ] || check_clock
    [ -n "$pin" ] ||
        warn "WARNING: trusting the CA that the service handed out, $found; give --ca-fingerprint to be sure"
}

# Over HTTPS the clock must be right, at least so far that the CA has begun.
check_clock() {
    [ "$(date +%s)" -ge "$(seconds "$tls_ca" startdate)" ] ||
        fail $LATER "the clock shows $(date -u), before the CA was made: it is not set yet"
}

# --- the work

# Reads the key or secret when it is needed: who has a certificate may have removed a secret that is used.
read_credential() {
    [ -n "$credential" ] || return 0
    [ -r "$credential" ] || fail $LOCAL "cannot read $credential"
    # Its first line, without what the editors of other systems leave: CR, blanks, a byte order mark.
    key=$(head -n 1 "$credential" | tr -d '\r\t ')
    key=${key#"$(printf '\357\273\277')"}
    case $key in '' | *[!!-~]*) fail $LOCAL "the first line of $credential is no key: visible ASCII is" ;; esac
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
    [ -z "$key" ] || how_key=key
    printf %s "$body" >"$work/data"
    ask POST /api/v1/onboarding "$work/data" "$how_key"
    case $status in
    200)
        token=$(field provisioning_token)
        case $token in *[!A-Za-z0-9._-]*) token='' ;; esac
        ;;
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
    [ -z "$key_file" ] || replace=',"replace":true' # with a secret, that goes without saying
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

# Into a folder `mv` would put what is to take its place. Container engines make one for a mount.
for file in ca.crt device.crt device.key device.key.new; do
    [ ! -d "$dir/$file" ] || fail $LOCAL "$dir/$file is a folder"
done
ca='' tls_ca=$server_ca partial='' state=none
[ ! -d "$dir" ] || lock
[ ! -d "$dir" ] || finish_replacement
[ ! -s "$dir/ca.crt" ] || adopt "$dir/ca.crt" "the CA in $dir"
if [ -n "$ca" ] && goes_with "$dir/device.crt" "$dir/device.key" && is_ours "$dir/device.crt"; then
    third=$((($(seconds "$dir/device.crt" enddate) - $(seconds "$dir/device.crt" startdate)) / 3))
    if openssl x509 -noout -checkend "$third" -in "$dir/device.crt" >/dev/null; then
        say "$dir/device.crt is good until $(openssl x509 -noout -enddate -in "$dir/device.crt" | sed 's/.*=//')"
        exit 0
    fi
    state=due
fi
renews=''
[ $state != due ] || [ $scheme != https ] || renews=yes
[ -n "$renews" ] || read_credential
[ "$splay" -eq 0 ] || nap "$(random $((splay + 1)))"
trust
[ -d "$dir" ] || (umask 022 && mkdir -p "$dir" && chmod 700 "$dir") || fail $LOCAL "cannot make $dir"
lock
if [ -n "$renews" ]; then
    renew
    read_credential
fi
enroll
