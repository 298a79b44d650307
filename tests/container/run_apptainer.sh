#!/usr/bin/env bash
# Convert the image with Apptainer and try it as docs/how-to/containers.md says; any user may.
#
#     tests/container/run_apptainer.sh ARCHIVE FOLDER [BIDS_DIR]
#
# ARCHIVE is what `docker save` or `buildah push IMAGE docker-archive:ARCHIVE` wrote. FOLDER gets
# bids_varaug.sif and outputs. With BIDS_DIR (small: --sloppy) a participant is segmented.
set -euo pipefail

die() { echo "tests/container: $*" >&2; exit 1; }
command -v apptainer > /dev/null || die "apptainer is missing (https://apptainer.org, or Debian's)"
[ $# -ge 2 ] || die "usage: run_apptainer.sh ARCHIVE FOLDER [BIDS_DIR]"
archive=$(realpath "$1") folder=$(realpath -m "$2")
mkdir -p "$folder"
cd "$folder"
sif=$folder/bids_varaug.sif

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
# --cleanenv: nothing of this shell's environment; the home, /tmp and the working directory are
# bound as ever. The network cannot be taken away without root: see build_and_run.sh.
app() { apptainer run --cleanenv "$@"; }
python() { apptainer exec --cleanenv "$sif" python -c "$1"; }

[ -s "$sif" ] || check "conversion" apptainer build "$sif" "docker-archive:$archive"
[ -s "$sif" ] || die "without an image there is nothing to try"
echo "SIF: $(($(stat -c %s "$sif") / 1000000)) MB"
check "labels" sh -c "apptainer inspect '$sif' | grep -q 'org.opencontainers.image.title: bids_varaug'"
check "--version" app "$sif" --version
check "the root is read-only" apptainer exec "$sif" sh -c '! touch /x /opt/venv/x'
check "the user's id" python "import os; assert os.getuid() == $(id -u)"
check "environment" python '
import os, sys
assert os.environ["NO_ET"] == os.environ["PYTHONNOUSERSITE"] == "1", os.environ
assert sys.prefix == "/opt/venv" and not any("local/lib" in p for p in sys.path), sys.path'
mkdir -p foreign/torch
echo 'raise SystemExit("the torch of the host")' > foreign/torch/__init__.py
check "PYTHONPATH of the host does not matter" env PYTHONPATH="$folder/foreign" \
    apptainer exec --cleanenv "$sif" python -c 'import torch'
check "--containall, no home" app --containall --no-home "$sif" --version

if [ $# -ge 3 ]; then
    bids=$(realpath "$3")
    rm -rf out work
    mkdir -p out work home
    touch before
    check "a participant" app -H "$folder/home" -B "$bids:/data:ro" -B "$PWD/out:/out" -B "$PWD/work:/work" \
        "$sif" /data /out participant --sloppy -w /work --nprocs 1 --omp-nthreads 1
    check "its outputs" sh -c 'ls out/sub-*.html && ls out/sub-*/anat/*_desc-consensus_dseg.nii.gz'
    check "the container in dataset_description.json" grep -q '"apptainer"' out/dataset_description.json
    check "nothing was written to the home" sh -c '! find home -mindepth 1 | grep .'
    check "nothing of ours is left in /tmp" sh -c \
        "! find /tmp -mindepth 1 -newer before -user $(id -u) ! -path '$folder*' | grep ."
fi
[ $failed = 0 ] || die "$failed check(s) failed"
