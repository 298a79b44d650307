#!/usr/bin/env bash
# Try the image with docker or podman as docs/how-to/containers.md says; any user whom the engine obeys may.
#
#     tests/container/run_engine.sh [--build] ENGINE FOLDER BIDS_DIR [ARCHIVE]
#
# ENGINE is docker or podman, with options if need be ("podman --storage-driver vfs"); FOLDER gets outputs.
# BIDS_DIR has small heads (all runs are --sloppy) of two people or more; with ages of ten or more, as from
# examples/make_ageing_cohort.py --n 12 --size 3, the group level is tried too. ARCHIVE, of `docker save`, is
# loaded; --build builds the Dockerfile. BUILD_FLAGS and RUN_FLAGS go to the engine.
set -euo pipefail

die() { echo "tests/container: $*" >&2; exit 1; }
build=no
[ "${1-}" != --build ] || { build=yes; shift; }
[ $# -ge 3 ] || die "usage: run_engine.sh [--build] ENGINE FOLDER BIDS_DIR [ARCHIVE]"
read -ra engine <<< "$1"
read -ra build_flags <<< "${BUILD_FLAGS-}"
read -ra run_flags <<< "${RUN_FLAGS-}"
command -v "${engine[0]}" > /dev/null || die "${engine[0]} is missing (apt-get install docker.io, or podman)"
repository=$(cd "$(dirname "$0")/../.." && pwd)
folder=$(realpath -m "$2") bids=$(realpath "$3") archive=${4:+$(realpath "$4")} image=bids_varaug:0.1.0
mkdir -p "$folder"
cd "$folder"
engine() { command "${engine[@]}" "$@"; }
engine info > engine.log 2>&1 || die "${engine[0]} does not answer: $(tail -n 1 engine.log)"
[ $build = no ] || engine build ${build_flags[@]+"${build_flags[@]}"} -t $image "$repository"
[ -z "$archive" ] || engine load -q -i "$archive"
size=$(engine image inspect -f '{{.Size}}' $image) || die "no image $image: give --build or an ARCHIVE"
echo "image: $((size / 1000000)) MB"

failed=0
check() { # what it should be, then a command
    local what=$1
    shift
    if "$@" > check.log 2>&1; then echo "ok    $what"; else
        failed=$((failed + 1))
        echo "FAIL  $what: $*"
        tail -n 15 check.log
    fi
}
ends() { # exit code, what is printed, then a command
    local code=0 wanted=$1 text=$2
    shift 2
    "$@" 2>&1 | tee ends.log || code=${PIPESTATUS[0]}
    echo "exit code $code"
    [ "$code" = "$wanted" ] && grep -q -- "$text" ends.log
}

user=$(id -u):$(id -g)
# Root stands for somebody whom the image does not know. Without root, podman's user 0 is the caller;
# RUN_FLAGS=--userns=keep-id for the other way.
[ "$user" != 0:0 ] || user=12345:12345
who=(-u "$user")
[[ ${engine[0]} != *podman || $user = 12345:12345 ]] || who=()
rm -rf out work
mkdir -p out work/tmp
[ "$(id -u)" != 0 ] || chown -R "$user" out work
strict=(--read-only --tmpfs /tmp --cap-drop all)
run() {
    engine run ${run_flags[@]+"${run_flags[@]}"} --network none ${who[@]+"${who[@]}"} \
        -v "$bids:/data:ro" -v "$PWD/out:/out" -v "$PWD/work:/work" "$@"
}
app() { run --rm "${strict[@]}" $image "$@"; }
participant=(/data /out participant -w /work)
small=("${participant[@]}" --sloppy --members "ieee,seed01" --nprocs 1 --omp-nthreads 1)

check "--version" ends 0 bids_varaug app --version
check "an unknown flag is exit code 64" ends 64 nonsense app "${participant[@]}" --nonsense
check "the root is read-only, /data too" run --rm "${strict[@]}" --entrypoint sh $image -c '! touch /x /data/x'
limited=(run --rm "${strict[@]}" --memory 1g)
# podman without root ignores it under control groups of version 1.
if "${limited[@]}" --entrypoint sh $image -c \
    'cd /sys/fs/cgroup && grep -qsx 1073741824 memory.max memory/memory.limit_in_bytes' 2> engine.log; then
    # Less than a member needs, more than the program takes to say so.
    check "too little memory is refused" ends 64 "Not enough memory: .*limit in" "${limited[@]}" $image "${participant[@]}"
    check "before anything is written" sh -c '! find out -type f | grep .'
else echo "skip  too little memory: --memory sets no limit. $(tail -n 1 engine.log)"; fi

stopped() { # signal, exit code: amid its work it ends by itself, within seconds if the machine has little else to do
    local id code seconds=$SECONDS
    id=$(run -d "${strict[@]}" $image "${small[@]}")
    while [ $((SECONDS - seconds)) -lt 600 ]; do
        ! engine logs "$id" 2>&1 | grep -q "member.* done" || break
        sleep 1
    done
    seconds=$SECONDS
    if [ "$1" = TERM ]; then engine stop -t 60 "$id"; else engine kill -s "$1" "$id"; fi
    code=$(engine wait "$id") seconds=$((SECONDS - seconds))
    engine logs "$id"
    echo "exit code $code after $seconds s"
    engine rm -f "$id"
    [ "$code" = "$2" ] && [ $seconds -lt 60 ]
}
check "stop" stopped TERM 143
check "Ctrl-C" stopped INT 130

two() { # what one has, the other leaves alone: exit code 1
    local first second=0 code=0
    app "${small[@]}" &
    first=$!
    app "${small[@]}" || second=$?
    wait $first || code=$?
    echo "exit codes $code and $second"
    [[ $code$second = 01 || $code$second = 10 || $code$second = 11 ]]
}
check "two at once" two
check "participants, no HOME, TMPDIR elsewhere" ends 0 "Done. Open" \
    run --rm "${strict[@]}" -e HOME=/nonexistent -e TMPDIR=/work/tmp $image "${small[@]}"
check "nothing is left in TMPDIR" sh -c '! find work/tmp -mindepth 1 | grep .'
count() { find "$1" -maxdepth 1 -name "$2" | wc -l; }
check "all reports are there" test "$(count out 'sub-*.html')" = "$(count "$bids" 'sub-*')"
check "the image's name in dataset_description.json" grep -q '"Tag": "bids_varaug:' out/dataset_description.json
# This one may write to its root, and does not.
name=varaug-test-$$ last=(group -w /work --brainage-model ridge)
[ "$(count "$bids" 'sub-*')" -ge 10 ] || last=("${small[@]:2}" --reports-only)
check "${last[*]}" run --name $name $image /data /out "${last[@]}"
engine diff $name > diff.log
engine rm -f $name > engine.log
# podman names the user in /etc/passwd.
check "nothing but mount points changed in its root" sh -c \
    "! grep -vE '^[AC] /(data|out|work|tmp|run|etc(/passwd|/group)?)\$' diff.log"
check "all outputs are the user's" sh -c "! find out work ! -uid ${user%:*} | grep ."

[ $failed = 0 ] || die "$failed check(s) failed"
