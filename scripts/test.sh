#!/bin/sh
# Installs what the tests need, if it is missing, and runs them all.
#
# usage: scripts/test.sh [arguments for cargo test]
#
# Tests need real parts: redis-server, mosquitto and its clients, openssl, curl, wget, busybox,
# faketime, chromium, zbarimg, prlimit, setpriv, promtool, shellcheck, and PyJWT in a virtual environment in the build
# folder. On Debian, as root, missing ones are installed by apt-get; elsewhere this says what is missing
# and fails. No test is ever skipped.
set -eu
me="test"
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
cd "$root"
tools redis-server redis-cli:redis-tools mosquitto mosquitto_pub:mosquitto-clients busybox \
    chromium rsync zbarimg:zbar-tools \
    prlimit:util-linux setpriv:util-linux promtool:prometheus openssl curl wget faketime shellcheck cc:gcc
python3 -c 'import ensurepip, venv' >/dev/null 2>&1 || debian python3-venv
has cargo || fail "missing: cargo (Rust, with rustfmt and clippy)"

venv=$build/venv
if ! "$venv/bin/python" -c 'import jwt' >/dev/null 2>&1; then
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check pyjwt
fi

exec cargo test --locked "$@"
