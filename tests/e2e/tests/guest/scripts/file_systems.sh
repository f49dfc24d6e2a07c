# Both file systems; between them, space is given back; then a reboot, and the file is found as it was.
disk=/dev/vda
if [ "$(blkid -o value -s LABEL $disk)" = kept ]; then
	mount $disk /mnt
	cd /mnt && sha256sum --quiet -c sums && echo "found after the reboot"
	cd / && umount /mnt
	exit 0
fi
echo "queues $(ls /sys/block/vda/mq | wc -l)"
echo "serial $(cat /sys/block/vda/serial)"
mkfs.ext4 -q $disk
mount $disk /mnt
write_and_verify /mnt 8 4
sync
echo full
read -r _
rm /mnt/load*
sync
fstrim /mnt
echo trimmed
read -r _
umount /mnt
mkfs.xfs -q -f -L kept $disk
mount $disk /mnt
write_and_verify /mnt 4 4
rm /mnt/load*
dd if=/dev/urandom of=/mnt/file bs=1M count=8 2>/run/dd
cd /mnt && sha256sum file >sums
cd / && umount /mnt
echo rebooting
busybox reboot -f
