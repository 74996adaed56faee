#!/usr/bin/env bash
# What gcp-gpu.yaml needs in a Google Cloud project, once: a network that only one address can reach, by ssh; and a
# bucket that the project's default account, which the workers have, may use. It can be run again.
#
#     bash clusters/gcp_once.sh PROJECT REGION BUCKET YOUR.ADDRESS     (or a range: 203.0.113.0/24)
set -euo pipefail

fail() { echo "gcp_once.sh: $*" >&2; exit 2; }

[ $# -eq 4 ] || fail "give four things: PROJECT REGION BUCKET YOUR.ADDRESS; $# were given"
project=$1 region=$2 bucket=$3 from=$4
case $from in */*) ;; *) from=$from/32 ;; esac
[[ ${from#*/} =~ ^[0-9]+$ && ${from#*/} -ge 8 ]] || fail "$4 is no address, or too many of them; give your own"

made() { # what "there" finds is left alone; else "make" makes it
  if there >/dev/null 2>&1; then echo "$1 is there"; else make && echo "$1 made"; fi
}
on() { gcloud --project "$project" --quiet "$@"; }

there() { on compute networks describe raylit; }
make() { on compute networks create raylit --subnet-mode=custom; }
made "network raylit"

there() { on compute networks subnets describe raylit --region "$region"; }
make() { on compute networks subnets create raylit --network raylit --region "$region" --range 10.11.0.0/20; }
made "subnet raylit"

# A network without rules lets nothing in. Hosts talk to each other on all ports: Ray and NCCL choose theirs freely.
there() { on compute firewall-rules describe raylit-inside; }
make() {
  on compute firewall-rules create raylit-inside --network raylit --allow tcp,udp,icmp --source-ranges 10.11.0.0/20
}
made "rule raylit-inside"

there() { on compute firewall-rules update raylit-ssh --source-ranges "$from"; } # another address than the last time?
make() { on compute firewall-rules create raylit-ssh --network raylit --allow tcp:22 --source-ranges "$from"; }
made "rule raylit-ssh, from $from"

there() { on storage buckets describe "gs://$bucket"; }
make() {
  on storage buckets create "gs://$bucket" --location "$region" --uniform-bucket-level-access \
    --public-access-prevention
}
made "bucket $bucket"

number=$(on projects describe "$project" --format 'value(projectNumber)')
on storage buckets add-iam-policy-binding "gs://$bucket" --role roles/storage.objectUser \
  --member "serviceAccount:$number-compute@developer.gserviceaccount.com" >/dev/null
echo "write into clusters/gcp-gpu.yaml: (1) $project  (2) $region and one of its zones  (3) gs://$bucket/runs"
