#!/bin/sh
# Installs, runs, upgrades, removes and purges the Debian package in a Debian of its own. By hand, after
# scripts/release.sh: it fetches that Debian (debootstrap, some 100 MB) and needs root.
#
# usage: .ci/check-deb.sh [PACKAGE]
set -eu
me="deb"
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/../scripts/lib.sh"
name=mqtt-publisher-lite
deb=${1:-$(find "$root/dist/release" -name "${name}_*_amd64.deb")}
[ -e "$deb" ] || fail "no package: run scripts/release.sh"
tools debootstrap curl
make_work
server=
leave() { [ -z "$server" ] || end "$server"; }

debootstrap --variant=minbase --include=systemd stable "$work/debian" >"$work/log" 2>&1 ||
    fail "debootstrap: $(tail -3 "$work/log")"
cp "$deb" "$work/debian/package.deb"
inside() { chroot "$work/debian" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive "$@"; }
mode() { stat -c '%a %G' "$work/debian$1"; }

inside dpkg -i /package.deb >"$work/out" 2>&1 || fail "install: $(cat "$work/out")"
grep -q 'systemctl enable --now' "$work/out" || fail "it does not say how to begin: $(cat "$work/out")"
[ ! -e "$work/debian/etc/systemd/system/multi-user.target.wants/$name.service" ] || fail "it was enabled"
id=$(inside id -u mqtt-lite) || fail "no user"
[ "$(inside stat -c '%a %G' /etc/$name/environment)" = "640 mqtt-lite" ] || fail "mode $(mode /etc/$name/environment)"
inside systemd-analyze verify --man=no $name.service mosquitto-crl.path mosquitto-certificate.timer >"$work/out" 2>&1 ||
    fail "units: $(cat "$work/out")"
ok "installed: user $id, units verified, nothing enabled"

# As the unit has it: its user, its folder, its program.
mkdir -p "$work/debian/var/lib/$name"
chown "$id" "$work/debian/var/lib/$name"
port=$(free_port 21000)
chroot --userspec=mqtt-lite "$work/debian" env -i DATA_DIR=/var/lib/$name HTTP_HOST=127.0.0.1 PORT="$port" \
    /usr/bin/$name 2>"$work/service" &
server=$!
await "it answers" "$server" healthy "$port"
end "$server"
server=
ok "serves as mqtt-lite"

echo 'LOG_LEVEL=debug' >>"$work/debian/etc/$name/environment"
inside dpkg -i /package.deb >"$work/out" 2>&1 || fail "upgrade: $(cat "$work/out")"
grep -q '^LOG_LEVEL=debug' "$work/debian/etc/$name/environment" || fail "the upgrade lost the configuration"
ok "upgraded, configuration kept"
inside dpkg -r $name >"$work/out" 2>&1 || fail "remove: $(cat "$work/out")"
[ -e "$work/debian/etc/$name/environment" ] || fail "removing took the configuration"
inside dpkg -P $name >"$work/out" 2>&1 || fail "purge: $(cat "$work/out")"
grep -q "are kept in /var/lib/$name" "$work/out" || fail "it does not say what it keeps: $(cat "$work/out")"
[ ! -e "$work/debian/etc/$name" ] || fail "purging left the configuration"
[ -s "$work/debian/var/lib/$name/ca/root-ca.key" ] || fail "purging took the CA"
ok "removed and purged, the CA is kept"
