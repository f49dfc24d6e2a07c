# Maps the export of the host at $port as /dev/nbd0, writes and verifies on it until it is told to stop, unmaps it.
modprobe nbd
nbd-client -C 2 -t 300 -N "$volume" 10.0.2.2 "$port" /dev/nbd0 >/run/client 2>&1 || { cat /run/client; exit 1; }
echo "mapped $(blockdev --getsize64 /dev/nbd0)"
mkfs.ext4 -q /dev/nbd0
mount /dev/nbd0 /mnt
prober /mnt/probe &
prober=$!
write_and_verify_until_stopped /mnt 4 2 &
writer=$!
read -r _
touch /run/stop
wait $prober
wait $writer
umount /mnt
e2fsck -fp /dev/nbd0 >/run/fsck || { cat /run/fsck; echo "failed: a broken file system"; }
nbd-client -d /dev/nbd0 >/run/client 2>&1
[ "$(cat /sys/block/nbd0/size)" = 0 ] || echo "failed: still mapped"
echo unmapped
