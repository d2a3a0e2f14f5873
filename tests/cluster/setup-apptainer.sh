#!/usr/bin/env bash
# A real Apptainer on a bare Debian 12, for tests. As root:
#   tests/cluster/setup-apptainer.sh [USER]    USER (created if missing) builds and runs, with subordinate ids;
#                                              USER-plain has none
#
# Also installs a registry for images, and Lmod, from Debian 12 itself.
#
# Debian 12 has no package of Apptainer, and a later Debian's needs a later C library. It gets that library
# in a directory of its own; the system's stays as it is. The packages come from the mirror in this machine's apt
# sources. Does nothing if everything is there already.
set -euo pipefail
user=${1:-}
libraries=/opt/apptainer/lib
multiarch=/usr/lib/x86_64-linux-gnu

((EUID == 0)) || { echo "setup-apptainer: must run as root" >&2; exit 2; }
[[ $(dpkg --print-architecture) == amd64 ]] || { echo "setup-apptainer: for amd64 only" >&2; exit 2; }
export DEBIAN_FRONTEND=noninteractive

tools=(mksquashfs squashfuse fuse2fs fuse-overlayfs fusermount3 newuidmap fakeroot mmdebstrap patchelf docker-registry
    /usr/share/lmod/lmod/libexec/lmod curl openssl)
missing=()
for tool in "${tools[@]}"; do command -v "$tool" > /dev/null || missing+=("$tool"); done
if ((${#missing[@]})); then
    echo "setup-apptainer: installing the packages of ${missing[*]}"
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends squashfs-tools squashfuse fuse2fs fuse-overlayfs fuse3 uidmap \
        fakeroot mmdebstrap patchelf ca-certificates docker-registry lmod curl openssl > /dev/null
    service docker-registry stop > /dev/null 2>&1 || true # the tests start one of their own, at the loopback address
fi

# apptainer from unstable; the C library, and the two libraries that must be newer, from Debian 13. Debian 12's
# squashfuse has one thread; Apptainer's own packages include one with several, as in unstable.
fetch_packages() {
    local directory=$1 mirror
    # shellcheck disable=SC2016 # apt fills that in
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m 1 '/debian/*$') || {
        echo "setup-apptainer: no Debian mirror in this machine's apt sources" >&2
        exit 1
    }
    mkdir -p "$directory"/{lists/partial,cache/archives/partial,packages}
    chmod 755 "$directory" "$directory/packages"
    for suite in sid trixie; do
        echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main"
    done > "$directory/sources.list"
    local options=(-qq -o Dir::Etc::SourceList="$directory/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null
        -o Dir::State::Lists="$directory/lists" -o Dir::Cache="$directory/cache" -o APT::Sandbox::User=root
        -o Acquire::Check-Valid-Until=false) # the mirror may be a snapshot, as those of continuous integration are
    apt-get "${options[@]}" update
    cd "$directory/packages"
    apt-get "${options[@]}" download apptainer/sid squashfuse/sid libfuse3-4/sid \
        libc6/trixie libseccomp2/trixie libsqlite3-0/trixie
}

squashfuse=$multiarch/apptainer/bin/squashfuse_ll # where Apptainer looks first
if ! apptainer --version > /dev/null 2>&1 || [[ ! -e $squashfuse ]]; then
    echo "setup-apptainer: installing Apptainer"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    (fetch_packages "$work/apt")
    for package in libc6 libseccomp2 libsqlite3-0 libfuse3-4 squashfuse apptainer; do
        dpkg -x "$work/apt/packages/$package"_*.deb "$work/$package"
    done
    # --force-rpath: a plain rpath also applies to what the libraries need.
    loader=(--set-interpreter "$libraries/ld-linux-x86-64.so.2" --force-rpath --set-rpath)
    patchelf "${loader[@]}" "$libraries" "$work/apptainer/usr/bin/apptainer"
    patchelf "${loader[@]}" "$libraries" "$work/apptainer$multiarch/apptainer/bin/starter"
    patchelf "${loader[@]}" "$libraries:$multiarch" "$work/squashfuse/usr/bin/squashfuse_ll"

    mkdir -p "$libraries"
    for package in libc6 libseccomp2 libsqlite3-0 libfuse3-4; do
        cp -a --remove-destination "$work/$package$multiarch"/*.so* "$libraries/"
    done
    cp -a "$work/apptainer/etc/apptainer" /etc/
    cp -a "$work/apptainer/var/lib/apptainer" /var/lib/ # where it mounts images; without it no container starts
    cp -a --remove-destination "$work/apptainer$multiarch/apptainer" "$multiarch/"
    cp -a --remove-destination "$work/squashfuse/usr/bin/squashfuse_ll" "$squashfuse"
    # Last, as a sign that everything is there. It finds the rest relative to itself, so it cannot go to /usr/local/bin.
    cp -a --remove-destination "$work/apptainer/usr/bin/apptainer" /usr/bin/
fi

if [[ -e /dev/fuse && $(stat -c %a /dev/fuse) != 666 ]]; then chmod 666 /dev/fuse; fi
if [[ -n $user ]]; then
    id "$user" > /dev/null 2>&1 || useradd --create-home --shell /bin/bash "$user" # with ranges in subuid and subgid
    grep -q "^$user:" /etc/subuid || usermod --add-subuids 100000-165535 --add-subgids 100000-165535 "$user"
    id "$user-plain" > /dev/null 2>&1 || useradd --create-home --shell /bin/bash "$user-plain"
    sed -i "/^$user-plain:/d" /etc/subuid /etc/subgid
fi
apptainer --version
