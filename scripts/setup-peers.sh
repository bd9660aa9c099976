#!/bin/sh
# Install what the interop tests and the comparison with DPDK run against: QEMU, DPDK, a guest kernel, user-mode Linux,
# busybox.
#
#     sudo scripts/setup-peers.sh
#
# For Debian 12 and later and Ubuntu, on amd64. Does nothing, quickly, where everything is there. Without root it names
# what is missing and succeeds, since the tests that need it are then skipped by name.
set -eu

HUGEPAGES=1024 # of 2 MiB: testpmd takes 512 MiB at each end in the comparison, and guests run beside
MINIMUM_QEMU=8 # 7.2 crashes without KVM as soon as a guest uses MSI-X on a vhost-user device
KERNEL_FOLDER=/var/cache/vq-peers/kernel
UML_FOLDER=/var/cache/vq-peers/uml
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg
PAGES_FILE=/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages

# shellcheck source=/dev/null
. /etc/os-release 2>/dev/null || { ID=unknown VERSION_CODENAME=; }

say() { printf 'setup-peers: %s\n' "$*"; }
has() { command -v "$1" >/dev/null 2>&1; }

qemu_major() {
    has qemu-system-x86_64 || { echo 0; return; }
    qemu-system-x86_64 --version | sed -n 's/.*version \([0-9]*\)\..*/\1/p;q'
}

# The storage daemon is of the same release; its package differs among releases, so both are always installed together.
has_qemu() { [ "$(qemu_major)" -ge "$MINIMUM_QEMU" ] && has qemu-storage-daemon; }

