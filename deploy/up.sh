#!/usr/bin/env bash
# One command: builds the image if it is not there (give --build to build it again) and starts compose.yaml.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ ${1:-} == --build ]] || ! docker image inspect cairn:local >/dev/null 2>&1; then
    deploy/image.sh
fi
compose=(docker-compose)
command -v docker-compose >/dev/null || compose=(docker compose)
"${compose[@]}" up -d --no-build
echo "the directory is at http://127.0.0.1:${CAIRN_PORT:-7400}; try: cairn status"
