#!/usr/bin/env bash
# Build the Dockerfile and try the image where there is no docker engine: Debian by debootstrap,
# the build by buildah (chroot isolation), the runs by chroot in namespaces of their own.
#
#     sudo tests/container/build_and_run.sh            # everything, 10 to 20 minutes
#     sudo tests/container/build_and_run.sh --no-run   # without the runs of both levels
#
# Where apptainer is installed, the image is converted and tried with it too (run_apptainer.sh).
# CONTAINER_DIR (default /tmp/bids_varaug-container) keeps base and layers for the next time, and
# the outputs of the run; remove it with `rm -rf` when done. PYTHON must have nilearn, for the demo
# dataset; default: .venv of `make demo`. pip in the build finds its packages where pip here does.
set -euo pipefail

die() { echo "tests/container: $*" >&2; exit 1; }
say() { echo "== $*"; }

repository=$(cd "$(dirname "$0")/../.." && pwd)
dir=${CONTAINER_DIR:-/tmp/bids_varaug-container}
PYTHON=${PYTHON:-$repository/.venv/bin/python}
participant=yes
[ "${1-}" != --no-run ] || participant=no

for tool in buildah debootstrap unshare chroot setpriv python3; do
    command -v "$tool" > /dev/null \
        || die "$tool is missing (apt-get install buildah debootstrap util-linux coreutils python3)"
done
[ "$(id -u)" = 0 ] || die "needs root, for debootstrap and chroot"
[ $participant = no ] || "$PYTHON" -c 'import nilearn' 2> /dev/null \
    || die "nilearn is missing for $PYTHON (make demo, or PYTHON=..., or --no-run)"

mkdir -p "$dir"
buildah() { command buildah --root "$dir/storage" --runroot "$dir/storage-run" "$@"; }
image=localhost/bids_varaug base=localhost/debian-slim

# --- base: what debian:bookworm-slim is, made from Debian's packages