# The tests take a kernel from the folder above or, where one is bootable with its modules, from the machine itself.
has_kernel() {
    for image in "$KERNEL_FOLDER"/boot/vmlinuz-* /boot/vmlinuz-*cloud-amd64; do
        version=${image##*/vmlinuz-}
        [ -r "$image" ] || continue
        for root in "$KERNEL_FOLDER" ""; do
            [ -e "$root/lib/modules/$version/modules.dep" ] && return 0
            [ -e "$root/usr/lib/modules/$version/modules.dep" ] && return 0
        done
    done
    return 1
}

has_uml() {
    [ -x "$UML_FOLDER/usr/bin/linux.uml" ] && [ -n "$(ls "$UML_FOLDER"/usr/lib/uml/modules/*/modules.dep 2>/dev/null)" ]
}

has_dpdk_driver() {
    # The driver is a file of its own in every release; only its version differs.
    for file in /usr/lib/*/dpdk/pmds-*/librte_net_"$1".so* /usr/lib/*/librte_net_"$1".so*; do
        [ -e "$file" ] && return 0
    done
    return 1
}

# Each missing program as a line "PACKAGE PROGRAM".
missing_programs() {
    while read -r package program; do
        has "$program" || echo "$package $program"
    done <<END
busybox-static busybox
iperf3 iperf3
iputils-ping ping
ethtool ethtool
kmod depmod
iproute2 ip
util-linux setpriv
gcc gcc
END
    # glibc's headers are no dependency of gcc, only a recommendation.
    [ -e /usr/include/stdio.h ] || echo "libc6-dev stdio.h"
    python3 -c 'import sysconfig, os, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
        2>/dev/null || echo "python3-dev Python.h"
    python3 -c 'import ensurepip' 2>/dev/null || echo "python3-venv ensurepip"
    has dpdk-testpmd || echo "dpdk-dev dpdk-testpmd"
}

missing_drivers() {
    for driver in vhost virtio tap pcap af_packet; do
        has_dpdk_driver "$driver" || echo "$driver"
    done
}

missing_parts() {
    missing_programs | sed 's/.* //'
    missing_drivers | sed 's/^/DPDK driver net_/'
    [ "$(qemu_major)" -ge "$MINIMUM_QEMU" ] || echo "QEMU $MINIMUM_QEMU or newer"
    has qemu-storage-daemon || echo "QEMU's storage daemon"
    has_kernel || echo "guest kernel"
    has_uml || echo "user-mode Linux"
    has_pages || echo "$HUGEPAGES hugepages of 2 MiB"
    has_hugetlbfs || echo "hugetlbfs mount"
}

has_pages() { [ "$(cat "$PAGES_FILE" 2>/dev/null || echo 0)" -ge "$HUGEPAGES" ]; }
has_hugetlbfs() { grep -q ' hugetlbfs ' /proc/mounts; }

if [ "$(id -u)" -ne 0 ]; then
    parts=$(missing_parts)
    if [ -n "$parts" ]; then
        say "missing, and not root; the tests that need these are skipped:"
        echo "$parts" | sed 's/^/    /'
        say "run: sudo $0"
    fi
    exit 0
fi

if [ -z "$(missing_parts)" ]; then
    exit 0
fi

# Hugepages need no package, so they come first: a machine that has the programs needs no network.
if ! has_pages && [ -w "$PAGES_FILE" ]; then
    echo "$HUGEPAGES" >"$PAGES_FILE"
    has_pages || say "only $(cat "$PAGES_FILE") of $HUGEPAGES hugepages: memory is fragmented or short; restart helps"
fi
if ! has_hugetlbfs; then
    mkdir -p /dev/hugepages
    mount -t hugetlbfs hugetlbfs /dev/hugepages || say "no hugetlbfs can be mounted here; DPDK is skipped"
fi
if [ -z "$(missing_programs; missing_drivers)" ] && has_qemu && has_kernel && has_uml; then
    exit 0
fi

if ! has apt-get || [ "$(dpkg --print-architecture)" != amd64 ]; then
    say "packages are installed on Debian and Ubuntu for amd64 only; missing here:"
    missing_parts | sed 's/^/    /'
    exit 0
fi

export DEBIAN_FRONTEND=noninteractive
install() { apt-get install -y -q --no-install-recommends "$@"; }

# The mirror that this machine uses for its own release, so that proxies and local mirrors go on working.
mirror() {
    apt-get indextargets --format '$(SITE)|$(RELEASE)|$(REPO_URI)|$(COMPONENT)' 'Created-By: Packages' |
        awk -F'|' -v release="$VERSION_CODENAME" '$2 == release && $4 == "main" { print $3; exit }'
}

add_backports() {
    suite=$VERSION_CODENAME-backports
    if apt-get indextargets --format '$(RELEASE)' | grep -qx "$suite"; then
        return
    fi
    uri=$(mirror)
    [ -n "$uri" ] || { say "no mirror of $VERSION_CODENAME is configured, so $suite cannot be added"; return 1; }
    {
        printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\n' "$uri" "$suite"
        # Where the sources carry no key of their own, the archive's keys are trusted for all of them.
        [ ! -e "$KEYRING" ] || printf 'Signed-By: %s\n' "$KEYRING"
    } >"/etc/apt/sources.list.d/vq-$suite.sources"
    say "added $suite from $uri"
}

has_qemu || [ "$VERSION_CODENAME" != bookworm ] || add_backports
say "fetching the package lists"
apt-get update -q

packages=$(missing_programs | sed 's/ .*//')
for driver in $(missing_drivers); do
    # librte-net-vhost23 on Debian 12, librte-net-vhost25 on its successor, librte-net-af-packet24 on Ubuntu.
    name=$(echo "$driver" | tr _ -)
    packages="$packages $(apt-cache pkgnames "librte-net-$name" | grep -E "^librte-net-$name[-0-9.]*$" | sort | tail -n 1)"
done
# shellcheck disable=SC2086 # a list of words
[ -z "$(echo $packages)" ] || install $packages

if ! has_qemu; then
    if [ "$VERSION_CODENAME" = bookworm ]; then
        install -t bookworm-backports qemu-system-x86 qemu-utils
    else
        install qemu-system-x86 qemu-utils
    fi
fi

# A kernel is unpacked, not installed: installing would touch /boot, build an initramfs and perhaps the boot menu.
unpack_kernel() {
    case $ID in
        ubuntu) meta=linux-image-virtual ;;
        *) meta=linux-image-cloud-amd64 ;;
    esac
    names=$(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances "$meta" |
        grep -E '^linux-(image|modules)-[0-9][^ ]*(amd64|generic)$' | sort -u)
    [ -n "$names" ] || { say "no kernel behind the package $meta"; return 1; }
    work=$(mktemp -d)
    # apt fetches as a user of its own, who has to be able to write here.
    chmod 777 "$work"
    # shellcheck disable=SC2086 # a list of words
    (cd "$work" && apt-get download -q $names && for file in *.deb; do dpkg-deb -x "$file" root; done)
    for image in "$work"/root/boot/vmlinuz-*; do
        version=${image##*/vmlinuz-}
        [ -d "$work/root/lib" ] || { mkdir "$work/root/lib" && mv "$work/root/usr/lib/modules" "$work/root/lib/modules"; }
        # The list of dependencies is made when a kernel is installed; here it is made by hand.
        depmod -b "$work/root" "$version"
        chmod a+r "$image"
    done
    rm -rf "$KERNEL_FOLDER"
    mkdir -p "$(dirname "$KERNEL_FOLDER")"
    mv "$work/root" "$KERNEL_FOLDER"
    chmod -R a+rX "$KERNEL_FOLDER"
    rm -rf "$work"
    say "guest kernel $version in $KERNEL_FOLDER"
}

# Unpacked as well: it is for the tests alone.
unpack_uml() {
    work=$(mktemp -d)
    chmod 777 "$work"
    (cd "$work" && apt-get download -q user-mode-linux && dpkg-deb -x ./*.deb root)
    rm -rf "$UML_FOLDER"
    mkdir -p "$(dirname "$UML_FOLDER")"
    mv "$work/root" "$UML_FOLDER"
    chmod -R a+rX "$UML_FOLDER"
    rm -rf "$work"
    say "user-mode Linux in $UML_FOLDER"
}

has_kernel || unpack_kernel
has_uml || unpack_uml

parts=$(missing_parts)
if [ -n "$parts" ]; then
    say "still missing:"
    echo "$parts" | sed 's/^/    /'
    exit 1
fi
say "all peers are there"
