#!/bin/sh
# Makes what a release consists of, in dist/release/: for each processor a tarball and a Debian package,
# one image for container engines, a list of what is in the program (CycloneDX), and checksums of all.
#
# usage: scripts/release.sh [--prebuilt] [TARGET…]
#
#   TARGET      x86_64, aarch64, armv7; all three without one
#   --prebuilt  takes the programs of dist/<TARGET>/ as scripts/build-static.sh left them
#
# The same source gives the same bytes: times are those of the last commit (or SOURCE_DATE_EPOCH), owners
# and order are fixed. Needs dpkg-deb, python3, git and skopeo, which reads the image back; on Debian, as
# root, missing ones are installed.
set -eu
me="release"
# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
cd "$root"
name=mqtt-publisher-lite
tools dpkg-deb:dpkg python3 git skopeo
make_work

prebuilt=
targets=
for word; do
    case $word in
        --prebuilt) prebuilt=yes ;;
        x86_64) targets="$targets x86_64-unknown-linux-musl" ;;
        aarch64) targets="$targets aarch64-unknown-linux-musl" ;;
        armv7) targets="$targets armv7-unknown-linux-musleabihf" ;;
        *) fail "unknown target $word" ;;
    esac
done
targets=${targets:-x86_64-unknown-linux-musl aarch64-unknown-linux-musl armv7-unknown-linux-musleabihf}

version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH
out=$root/dist/release
rm -rf "$out"
mkdir -p "$out"
umask 022

# pack FOLDER [NAME…]: a tar archive of what is in the folder, on standard output.
pack() {
    folder=$1
    shift
    tar -C "$folder" --format=ustar --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 \
        --numeric-owner -cf - "${@:-.}"
}

# tarball ARCH PROGRAM: the program with its pages and examples.
tarball() {
    folder=$name-$version-$1
    mkdir -p "$work/tar/$folder"
    mkdir "$work/tar/$folder/scripts"
    install -m 755 "$2" "$work/tar/$folder/"
    cp scripts/enroll.sh scripts/smoke.sh scripts/lib.sh "$work/tar/$folder/scripts/"
    cp -R README.md CHANGELOG.md LICENSE-APACHE LICENSE-MIT contrib docs "$work/tar/$folder/"
    chmod -R u=rwX,go=rX "$work/tar/$folder"
    pack "$work/tar" "$folder" | gzip -9n >"$out/$folder.tar.gz"
    rm -r "$work/tar"
}

# package DEBIAN-ARCH PROGRAM
package() {
    tree=$work/deb
    doc=$tree/usr/share/doc/$name
    mkdir -p "$tree/DEBIAN" "$tree/usr/bin" "$tree/usr/lib/systemd/system" "$tree/usr/lib/sysusers.d" \
        "$tree/usr/share/$name" "$tree/etc/$name" "$doc"
    install -m 755 "$2" "$tree/usr/bin/$name"
    install -m 755 scripts/enroll.sh "$tree/usr/share/$name/enroll.sh"
    install -m 755 contrib/mosquitto/*.sh "$tree/usr/share/$name/"
    install -m 644 contrib/openssl-ca.cnf "$tree/usr/share/$name/"
    install -m 644 contrib/systemd/mqtt-publisher-lite.conf "$tree/usr/lib/sysusers.d/"
    for unit in contrib/systemd/*.service contrib/systemd/*.path contrib/systemd/*.timer; do
        sed 's|/usr/local/bin/|/usr/bin/|' "$unit" >"$tree/usr/lib/systemd/system/${unit##*/}"
    done
    sed 's/^#DATA_DIR=/DATA_DIR=/' contrib/environment.example >"$tree/etc/$name/environment"
    chmod 640 "$tree/etc/$name/environment"
    # All pages are in one folder there, and what they link to beside them.
    sed 's|](docs/|](|g' README.md >"$doc/README.md"
    for page in docs/*.md; do sed 's|](\.\./contrib/|](contrib/|g' "$page" >"$doc/${page##*/}"; done
    install -m 644 docs/*.svg "$doc/"
    mkdir "$doc/contrib"
    cp -R contrib/mosquitto contrib/openwrt contrib/systemd "$doc/contrib/"
    chmod -R u=rwX,go=rX "$doc"
    cat contrib/debian/copyright LICENSE-MIT >"$doc/copyright"
    gzip -9n <CHANGELOG.md >"$doc/changelog.gz"
    install -m 755 contrib/debian/postinst contrib/debian/prerm contrib/debian/postrm "$tree/DEBIAN/"
    echo "/etc/$name/environment" >"$tree/DEBIAN/conffiles"
    sed -e "s/@VERSION@/$version/" -e "s/@ARCH@/$1/" -e "s/@SIZE@/$(du -ks "$tree/usr" | cut -f 1)/" \
        contrib/debian/control >"$tree/DEBIAN/control"
    find "$tree" -exec touch -hd "@$SOURCE_DATE_EPOCH" {} +
    dpkg-deb --root-owner-group -Zxz --build "$tree" "$out/${name}_${version}_$1.deb" >/dev/null
    rm -r "$tree"
}

for target in $targets; do
    program=dist/$target/$name
    [ -n "$prebuilt" ] || scripts/build-static.sh "$target"
    [ -x "$program" ] || fail "no $program"
    case $target in
        x86_64-*) arch=x86_64 debian=amd64 oci=amd64 ;;
        aarch64-*) arch=aarch64 debian=arm64 oci=arm64 ;;
        *) arch=armv7 debian=armhf oci=arm/v7 ;;
    esac
    tarball "$arch" "$program"
    package "$debian" "$program"
    mkdir -p "$work/image/$arch/data"
    install -m 755 "$program" "$work/image/$arch/"
    echo "$oci" >"$work/image/$arch.platform"
done

tools/release.py image "$work/image" "$out/$name-$version-oci.tar" "$version"
cargo metadata --locked --format-version 1 --filter-platform x86_64-unknown-linux-musl >"$work/metadata"
tools/release.py sbom "$work/metadata" "$out/$name-$version.cdx.json"

# --- Proof: another program reads them.
for deb in "$out"/*.deb; do
    dpkg-deb --contents "$deb" >"$work/contents"
    grep -q "usr/bin/$name\$" "$work/contents" || fail "$deb lacks the program"
done
skopeo inspect --raw "oci-archive:$out/$name-$version-oci.tar" >"$work/index"
for platform in "$work"/image/*.platform; do
    IFS=/ read -r arch variant <"$platform" || true
    skopeo --override-arch "$arch" ${variant:+--override-variant "$variant"} inspect --config \
        "oci-archive:$out/$name-$version-oci.tar" >"$work/config"
    grep -q "\"architecture\": *\"$arch\"" "$work/config" || fail "the image lacks $arch"
done
(cd "$out" && sha256sum -- * >"$work/sums" && mv "$work/sums" SHA256SUMS && chmod 644 SHA256SUMS)
ls -l "$out"
