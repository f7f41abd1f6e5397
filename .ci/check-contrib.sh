#!/bin/sh
# Checks the files of contrib/ with the tools that read them, as far as that can be done without
# installing them: systemd-analyze and systemd-sysusers, strace against the unit's filter of system
# calls, shellcheck and a stub of procd, monit, a broker that is told of lists, and the program itself.
#
# usage: .ci/check-contrib.sh
#
# MPL_BIN names the program; else target/release, else target/debug. It needs root, since it gives files
# to others; on Debian it installs missing tools. The Dockerfile is tried by .ci/check-chroot.sh,
# which has a static program.
set -eu
me="contrib"
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/../scripts/lib.sh"
contrib=$root/contrib
# Most that `systemd-analyze security` may find wanting, in tenths of its points (0 is best, 100 worst).
threshold=12
server=
broker=
watcher=
service=
make_work

leave() {
    # shellcheck disable=SC2086 # those that there are
    end $watcher $broker $service
    # strace does not end for a signal, but when the program does that it watches.
    [ -z "$server" ] || kill "$(sed -n '1s/ .*//p' "$work/trace")" 2>/dev/null || true
}

tools systemd-analyze:systemd shellcheck strace monit curl openssl mosquitto busybox \
    setpriv:util-linux unshare:util-linux nsenter:util-linux faketime
find_service

# --- systemd: the units as they are, with this program in its place.
units=$work/units
mkdir "$units"
cp "$contrib"/systemd/*.service "$contrib"/systemd/*.path "$contrib"/systemd/*.timer "$units"
sed "s|^ExecStart=/usr/local/bin/mqtt-publisher-lite\$|ExecStart=$bin|" \
    "$contrib/systemd/mqtt-publisher-lite.service" >"$units/mqtt-publisher-lite.service"
grep -q "^ExecStart=$bin\$" "$units/mqtt-publisher-lite.service" || fail "the unit starts another program"
sed -i "s|^ExecStart=/usr/local/bin/mqtt-publisher-lite |ExecStart=$bin |" "$units/mosquitto-certificate.service"
for unit in mqtt-publisher-lite.service mosquitto-crl.path mosquitto-crl.service \
    mosquitto-certificate.service mosquitto-certificate.timer; do
    systemd-analyze verify --man=no "$units/$unit" >"$work/verify" 2>&1 || fail "$unit: $(cat "$work/verify")"
    # What is merely ignored, a key that is misspelt for instance, is only said.
    grep -F "$units" "$work/verify" >&2 && fail "systemd-analyze finds fault with $unit"
    ok "systemd-analyze verify $unit"
done
systemd-analyze security --no-pager --offline=true --threshold=$threshold \
    "$units/mqtt-publisher-lite.service" >"$work/security" || fail "$(tail -1 "$work/security")"
ok "$(tail -1 "$work/security" | sed 's/^[^O]*//; s/ [^ ]*$//')"

tools promtool
promtool check rules "$contrib/alerts.yml" >"$work/rules" 2>&1 || fail "alerts.yml: $(cat "$work/rules")"
python3 -m json.tool "$contrib/grafana.json" >/dev/null || fail "grafana.json is no JSON"
ok "alerts.yml and grafana.json"

