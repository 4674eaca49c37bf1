#!/bin/sh
# Starts this host's node for `ray up`: start-node.sh head|worker XERAY SPEC
# Cards, cores, name and address are counted or found here, where SPEC does not say them.
# Made by `xeray cluster render ray-up`; change cluster/templates/start-node.sh.j2, not this file.
set -eu
role=$1 xeray=$2 spec=$3
here=$(cd "$(dirname "$0")" && pwd)
file=$(mktemp)
trap 'rm -f "$file"' EXIT
printf '%s' "$spec" >"$file"
if [ "$role" = head ]; then
  # The head starts the workers: its monitor reads the file that `ray up` has put there.
  set -- --ray-arg="--autoscaling-config=$HOME/ray_bootstrap_config.yaml"
else
  set --
fi
"$xeray" cluster node stop --spec "$file" >/dev/null
"$xeray" cluster node start --spec "$file" --token-file "$here/auth_token" "$@"
