# What a device's own sh does for `remote.py`: these functions, and after them the calls of one round trip.
# A cache is one folder: sets/ID/ (files that lie side by side), jobs/NAME/ (one request), and a tag.
set -eu
export LC_ALL=C
umask 077
trap '[ $? -ne 0 ] || echo "potstill: ended" >&2' EXIT
tag='Signature: 8a477f597d28d172789f06886806bc55
# A cache that potstill may remove; https://bford.info/cachedir/'

refuse() {
    echo "potstill: $1" >&2
    exit 2
}

sum=sha256sum
command -v $sum >/dev/null || sum='shasum -a 256'
command -v ${sum%% *} >/dev/null || refuse 'there is neither sha256sum nor shasum; install one'

enter() {  # ROOT: into the cache, which is made where it is missing
    mkdir -p "$1"
    cd "$1"
    [ -n "$(ls -A | grep -v '^CACHEDIR\.TAG\.')" ] || mark
    [ "$(cat CACHEDIR.TAG 2>/dev/null)" = "$tag" ] || refuse "$PWD is no cache of potstill; move it out of the way"
    mkdir -p sets jobs
    forget
}

mark() {  # the tag comes whole, even where two begin at once
    { printf '%s\n' "$tag" >CACHEDIR.TAG.$$ && mv -f CACHEDIR.TAG.$$ CACHEDIR.TAG; } || { rm -f CACHEDIR.TAG.$$; exit 1; }
}

forget() {  # remove the jobs of this host whose holder is dead
    for old in jobs/????????."$(uname -n)".*; do
        kill -0 "${old##*.}" 2>/dev/null || rm -rf "$old"
    done
}

same() (  # FOLDER ID NAME HASH…: whether a set's files are in a folder
    cd "$1" 2>/dev/null || exit 1
    shift 2
    while [ $# -gt 0 ]; do
        case $($sum "./$1" 2>/dev/null) in
        "$2 "* | "\\$2 "*) shift 2 ;;
        *) exit 1 ;;
        esac
    done
)

tell() {  # ID NAME HASH…: name the set if the cache has it
    if same "sets/$1" "$@"; then echo "there $1"; fi
}

look() {  # ID NAME HASH…: name the set if it came whole
    if same "$1.part" "$@"; then echo "there $1"; fi
}

hold() {  # WORD: a job's folder, for as long as somebody holds the standard input
    trap '' HUP INT TERM PIPE
    job=jobs/$1.$(uname -n).$$
    mkdir "$job"
    echo "ready $job"
    cat >/dev/null || :
    set +e
    if agent=$(cat "$job/agent" 2>/dev/null); then
        kill -9 "$agent"
        for _ in 1 2 3 4 5 6 7 8 9 10; do
            kill -0 "$agent" 2>/dev/null || break
            sleep 0.1 2>/dev/null || sleep 1
        done
    fi 2>/dev/null
    rm -rf "$job"
}

take() {  # NAME: the standard input becomes this file
    mkdir -p "$(dirname "./$1")"
    cat >"./$1"
    chmod 700 "./$1"
}

settle() {  # ID NAME HASH…: a set that was sent takes its place, if it came whole
    place=../../sets/$1
    same "$1.part" "$@" || return 0
    if [ -d "$place" ] && ! same "$place" "$@"; then mv "$place" "$1.old"; fi
    [ -d "$place" ] || mv "$1.part" "$place"
    rm -rf "$place/$1.part"  # where another job was quicker
    if same "$place" "$@"; then echo "there $1"; fi
}

answer() {  # COMMAND NAME…: run it; then come its exit code, and the hash and bytes of each file it made, or -
    command=$1 code=0
    shift
    cat >request.json
    export TMPDIR="$PWD" ORT_DISABLE_TELEMETRY=1 PYTHONDONTWRITEBYTECODE=1 PYTHONSAFEPATH=1
    sh -c "echo \$\$ >agent && exec $command" </dev/null || code=$?
    rm -f agent
    echo
    echo $code
    for made; do
        if [ -f "$made" ]; then echo "$($sum <"$made") $(wc -c <"$made")"; else echo -; fi
    done
}

clean() {  # ROOT: remove the cache, and tell the kilobytes that it had
    [ -d "$1" ] || { echo 0; return; }
    cd "$1"
    [ "$(cat CACHEDIR.TAG 2>/dev/null)" = "$tag" ] || refuse "$PWD is no cache of potstill; nothing was removed"
    forget
    [ -z "$(ls -A jobs)" ] || refuse "$PWD is in use; wait until the other run has ended"
    du -sk . | { read -r kilobytes rest; echo "$kilobytes"; }
    rm -rf sets jobs CACHEDIR.TAG CACHEDIR.TAG.*
    root=$PWD
    cd ..
    rmdir "$root" 2>/dev/null || :  # it stays where somebody put a file
}