# --- The installation as docs/operations.md and docs/upgrade.md give it, into a folder instead of /: each
# command is the real one, but for paths and names of users, which are those of that folder.
sysroot=$work/sysroot
mkdir -p "$sysroot/usr/local/bin" "$sysroot/usr/lib/sysusers.d" "$sysroot/etc/systemd/system" "$work/shims" "$work/source"
ln -s "$contrib" "$bin" "$work/source"
cat >"$work/shims/install" <<END
#!/bin/sh
set -eu
number() { sed -n "s/^mqtt-lite:[^:]*:\([0-9]*\):.*/\1/p" "$sysroot/etc/\$1"; }
for word; do
    shift
    case \$word in
        /dev/*) ;;
        /*) word=$sysroot\$word ;;
        mqtt-lite) case \$last in -g) word=\$(number group) ;; -o) word=\$(number passwd) ;; esac ;;
    esac
    last=\$word
    set -- "\$@" "\$word"
done
exec $(command -v install) "\$@"
END
cat >"$work/shims/systemd-sysusers" <<END
#!/bin/sh
exec $(command -v systemd-sysusers) --root="$sysroot" "\$@"
END
# Nothing runs there that could be reloaded or started.
cat >"$work/shims/systemctl" <<END
#!/bin/sh
case "\$1 \$2" in
    "daemon-reload ") ;;
    "enable --now") exec $(command -v systemctl) --root="$sysroot" --quiet enable "\$3" ;;
    *) exit 1 ;;
esac
END
chmod 755 "$work/shims"/*
# The blocks of a page that are marked as run by this.
blocks_of() { awk '/^ *```sh by \.ci\/check-contrib\.sh/ { on = 1; next } /^ *```/ { on = 0 } on' "$root/$1"; }
installed() { [ "$(stat -c '%a %g' "$sysroot$1")" = "$2" ] || fail "$1 has $(stat -c '%a %g' "$sysroot$1"), not $2"; }
blocks_of docs/operations.md >"$work/install.sh"
[ "$(grep -c '^ *install' "$work/install.sh")" -ge 5 ] || fail "docs/operations.md does not say how to install"
(cd "$work/source" && PATH=$work/shims:$PATH sh -eu "$work/install.sh" >"$work/installed" 2>&1) ||
    fail "the page's installation: $(cat "$work/installed")"
id=$(sed -n 's/^mqtt-lite:[^:]*:\([0-9]*\):.*/\1/p' "$sysroot/etc/group")
[ -n "$id" ] || fail "sysusers made no group"
grep -q '^mqtt-lite:' "$sysroot/etc/passwd" || fail "sysusers made no user"
installed /usr/local/bin/mqtt-publisher-lite "755 0"
installed /etc/mqtt-publisher-lite "750 $id"
installed /etc/mqtt-publisher-lite/environment "640 $id"
grep -q '^DATA_DIR=/var/lib/mqtt-publisher-lite$' "$sysroot/etc/mqtt-publisher-lite/environment" ||
    fail "commands that are given the settings would look for the data elsewhere"
for unit in multi-user.target.wants/mqtt-publisher-lite.service multi-user.target.wants/mosquitto-crl.path \
    timers.target.wants/mosquitto-certificate.timer; do
    [ -L "$sysroot/etc/systemd/system/$unit" ] || fail "$unit is not enabled"
done
"$sysroot/usr/local/bin/mqtt-publisher-lite" --version >"$work/version" || fail "what was installed does not run"
ok "the page's installation: $(cat "$work/version"), user $id, three units enabled"
openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=old -days 30 -keyout "$work/old.key" \
    -addext keyUsage=critical,keyCertSign,cRLSign -out "$work/old.crt" 2>/dev/null
blocks_of docs/upgrade.md >"$work/upgrade.sh"
(
    cd "$work/source"
    MQTT_TLS_CA_BASE64=$(base64 -w 0 "$work/old.crt")
    MQTT_TLS_CA_KEY_BASE64=$(base64 -w 0 "$work/old.key")
    export MQTT_TLS_CA_BASE64 MQTT_TLS_CA_KEY_BASE64
    PATH=$work/shims:$PATH exec sh -eu "$work/upgrade.sh" >"$work/installed" 2>&1
) ||
    fail "the CA of docs/upgrade.md: $(cat "$work/installed")"
installed /var/lib/mqtt-publisher-lite/ca/root-ca.key "600 0"
DATA_DIR=$sysroot/var/lib/mqtt-publisher-lite "$bin" server-certificate broker.lan --out "$work/broker" >/dev/null ||
    fail "the CA that docs/upgrade.md puts there is not read"
openssl verify -CAfile "$work/old.crt" "$work/broker/server.crt" >/dev/null || fail "another CA signed"
ok "docs/upgrade.md: the older service's CA signs"

