#!/bin/sh
# First program of the guest: brings up the virtio devices, then obeys the test over a virtio-serial port, or over the
# terminal that the kernel's command line names (vq_port=/dev/console).
# A request is one line "ID SECONDS BASE64-OF-A-SHELL-SCRIPT", its answer one line "ID EXIT-CODE BASE64-OF-THE-OUTPUT".
export PATH=/bin:/sbin HOME=/tmp
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
# The first root holds no more than half of the memory; what the tests send and receive needs more.
mount -t tmpfs -o size=100m tmp /tmp
modules="virtio_pci virtio_console virtio_net virtio_blk"
[ -z "$vq_port" ] || modules="virtio_net 8021q ipv6"
for module in $modules; do
    modprobe "$module" || echo "init: no module $module" >/dev/console
done
ip link set lo up
# The device appears a moment after its driver, since the port is announced by a message.
port=$vq_port
[ -z "$port" ] || stty raw -echo <"$port"
for attempt in $(seq 100); do
    [ -z "$vq_port" ] || break
    for entry in /sys/class/virtio-ports/*; do
        [ "$(cat "$entry/name" 2>/dev/null)" = vq ] && port=/dev/${entry##*/}
    done
    [ -n "$port" ] && [ -c "$port" ] && break
    usleep 20000
done
exec 3<>"$port" || { echo "init: no command port" >/dev/console; poweroff -f; }
echo "ready $(cut -d' ' -f1 /proc/uptime)" >&3
while true; do
    read -r id seconds text <&3 || { usleep 50000; continue; }
    echo "$text" | base64 -d >/tmp/.command
    timeout -s KILL "$seconds" sh /tmp/.command >/tmp/.output 2>&1 </dev/null 3>&-
    code=$?
    printf '%s %s %s\n' "$id" "$code" "$(base64 -w 0 /tmp/.output)" >&3
done
