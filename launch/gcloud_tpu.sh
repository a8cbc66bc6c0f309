#!/usr/bin/env bash
# Trains on one slice of Cloud TPU VMs, asked for as a queued resource. From the top of the repository:
#
#     BUCKET=my-bucket launch/gcloud_tpu.sh up configs/flux2_sft.py --model gs://my-bucket/models/klein
#
# asks for the slice, waits for it, installs the commit that is checked out on all workers and starts the run on them.
# The run is in gs://$BUCKET/$RUN, which the service account of the VMs must be able to read and write; for files that
# are read only from directories the bucket is the directory /bucket as well. After a preemption the same command gets a
# new slice and resumes from the newest checkpoint. `logs` follows worker 0, `stop` saves and ends the run, `down` gives
# the slice back: without it the slice costs money. PROJECT and ZONE are gcloud's own if not given.
set -euo pipefail

NAME=${NAME:-clvr}
ZONE=${ZONE:-$(gcloud config get-value compute/zone 2>/dev/null || true)}
PROJECT=${PROJECT:-$(gcloud config get-value project 2>/dev/null || true)}
ACCELERATOR=${ACCELERATOR:-v6e-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv6e} # v5e and v5p: v2-alpha-tpuv5-lite, v2-alpha-tpuv5
SPOT=${SPOT:-1}                     # 0: on demand
RUN=${RUN:-clvr-run}                # directory of the run in the bucket
EXPORTS=${EXPORTS:-}                # names of variables to hand on, such as "HF_TOKEN WANDB_API_KEY"

usage() {
  echo "usage: BUCKET=B ZONE=Z $0 up CONFIG [OPTION ...] | status | logs | stop | down" >&2
  exit 2
}

[[ $# -ge 1 && -n $ZONE && -n $PROJECT ]] || usage
place=(--zone "$ZONE" --project "$PROJECT")
action=$1
shift

state() { # ACTIVE, WAITING_FOR_RESOURCES, ..., or nothing if there is no such request
  gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format 'value(state.state)' 2>/dev/null || true
}

on_all() { gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=all --command "$1"; }

delete() { gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet; }

# A slice that was preempted is SUSPENDED: it never comes back, another must be asked for.
acquire() {
  local capacity=() now
  [[ $SPOT == 0 ]] || capacity=(--spot)
  while true; do
    now=$(state)
    case $now in
      ACTIVE) return ;;
      SUSPENDED | FAILED) delete ;;
      '')
        gcloud compute tpus queued-resources create "$NAME" "${place[@]}" --node-id "$NAME" \
          --accelerator-type "$ACCELERATOR" --runtime-version "$RUNTIME" "${capacity[@]}"
        ;;
      *)
        echo "$NAME: $now" >&2
        sleep 60
        ;;
    esac
  done
}

# On each worker. The images bring Python 3.10, so uv brings ours. Hosts see at once what another has written.
# shellcheck disable=SC2016 # expanded there
install='set -e
command -v gcsfuse >/dev/null || {
  curl -sSf https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/gcsfuse.asc >/dev/null
  echo "deb [signed-by=/usr/share/keyrings/gcsfuse.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update -qq && sudo apt-get install -qq -y gcsfuse
}
mountpoint -q /bucket || {
  sudo mkdir -p /bucket && sudo chown "$USER" /bucket
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs 0 --metadata-cache-negative-ttl-secs 0 "$BUCKET" /bucket
}
command -v ~/.local/bin/uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
mkdir -p ~/clvr && tar -xzf ~/clvr.tar.gz -C ~/clvr && cd ~/clvr
[ -d .venv ] || ~/.local/bin/uv venv --quiet --python 3.11 .venv
~/.local/bin/uv pip install --quiet --python .venv/bin/python ".[tpu,train,gcs]"'

# As a unit of systemd it outlives this connection, and a shutdown of the VM sends it SIGTERM and waits for it.
# shellcheck disable=SC2016 # expanded there
start='cd ~/clvr && sudo systemd-run --collect --unit clvr --uid "$(id -u)" --working-directory ~/clvr \
  --setenv HOME="$HOME" --property TimeoutStopSec=300'

case $action in
  up)
    [[ $# -ge 1 && -n ${BUCKET:-} ]] || usage
    config=$1
    shift
    acquire
    archive=$(mktemp -d)/clvr.tar.gz
    git archive --format=tar.gz --output "$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$NAME:clvr.tar.gz" "${place[@]}" --worker=all
    on_all "BUCKET=$(printf %q "$BUCKET"); $install"
    handed=''
    for name in $EXPORTS; do
      handed+=$(printf ' --setenv %q' "$name=${!name}")
    done
    printf -v command ' %q' .venv/bin/python launch/train.py "$config" --out "gs://$BUCKET/$RUN" --resume "$@"
    on_all "$start$handed \"\$PWD\"/${command# }"
    ;;
  status) echo "$NAME: $(state)" ;;
  logs) gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=0 --command 'sudo journalctl --unit clvr --follow' ;;
  stop) on_all 'sudo systemctl stop clvr' ;;
  down) delete ;;
  *) usage ;;
esac