# --- The filter of system calls: all that the program does on its whole way must be in it.
# filter NAME: the system calls of a set, and of the sets in it.
filter() {
    systemd-analyze syscall-filter "$1" | sed -n 's/^    \([@a-z_0-9-]*\)$/\1/p' >"$work/set.$1"
    grep -v '^@' "$work/set.$1" || true
    for set in $(grep '^@' "$work/set.$1" || true); do filter "$set"; done
}
filter @system-service | sort -u >"$work/allowed"
{ filter @privileged; filter @resources; } | sort -u >"$work/denied"
# @privileged holds @chown, which also unprivileged programs call; what is denied is denied.
comm -23 "$work/allowed" "$work/denied" >"$work/permitted"
printf '%s\n' execve getrlimit prlimit64 >>"$work/permitted"
port=$(free_port $((20000 + $$ % 12000)))
# In the unit's mask, too: the broker must be able to read what it reads, and nobody the keys.
(
    umask 077
    exec env -i PATH="$PATH" DATA_DIR="$work/data" PORT="$port" HTTP_HOST=127.0.0.1 \
        NOTIFY_SOCKET="@mqtt-lite-nobody-$$" WATCHDOG_USEC=200000 \
        strace -f -qq -o "$work/trace" "$bin"
) 2>"$work/log" &
server=$!
await "the server answers" "$server" healthy "$port"
"$root/scripts/smoke.sh" "http://127.0.0.1:$port" >/dev/null || fail "the smoke test"
# What monit would run every cycle, as root, on this server and on none: no value may run as a command.
# shellcheck disable=SC2016 # to be expanded by nobody
{
    printf 'HTTP_HOST=127.0.0.1\nPORT=%s\n' "$port"
    printf '%s=abcdefgh12345678;touch${IFS}%s\n' ADMIN_API_KEY "$work/executed" HTTP_A "$work/executed"
    printf '%s=$(touch %s) `touch %s`\n' HTTP_B "$work/executed" "$work/executed"
} >"$work/environment.monit"
sed -n 's/^ *with path "\(.*\)"$/\1/p' "$contrib/monit/mqtt-publisher-lite.conf" |
    sed "s|/etc/mqtt-publisher-lite/environment|$work/environment.monit|; s|/usr/local/bin/mqtt-publisher-lite|$bin|" >"$work/monit.sh"
grep -q "^$bin --env-file $work/environment.monit healthcheck" "$work/monit.sh" || fail "monit runs something else"
sh -eu "$work/monit.sh" || fail "monit's check of a server that is well"
sed -i 's/^PORT=.*/PORT=1/' "$work/environment.monit"
if sh -eu "$work/monit.sh" 2>/dev/null; then fail "monit's check of no server"; fi
[ ! -e "$work/executed" ] || fail "monit's check runs a setting as a command"
ok "monit's check"
curl --silent --fail --output /dev/null "http://127.0.0.1:$port/metrics" || fail "/metrics"
child=$(sed -n '1s/ .*//p' "$work/trace")
kill -HUP "$child"
sleep 0.5
kill -TERM "$child"
wait "$server" || fail "it did not end well: $(cat "$work/log")"
server=
# With or without an abi's number behind it.
sed -n 's/^[0-9]* *\([a-z_0-9]*\)(.*/\1/p' "$work/trace" | sort -u >"$work/called"
sort -u "$work/permitted" | comm -23 "$work/called" - >"$work/refused"
[ ! -s "$work/refused" ] || fail "outside of the unit's filter: $(tr '\n' ' ' <"$work/refused")"
ok "$(wc -l <"$work/called") system calls, all within the unit's filter"
if grep -E '(mmap|mprotect|pkey_mprotect)\(.*PROT_WRITE\|PROT_EXEC' "$work/trace" >&2; then
    fail "memory that can be written and executed"
fi
ok "no memory that can be written and executed"
readable() { [ "$(stat -c %a "$work/data/$1")" = "$2" ] || fail "$1 has mode $(stat -c %a "$work/data/$1")"; }
readable ca/root-ca.crt 644
readable ca/root-ca.key 600
readable ca 755
readable jwt-secret 600
[ ! -e "$work/data/ca/crl.pem" ] || readable ca/crl.pem 644
ok "modes under the unit's mask"

# --- The example of the environment: names that exist, and values that hold together.
sed -n 's/^#\([A-Z_]*=\)/\1/p' "$contrib/environment.example" >"$work/environment"
"$bin" --help >"$work/help"
while IFS='=' read -r name _; do
    grep -q "^ *${name%_FILE}\\b" "$work/help" || fail "environment.example: $name is no setting"
done <"$work/environment"
mkdir "$work/etc"
# TLS=auto is the other way to what TLS_CERT is one of.
sed "s|=/etc/mqtt-publisher-lite/|=$work/etc/|; s|=/var/lib/|=$work/|; /^TLS=auto\$/d" "$work/environment" \
    >"$work/etc/environment"
