# What follows is the same for every launch. Vast.ai runs this script at every start of the
# container. State lies in $dir, and says what is still to be done:
#   attempt     how often the job was begun; behind the last one allowed it counts as failed
#   exit_code   the job's, once it has ended: it is not run again
#   begun       when the first attempt was begun, in seconds since the epoch
#   ended-N     exit code that the command of attempt N left
#   stay        made by hand: the instance stays
# Variables that change where things are:
#   RAYWB_LAUNCH_DIR   $dir                      RAYWB_RAY_OPTIONS   more for `ray start`
#   RAYWB_VENV         an environment that has everything: nothing is installed
#   RAYWB_CONSOLE      where `vastai logs` looks RAYWB_DASHBOARD_PORT  Ray's, on loopback
#   RAYWB_PAUSES_S     before what failed       RAYWB_RAY_PORT        Ray's own, on loopback
#                      is tried again, in seconds
#   RAYWB_INIT_ENVIRON where the first process's variables are
export HOME=${HOME:-/root}
dir=${RAYWB_LAUNCH_DIR:-$HOME/raywb-launch}
src=$dir/source
venv=${RAYWB_VENV:-$dir/venv}
port=${RAYWB_DASHBOARD_PORT:-8265}
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
init=${RAYWB_INIT_ENVIRON:-/proc/1/environ}
if [ -z "${CONTAINER_ID:-}" ] && [ -r "$init" ]; then
    while IFS= read -r -d '' pair; do
        name=${pair%%=*}
        if [[ $name =~ ^(CONTAINER_(ID|API_KEY)|(VAST|WANDB|RAYWB)_.*|$names)$ ]] &&
            [ -z "${!name:-}" ]; then
            export "$pair"
        fi
    done <"$init"
fi

# Pauses between tries of what begins something, and of what is to come to its end, for hours.
begin="10 30"
end="30 60 120 300 600 1800 3600 3600 3600"

try() {
    local pause failed
    for pause in ${RAYWB_PAUSES_S:-$1} none; do
        failed=0
        "${@:2}" || failed=$?
        case "$2 $failed" in
            # What time does not mend: wrong usage, an offline run, outputs without a place, signals.
            *" 0" | "shut_down "[289] | "shut_down 1"[234]?) break ;;
        esac
        [ "$pause" = none ] || { say "failed; again in $pause s: $2"; sleep "$pause"; }
    done
    return "$failed"
}

has() { command -v "$1" >/dev/null; }
limit() { timeout -k 30 "$@" 9>&-; }
need() {
    has "$1" || { limit 600 apt-get update -qq && limit 900 apt-get install -y -qq "$1" >/dev/null; }
}

fetch() {
    need git && git init -q "$src" || return 1
    if ! git -C "$src" cat-file -e "$commit^{commit}" 2>/dev/null; then
        if [ -n "${RAYWB_GIT_TOKEN:-}" ]; then
            export GIT_ASKPASS=$dir/askpass
            printf '%s\n' '#!/bin/sh' 'case $1 in Username*) echo x-access-token ;;' \
                '*) echo "$RAYWB_GIT_TOKEN" ;; esac' >"$GIT_ASKPASS"
            chmod 700 "$GIT_ASKPASS"
        fi
        GIT_TERMINAL_PROMPT=0 limit 1800 git -C "$src" fetch -q --depth 1 "$repo" "$commit" ||
            return 1
    fi
    git -C "$src" checkout -q --force --detach "$commit"
}

install() {
    [ -z "${RAYWB_VENV:-}" ] && [ ! -e "$dir/installed" ] || return 0
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        say "python3 of this image is older than 3.11, or missing: take another --image"
        return 1
    fi
    limit 300 python3 -m venv --system-site-packages "$venv" &&
        limit 3600 "$venv/bin/pip" install -q -e "$src$extras" &&
        touch "$dir/installed"
}

# The very words of the end are tried before there is anything to lose.
ready() {
    [ "$auto_shutdown" = no ] ||
        limit 300 python -m raywb.launch.vast.ready --place vast --job-exit-code 0 "${shutdown[@]}"
}

run_job() {
    python -m raywb.launch.vast.attempts --dir "$dir" --attempts "$attempts" \
        --max-hours "$max_hours" --gcs-port "$gcs" --dashboard-port "$port" \
        --ray-options="${RAYWB_RAY_OPTIONS:-}" -- "${command[@]}" 9>&-
}

# Of this script's own Ray, and of no other one that the machine may have.
shut_down() {
    RAY_ADDRESS=127.0.0.1:$gcs python -m raywb shutdown --place vast --job-exit-code "$code" \
        "${shutdown[@]}" 9>&-
}

# Of what begins with nothing but a shell: the key goes to curl's standard input.
api() {
    printf 'header = "Authorization: Bearer %s"\n' "${CONTAINER_API_KEY:-}" |
        limit 90 curl -sS -m 60 -K - -w ' %{http_code}' -H 'Content-Type: application/json' \
            -X "$@" "${VAST_URL:-https://console.vast.ai}/api/v0/instances/$CONTAINER_ID/?owner=me"
}

destroy() {
    local said
    need curl || return 1
    said=$(api DELETE -d{}) || return 1
    say "Vast.ai: $said"
    [[ $said =~ \"success\":\ *true|\ 404$ ]] || return 1
    for _ in {1..20}; do
        [[ $(api GET) =~ \"instances\":\ *null|\ 40[134]$ ]] && return 0
        sleep 3
    done
    return 1
}

# Where no attempt was ever begun nothing can be lost, and raywb may not even be here.
give_up() {
    say "$1; nothing was run now"
    code=1
    if [ "$auto_shutdown" = no ] || [ "$keep_on_failure" = yes ] || [ -e "$dir/stay" ]; then
        say "the instance stays"
    elif [ -z "${CONTAINER_ID:-}" ]; then
        say "CONTAINER_ID not set - cannot auto-shutdown"
    elif [ ! -e "$dir/attempt" ]; then
        try "$end" destroy && say "the instance is gone" || stays
    elif python -m raywb --version >/dev/null 2>&1; then
        try "$end" shut_down || stays
    else
        say "an earlier attempt may have left data here"
        stays
    fi
    exit 1
}

stays() { say "THE INSTANCE STAYS AND COSTS: raywb vast destroy ${CONTAINER_ID:-} ends it"; }

export RAY_MAX_LIMIT_FROM_API_SERVER=40000 RAY_MAX_LIMIT_FROM_DATA_SOURCE=40000
export RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 # one machine: all of Ray listens on loopback alone
export PATH="$venv/bin:$PATH" PYTHONPATH="$src${PYTHONPATH:+:$PYTHONPATH}"
cd "$dir"
if [ -s "$dir/exit_code" ]; then
    say "the job has ended before, with exit code $(cat "$dir/exit_code"): it is not run again"
else
    say "instance ${CONTAINER_ID:-?}: $repo at $commit"
    try "$begin" fetch || give_up "$repo has no commit $commit for this machine"
    unset RAYWB_GIT_TOKEN
    try "$begin" install || give_up "the project cannot be installed"
    ready || give_up "the project could not end this instance"
    try "$begin 60 120 300" run_job || give_up "Ray does not start, or takes no job"
fi
code=$(cat "$dir/exit_code")
if [ "$auto_shutdown" = no ] || [ -e "$dir/stay" ]; then
    say "the instance stays; raywb vast destroy ${CONTAINER_ID:-} ends it"
    exit "$code"
fi
ended=0
try "$end" shut_down || ended=$?
say "raywb shutdown: exit code $ended"
[ "$ended" = 0 ] || stays
exit "$ended"
