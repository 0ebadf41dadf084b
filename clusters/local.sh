#!/usr/bin/env bash
# Several Ray nodes on this machine, each a set of processes of its own that can be killed alone.
#
#   clusters/local.sh start [NODES] [CPUS]    NODES nodes (2) of CPUS CPUs each (2); prints how to use them
#   clusters/local.sh stop                    ends them, and nothing else that runs here
#   clusters/local.sh kill NODE               SIGKILL to all processes of a node, from 1, as when its power is cut
#   clusters/local.sh env                     prints the variables again: eval "$(clusters/local.sh env)"
#
# A token is asked for (RAY_AUTH_MODE=token), nodes and dashboard are on loopback addresses, and the ports are not Ray's
# usual ones. Ray's head and its metrics ports listen on all addresses all the same, the latter without a token: mind the
# firewall. ELASTICTRAIN_LOCAL names the folder that holds token, logs and process ids, ELASTICTRAIN_PORT the first of
# the ports.
set -euo pipefail

state=${ELASTICTRAIN_LOCAL:-$HOME/.elastictrain/local}
port=${ELASTICTRAIN_PORT:-23790} # 10002 to 19999 are Ray's for workers
start_timeout_s=60
stop_timeout_s=20
object_store_bytes=$((200 * 1024 * 1024))

fail() {
    echo "local.sh: $*" >&2
    exit 1
}

environment() {
    echo "export RAY_ADDRESS=127.0.0.2:$(cat "$state/port")"
    echo "export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$(($(cat "$state/port") + 1))"
    echo "export RAY_AUTH_MODE=token"
    echo "export RAY_AUTH_TOKEN_PATH=$(printf %q "$state/token")"
}

# When the process began, in the kernel's ticks: with the pid it names a process for good.
began() {
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    stat=${stat##*) }
    cut -d' ' -f20 <<<"$stat"
}

# launch NAME OPTION...: one `ray start --block`, in a session of its own; returns when the node is up
launch() {
    local name=$1 log=$state/$1.log pid deadline=$((SECONDS + start_timeout_s))
    shift
    : >"$log"
    setsid ray start "$@" --block --disable-usage-stats --num-cpus="$cpus" \
        --object-store-memory="$object_store_bytes" >"$log" 2>&1 </dev/null &
    pid=$!
    echo "$pid $(began "$pid")" >>"$state/pids"
    until grep -q 'Ray runtime started' "$log"; do
        [[ -e /proc/$pid ]] || fail "$name ended while it started; its log is $log: $(tail -n 3 "$log")"
        ((SECONDS < deadline)) || fail "$name is not up after $start_timeout_s s; its log is $log"
        sleep 0.1
    done
}

start() {
    local nodes=${1:-2}
    cpus=${2:-2}
    [[ $nodes =~ ^[1-9][0-9]?$ ]] || fail "NODES is a number from 1 to 99, not '$nodes'"
    [[ $cpus =~ ^[1-9][0-9]*$ ]] || fail "CPUS is a number from 1, not '$cpus'"
    command -v ray >/dev/null || fail "no ray command: activate the venv first (source .venv/bin/activate)"
    [[ ! -e $state/pids ]] || fail "a cluster of this folder runs ($state): clusters/local.sh stop"
    (umask 077 && mkdir -p "$state" && head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$state/token")
    chmod 600 "$state/token" # one that was there before too
    echo "$port" >"$state/port"
    mktemp -d /tmp/et-XXXXXX >"$state/folder" # short: Ray puts sockets there, whose paths may have 107 bytes
    : >"$state/pids"
    trap 'stop' ERR EXIT
    eval "$(environment)"
    launch head --head --node-ip-address=127.0.0.2 --port="$port" --temp-dir="$(cat "$state/folder")" \
        --dashboard-host=127.0.0.1 --dashboard-port=$((port + 1)) --ray-client-server-port=$((port + 2)) \
        --dashboard-agent-listen-port=$((port + 3))
    for ((node = 1; node < nodes; node++)); do
        launch "node-$node" --address="$RAY_ADDRESS" --node-ip-address="127.0.0.$((2 + node))" \
            --dashboard-agent-listen-port=$((port + 3 + node))
    done
    trap - ERR EXIT
    echo "# $nodes Ray nodes of $cpus CPUs; dashboard $RAY_API_SERVER_ADDRESS, token in $state/token"
    environment
}

stop() {
    trap - ERR EXIT
    [[ -e $state/pids ]] || fail "no cluster was started from here ($state)"
    local pid since deadline=$((SECONDS + stop_timeout_s))
    while read -r pid since; do
        if [[ $(began "$pid") == "$since" ]]; then kill -TERM "$pid" || true; fi
    done <"$state/pids"
    while read -r pid since; do
        while [[ $(began "$pid") == "$since" ]]; do
            if ((SECONDS >= deadline)); then
                echo "local.sh: $pid does not end; killing its session" >&2
                pkill -KILL --session "$pid" || true
                break
            fi
            sleep 0.1
        done
    done <"$state/pids"
    rm -rf "$(cat "$state/folder")"
    rm -f "$state/pids" "$state/token" "$state/port" "$state/folder"
}

kill_node() {
    [[ -e $state/pids ]] || fail "no cluster was started from here ($state)"
    [[ ${1:-} =~ ^[1-9][0-9]?$ ]] || fail "NODE is a number from 1; node 0 is the head, and stop ends all of them"
    local pid='' since=''
    read -r pid since < <(sed -n "$((1 + $1))p" "$state/pids") || true
    [[ -n $pid && $(began "$pid") == "$since" ]] || fail "there is no node $1, or it has ended"
    pkill -KILL --session "$pid"
}

case ${1:-} in
    start) start "${@:2}" ;;
    stop) stop ;;
    kill) kill_node "${@:2}" ;;
    env)
        [[ -e $state/pids ]] || fail "no cluster was started from here ($state): clusters/local.sh start"
        environment
        ;;
    *)
        sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
        exit 2
        ;;
esac
