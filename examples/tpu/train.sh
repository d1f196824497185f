#!/bin/bash
# Trains on all hosts of a TPU slice, which have the code at ~/vla_jax and the run folder on a shared
# disk. Create a spot slice that was taken away again; the same command then resumes:
#
#     TPU=my-slice ZONE=us-east5-b examples/tpu/train.sh --preset kosmos_lstm \
#         --backbone-from /shared/kosmos2 --dataset /shared/demos --run-dir /shared/runs/kosmos \
#         --batch-size 128 --mesh fsdp=16
set -eu
printf -v options '%q ' "$@" --distributed auto
gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker all \
  --command "cd ~/vla_jax && exec .venv/bin/python -m train.imitate $options"
