#!/usr/bin/env bash
# Starts compose.yaml and works with it from this host: writes, stops a file server, reads, writes, starts it again,
# waits until everything is complete, and takes all down with its data. Ends with PASS or FAIL.
#
# Runs beside a cluster that is up already: it has a project name and ports of its own.
set -euo pipefail
cd "$(dirname "$0")/.."

export CAIRN_PROFILE=${CAIRN_PROFILE:-dev}
export COMPOSE_PROJECT_NAME=cairn-compose-test
export CAIRN_PORT=17400 CAIRN_FILE_1_PORT=17501 CAIRN_FILE_2_PORT=17502 CAIRN_FILE_3_PORT=17503
unset CAIRN_LOCK_TOKEN
compose=(docker-compose)
command -v docker-compose >/dev/null || compose=(docker compose)

work=$(mktemp -d)
result=FAIL
finish() {
    local status=$?
    if [[ $result != PASS ]]; then
        say "what the containers said last"
        "${compose[@]}" ps || true
        "${compose[@]}" logs --no-color --tail 40 || true
    fi
    say "taking everything down, with its data"
    "${compose[@]}" down --volumes --timeout 20 >/dev/null 2>&1 || true
    rm -rf "$work"
    echo
    echo "compose test: $result"
    [[ $result == PASS ]] || exit "$((status == 0 ? 1 : status))"
}
trap finish EXIT

say() { printf '\n> %s\n' "$1"; }

# The command on this host, out of the build that is in the image.
cairn() { timeout 60 target/image/cairn --directory "http://127.0.0.1:$CAIRN_PORT" "$@"; }

# until_true SECONDS WHAT COMMAND...: waits until the command succeeds.
until_true() {
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do
        ((SECONDS < deadline)) || { echo "gave up waiting: $what"; return 1; }
        sleep 0.5
    done
    echo "$what"
}

healthy() {
    local id
    id=$("${compose[@]}" ps -q "$1")
    [[ $(docker inspect --format '{{.State.Health.Status}}' "$id") == healthy ]]
}

# status_is EXPRESSION: whether a Python expression over `s`, the status, holds.
status_is() {
    cairn status --json 2>/dev/null |
        python3 -c 'import json, sys; s = json.load(sys.stdin); sys.exit(0 if eval("(" + sys.argv[1] + ")") else 1)' "$1" 2>/dev/null
}

say "building the image"
deploy/image.sh

say "starting one directory and three file servers"
"${compose[@]}" down --volumes --timeout 5 >/dev/null 2>&1 || true
timeout 120 "${compose[@]}" up -d --no-build
for service in directory file-1 file-2 file-3; do
    until_true 60 "$service is healthy" healthy "$service"
done
until_true 30 "three file servers are live" \
    status_is 'sum(f["state"] == "live" for f in s["file_servers"]) == 3'

say "writing from this host"
mkdir -p "$work/in/sub dir"
head -c 20000000 /dev/urandom >"$work/in/large"
for i in $(seq 50); do echo "file $i" >"$work/in/sub dir/file $i"; done
: >"$work/in/empty"
cairn mkdir -p /compose
cairn put -r "$work/in" /compose/in
echo "first words" | cairn write /compose/words
cairn ls -l /compose

say "writing from within a container"
"${compose[@]}" exec -T file-2 cairn --directory http://directory:7400 ls -R /compose >"$work/listing"
grep -q "file 50" "$work/listing"

say "stopping file-2"
timeout 60 "${compose[@]}" stop -t 20 file-2

say "reading all of it without file-2"
cairn get -r /compose/in "$work/out"
diff -r "$work/in" "$work/out"
[[ $(cairn cat /compose/words) == "first words" ]]
echo "all is as it was written"

say "writing without file-2"
for i in $(seq 20); do echo "later $i" | cairn write "/compose/later-$i"; done
cairn put "$work/in/large" /compose/large-2
cairn get /compose/large-2 "$work/large-2"
cmp "$work/in/large" "$work/large-2"

say "starting file-2 again"
timeout 60 "${compose[@]}" start file-2
until_true 120 "every chunk has all its copies again" status_is \
    'sum(f["state"] == "live" for f in s["file_servers"]) == 3 and s["chunks"]["total"] > 0
     and s["chunks"]["healthy"] == s["chunks"]["total"] and s["chunks"]["lost"] == 0'
cairn status

say "everything stops and starts, and all is still there"
timeout 120 "${compose[@]}" stop -t 20
timeout 120 "${compose[@]}" start
until_true 60 "the directory is healthy" healthy directory
until_true 60 "three file servers are live" \
    status_is 'sum(f["state"] == "live" for f in s["file_servers"]) == 3'
rm -rf "$work/out"
cairn get -r /compose/in "$work/out"
diff -r "$work/in" "$work/out"
[[ $(cairn cat /compose/later-20) == "later 20" ]]
echo "all is as it was written"
result=PASS
