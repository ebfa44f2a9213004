# What follows is the same for every launch. Vast.ai runs this script at every start of the
# container. State lies in $dir, and says what is still to be done:
#   attempt     how often the job was begun; behind the last one allowed it counts as failed
#   exit_code   the job's, once it has ended: it is not run again
#   stay        made by hand: the instance stays
# Variables that change where things are:
#   RAYWB_LAUNCH_DIR   $dir                      RAYWB_RAY_OPTIONS   more for `ray start`
#   RAYWB_VENV         an environment that has everything: nothing is installed
#   RAYWB_CONSOLE      where `vastai logs` looks RAYWB_DASHBOARD_PORT  Ray's, on loopback
#   RAYWB_PAUSES_S     before what failed       RAYWB_RAY_PORT        Ray's own, on loopback
#                      is tried again, in seconds
export HOME=${HOME:-/root}
dir=${RAYWB_LAUNCH_DIR:-$HOME/raywb-launch}
src=$dir/source
venv=${RAYWB_VENV:-$dir/venv}
port=${RAYWB_DASHBOARD_PORT:-8265}
dashboard=http://127.0.0.1:$port
gcs=${RAYWB_RAY_PORT:-6379}
mkdir -p "$dir"
exec 9>"$dir/lock"
if ! flock -n 9; then
    echo "[raywb] this script is at work already"
    exit 0
fi
console=${RAYWB_CONSOLE:-/proc/1/fd/1}
[ -w "$console" ] || console=/dev/stdout
exec > >(exec tee -a "$dir/onstart.log" 9>&- >>"$console") 2>&1
tee=$!
trap 'exec >&- 2>&-; wait "$tee" || true' EXIT # its last lines are not lost

say() { echo "[raywb] $(date -u +%FT%TZ) $*"; }

# Vast.ai sets variables for the container's first process; some images hide them from its children.
if [ -z "${CONTAINER_ID:-}" ] && [ -r /proc/1/environ ]; then
    while IFS= read -r -d '' pair; do
        name=${pair%%=*}
        case $name in
            CONTAINER_ID | CONTAINER_API_KEY | VAST_* | WANDB_* | RAYWB_*)
                [ -n "${!name:-}" ] || export "$pair" ;;
        esac
    done </proc/1/environ
fi

try() {
    local pause
    for pause in ${RAYWB_PAUSES_S:-10 30} none; do
        "$@" && return 0
        [ "$pause" = none ] || { say "failed; again in $pause s: $*"; sleep "$pause"; }
    done
    return 1
}

has() { command -v "$1" >/dev/null; }

fetch() {
    has git || { apt-get update -qq && apt-get install -y -qq git >/dev/null; } || return
    git init -q "$src" || return
    if ! git -C "$src" cat-file -e "$commit^{commit}" 2>/dev/null; then
        if [ -n "${RAYWB_GIT_TOKEN:-}" ]; then
            export GIT_ASKPASS=$dir/askpass
            printf '%s\n' '#!/bin/sh' 'case $1 in Username*) echo x-access-token ;;' \
                '*) echo "$RAYWB_GIT_TOKEN" ;; esac' >"$GIT_ASKPASS"
            chmod 700 "$GIT_ASKPASS"
        fi
        GIT_TERMINAL_PROMPT=0 git -C "$src" fetch -q --depth 1 "$repo" "$commit" || return
    fi
    git -C "$src" checkout -q --force --detach "$commit"
}

install() {
    [ -z "${RAYWB_VENV:-}" ] || return 0
    [ ! -e "$dir/installed" ] || return 0
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        say "python3 of this image is older than 3.11, or missing: take another --image"
        return 1
    fi
    python3 -m venv --system-site-packages "$venv" &&
        "$venv/bin/pip" install -q -e "$src$extras" &&
        touch "$dir/installed"
}

start_ray() {
    say "starting Ray"
    ray start --head --disable-usage-stats --port="$gcs" --dashboard-host=127.0.0.1 \
        --dashboard-port="$port" ${RAYWB_RAY_OPTIONS:-} </dev/null >"$dir/ray.log" 2>&1 9>&- ||
        { cat "$dir/ray.log"; return 1; }
}

