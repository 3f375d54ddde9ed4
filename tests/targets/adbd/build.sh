#!/bin/sh
# Build Android's own adbd for this machine, for the tests: `sh build.sh FOLDER` makes FOLDER/adbd out of Debian's source of
# adb (76 MB are fetched from MIRROR, apt's own of Debian if unset). Then set POTSTILL_ADBD to that file.
# Needs: apt-get install adb clang android-libbase-dev android-libcutils-dev android-liblog-dev libcap-dev libssl-dev \
#        android-platform-system-core-headers curl
set -eu
folder=$(mkdir -p "$1" && cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
mirror=${MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' | head -n 1)}
origin=android-platform-tools_29.0.6.orig.tar.gz
patches=android-platform-tools_29.0.6-28.debian.tar.xz
cd "$folder"
for file in $origin $patches; do
    [ -f "$file" ] || curl -fsSL -o "$file" "${mirror%/}/pool/main/a/android-platform-tools/$file"
done
sha256sum --check --quiet <<SUMS
dbd241642af17fe545a91c4b54d79867f94abfb64c1f4ed759aea5b85334a633  $origin
ae5d25152029cbdfc5c1b846a81d23ea30067a2638a94fa3cb9a8c867cf88bae  $patches
SUMS
rm -rf tree && mkdir tree
tar -xzf "$origin" -C tree --strip-components=1
tar -xJf "$patches" -C tree
cd tree
grep -v '^#' debian/patches/series | while read -r patch; do
    patch -s -p1 < "debian/patches/$patch"
done

# It listens on this machine alone, on no vsock, and asks for authorisation only where ADBD_SECURE is set.
cd system/core
sed -i 's/network_inaddr_any_server(port, SOCK_STREAM, error)/network_loopback_server(port, SOCK_STREAM, error, true)/' \
    adb/socket_spec.cpp
sed -i -e '/push_back.*StringPrintf("vsock/d' \
    -e 's/^    init_transport_registration();/&\n    auth_required = getenv("ADBD_SECURE") != nullptr;/' adb/daemon/main.cpp

mkdir objects
for file in adb/adb.cpp adb/adb_io.cpp adb/adb_listeners.cpp adb/adb_trace.cpp adb/adb_unique_fd.cpp adb/adb_utils.cpp \
    adb/fdevent/fdevent*.cpp adb/services.cpp adb/sockets.cpp adb/socket_spec.cpp adb/sysdeps/errno.cpp \
    adb/sysdeps/posix/network.cpp adb/sysdeps_unix.cpp adb/transport.cpp adb/transport_fd.cpp adb/transport_local.cpp \
    adb/transport_usb.cpp adb/types.cpp adb/shell_service_protocol.cpp adb/adbconnection/adbconnection_server.cpp \
    adb/daemon/auth.cpp adb/daemon/jdwp_service.cpp adb/daemon/usb_dummy.cpp adb/daemon/file_sync_service.cpp \
    adb/daemon/services.cpp adb/daemon/shell_service.cpp adb/daemon/main.cpp libasyncio/AsyncIO.cpp \
    diagnose_usb/diagnose_usb.cpp "$here/stub.cpp"; do
    case $file in *_test.cpp) ;; *) echo "$file" ;; esac
done | xargs -P "$(nproc)" -I{} sh -c 'clang++ -std=gnu++2a -O1 -w -c {} -o objects/$(echo {} | tr / _).o \
    -D_GNU_SOURCE -DADB_HOST=0 -DALLOW_ADBD_ROOT=0 -DPLATFORM_TOOLS_VERSION="\"29.0.6\"" \
    -Ilibcutils/include -Iadb -Iadb/daemon/include -Iadb/adbconnection/include -Ilibasyncio/include -Idiagnose_usb/include \
    -Ilibcrypto_utils/include -I../../frameworks/native/libs/adbd_auth/include -Ibase/include -Iinclude \
    -Iliblog/include'
places=/usr/lib/$(dpkg-architecture -qDEB_HOST_MULTIARCH)/android
clang++ objects/*.o -o "$folder/adbd" -L"$places" -Wl,-rpath="$places" \
    -lbase -lcutils -llog -lcap -lcrypto -lresolv -lutil -lpthread
rm -rf "$folder/tree"
echo "export POTSTILL_ADBD=$folder/adbd"
