#!/bin/sh
# Installs what the tests need, if it is missing, and runs them all.
#
# usage: scripts/test.sh [arguments for cargo test]
#
# Tests need real parts: redis-server, mosquitto and its clients, openssl, curl, busybox, faketime,
# prlimit, setpriv, promtool, shellcheck, and PyJWT in a virtual environment in the build folder. On Debian, as root,
# missing ones are installed by apt-get; elsewhere this says what is missing and fails. No test is
# ever skipped.
set -eu
cd "$(dirname "$0")/.."
build=${CARGO_TARGET_DIR:-target}

has() { command -v "$1" >/dev/null 2>&1; }

# The Debian packages of the commands that are missing.
missing() {
    has redis-server || echo redis-server
    has redis-cli || echo redis-tools
    has mosquitto || echo mosquitto
    has mosquitto_pub || echo mosquitto-clients
    has busybox || echo busybox
    has prlimit && has setpriv || echo util-linux
    has promtool || echo prometheus
    has openssl || echo openssl
    has curl || echo curl
    has faketime || echo faketime
    has shellcheck || echo shellcheck
    has cc || echo gcc
    python3 -c 'import ensurepip, venv' >/dev/null 2>&1 || echo python3-venv
}

install() {
    if ! has apt-get || [ "$(id -u)" -ne 0 ]; then
        echo "missing: $* (these are Debian's names; as root on Debian, this script installs them)" >&2
        exit 1
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

packages=$(missing)
# shellcheck disable=SC2086 # one word for each package
[ -z "$packages" ] || install $packages
packages=$(missing)
if [ -n "$packages" ]; then
    echo "still missing after the installation: $packages" >&2
    exit 1
fi

if ! has cargo; then
    echo "missing: cargo (Rust, with rustfmt and clippy)" >&2
    exit 1
fi

venv=$build/venv
if ! "$venv/bin/python" -c 'import jwt' >/dev/null 2>&1; then
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check pyjwt
fi

exec cargo test --locked "$@"
