#!/usr/bin/env bash
# Sets up trt-graft, then runs something in it.
#
#   ./start.sh                 the demo: both models from PyTorch to the report
#   ./start.sh test [ARG...]   the tests; the arguments are pytest's
#   ./start.sh shell           a shell
#   ./start.sh COMMAND...      any other command, for example: ./start.sh python surgeon.py restormer
#
# Where Docker and an NVIDIA GPU are there, everything runs in a container with NVIDIA's TensorRT, which sees no files
# but those in this folder. Elsewhere it runs in .venv, with TensorRT-RTX, which builds engines without a GPU.
# The environment variable TENSORRT_IMAGE names another base image than the Dockerfile does.

set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

readonly image=trt-graft
readonly workdir=/workspace/trt-graft

say() { printf 'trt-graft: %s\n' "$*" >&2; } # standard output is the command's alone
die() {
    say "$*"
    exit 2
}

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

# ----------------------------------------------------------------------------------------------------------------------
# Which environment
# ----------------------------------------------------------------------------------------------------------------------

# Sets `environment` and `reason`.
choose_environment() {
    environment=venv
    if ! command -v docker >/dev/null; then
        reason="running in .venv: Docker is not installed"
    elif ! docker info >/dev/null 2>&1; then
        reason="running in .venv: Docker does not answer (is it running, and may you use it?)"
    elif ! gpu_visible; then
        reason="running in .venv: no NVIDIA GPU is visible$(wsl_hint)"
    else
        environment=container
        reason="running in a container: Docker and a GPU are there"
    fi
}

# WSL2 keeps nvidia-smi in a folder that not every shell has on its PATH.
gpu_visible() { PATH="$PATH:/usr/lib/wsl/lib" nvidia-smi -L >/dev/null 2>&1; }

wsl_hint() {
    if grep -qi microsoft /proc/version 2>/dev/null; then
        printf '%s' " (WSL2: it needs NVIDIA's driver on Windows, and Docker Desktop or nvidia-container-toolkit here)"
    fi
}

# ----------------------------------------------------------------------------------------------------------------------
# Container: the image is the set-up; each command gets a container of its own, so that two can run at once
# ----------------------------------------------------------------------------------------------------------------------

container_ready() { [[ -e build/plugins/libtrt_graft.so ]] && docker image inspect "$image" >/dev/null 2>&1; }

container_set_up() {
    # Without a value, --build-arg takes the environment's; where that has none, the Dockerfile's default stays.
    docker build --tag "$image" --build-arg TENSORRT_IMAGE . >&2
    container_run nvidia-smi -L </dev/null >/dev/null || # standard input is the command's alone, too
        die "containers do not see the GPU: install nvidia-container-toolkit, or on WSL2 use Docker Desktop"
    say "compiling the plugins, which takes a few minutes the first time"
    { # afresh: TensorRT, CUDA and the GPU may be others than they were
        container_run cmake --fresh -S plugins -B build/plugins -G Ninja -D TRT_GRAFT_ARCHITECTURES=native &&
            container_run ninja -C build/plugins
    } </dev/null >&2 || die "the plugins do not compile: see above"
}

# In rootless Docker the container's root is the user, and its other users may write nothing that is the user's.
container_user() {
    if [[ "$(docker info --format '{{.SecurityOptions}}' 2>/dev/null)" == *name=rootless* ]]; then
        echo 0:0
    else
        echo "$(id -u):$(id -g)"
    fi
}

container_run() {
    local terminal=()
    if [[ -t 0 && -t 1 ]]; then terminal=(--tty); fi
    mkdir -p build/home
    # The user has no account in the image, so a home (in build/, where downloads and caches outlive the container)
    # and a name are given. Variables without a value are the caller's, where they are set.
    docker run --rm --init --interactive "${terminal[@]}" --name "$image-$$" --gpus all \
        --user "$(container_user)" --env HOME="$workdir/build/home" --env USER="$image" \
        --env CUDA_VISIBLE_DEVICES --env HF_TOKEN \
        --mount "type=bind,source=$PWD,target=$workdir" --workdir "$workdir" "$image" "$@"
}

container_shell() { container_run bash; }

# ----------------------------------------------------------------------------------------------------------------------
# .venv
# ----------------------------------------------------------------------------------------------------------------------

# What .venv was made for. Its scripts hold its path, so a moved or copied folder needs a new one.
venv_fingerprint() { cat <(pwd -P) requirements.txt requirements-dev.txt | sha256sum; }

venv_ready() {
    [[ "$(cat .venv/complete 2>/dev/null)" == "$(venv_fingerprint)" ]] && .venv/bin/python -c '' 2>/dev/null
}

venv_set_up() {
    if venv_ready; then return; fi
    local python
    python=$(find_python)
    say "installing Python packages into .venv, which takes a few minutes"
    "$python" -m venv --clear .venv
    .venv/bin/python -m pip install -qq --disable-pip-version-check \
        -r requirements.txt -r requirements-dev.txt >&2
    venv_fingerprint >.venv/complete # last: a set-up that was interrupted is done again
}

# Prints the first Python that fits; the machine's own comes first.
find_python() {
    local candidate without_venv=
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null || continue
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$candidate"
            return
        fi
        without_venv=$candidate
    done
    if [[ -n $without_venv ]]; then
        die "$without_venv cannot make virtual environments: install its venv package (Debian, Ubuntu: python3-venv)"
    fi
    die "Python 3.11 to 3.14 is needed; found $(python3 --version 2>/dev/null || echo none)"
}

venv_run() (
    export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"
    exec "$@"
)

# Not the user's own start-up file, which may put another Python in front.
venv_shell() { venv_run bash --rcfile .venv/bin/activate; }

# ----------------------------------------------------------------------------------------------------------------------
# What to run
# ----------------------------------------------------------------------------------------------------------------------

step() {
    say "$*"
    "${environment}_run" "$@"
}

# demo MODEL OUTPUT: the whole chain on the model's own samples.
demo() {
    local model=$1 output=$2 precision
    step python export_onnx.py "$model"
    for precision in fp32 fp16; do step python surgeon.py "$model" --precision "$precision"; done
    for precision in fp32 fp16; do step python build_engine.py "$model" --precision "$precision"; done
    step python compare.py "$model" --write-samples "build/$model/samples"
    step python infer_trt.py "$model" "build/$model/samples" -o "build/$model/$output"
    step python compare.py "$model"
}

# The report's summary is what precedes its first section.
show_report() {
    printf '\n'
    sed '/^## /,$d' "build/$1/report.md"
    printf '%s\n' "Full report: build/$1/report.md"
}

demos() {
    demo restormer restored
    demo trocr lines.jsonl
    show_report restormer
    show_report trocr
}

main() {
    local set_up=yes environment reason
    if [[ ${1-} == --no-setup ]]; then # restart.sh
        set_up=no
        shift
    fi
    case ${1-} in
        -h | --help) usage && exit ;;
        -*) die "unknown option $1: see ./start.sh --help" ;;
    esac

    choose_environment
    if [[ $set_up == no ]]; then
        "${environment}_ready" || die "nothing is set up for these requirements: run ./start.sh first"
    fi
    say "$reason"
    if [[ $set_up == yes ]]; then "${environment}_set_up"; fi

    case ${1-} in
        '') demos ;;
        test) "${environment}_run" pytest "${@:2}" ;;
        shell) "${environment}_shell" ;;
        *) "${environment}_run" "$@" ;;
    esac
}

main "$@"
