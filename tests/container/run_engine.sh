#!/usr/bin/env bash
# Try the image with docker or podman as docs/containers.md says; any user whom the engine obeys may.
#
#     tests/container/run_engine.sh [--build] ENGINE FOLDER BIDS_DIR [ARCHIVE]
#
# ENGINE is docker or podman, with options if need be ("podman --storage-driver vfs"). FOLDER gets outputs.
# BIDS_DIR: small heads (all runs are --sloppy) of ten people or more with ages, for the group level:
# examples/make_ageing_cohort.py --n 12 --size 3. ARCHIVE, from `docker save`, is loaded; --build builds the
# Dockerfile. BUILD_FLAGS and RUN_FLAGS go to the engine. For root the app runs as user 12345, else as its user.
set -euo pipefail

die() { echo "tests/container: $*" >&2; exit 1; }
build=no
[ "${1-}" != --build ] || { build=yes; shift; }
[ $# -ge 3 ] || die "usage: run_engine.sh [--build] ENGINE FOLDER BIDS_DIR [ARCHIVE]"
read -ra engine <<< "$1"
read -ra build_flags <<< "${BUILD_FLAGS-}"
read -ra run_flags <<< "${RUN_FLAGS-}"
command -v "${engine[0]}" > /dev/null || die "${engine[0]} is missing (apt-get install docker.io, or podman)"
bids=$(realpath "$3") folder=$(realpath -m "$2") image=bids_varaug:0.1.0
repository=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$folder"
cd "$folder"
engine() { command "${engine[@]}" "$@"; }
engine info > engine.log 2>&1 || die "${engine[0]} does not answer: $(tail -n 1 engine.log)"
[ $build = no ] || engine build ${build_flags[@]+"${build_flags[@]}"} -t $image "$repository"
[ $# -lt 4 ] || engine load -q -i "$4"
engine image inspect $image > image.json || die "there is no image $image (--build, or an ARCHIVE)"
echo "image: $(($(engine image inspect -f '{{.Size}}' $image) / 1000000)) MB"


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
# Root stands for somebody whom the image does not know. Without root, podman's user 0 would be the caller.
[ "$user" != 0:0 ] || user=12345:12345
who=(-u "$user")
[[ ${engine[0]} != *podman || $user = 12345:12345 ]] || who=(--userns=keep-id)
rm -rf out work
mkdir -p out work/tmp
[ "$(id -u)" != 0 ] || chown -R "$user" out work
volumes=(-v "$bids:/data:ro" -v "$PWD/out:/out" -v "$PWD/work:/work")
run() { engine run ${run_flags[@]+"${run_flags[@]}"} --network none "${who[@]}" "${volumes[@]}" "$@"; }
strict=(--read-only --tmpfs /tmp --cap-drop all)
app() { run --rm "${strict[@]}" $image "$@"; }
participant=(/data /out participant -w /work)
small=(--sloppy --members "ieee,seed01" --nprocs 1 --omp-nthreads 1)

check "--version" ends 0 bids_varaug app --version
check "an unknown flag is exit code 64" ends 64 nonsense app "${participant[@]}" --nonsense
check "the root is read-only, /data too" run --rm "${strict[@]}" --entrypoint sh $image -c '! touch /x /data/x'
# Less than a member needs, more than it takes to say so. Without --memory-swap there would be as much again.
check "too little memory is refused" ends 64 "Not enough memory: .* needs .*memory" \
    run --rm "${strict[@]}" --memory 1g --memory-swap 1g $image "${participant[@]}"
check "before anything is written" sh -c '! find out -type f | grep .'

stopped() { # signal, exit code: in the middle of the work, it ends at once, not by the SIGKILL after 20 s
    local id code begun
    id=$(run -d "${strict[@]}" $image "${participant[@]}" "${small[@]}")
    for ((i = 0; i < 1200; i++)); do
        engine logs "$id" 2>&1 | grep -q "member.* done" && break
        sleep 0.5
    done
    begun=$SECONDS
    if [ "$1" = TERM ]; then engine stop -t 20 "$id"; else engine kill -s "$1" "$id"; fi
    code=$(engine wait "$id")
    echo "exit code $code after $((SECONDS - begun)) s"
    engine logs "$id"
    engine rm -f "$id"
    [ "$code" = "$2" ] && [ $((SECONDS - begun)) -lt 15 ]
}
check "docker stop" stopped TERM 143
check "Ctrl-C" stopped INT 130

two() { # what one has, the other leaves alone: exit code 1
    local first second=0 code=0
    app "${participant[@]}" "${small[@]}" &
    first=$!
    app "${participant[@]}" "${small[@]}" || second=$?
    wait $first || code=$?
    echo "exit codes $code and $second"
    [ "$code$second" = 01 ] || [ "$code$second" = 10 ] || [ "$code$second" = 11 ]
}
check "two at once" two
check "a participant level, without HOME, TMPDIR elsewhere" ends 0 "Done. Open" \
    run --rm "${strict[@]}" -e HOME=/nonexistent -e TMPDIR=/work/tmp $image "${participant[@]}" "${small[@]}"
count() { find "$@" -maxdepth 1 | wc -l; }
check "all reports are there" test "$(count out -name 'sub-*.html')" = "$(count "$bids" -name 'sub-*')"
check "the image's name in dataset_description.json" grep -q '"Tag": "bids_varaug:' out/dataset_description.json
check "nothing is left in TMPDIR" sh -c '! find work/tmp -mindepth 1 | grep .'
# The root can be written here, and is not.
name=varaug-test-$$
check "a group level" ends 0 "Done. Open" run --name $name $image /data /out group -w /work --brainage-model ridge
engine diff $name > diff.log
engine rm -f $name > engine.log
check "nothing but mount points has changed in its root" sh -c \
    "! grep -vE '^[AC] /(data|out|work|tmp|etc|run)\$' diff.log"
check "all outputs are the user's" sh -c "! find out work ! -uid ${user%:*} | grep ."

[ $failed = 0 ] || die "$failed check(s) failed"