for key in onboarding-api-key admin-api-key redis-password; do
    head -c 24 /dev/urandom | base64 >"$work/etc/$key"
done
echo "anna:$(head -c 24 /dev/urandom | base64)" >"$work/etc/admin-api-keys"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=x \
    -keyout "$work/etc/server.key" -out "$work/etc/server.crt" 2>/dev/null
for file in redis-ca.crt redis-client.crt; do cp "$work/etc/server.crt" "$work/etc/$file"; done
cp "$work/etc/server.key" "$work/etc/redis-client.key"
# shellcheck disable=SC2046 # one word for each setting; the file allows no spaces
env -i $(cat "$work/etc/environment") "$bin" check-config --offline >/dev/null || fail "environment.example"
ok "environment.example: $(wc -l <"$work/environment") settings"

shellcheck "$contrib"/mosquitto/*.sh

# --- OpenWrt: the scripts, with every function of procd that they call written down.
init=$contrib/openwrt/mqtt-publisher-lite.init
for script in "$init" "$contrib/openwrt/mosquitto-crl.init"; do
    sh -n "$script"
    shellcheck -s sh "$script"
done
printf '# a remark\n\nPORT=4444\nREDIS_PASSWORD=a b\n' >"$work/etc/environment"
stub() {
    # shellcheck disable=SC2016 # to be expanded by the shell that runs it
    echo 'tell() { printf "%s:" "$1"; shift; printf " <%s>" "$@"; echo; }'
    for name in open_instance set_param append_param close_instance send_signal; do
        echo "procd_$name() { tell $name \"\$@\"; }"
    done
    for name in user_add mkdir chown; do echo "$name() { tell $name \"\$@\"; }"; done
    echo 'group_add_next() { echo 4711; }'
    echo 'user_exists() { return 1; }'
}
{ stub; cat "$init"; echo 'start_service; reload_service'; } >"$work/run.sh"
for shell in "sh" "busybox sh"; do
    MPL_CONF=$work/etc $shell -eu "$work/run.sh" >"$work/calls" || fail "$shell: $(cat "$work/calls")"
    cat >"$work/expected" <<EXPECTED
user_add: <mqtt-lite> <> <4711>
mkdir: <-p> <$work/etc/data>
chown: <mqtt-lite> <$work/etc/data>
open_instance: <>
set_param: <command> </usr/bin/mqtt-publisher-lite>
set_param: <user> <mqtt-lite>
set_param: <no_new_privs> <1>
set_param: <env> <DATA_DIR=$work/etc/data>
append_param: <env> <PORT=4444>
append_param: <env> <REDIS_PASSWORD=a b>
set_param: <limits> <nofile=4096 4096> <core=0>
set_param: <respawn> <3600> <5> <0>
set_param: <term_timeout> <15>
set_param: <stdout> <1>
set_param: <stderr> <1>
close_instance: <>
send_signal: <mqtt-publisher-lite> <*> <HUP>
EXPECTED
    diff "$work/expected" "$work/calls" >&2 || fail "the init script does something else under $shell"
    ok "the init script under $shell"
done
sed "s|^PROG=.*|PROG=$work/prog|" "$work/run.sh" | sed '$d' >"$work/check.sh"
echo check >>"$work/check.sh"
# shellcheck disable=SC2016 # to be expanded when it runs
printf '#!/bin/sh\necho "$1 $PORT $REDIS_PASSWORD $DATA_DIR"\n' >"$work/prog"
chmod +x "$work/prog"
[ "$(MPL_CONF=$work/etc sh -eu "$work/check.sh")" = "healthcheck 4444 a b $work/etc/data" ] || fail "the script's check"
ok "the init script's check"

# Installed as docs/openwrt.md says, into a folder instead of /, and upgraded twice: what sysupgrade
# keeps is what it finds by /etc/sysupgrade.conf, as its own script does; the rest is new each time.
router=$work/router
mkdir -p "$router/etc/init.d" "$router/etc/rc.d" "$router/usr/bin"
printf '## Files to keep\n\n/etc/sysupgrade.conf\n' >"$router/etc/sysupgrade.conf"
blocks_of docs/openwrt.md >"$work/openwrt.sh"
[ "$(grep -c '^/etc/init.d/.* enable$' "$work/openwrt.sh")" -eq 2 ] || fail "docs/openwrt.md starts something else"
# /etc/rc.common's `enable` makes links of these names; nothing is started.
while read -r script _; do
    name=${script##*/}
    order() { sed -n "s/^$1=//p" "$work/source/contrib/openwrt/$name.init"; }
    ln -sf "../init.d/$name" "$router/etc/rc.d/S$(order START)$name"
    ln -sf "../init.d/$name" "$router/etc/rc.d/K$(order STOP)$name"