if ! buildah inspect --type image $base > /dev/null 2>&1; then
    say "debootstrap"
    rm -rf "$dir/base"
    debootstrap --variant=minbase bookworm "$dir/base" http://deb.debian.org/debian \
        > "$dir/debootstrap.log" || die "debootstrap failed, see $dir/debootstrap.log"
    printf 'path-exclude %s/*\n' /usr/share/{doc,info,locale,man} > "$dir/base/etc/dpkg/dpkg.cfg.d/docker"
    rm -rf "$dir"/base/usr/share/{doc,info,locale,man}/* "$dir"/base/var/lib/apt/lists/* \
        "$dir"/base/var/cache/apt/* "$dir"/base/var/log/*.log
    container=$(buildah from scratch)
    buildah add -q "$container" "$dir/base" / > /dev/null
    buildah config --cmd /bin/bash "$container"
    buildah commit -q --rm "$container" $base > /dev/null
    rm -rf "$dir/base"
fi

# --- build, with this machine's certificates and package folders, none of which stays in the image

volumes=()
python3 - > "$dir/pip.conf" 2> "$dir/pip.folders" <<'PYTHON'
import re, subprocess, sys
listed = subprocess.run(["python3", "-m", "pip", "config", "list"], capture_output=True, text=True)
print("[global]")
options = dict(re.findall(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", listed.stdout, re.MULTILINE))
for option in {"cert", "find-links", "index-url", "extra-index-url"} & set(options):
    print(f"{option} = {'/etc/pip-ca.crt' if option == 'cert' else options[option]}")
    # A PEP 503 index in a folder, .../simple, has its files beside it.
    for path in re.findall(r"(?:(?<=\s)|^|(?<=file://))(/\S+?)(?:/simple/?)?(?=\s|$)", options[option]):
        print(path + (":/etc/pip-ca.crt" if option == "cert" else ""), file=sys.stderr)
PYTHON
while read -r folder; do
    [ ! -e "${folder%%:*}" ] || case $folder in
        *:*) volumes+=(--volume "$folder:ro") ;;
        *) volumes+=(--volume "$folder:$folder:ro") ;;
    esac
done < "$dir/pip.folders"

say "buildah bud"
SECONDS=0
buildah bud --isolation chroot --layers --build-arg BASE=$base \
    ${TORCH_INDEX:+--build-arg TORCH_INDEX="$TORCH_INDEX"} \
    --build-arg REVISION="$(git -C "$repository" rev-parse HEAD 2> /dev/null || true)" \
    --volume "$dir/pip.conf:/etc/pip.conf:ro" ${volumes[@]+"${volumes[@]}"} \
    -t $image "$repository" > "$dir/build.log" 2>&1 \
    || { tail -n 30 "$dir/build.log" >&2; die "the build failed, see $dir/build.log"; }
echo "built in $SECONDS s"

container=$(buildah from --pull-never $image)
root=$(buildah mount "$container")
trap 'buildah umount "$container" > /dev/null; buildah rm "$container" > /dev/null' EXIT
mkdir -p "$root/data" "$root/out" "$root/work"  # docker makes mount points by itself

# --- what is in it

failed=0
check() { # what it should be, then a command
    local what=$1
    shift
    if "$@" > "$dir/check.log" 2>&1; then echo "ok    $what"; else
        failed=$((failed + 1))
        echo "FAIL  $what: $*"
        tail -n 15 "$dir/check.log"
    fi
}
inspect() { buildah inspect --type image --format "$1" $image; }
megabytes=$(du -sx --apparent-size --block-size=1000000 "$root" | cut -f1)
check "uncompressed, at most 1600 MB: $megabytes MB" test "$megabytes" -le 1600
check "no compiler, no pip" bash -c "! ls $root/usr/bin/*gcc* $root/usr/bin/pip* $root/opt/venv/bin/pip*"
check "no caches" bash -c "! ls -d $root/root/.cache $root/var/lib/apt/lists/*_* $root/var/cache/apt/*.bin"
check "nothing of the build machine" bash -c "! find $root/etc/pip.conf $root/etc/pip-ca.crt -size +0 | grep ."
check "labels" test "$(inspect '{{index .OCIv1.Config.Labels "org.opencontainers.image.version"}}')" \
    = "$(cat "$root/version")"

# --- runs

mapfile -t environment < <(inspect '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' | grep .)
mapfile -t entrypoint < <(inspect '{{range .OCIv1.Config.Entrypoint}}{{println .}}{{end}}' | grep .)

# A foreign uid without groups and with no way to more rights, a read-only root, no network, /tmp in memory, and of
# the environment what the image sets, without HOME.
# docker run --read-only --network none -u 12345:12345 --cap-drop all --tmpfs /tmp
#     -v data:/data:ro -v out:/out -v work:/work
user=12345
strictly() { # [NAME=VALUE...] command...
    unshare --mount --net --ipc --pid --fork bash -euc '
        root=$1 dir=$2 user=$3
        shift 3
        mount --bind "$root" "$root"
        mount -t proc proc "$root/proc"
        mount --rbind /dev "$root/dev"
        mount -t tmpfs tmpfs "$root/dev/shm"
        mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
        for name in data out work; do
            mkdir -p "$dir/run/$name"
            mount --bind "$dir/run/$name" "$root/$name"
        done
        chown "$user:$user" "$dir/run/out" "$dir/run/work"
        mount -o remount,bind,ro "$root/data"
        mount -o remount,bind,ro "$root"
        exec setpriv --no-new-privs \
            chroot --userspec="$user:$user" --groups= "$root" env -i -C /tmp "$@"
    ' strictly "$root" "$dir" "$user" "${environment[@]}" "$@"
}
app() { strictly "${entrypoint[@]}" "$@"; }

plainly() { buildah run --isolation chroot "$container" -- "$@"; }

mkdir -p "$dir/run"
check "plain: --version" plainly "${entrypoint[@]}" --version
check "plain, --user $user: --help" \
    buildah run --isolation chroot --user "$user" "$container" -- "${entrypoint[@]}" --help
check "strict: --version" app --version
check "strict: --help" app --help
check "strict, HOME=/: --version" strictly HOME=/ "${entrypoint[@]}" --version
check "strict: bids_varaug-train --version" strictly bids_varaug-train --version
check "strict: unknown flag is exit code 64" bash -c "
    $(declare -f app strictly)
    $(declare -p root dir user environment entrypoint)
    app /data /out participant --nonsense; test \$? = 64"
check "strict: the root is read-only, /data too" strictly sh -c '! touch /x /opt/venv/x /data/x'
check "strict: no network" strictly python -c '
import socket
try:
    socket.create_connection(("1.1.1.1", 53), 2)
except OSError:
    raise SystemExit
raise SystemExit("connected")'
check "strict: environment" strictly python -c '
import os, sys
assert "HOME" not in os.environ and os.getuid() == '$user'
assert os.environ["NO_ET"] == "1" and os.environ["PYTHONNOUSERSITE"] == "1"
assert sys.prefix == "/opt/venv" and not any("local" in p for p in sys.path), sys.path'
check "strict: all modules are importable, their bytecode is there" strictly python -c '
import importlib, os, pkgutil, sys, bids_varaug
for module in pkgutil.walk_packages(bids_varaug.__path__, "bids_varaug."):
    if not module.name.endswith("triton_kernel"):  # Triton comes with CUDA
        importlib.import_module(module.name)
cached = [getattr(m, "__cached__", None) for m in list(sys.modules.values())]
without = [c for c in cached if isinstance(c, str) and c.startswith("/opt/venv") and not os.path.exists(c)]
print(len(without), "of", len(cached), "lack it:", *without[:20])
assert len(without) < 10'
check "strict, TMPDIR elsewhere" strictly TMPDIR=/work python -c '
import tempfile; assert tempfile.gettempdir() == "/work"'

if [ $participant = yes ]; then
    rm -rf "$dir/run"
    mkdir -p "$dir/run/data"
    "$PYTHON" "$repository/examples/make_demo_dataset.py" "$dir/run/data" > /dev/null
    SECONDS=0
    # /tmp and /dev/shm are of this run alone: they show what it left there.
    check "strict: a participant, which leaves nothing in /tmp" strictly sh -c '
        "$@" && ! find /tmp /dev/shm -mindepth 1 | grep .' sh \
        "${entrypoint[@]}" /data /out participant -w /work --members ieee --nprocs 1 --omp-nthreads 1
    echo "ran in $SECONDS s"
    name=sub-mni152/anat/sub-mni152_seg-varaug_desc-consensus_dseg.nii.gz
    check "its outputs" ls "$dir/run/out/"{sub-mni152.html,dataset_description.json,$name}
    check "its owner" test "$(stat -c %u "$dir/run/out/$name")" = $user
    check "the image's name in dataset_description.json" \
        grep -q '"Tag": "bids_varaug:' "$dir/run/out/dataset_description.json"
    check "its caches are in the work directory" ls -d "$dir/run/work/caches/"{numba,matplotlib,deno}

    cp "$dir/run/out/$name" "$dir/labels.nii.gz"
    mv "$dir/run/out/sub-mni152.html" "$dir/report.html"
    rm -rf "$dir/run" "$dir/cohort"
    "$PYTHON" "$repository/examples/make_ageing_cohort.py" "$dir/labels.nii.gz" "$dir/cohort" \
        --n 12 --size 3 > /dev/null
    mkdir -p "$dir/run/work/tmp"
    mv "$dir/cohort" "$dir/run/data"
    chmod 1777 "$dir/run/work/tmp"
    SECONDS=0
    check "strict, TMPDIR elsewhere: a cohort, which leaves nothing in /tmp" \
        strictly TMPDIR=/work/tmp sh -c '"$@" && ! find /tmp /work/tmp -mindepth 1 | grep .' sh \
        "${entrypoint[@]}" /data /out participant --sloppy -w /work --nprocs 2 --omp-nthreads 1
    check "strict, TMPDIR elsewhere: group, which leaves nothing in /tmp" \
        strictly TMPDIR=/work/tmp sh -c '"$@" && ! find /tmp /work/tmp -mindepth 1 | grep .' sh \
        "${entrypoint[@]}" /data /out group -w /work --brainage-model ridge
    echo "ran in $SECONDS s"
    check "its outputs" ls "$dir/run/out/"{group_brainage.html,phenotype/brainage.tsv,models/brainage.skops}
fi

if command -v apptainer > /dev/null; then
    rm -f "$dir/image.tar"
    buildah push -q $image "docker-archive:$dir/image.tar:bids_varaug:$(cat "$root/version")"
    check "with apptainer" "$repository/tests/container/run_apptainer.sh" "$dir/image.tar" "$dir/apptainer"
else
    echo "skip  with apptainer: it is not installed"
fi

[ $failed = 0 ] || die "$failed check(s) failed"
say "all passed; outputs are in $dir"
