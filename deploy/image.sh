#!/usr/bin/env bash
# Builds the programs and the image cairn:local. CAIRN_PROFILE chooses the cargo profile: release (default) or dev.
set -euo pipefail
cd "$(dirname "$0")/.."

profile=${CAIRN_PROFILE:-release}
folder=$profile
[[ $profile == dev ]] && folder=debug
target=${CARGO_TARGET_DIR:-target}

cargo build --locked --profile "$profile" -p dir-service -p file-service -p cli --bins
# A build context of its own: the checkout with its build files would be gigabytes. compose.yaml names it too.
context=target/image
rm -rf "$context"
mkdir -p "$context"
for program in dir-service file-service cairn; do
    install -m 755 "$target/$folder/$program" "$context/$program"
    strip "$context/$program" 2>/dev/null || true
done
cp deploy/Dockerfile "$context/"

deploy/base-image.sh "$context"/{dir-service,file-service,cairn}
docker build --quiet --tag cairn:local "$context"
docker images cairn:local