done <<END
$(grep '^/etc/init.d/.* enable$' "$work/openwrt.sh")
END
# In the block for sysupgrade.conf such lines are no commands.
awk '/^cat >>/ { on = 1 } on { print } /^END$/ { on = 0 }' "$work/openwrt.sh" >"$work/keep.sh"
awk '/^cat >>/ { on = 1 } !on { print } /^END$/ { on = 0 }' "$work/openwrt.sh" | grep -v '^/etc/init.d/' >"$work/copy.sh"
sed "s, /, $router/,g" "$work/copy.sh" >"$work/copy.here"
sed "1s,>>/,>>$router/," "$work/keep.sh" >"$work/keep.here"
if grep -h '[ >]/' "$work/copy.here" | grep -v "$router"; then fail "this would go to this machine"; fi
(cd "$work/source" && sh -eu "$work/copy.here" && sh -eu "$work/keep.here") || fail "docs/openwrt.md: installing"
mkdir -p "$router/etc/mqtt-publisher-lite/data/ca"
echo key >"$router/etc/mqtt-publisher-lite/data/ca/root-ca.key"
(cd "$router" && find . ! -type d | sort) >"$work/before"
for upgrade in 1 2; do
    (
        cd "$router"
        # shellcheck disable=SC2046 # words, as sysupgrade reads them
        find $(sed -ne '/^[[:space:]]*$/d; /^#/d; s|^/|./|; p' etc/sysupgrade.conf) -type f -o -type l 2>/dev/null |
            sort -u | tar -cf "$work/kept.tar" -T -
    )
    rm -rf "$router"
    mkdir -p "$router"
    tar -xf "$work/kept.tar" -C "$router"
done
(cd "$router" && find . ! -type d | sort) | diff "$work/before" - >&2 || fail "upgrade $upgrade loses files"
"$router/usr/bin/mqtt-publisher-lite" --version >/dev/null || fail "the kept program does not run"
ok "docs/openwrt.md: $(wc -l <"$work/before") files are there after two upgrades"

# --- Who tells the broker, where the service's user may not: each way that docs/mosquitto.md has,
# besides systemd's, with a service and a broker that have users of their own.
{ stub; cat "$contrib/openwrt/mosquitto-crl.init"; echo start_service; } >"$work/run.sh"
MPL_CONF=/etc/mqtt-publisher-lite busybox sh -eu "$work/run.sh" >"$work/calls"
procd=$(sed -n 's/^set_param: <command> <\(.*\)>$/\1/p' "$work/calls" | sed 's/> </ /g')
cron=$(sed -n 's/^    \* \* \* \* \*  \(on-new-crl\.sh .*\)/\1/p' "$root/docs/mosquitto.md")
container=$(sed -n 's|^ *eclipse-mosquitto:2 ||p' "$root/docs/mosquitto.md")
as_service="setpriv --reuid 4711 --regid 4711 --clear-groups"
as_broker="setpriv --reuid 1883 --regid 1883 --clear-groups"
chmod 755 "$work"
mkdir "$work/users" "$work/mosquitto"
chown 4711:4711 "$work/users"
chown 1883:1883 "$work/mosquitto"
list=$work/users/data/ca/crl.pem
port=$(free_port "$port")
# shellcheck disable=SC2086 # a command and its arguments
env -i PATH="$PATH" DATA_DIR="$work/users/data" PORT="$port" HTTP_HOST=127.0.0.1 \
    ADMIN_API_KEY=admin-key-of-the-check $as_service "$bin" 2>"$work/users.log" &
