# Runs in a guest: reads 4 MiB of /dev/vda from the 64th on, past every cache, and compares their SHA-256 with the
# argument, again and again until /tmp/stop is there. /tmp/work.read holds how often; /tmp/wrong.read what was wrong.
rounds=0
while [ ! -e /tmp/stop ]; do
    sum=$(dd if=/dev/vda bs=256k iflag=direct skip=256 count=16 2>/tmp/dd.read | sha256sum | cut -d' ' -f1)
    [ "$sum" = "$1" ] || { echo "SHA-256 $sum; $(cat /tmp/dd.read)" >/tmp/wrong.read; exit 1; }
    rounds=$((rounds + 1))
    echo $rounds >/tmp/next.read && mv /tmp/next.read /tmp/work.read
done
touch /tmp/done.read
