#!/bin/sh
# Installs, runs, upgrades, removes and purges the Debian package in a Debian of its own, and boots that
# one: under its systemd the service runs with its user and its walls, and a Mosquitto beside it hears of a
# revocation. By hand, after scripts/release.sh: it fetches that Debian (debootstrap, some 150 MB) and
# needs root.
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

port=$(free_port 21000)
mqtt=$(free_port 22000)
cat >"$work/debian/walk.sh" <<END
set -eux
cd /root
api=http://127.0.0.1:$port
in_time() { n=0; until "\$@"; do n=\$((n + 1)); test "\$n" -lt 100 || return 1; sleep 0.1; done; }
answers() { curl -sf "\$api/ready"; }
key=\$(openssl rand -hex 16)
printf '%s\\n' HTTP_HOST=127.0.0.1 PORT=$port "ADMIN_API_KEY=\$key" >>/etc/$name/environment
systemctl enable --now $name.service
answers
pid=\$(systemctl show -p MainPID --value $name.service)
test "\$(stat -c %U /proc/\$pid)" = mqtt-lite
systemctl reload $name.service
answers
kill -9 "\$pid"
in_time sh -c "! kill -0 \$pid 2>/dev/null"
in_time answers

export DATA_DIR=/var/lib/$name
$name server-certificate 127.0.0.1 --out /etc/mosquitto/certs
chown mosquitto /etc/mosquitto/certs/server.key
cat >/etc/mosquitto/conf.d/devices.conf <<EOF
listener $mqtt 127.0.0.1
cafile \$DATA_DIR/ca/root-ca.crt
certfile /etc/mosquitto/certs/server.crt
keyfile /etc/mosquitto/certs/server.key
crlfile \$DATA_DIR/ca/crl.pem
require_certificate true
use_identity_as_username true
EOF
systemctl restart mosquitto.service
systemctl enable --now mosquitto-crl.path mosquitto-certificate.timer
systemctl start mosquitto-certificate.service
systemctl is-active mosquitto-certificate.timer
for device in one two; do
    /usr/share/$name/enroll.sh --url "\$api" --device-id \$device --dir \$device
done
say() { mosquitto_pub -h 127.0.0.1 -p $mqtt --cafile \$1/ca.crt --cert \$1/device.crt --key \$1/device.key -t t -m on -q 1; }
in_time say one
say two
curl -sf -X DELETE -H "Authorization: Bearer \$key" "\$api/api/v1/certificates/one"
shut_out() { ! say one 2>/dev/null; }
in_time shut_out || { journalctl --no-pager -u mosquitto-crl -u mosquitto | tail -n 15; exit 1; }
say two
systemctl stop $name.service
test "\$(systemctl show -p Result --value $name.service)" = success
echo walked >/walked
END
cat >"$work/debian/etc/systemd/system/walk.service" <<END
[Unit]
After=multi-user.target
[Service]
Type=oneshot
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
timeout 180 systemd-nspawn --quiet --register=no --keep-unit --boot -D "$work/debian" >"$work/boot" 2>&1 || true
[ -e "$work/debian/walked" ] || fail "under systemd: $(tail -n 20 "$work/debian/walk.log")"
inside systemctl disable walk.service >"$work/out" 2>&1
ok "under systemd: starts, reloads, is started again, and a broker hears of a revocation"

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