service=$!
await "the service of a user of its own answers" "$service" healthy "$port"
[ "$(stat -c %u "$list")" -eq 4711 ] || fail "the list belongs to $(stat -c %U "$list")"
broker_port=$(free_port $((port + 1)))
printf 'listener %s 127.0.0.1\nallow_anonymous true\nlog_dest file %s/log\nlog_type all\n' \
    "$broker_port" "$work/mosquitto" >"$work/mosquitto.conf"

# has_read N: whether the broker has read its files again so many times.
has_read() { [ "$(grep -c 'Reloading config' "$work/mosquitto/log")" -ge "$1" ]; }

# revoke NAME: a device gets its certificate, and loses it.
revoke() {
    "$root/scripts/enroll.sh" --url "http://127.0.0.1:$port" --device-id "$1" --dir "$work/device.$1" \
        >"$work/enrolled" 2>&1 || fail "enroll.sh: $(cat "$work/enrolled")"
    curl --silent --fail --output /dev/null -X DELETE -H 'Authorization: Bearer admin-key-of-the-check' \
        "http://127.0.0.1:$port/api/v1/certificates/$1" || fail "$1 is not revoked"
}

# told NAME WHO COMMAND: by that command of the page, with this check's paths, a new list reaches the broker.
told() {
    [ -n "$3" ] || fail "$1: no command"
    rm -f "$work/mosquitto/log"
    # As in a container: process 1 of its own numbers.
    # shellcheck disable=SC2086 # a command and its arguments
    (exec unshare --pid --fork $as_broker mosquitto -c "$work/mosquitto.conf") 2>"$work/broker.log" &
    broker=$!
    await "the broker runs" "$broker" grep -qs running "$work/mosquitto/log"
    inner=$(tr -d ' ' <"/proc/$broker/task/$broker/children")
    command=$(echo "$3" | sed "s|[^ ]*on-new-crl.sh|sh $contrib/mosquitto/on-new-crl.sh|; s|[^ ]*/crl.pem|$list|
        s|/run/|$work/|; s|killall -HUP mosquitto|kill -HUP $inner|")
    if [ "$2" = once ]; then
        $command
        has_read 1 || await "$1 tells the broker" "$broker" has_read 1
        $command # the same list: nothing to tell
        revoke "$1"
        $command
    else
        within=
        [ "$2" != container ] || within="nsenter --target $inner --pid $as_broker"
        # shellcheck disable=SC2086 # a command and its arguments
        (exec $within $command) &
        watcher=$!
        await "$1 tells the broker" "$watcher" has_read 1
        revoke "$1"
    fi
    await "$1 tells the broker of the new list" "$broker" has_read 2
    sleep 0.3
    if has_read 3; then fail "$1 tells the broker more than once"; fi
    kill "$inner"
    [ -z "$watcher" ] || kill "$watcher"
    end $watcher $broker
    broker='' watcher=''
    ok "$1 tells the broker of a new list"
}
# The service's user cannot, which is why.
sleep 60 &
process=$!
if $as_service kill -HUP $process 2>/dev/null; then fail "a user may signal another's process"; fi
end $process
told openwrt root "$procd"
told container container "$container"
told cron once "$cron"

# --- The broker's certificate, renewed by what docs/https.md has, while a broker shows it: today there is
# nothing to do, in 265 days there is, once.
certs=$work/mosquitto/certs
DATA_DIR=$work/users/data "$bin" server-certificate localhost --out "$certs"
chown 1883:1883 "$certs/server.key"
printf 'listener %s 127.0.0.1\nallow_anonymous true\nlog_dest file %s/log\nlog_type all\ncertfile %s\nkeyfile %s\n' \
    "$broker_port" "$work/mosquitto" "$certs/server.crt" "$certs/server.key" >"$work/mosquitto.conf"
shown() { openssl s_client -connect "127.0.0.1:$broker_port" </dev/null 2>/dev/null | openssl x509 -noout -serial; }
shows_another() { [ "$(shown)" != "$1" ]; }
in_265_days() { faketime -f +265d sh -euc "$1"; }

# renews NAME COMMAND: by that command, with this check's paths.
renews() {
    [ -n "$2" ] || fail "$1: no command"
    DATA_DIR=$work/users/data "$bin" server-certificate localhost --out "$certs" --force
    chown 1883:1883 "$certs/server.key"
    rm -f "$work/mosquitto/log" "$work/broker.seen"
    # shellcheck disable=SC2086 # a command and its arguments
    (exec $as_broker mosquitto -c "$work/mosquitto.conf") 2>"$work/broker.log" &
    broker=$!
    await "the broker runs" "$broker" grep -qs running "$work/mosquitto/log"
    command=$(echo "$2" | sed "s|DATA_DIR=[^ ]*|DATA_DIR=$work/users/data|; s|[^ ]*mqtt-publisher-lite server|$bin server|
        s|/etc/mosquitto/certs|$certs|g; s|[^ ]*on-new-crl.sh|sh $contrib/mosquitto/on-new-crl.sh|
        s|--once [^ ]*|--once $work/broker.seen|; s|killall -HUP mosquitto|kill -HUP $broker|")
    before=$(shown)
    sh -euc "$command"
    await "$1 has the broker reload once" "$broker" has_read 1
    [ "$(shown)" = "$before" ] || fail "$1 renews what is young"
    in_265_days "$command"
    await "$1 renews the certificate" "$broker" shows_another "$before"
    in_265_days "$command"
    sleep 0.3
    if has_read 3; then fail "$1 has the broker reload for nothing"; fi
    end "$broker"
    broker=
    ok "$1 renews the broker's certificate"
}
sed -n 's/^ *17 4 \* \* \*  //p' "$root/docs/https.md" >"$work/lines"
[ "$(wc -l <"$work/lines")" -eq 2 ] || fail "docs/https.md has other lines for cron"
renews cron "$(sed -n 1p "$work/lines")"
renews "OpenWrt's cron" "$(sed -n 2p "$work/lines")"
# systemd's command; mosquitto-crl.path watches what it writes.
grep -q '^PathChanged=/etc/mosquitto/certs/server.crt$' "$units/mosquitto-crl.path" || fail "nobody watches"
command=$(sed -n 's/^ExecStart=//p' "$units/mosquitto-certificate.service" | sed "s|/etc/mosquitto/certs|$certs|")
DATA_DIR=$work/users/data "$bin" server-certificate localhost --out "$certs" --force
[ -z "$(DATA_DIR=$work/users/data sh -euc "$command")" ] || fail "the timer renews what is young"
case $(DATA_DIR=$work/users/data in_265_days "$command") in
    "$certs/server.crt is renewed until 20"*) ok "systemd's timer renews the broker's certificate" ;;
    *) fail "the timer renews nothing" ;;
