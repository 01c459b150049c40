#!/bin/sh
# Copies a SQLite store as of one moment, beside a running server; verifies the copy; keeps the newest ones.
#
#     backup.sh DELTAMEM STORE FOLDER KEEP
#
# DELTAMEM: the deltamem command. STORE: absolute path of the store's file. FOLDER: absolute path; there already.
# DELTAMEM_STORE_OPTIONS: what follows the ? of the store's URL, key_file=PATH for one.
set -eu

deltamem=$1 store=$2 folder=$3 keep=$4
options=${DELTAMEM_STORE_OPTIONS:+?$DELTAMEM_STORE_OPTIONS}
copy=$folder/sessions-$(date -u +%Y%m%dT%H%M%SZ).db
part=$copy.part

trap 'rm -f "$part" "$part-wal" "$part-shm"' EXIT
"$deltamem" store backup "$part" --store "sqlite:///$store$options"
"$deltamem" store check --store "sqlite:///$part$options"
mv "$part" "$copy"
# Names sort by time.
ls -1 "$folder"/sessions-*.db | sort -r | tail -n "+$((keep + 1))" | xargs -r rm -f --
