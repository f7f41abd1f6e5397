#!/bin/sh
# Installs, runs, upgrades, removes and purges the Debian package in a Debian of its own, and boots that
# one: under its systemd docs/quickstart.md is walked as it stands, the service runs with its user and its
# walls, and the Mosquitto beside it hears of a revocation. By hand, after scripts/release.sh: it fetches
# that Debian (debootstrap, some 150 MB) and needs root.
#
# usage: .ci/check-deb.sh [PACKAGE]
set -eu
me="deb"
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/../scripts/lib.sh"
name="mqtt-publisher-lite"
deb=${1:-$(find "$root/dist/release" -name "${name}_*_amd64.deb")}
[ -e "$deb" ] || fail "no package: run scripts/release.sh"
tools debootstrap curl systemd-nspawn:systemd-container
make_work

# The unit of Mosquitto reloads with the kill of procps, which a minimal Debian lacks.
debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,procps,curl,openssl,mosquitto,mosquitto-clients stable "$work/debian" >"$work/log" 2>&1 ||
    fail "debootstrap: $(tail -3 "$work/log")"
cp "$deb" "$work/debian/package.deb"
# An installer writes this one.
printf '127.0.0.1 localhost\n::1 localhost\n' >"$work/debian/etc/hosts"
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

# The blocks of a page that are for the package.
blocks_of() { awk '/^ *```sh (by \.ci\/check-deb\.sh|run package)/ { on = 1; next } /^ *```/ { on = 0 } on' "$root/$1"; }
cat >"$work/debian/walk.sh" <<END
set -eux
$(blocks_of docs/quickstart.md)
openssl x509 -noout -ext subjectAltName -in \$data/tls/server.crt | grep "DNS:\$(cat /proc/sys/kernel/hostname), .*IP Address:127.0.0.1"

in_time() { n=0; until "\$@"; do n=\$((n + 1)); test "\$n" -lt 100 || return 1; sleep 0.1; done; }
answers() { curl -sf --cacert \$data/ca/root-ca.crt https://localhost:3002/ready; }
answers
pid=\$(systemctl show -p MainPID --value $name.service)
test "\$(stat -c %U /proc/\$pid)" = mqtt-lite
systemctl reload $name.service
answers
kill -9 "\$pid"
in_time sh -c "! kill -0 \$pid 2>/dev/null"
in_time answers

systemctl is-active mosquitto-certificate.timer
systemctl start mosquitto-certificate.service
mqtt-publisher-lite --env-file \$settings device add pump-2 | awk '{ print \$2 }' >secret
enroll.sh --url https://127.0.0.1:3002 --device-id pump-2 --dir pump-2 --secret-file secret --ca-fingerprint "\$fingerprint"
say() { mosquitto_pub -h localhost -p 8883 --cafile \$1/ca.crt --cert \$1/device.crt --key \$1/device.key -t devices/\$1/t -m on -q 1; }
say pump-1
say pump-2
mqtt-publisher-lite --env-file \$settings device revoke pump-1
shut_out() { ! say pump-1 2>/dev/null; }
in_time shut_out || { journalctl --no-pager -u mosquitto-crl -u mosquitto | tail -n 15; exit 1; }
say pump-2
systemctl stop $name.service
test "\$(systemctl show -p Result --value $name.service)" = success
echo walked >/walked
END
cat >"$work/debian/etc/systemd/system/walk.service" <<END
[Unit]
After=multi-user.target
[Service]
Type=oneshot
Environment=HOME=/root
ExecStart=/bin/sh /walk.sh
ExecStopPost=/bin/systemctl --no-block poweroff
StandardOutput=file:/walk.log
StandardError=file:/walk.log
TimeoutStartSec=120
[Install]
WantedBy=multi-user.target
END
inside systemctl enable walk.service >"$work/out" 2>&1
# Its own end is an error to nspawn where the file systems of the machine are not quite its own.
timeout 180 systemd-nspawn --quiet --private-network --register=no --keep-unit --boot -D "$work/debian" >"$work/boot" 2>&1 || true
[ -e "$work/debian/walked" ] || fail "under systemd: $(tail -n 20 "$work/debian/walk.log")"
inside systemctl disable walk.service >"$work/out" 2>&1
ok "docs/quickstart.md under systemd; it reloads, is started again, and the broker hears of a revocation"

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