esac
# What root has signed is the service's own, and in the record.
kill -HUP "$service"
entered() { [ "$(grep -c '	server	/CN=localhost$' "$work/users/data/ca/index.txt")" -eq 7 ]; }
await "the service enters what was signed" "$service" entered
[ -z "$(find "$work/users/data/ca/certs" ! -user 4711)" ] || fail "something in certs/ is not the service's"
ok "the record has them"
end "$service"
service=

# --- monit reads its own file; the program has to be there.
{
    echo "set daemon 30"
    sed "s|/usr/local/bin/mqtt-publisher-lite|$bin|" "$contrib/monit/mqtt-publisher-lite.conf"
} >"$work/monitrc"
chmod 600 "$work/monitrc"
(cd "$work" && HOME=$work monit -t -c "$work/monitrc" >"$work/monit" 2>&1) || fail "$(cat "$work/monit")"
ok "monit: $(tail -1 "$work/monit")"

# --- The Dockerfile: what is checked and what is run is one program.
dockerfile=$contrib/docker/Dockerfile
grep -q '^FROM scratch$' "$dockerfile" || fail "the Dockerfile is not from scratch"
entry=$(sed -n 's/^ENTRYPOINT \["\(.*\)"\]$/\1/p' "$dockerfile")
grep -q "CMD \\[\"${entry:?}\", \"healthcheck\"\\]" "$dockerfile" || fail "the Dockerfile's HEALTHCHECK"
port=$(sed -n 's/^ *PORT  *\([0-9]*\) .*/\1/p' "$work/help")
grep -q "^EXPOSE ${port:?}\$" "$dockerfile" || fail "the Dockerfile exposes another port than $port"
grep -q " -p $port:$port " "$dockerfile" || fail "the Dockerfile's example maps another port than $port"
ok "Dockerfile"
echo "contrib: all passed"
