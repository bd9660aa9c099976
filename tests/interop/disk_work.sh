# Runs in a guest: writes numbered blocks to its part of /dev/vda and reads them back, past every cache, until /tmp/stop
# is there. Argument: which part. /tmp/work.N holds how many blocks are written; /tmp/wrong.N what was not as written.
part=$1
slots=32
block() { yes "part $part block $1" | head -c 65536; }

written=0
while [ ! -e /tmp/stop ]; do
    slot=$((part * slots + written % slots))
    block $written | dd of=/dev/vda bs=64k iflag=fullblock oflag=direct conv=notrunc seek=$slot 2>/tmp/dd.$part ||
        { echo "write of block $written failed: $(cat /tmp/dd.$part)" >/tmp/wrong.$part; exit 1; }
    old=$((written - written * 7 % slots))
    if [ $old -ge 0 ]; then
        slot=$((part * slots + old % slots))
        dd if=/dev/vda bs=64k count=1 iflag=direct skip=$slot 2>/tmp/dd.$part >/tmp/back.$part
        block $old | cmp - /tmp/back.$part >/tmp/differs.$part 2>&1 ||
            { echo "block $old: $(cat /tmp/dd.$part /tmp/differs.$part)" >/tmp/wrong.$part; exit 1; }
    fi
    written=$((written + 1))
    echo $written >/tmp/next.$part && mv /tmp/next.$part /tmp/work.$part
done
touch /tmp/done.$part
