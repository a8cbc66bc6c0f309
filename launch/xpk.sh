#!/usr/bin/env bash
# Trains on TPU slices of GKE through XPK (pip install xpk). From the top of the repository, for each run:
#
#     PROJECT=my-project BUCKET=my-bucket launch/xpk.sh train configs/flux2_sft.py --model gs://my-bucket/models/klein
#
# after, once, with the same variables: `launch/xpk.sh cluster` (makes it and joins the bucket to it) and
# `launch/xpk.sh image` (builds and pushes the Dockerfile). The run is in gs://$BUCKET/$RUN, which the service account of
# the nodes must be able to read and write; for files that are read only from directories the bucket is the directory
# /bucket as well. `launch/xpk.sh stop` ends the run; after that the same command resumes from its newest checkpoint.
set -euo pipefail

ZONE=${ZONE:-us-east5-b}
CLUSTER=${CLUSTER:-clvr}
TPU_TYPE=${TPU_TYPE:-v6e-256}
NUM_SLICES=${NUM_SLICES:-1}
CAPACITY=${CAPACITY:---spot} # or --on-demand, --flex, --reservation=NAME
RUN=${RUN:-clvr-run}         # name of the workload and of its directory in the bucket
MAX_RESTARTS=${MAX_RESTARTS:-10}
EXPORTS=${EXPORTS:-} # names of variables to hand on, such as "HF_TOKEN WANDB_API_KEY"

usage() {
  echo "usage: PROJECT=P BUCKET=B $0 cluster | image | train CONFIG [OPTION ...] | stop" >&2
  exit 2
}

[[ $# -ge 1 && -n ${PROJECT:-} && -n ${BUCKET:-} ]] || usage
IMAGE=${IMAGE:-${ZONE%-*}-docker.pkg.dev/$PROJECT/clvr/clvr-jax:tpu}
where=(--project "$PROJECT" --zone "$ZONE" --cluster "$CLUSTER")
action=$1
shift

case $action in
  cluster)
    xpk cluster create "${where[@]}" --tpu-type "$TPU_TYPE" --num-slices "$NUM_SLICES" "$CAPACITY" \
      --enable-workload-identity --enable-gcsfuse-csi-driver
    # Hosts see at once what another has written; 1000 is the user of the image.
    xpk storage attach clvr-bucket "${where[@]}" --type gcsfuse --bucket "$BUCKET" --size 1 \
      --mount-point /bucket --readonly false --auto-mount false \
      --mount-options implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0,uid=1000,gid=1000
    ;;
  image)
    docker build --build-arg JAX_EXTRA=tpu --tag "$IMAGE" .
    docker push "$IMAGE"
    ;;
  train)
    [[ $# -ge 1 ]] || usage
    config=$1
    shift
    options=(--out "gs://$BUCKET/$RUN" --resume)
    if [[ $NUM_SLICES -gt 1 ]]; then # each slice is a copy of the model
      options+=(--train.mesh.data "$NUM_SLICES" --train.mesh.slices "$NUM_SLICES")
    fi
    printf -v command '%q ' python launch/train.py "$config" "${options[@]}" "$@"
    handed=()
    for name in $EXPORTS; do
      handed+=(--env "$name=${!name}")
    done
    # 1: another host was lost. Codes from 127 on, which signals give, restart by themselves.
    xpk workload create "${where[@]}" --workload "$RUN" --tpu-type "$TPU_TYPE" --num-slices "$NUM_SLICES" \
      --docker-image "$IMAGE" --storage clvr-bucket --command "$command" "${handed[@]}" \
      --max-restarts "$MAX_RESTARTS" --restart-on-exit-codes 1 --termination-grace-period-seconds 300
    ;;
  stop)
    xpk workload delete "${where[@]}" --workload "$RUN"
    ;;
  *) usage ;;
esac