# Prints the exit code of a job that has ended. 0: it is there, 3: not there, 4: there is no Ray.
job_code() { python -m raywb.launch.vast.job "$dashboard" "$@"; }

run_job() {
    local attempt seen=0
    attempt=$(cat "$dir/attempt" 2>/dev/null || echo 0)
    [ "$attempt" = 0 ] || job_code "job-$attempt" >/dev/null || seen=$?
    if [ "$attempt" != 0 ] && [ "$seen" = 0 ]; then
        say "attempt $attempt is on this Ray: following it"
        ray job logs --address "$dashboard" --follow "job-$attempt" 9>&- || true
    else
        if [ "$attempt" -ge "$attempts" ]; then
            say "begun and interrupted $attempt x: that is enough"
            echo 1 >"$dir/exit_code"
            return
        fi
        [ "$attempt" = 0 ] || say "attempt $attempt was interrupted: the same command goes on"
        { [ "$attempt" != 0 ] && [ "$seen" = 3 ]; } || start_ray || return
        attempt=$((attempt + 1))
        echo "$attempt" >"$dir/attempt" || return
        say "attempt $attempt: ${command[*]}"
        ray job submit --address "$dashboard" --submission-id "job-$attempt" -- \
            bash -c 'cd "$0" && exec "$@"' "$src" "$venv/bin/python" "${command[@]}" 9>&- || true
    fi
    local code
    code=$(job_code "job-$attempt" --wait) || { say "Ray was lost"; code=1; }
    say "the job has ended with exit code $code"
    echo "$code" >"$dir/exit_code"
}

# Of this script's own Ray, and of no other one that the machine may have.
end_instance() {
    RAY_ADDRESS=127.0.0.1:$gcs python -m raywb shutdown --place vast --job-exit-code "$1" \
        "${shutdown[@]}" 9>&-
}

# Where no attempt was ever begun nothing can be lost, and raywb may not even be here.
give_up() {
    say "$1; nothing was run now"
    if [ "$auto_shutdown" = no ] || [ "$keep_on_failure" = yes ] || [ -e "$dir/stay" ]; then
        say "the instance stays"
    elif [ -z "${CONTAINER_ID:-}" ]; then
        say "CONTAINER_ID not set - cannot auto-shutdown"
    elif python -m raywb --version >/dev/null 2>&1; then
        end_instance 1 || true
    elif [ -e "$dir/attempt" ]; then
        say "an earlier attempt may have left data here: the instance stays"
    else
        python3 -m venv "$dir/vastai" && "$dir/vastai/bin/pip" install -q vastai &&
            VAST_API_KEY=${CONTAINER_API_KEY:-} "$dir/vastai/bin/vastai" destroy instance \
                "$CONTAINER_ID" -y
    fi
    exit 1
}

export RAY_MAX_LIMIT_FROM_API_SERVER=40000 RAY_MAX_LIMIT_FROM_DATA_SOURCE=40000
export RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 # one machine: all of Ray listens on loopback alone
export PATH="$venv/bin:$PATH" PYTHONPATH="$src${PYTHONPATH:+:$PYTHONPATH}"
cd "$dir"
if [ -s "$dir/exit_code" ]; then
    say "the job has ended before, with exit code $(cat "$dir/exit_code"): it is not run again"
else
    say "instance ${CONTAINER_ID:-?}: $repo at $commit"
    try fetch || give_up "$repo has no commit $commit for this machine"
    unset RAYWB_GIT_TOKEN
    try install || give_up "the project cannot be installed"
    run_job || give_up "Ray does not start"
fi
code=$(cat "$dir/exit_code")
if [ "$auto_shutdown" = no ] || [ -e "$dir/stay" ]; then
    say "the instance stays; raywb vast destroy ${CONTAINER_ID:-} ends it"
    exit "$code"
fi
ended=0
end_instance "$code" || ended=$?
say "raywb shutdown: exit code $ended"
exit "$ended"
