# apart.sh NEW FOLDER SIZE COMMAND...: runs COMMAND in a system like this one, but with FOLDER empty and of SIZE.
# With $ARM64_EMULATOR (qemu-aarch64), ARM programs run in it.
# To be started by `unshare` with new mount and process namespaces; NEW is an empty folder. Nothing of this system changes.
set -e
new=$1 folder=$2 size=$3
shift 3
mount -t tmpfs none "$new"
top=${folder#/} top=${top%%/*}
for entry in /*; do
    name=$(basename "$entry")
    if [ -L "$entry" ]; then
        cp -P "$entry" "$new/$name"
    elif [ -d "$entry" ] && [ "$name" != "$top" ]; then
        mkdir "$new/$name"
        [ "$name" = proc ] || mount --rbind "$entry" "$new/$name"
    fi
done
mount -t proc none "$new/proc"
mkdir -p "$new/$folder"
mount -t tmpfs -o "size=$size,mode=1777" none "$new/$folder"
cd "$new"
pivot_root . .
umount -l .
cd /
if [ -n "$ARM64_EMULATOR" ]; then # its own table of program formats: ARM programs run like others
    mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
    magic='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
    mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
    printf '%s' ":arm64:M::$magic:$mask:$ARM64_EMULATOR:" >/proc/sys/fs/binfmt_misc/register
fi
exec "$@"
