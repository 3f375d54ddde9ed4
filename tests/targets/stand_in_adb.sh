#!/bin/sh
# Stands in for adb, by the calls that Potstill makes of it; a phone's shell is one of this machine. $PHONE is a folder:
#   devices, features   what adb says of them
#   bin/                the phone's own programs
#   fault               "KIND WORD": what goes wrong when a script's last line starts with WORD
#   gone                there once the phone went away
#   calls               the first word of the last line of each script that has several, as they came
case $1 in
devices)
    printf 'List of devices attached\n'
    cat "$PHONE/devices"
    printf '\n'
    exit
    ;;
-s) ;;
*)
    echo "adb: unknown command $1" >&2
    exit 1
    ;;
esac
if [ -e "$PHONE/gone" ]; then
    echo "error: device '$2' not found" >&2
    exit 1
fi
[ "$3" = features ] && exec cat "$PHONE/features"
[ "$3 $4" = "shell -T" ] || exit 1
call=$(printf '%s' "$5" | sed -n '$p')
[ "$call" = "$5" ] || printf '%s\n' "${call%% *}" >>"$PHONE/calls"
kind='' word=''
[ ! -f "$PHONE/fault" ] || read -r kind word <"$PHONE/fault" || :
case $call in "$word"*) ;; *) kind='' ;; esac
PATH=$PHONE/bin:$PATH
case $kind in
cut) # the connection is lost in the middle of what is sent; adb ends with 0
    touch "$PHONE/gone"
    head -c 1000 | sh -c "$5" >/dev/null 2>&1
    exit 0
    ;;
lose) # it is lost while something runs there, after its first words
    : >"$PHONE/said"
    sh -c "$5" >>"$PHONE/said" 2>/dev/null <&0 &
    while [ ! -s "$PHONE/said" ]; do sleep 0.1; done
    touch "$PHONE/gone"
    exec cat "$PHONE/said"
    ;;
change) # in what is sent, or in what comes back
    tr '\000-\177' '\001-\177\000' | sh -c "$5" ;;
alter)
    sh -c "$5" | tr '\000-\177' '\001-\177\000' ;;
hang) exec sleep 60 ;;
quit) exit 0 ;; # the connection is lost at once
*) exec sh -c "$5" ;;
esac
