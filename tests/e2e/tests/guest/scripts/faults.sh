# Writes and verifies on the first disk until it is told to stop; meanwhile says how the disks look when it is asked.
mkfs.ext4 -q /dev/vda
mount /dev/vda /mnt
prober /mnt/probe &
prober=$!
write_and_verify_until_stopped /mnt 4 2 &
writer=$!
has_size() { [ "$(blockdev --getsize64 /dev/vda)" = "$1" ]; }
block=$(cat /sys/block/vda/queue/logical_block_size)
has_told() { dmesg | grep -qF "[vda] new size: $(($1 / block)) $block-byte logical blocks"; }
has_gone() { [ ! -e "/dev/$1" ]; }
while read -r word rest; do
	case $word in
	size)
		until_true has_size "$rest"
		until_true has_told "$rest"
		echo "sized $rest"
		;;
	fill)
		until_true test -b "/dev/$rest"
		dd if=/dev/urandom of=/run/pattern bs=64k count=8 2>/run/dd2
		dd if=/run/pattern of="/dev/$rest" bs=64k oflag=direct 2>/run/dd2
		echo "filled"
		;;
	gone)
		until_true has_gone "$rest"
		echo "gone $rest"
		;;
	compare)
		until_true test -b "/dev/$rest"
		dd if="/dev/$rest" bs=64k count=8 iflag=direct 2>/run/dd2 | cmp - /run/pattern
		echo "same $rest"
		;;
	stop) break ;;
	esac
done
touch /run/stop
wait $prober
wait $writer
umount /mnt
e2fsck -fp /dev/vda >/run/fsck || { cat /run/fsck; echo "failed: a broken file system"; }
echo "verified"
