#!/usr/bin/env bash
# Writes lock-cpu.txt, lock-gpu.txt and lock-dev.txt from the *.in files. Only package metadata is read, so the GPU lock
# can be made on any machine. Pins that are already there stay, unless `--upgrade` is given.
#
# Needs uv (`pip install uv`). The CPU lock wants a CPU wheel of torch in sight: set UV_TORCH_BACKEND=cpu, or
# UV_FIND_LINKS to a folder that holds one.
set -euo pipefail
cd "$(dirname "$0")"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
arguments=("$@")

resolve() { # resolve NAME ARGUMENTS...: $scratch/NAME gets one pin a line
    local name=$1
    shift
    if [ -f "$name" ]; then grep -v '^#\|^torch==' "$name" > "$scratch/$name" || true; fi
    uv pip compile --quiet --python-version 3.11 --no-header --annotation-style line \
        --output-file "$scratch/$name" "$@" "${arguments[@]}" > /dev/null
    # A local version (+cpu) would tie the lock to the index that it was made with.
    sed -i -E "s/^([^ ]+==[^ +]+)\+[^ ]+/\1/" "$scratch/$name"
}

publish() { # publish NAME: the lock file, under the comment on standard input
    cat - "$scratch/$1" > "$scratch/published"
    cp "$scratch/published" "$1"
}

resolve lock-cpu.txt base.in cpu.in --override left-out-cpu.txt
if grep -q '^nvidia-' "$scratch/lock-cpu.txt"; then
    echo "lock.sh: torch was resolved to a CUDA build; see the head of this script" >&2
    exit 1
fi
cut -d ' ' -f 1 "$scratch/lock-cpu.txt" > "$scratch/cpu-pins"

# A GPU machine runs the versions that were tested without one, except where CUDA packages ask for others.
grep -vE '^(torch|apache-tvm-ffi)==' "$scratch/cpu-pins" > "$scratch/common-pins"
(
    unset UV_TORCH_BACKEND UV_FIND_LINKS
    resolve lock-gpu.txt base.in gpu.in --override left-out-gpu.txt --constraint "$scratch/common-pins"
)

resolve lock-dev.txt base.in cpu.in dev.in --override left-out-cpu.txt --constraint "$scratch/cpu-pins"
sed -i 's/==.*/==/; s/^/^/' "$scratch/cpu-pins"
grep -vf "$scratch/cpu-pins" "$scratch/lock-dev.txt" > "$scratch/dev-only"
mv "$scratch/dev-only" "$scratch/lock-dev.txt"

# Constraint files are no reason why a package is there.
sed -i -E "s#-c $scratch/[a-z-]+(, )?##; s/, *$//; s/ *# via *$//" "$scratch"/lock-*.txt

publish lock-cpu.txt <<'HEADER'
# Every package on a machine without a GPU: Python 3.11, Linux. Written by lock.sh; install with
# `pip install --no-deps`.

HEADER
publish lock-gpu.txt <<'HEADER'
# Every package on a machine with an NVIDIA GPU: Python 3.11, Linux x86-64, CUDA 13. Written by lock.sh; install with
# `pip install --no-deps`.
#
# Checked, from the packages' published metadata: this is a consistent resolution of base.in and gpu.in, and its
# versions are those of lock-cpu.txt, which the tests run on, except where CUDA packages ask for others.
# Not checked: an installation of this file.

HEADER
publish lock-dev.txt <<'HEADER'
# What tests and checks need besides lock-cpu.txt or lock-gpu.txt. Written by lock.sh; install with
# `pip install --no-deps`.

HEADER
wc -l lock-*.txt
