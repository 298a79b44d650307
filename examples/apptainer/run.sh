#!/usr/bin/env bash
# bids_varaug by Apptainer on one machine without a scheduler: all participants, then the group.
#
#     examples/apptainer/run.sh bids_varaug.sif BIDS_DIR OUTPUT_DIR WORK_DIR [flags of participant]
#
# With NVIDIA=1 in the environment and --device cuda among the flags, on a GPU (an image built with CUDA).
# Run it again after an interruption: what is done is not done again.
set -euo pipefail

[ $# -ge 4 ] || { sed -n '2,7s/^# \?//p' "$0" >&2; exit 64; }
sif=$1 bids=$(realpath "$2")
mkdir -p "$3" "$4"
out=$(realpath "$3") work=$(realpath "$4")
shift 4

app() {
    # --cleanenv: no PYTHONPATH of this shell. --containall: neither the home nor /tmp of the host;
    # temporary files (sockets, kilobytes) go to the work directory.
    apptainer run --cleanenv --containall ${NVIDIA:+--nv} --env TMPDIR=/work/tmp \
        -B "$bids:/data:ro" -B "$out:/out" -B "$work:/work" "$sif" "$@"
}
mkdir -p "$work/tmp"
app /data /out participant -w /work "$@"
# Only where there are ages.
[ ! -e "$bids/participants.tsv" ] || app /data /out group -w /work
