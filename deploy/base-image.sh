#!/usr/bin/env bash
# Makes the image cairn-base:local without any registry: nothing but the C library that the programs given as
# arguments were linked with, what it needs to resolve names, and an unprivileged user. Not one program is in it.
#
#   deploy/base-image.sh PROGRAM...
set -euo pipefail

[[ $# -gt 0 ]] || { echo "usage: $0 PROGRAM..." >&2; exit 2; }

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root"/{etc,tmp,data,usr/bin}

# Libraries under the paths by which the programs ask for them; links are followed.
libraries() { ldd "$@" | grep -oE '/[^ :)]+' | grep -E '\.so(\.|$)'; }
copied=()
for library in $(libraries "$@" | sort -u); do
    install -D -m 755 "$(readlink -f "$library")" "$root$library"
    copied+=("$library")
done
# The C library loads these by itself when a name is looked up; since glibc 2.34 most of it is built in.
libc=$(printf '%s\n' "${copied[@]}" | grep -E '/libc\.so' | head -1)
for name in libnss_files.so.2 libnss_dns.so.2 libresolv.so.2; do
    library=$(dirname "$libc")/$name
    if [[ -e $library ]]; then
        install -D -m 755 "$(readlink -f "$library")" "$root$library"
    fi
done

echo 'hosts: files dns' >"$root/etc/nsswitch.conf"
printf 'root:x:0:0:root:/:/none\ncairn:x:7400:7400:Cairn:/data:/none\n' >"$root/etc/passwd"
printf 'root:x:0:\ncairn:x:7400:\n' >"$root/etc/group"
chmod 1777 "$root/tmp"

# A named volume takes over the owner of the folder that it is mounted on.
{
    tar -C "$root" --numeric-owner --owner=0 --group=0 --exclude=./data -cf "$root.tar" .
    tar -C "$root" --numeric-owner --owner=7400 --group=7400 -rf "$root.tar" ./data
}
trap 'rm -rf "$root" "$root.tar"' EXIT
docker import --message "the C library of $(uname -m) and nothing else" "$root.tar" cairn-base:local >/dev/null
echo "cairn-base:local holds:"
printf '  %s\n' "${copied[@]}"
