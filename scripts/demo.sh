#!/usr/bin/env bash
# Play the seed document's walkthrough with curl against the running clusters, and check every answer.
# What is not running is started first and stopped at the end. Exit code 1 at the first difference.
# usage: demo.sh [all|lock|queue|cache|secure]
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

DEADLINE_S=20   # for what needs a moment: an election, a line in a log
STATUS="" BODY="" # the last answer

# json EXPRESSION TEXT...: a Python expression over `texts`, the TEXTs parsed as JSON.
json() {
  local expression=$1
  shift
  "$VENV/bin/python" -I -S -c '
import json, sys
def has(wanted, got):
    """Whether every field of wanted is in got, with the same value."""
    return isinstance(got, dict) and all(k in got and got[k] == v for k, v in wanted.items())
texts = [json.loads(text) for text in sys.argv[2:]]
result = eval(sys.argv[1])
print(result if isinstance(result, str) else json.dumps(result))' "$expression" "$@"
}

heading() { printf '\n== %s\n' "$*"; }
step() { printf '\n-- %s\n' "$*"; }

# show WORD...: a command as one would type it.
show() {
  local word
  printf '$ curl'
  for word in "$@"; do
    case $word in
      *[!A-Za-z0-9_./:=@,+-]*) printf " '%s'" "$word" ;;
      *) printf ' %s' "$word" ;;
    esac
  done
  printf '\n'
}

