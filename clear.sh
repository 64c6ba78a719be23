#!/usr/bin/env bash
# Removes what start.sh made: containers, image, .venv and build/. Asks nothing.
#
#   ./clear.sh

set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

readonly image=trt-graft

found=no
removed() {
    found=yes
    printf 'removed %s\n' "$*"
}

remove_containers() {
    local container
    for container in $(docker ps --all --quiet --filter "name=^$image-"); do
        docker rm --force "$container" >/dev/null
        removed "container $container"
    done
}

remove_image() {
    if docker image inspect "$image" >/dev/null 2>&1; then
        docker image rm "$image" >/dev/null
        removed "image $image"
    fi
}

remove_folder() {
    if [[ -e $1 ]]; then
        rm -rf -- "$1"
        removed "$1"
    fi
}

if [[ $# -gt 0 ]]; then
    sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    [[ $1 == -h || $1 == --help ]] && exit
    exit 2
fi

if docker info >/dev/null 2>&1; then
    remove_containers
    remove_image
elif command -v docker >/dev/null; then
    echo "Docker does not answer: its containers and images stay"
fi
remove_folder .venv
remove_folder build
if [[ $found == no ]]; then echo "nothing to remove"; fi
