# Disks in this order: blocks of 512 bytes, blocks of 4096 bytes, read-only.
block() { cat "/sys/block/$1/queue/logical_block_size"; }
write_blocks() {
	dd if=/dev/urandom of=/run/blocks bs="$2" count=3 2>/run/dd
	dd if=/run/blocks of="/dev/$1" bs="$2" seek=5 count=3 oflag=direct 2>/run/dd || return 1
	dd if="/dev/$1" bs="$2" skip=5 count=3 iflag=direct 2>/run/dd | cmp - /run/blocks
}
echo "sizes $(block vda) $(block vdb) $(block vdc)"
write_blocks vda 512
write_blocks vdb 4096
# The kernel itself refuses what is less than a block.
if write_blocks vdb 512; then echo "failed: half a block was written"; fi
for disk in vda vdb; do
	mkfs.ext4 -q /dev/$disk
	mount /dev/$disk /mnt
	write_and_verify /mnt 4 2
	umount /mnt
	e2fsck -fp /dev/$disk >/run/fsck || { cat /run/fsck; echo "failed: a broken file system"; }
done
echo "read-only $(blockdev --getro /dev/vdc)"
if dd if=/dev/zero of=/dev/vdc bs=4k count=1 oflag=direct 2>/run/dd; then echo "failed: a read-only disk was written"; fi
if blkdiscard /dev/vdc 2>/run/dd; then echo "failed: a read-only disk was discarded"; fi
if mount -o rw /dev/vdc /mnt 2>/run/dd && touch /mnt/x; then echo "failed: a read-only file system was written"; fi
echo "holds $(dd if=/dev/vdc bs=64k count=1 iflag=direct 2>/run/dd | sha256sum | cut -d' ' -f1)"