# quietly CURL-ARGUMENT...: sets STATUS and BODY. Everything is on this machine: no proxy may step in.
quietly() {
  local answer
  answer=$(curl -sS --noproxy '*' --max-time 30 -w '\n%{http_code}' "$@") ||
    die "curl got no answer (its message is above)"
  STATUS=${answer##*$'\n'}
  BODY=${answer%$'\n'*}
}

# ask CURL-ARGUMENT...: the same, printed as a person would see it.
ask() {
  show "$@"
  quietly "$@"
  printf '%s %s\n' "$STATUS" "$BODY"
}

differs() { die "expected $1, got $STATUS $BODY"; }

# expect STATUS FIELDS: the status, and every field of the JSON object FIELDS.
expect() {
  [ "$STATUS" = "$1" ] || differs "$1 $2"
  [ "$(json 'has(texts[0], texts[1])' "$2" "$BODY" 2>/dev/null)" = true ] || differs "$1 $2"
}

# expect_that STATUS CONDITION: the status, and a Python condition over the answer `texts[0]`.
expect_that() {
  [ "$STATUS" = "$1" ] || differs "$1 with $2"
  [ "$(json "bool($2)" "$BODY" 2>/dev/null)" = true ] || differs "$1 with $2"
}

# expect_exactly STATUS BODY: byte for byte.
expect_exactly() {
  [ "$STATUS $BODY" = "$1 $2" ] || differs "exactly $1 $2"
}

# until_true COMMAND...: polls it with a deadline.
until_true() {
  local give_up=$((SECONDS + DEADLINE_S))
  until "$@"; do
    [ "$SECONDS" -lt "$give_up" ] || return 1
    sleep 0.1
  done
}

# addresses SERVICE: sets URLS and LOGS, in the order of the nodes.
addresses() {
  local _service _name url log
  URLS=() LOGS=()
  while IFS=$'\t' read -r _service _name url log; do
    URLS+=("$url")
    LOGS+=("$log")
  done < <(nodes list "$1")
}

JSON_TYPE="Content-Type: application/json"
post() { ask -X POST "$1" -H "$JSON_TYPE" -d "$2"; }

# --- A. lock -----------------------------------------------------------------------------------------

find_leader() {
  local url
  LEADER="" FOLLOWER=""
  for url in "${URLS[@]}"; do
    quietly "$url/status"
    if [ "$(json 'texts[0].get("state")' "$BODY")" = LEADER ]; then LEADER=$url; else FOLLOWER=$url; fi
  done
  [ -n "$LEADER" ] && [ -n "$FOLLOWER" ]
}

waits_for_right() {
  quietly "$LEADER/locks/demo-right"
  printf '%s' "$BODY" | grep -q '"waiters": *\[ *{[^]]*"client_id": *"klien-A"'
}

demo_lock() {
  heading "A. Distributed lock manager (Raft)"
  addresses lock
  step "Find the leader: /status of each node"
  until_true find_leader || die "no leader within $DEADLINE_S s"
  ask "$LEADER/status"
  expect 200 '{"state": "LEADER"}'

  local name client
  for client in klien-A klien-B; do # what an interrupted demo left behind
    for name in kunci-raft demo-left demo-right; do
      quietly -L -X POST "$LEADER/release" -d "{\"lock_name\": \"$name\", \"client_id\": \"$client\"}"
    done
  done

  step "Acquire an exclusive lock, on the leader"
  post "$LEADER/acquire" '{"lock_name": "kunci-raft", "lock_type": "exclusive", "client_id": "klien-A"}'
  expect 200 '{"status": "acquired", "lock_name": "kunci-raft", "lock_type": "exclusive", "client_id": "klien-A"}'
  expect_that 200 'texts[0]["fencing_token"] > 0'

  step "Nobody else gets it (wait_ms 0: only try)"
  post "$LEADER/acquire" '{"lock_name": "kunci-raft", "client_id": "klien-B", "wait_ms": 0}'
  expect 409 '{"error": "Lock is held", "status": "held"}'

  step "A follower says who leads (307; curl -L goes there by itself)"
  post "$FOLLOWER/release" '{"lock_name": "kunci-raft", "client_id": "klien-A"}'
  expect 307 "{\"error\": \"Not the leader\", \"leader\": \"$LEADER\"}"

  step "Release"
  post "$LEADER/release" '{"lock_name": "kunci-raft", "client_id": "klien-A"}'
  expect 200 '{"status": "released"}'

  step "Deadlock: A holds left and wants right, B holds right and wants left"
  post "$LEADER/acquire" '{"lock_name": "demo-left", "client_id": "klien-A"}'
  expect 200 '{"status": "acquired"}'
  post "$LEADER/acquire" '{"lock_name": "demo-right", "client_id": "klien-B"}'
  expect 200 '{"status": "acquired"}'
  local waiting=$SCRATCH/waiting.json wanted='{"lock_name": "demo-right", "client_id": "klien-A"}'
  show -X POST "$LEADER/acquire" -H "$JSON_TYPE" -d "$wanted"
  echo "  (it waits, in the background)"
  curl -sS --noproxy '*' --max-time 30 -X POST "$LEADER/acquire" -H "$JSON_TYPE" -d "$wanted" >"$waiting" &
  local waiter=$!
  until_true waits_for_right || die "klien-A does not wait for demo-right; last seen: $BODY"
  post "$LEADER/acquire" '{"lock_name": "demo-left", "client_id": "klien-B"}'
  expect 409 '{"error": "Deadlock detected", "status": "deadlock", "cycle": ["klien-B", "klien-A"]}'

  step "B gives way: A, who waited, gets the lock at once"
  post "$LEADER/release" '{"lock_name": "demo-right", "client_id": "klien-B"}'
  expect 200 '{"status": "released"}'
  wait "$waiter" || die "the waiting curl failed"
  STATUS=200 BODY=$(cat "$waiting")
  echo "  the waiting curl was answered: $BODY"
  expect 200 '{"status": "acquired", "lock_name": "demo-right", "client_id": "klien-A"}'
  for name in demo-left demo-right; do
    post "$LEADER/release" "{\"lock_name\": \"$name\", \"client_id\": \"klien-A\"}"
    expect 200 '{"status": "released"}'
  done
}

# --- B. queue ----------------------------------------------------------------------------------------

# Of the nodes, asked each for itself, one has the queue. Soon after a start it may be changing hands.
one_owner_answers() {
  local url owners=0 others=0
  for url in "${URLS[@]}"; do
    ask "$url/consume?queue=nama-antrean&forward=false"
    case $STATUS in
      204) owners=$((owners + 1)) ;;
      421)
        expect 421 '{"error": "Wrong node"}'
        expect_that 421 '":" in texts[0]["owner"]'
        others=$((others + 1))
        ;;
    esac
  done
  [ "$owners" = 1 ] && [ $((owners + others)) = ${#URLS[@]} ] && return 0
  echo "  (the queue is changing hands: once more)"
  return 1
}

demo_queue() {
  heading "B. Message queue (consistent hashing)"
  addresses queue
  step "Produce to any node; it forwards to the queue's owner"
  post "${URLS[0]}/produce" '{"queue": "nama-antrean", "body": "isi pesan baru"}'
  expect 201 '{"queue": "nama-antrean", "status": "created"}'
  local produced received
  produced=$(json 'texts[0]["id"]' "$BODY")

  step "Consume, here through another node"
  ask "${URLS[1]}/consume?queue=nama-antrean"
  expect 200 '{"queue": "nama-antrean", "body": "isi pesan baru"}'
  received=$(json 'texts[0]["id"]' "$BODY")
  while [ "$received" != "$produced" ]; do # an interrupted demo left one: at least once, until acknowledged
    echo "  (an older message that nobody had acknowledged)"
    post "${URLS[1]}/ack" "{\"message_id\": \"$received\"}"
    expect 200 '{"status": "acknowledged"}'
    ask "${URLS[1]}/consume?queue=nama-antrean"
    expect 200 '{"body": "isi pesan baru"}'
    received=$(json 'texts[0]["id"]' "$BODY")
  done

  step "Acknowledge"
  post "${URLS[1]}/ack" "{\"message_id\": \"$received\"}"
  expect 200 '{"status": "acknowledged"}'

  step "With ?forward=false a node that does not own the queue names the owner"
  until_true one_owner_answers || die "expected one owner with an empty queue (204), 421 elsewhere"
}

# --- C. cache ----------------------------------------------------------------------------------------

invalidations() { grep -c 'INVALIDATE.*key=nama-kota' "${LOGS[1]}" || true; }
invalidated_again() { [ "$(invalidations)" -gt "$1" ]; }

demo_cache() {
  heading "C. Coherent cache (MESI)"
  addresses cache
  step "Write on node A"
  post "${URLS[0]}/write" '{"key": "nama-kota", "value": "Balikpapan"}'
  expect 200 '{"status": "ok", "key": "nama-kota", "value": "Balikpapan", "state": "M"}'

  step "Read on node A: a hit"
  ask "${URLS[0]}/read?key=nama-kota"
  expect 200 '{"key": "nama-kota", "value": "Balikpapan", "hit": true, "source": "cache"}'

  step "Read on node B: a miss, fetched and kept"
  ask "${URLS[1]}/read?key=nama-kota"
  expect 200 '{"value": "Balikpapan", "state": "S", "hit": false, "source": "memory"}'
  ask "${URLS[1]}/read?key=nama-kota"
  expect 200 '{"value": "Balikpapan", "state": "S", "hit": true, "source": "cache"}'

  step "Update on node A: node B's copy is invalidated before the answer (see its log)"
  local before
  before=$(invalidations)
  post "${URLS[0]}/write" '{"key": "nama-kota", "value": "Samarinda"}'
  expect 200 '{"status": "ok", "value": "Samarinda", "state": "M"}'
  until_true invalidated_again "$before" || die "no INVALIDATE line for nama-kota in ${LOGS[1]}"
  grep 'INVALIDATE.*key=nama-kota' "${LOGS[1]}" | tail -n 1
  ask "${URLS[1]}/read?key=nama-kota"
  expect 200 '{"value": "Samarinda", "hit": false}'

  step "Metrics of node B"
  ask "${URLS[1]}/metrics"
  expect_that 200 'texts[0]["hits"] >= 1 and texts[0]["misses"] >= 2 and texts[0]["invalidations_received"] >= 1'
}

# --- D. secure ---------------------------------------------------------------------------------------

demo_secure() {
  heading "D. Secure key-value store (TLS, roles, audit)"
  addresses secure
  # The seed's public demo tokens: the node takes them on loopback only.
  local user="Authorization: Bearer token-user-ABC" admin="Authorization: Bearer token-admin-123"
  step "Without a token"
  ask -k "${URLS[0]}/get?key=kunci1"
  expect_exactly 401 '{"error":"Authorization token required or invalid"}'

  step "Role user may not write"
  ask -k -X POST -H "$user" -H "$JSON_TYPE" -d '{"key": "kunci1", "value": "gagal"}' "${URLS[0]}/set"
  expect_exactly 403 '{"error":"Insufficient permissions"}'

  step "Role admin may"
  ask -k -X POST -H "$admin" -H "$JSON_TYPE" -d '{"key": "kunci1", "value": "berhasil"}' "${URLS[0]}/set"
  expect_exactly 200 '{"status":"ok","key":"kunci1","value":"berhasil"}'

  step "It is on node B as well"
  ask -k -H "$user" "${URLS[1]}/get?key=kunci1"
  expect_exactly 200 '{"key":"kunci1","value":"berhasil"}'
}

# --- play --------------------------------------------------------------------------------------------

# The services that were not running before: they are stopped again, whatever happens.
BORROWED=""
SCRATCH=""
give_back() {
  local code=$? service job
  trap - EXIT
  for job in $(jobs -p); do kill "$job" 2>/dev/null || true; done
  for service in $BORROWED; do nodes stop "$service" || code=1; done
  [ -z "$SCRATCH" ] || rm -rf "$SCRATCH"
  exit "$code"
}

service_argument demo.sh "$@"
command -v curl >/dev/null || die "curl is needed for the demo"
prepare "$VENV" "${SERVICE_REQUIREMENTS[@]}"
PLAYED=$SERVICE
[ "$PLAYED" != all ] || PLAYED=$SERVICE_NAMES
trap give_back EXIT
trap 'exit 130' INT TERM
SCRATCH=$(mktemp -d)
for each in $PLAYED; do
  [ -n "$(nodes list "$each")" ] || BORROWED="$BORROWED $each"
done
[ -z "$BORROWED" ] || echo "Not running, so started for the demo:$BORROWED"
nodes start "$SERVICE" >"$SCRATCH/start.log" || {
  cat "$SCRATCH/start.log"
  exit 1
}
for each in $PLAYED; do
  "demo_$each"
done
printf '\nEvery answer was as expected: %s\n' "$PLAYED"
