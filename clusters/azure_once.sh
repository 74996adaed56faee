#!/usr/bin/env bash
# What azure-gpu.yaml needs in an Azure subscription, once: a resource group, a storage account with a container for
# runs, and the identity that the machines have, which may use that storage. It can be run again.
#
#     bash clusters/azure_once.sh LOCATION STORAGE-ACCOUNT       (3 to 24 small letters and digits, unique in the world)
set -euo pipefail

fail() { echo "azure_once.sh: $*" >&2; exit 2; }

[ $# -eq 2 ] || fail "give two things: LOCATION STORAGE-ACCOUNT; $# were given"
location=$1 account=$2
[[ $account =~ ^[a-z0-9]{3,24}$ ]] || fail "$account: an account's name is 3 to 24 small letters and digits"

az group create --name raylit --location "$location" --output none
# Hierarchical namespaces: abfss:// is a file system only with them. No public blobs, no keys, nothing before TLS 1.2.
az storage account create --name "$account" --resource-group raylit --location "$location" --sku Standard_LRS \
  --enable-hierarchical-namespace true --allow-blob-public-access false --allow-shared-key-access false \
  --min-tls-version TLS1_2 --output none
az storage container-rm create --name runs --storage-account "$account" --resource-group raylit --output none
az identity create --name raylit --resource-group raylit --location "$location" --output none

identity=$(az identity show --name raylit --resource-group raylit --query principalId --output tsv)
scope=$(az storage account show --name "$account" --resource-group raylit --query id --output tsv)
az role assignment create --assignee-object-id "$identity" --assignee-principal-type ServicePrincipal \
  --role "Storage Blob Data Contributor" --scope "$scope" --output none
echo "write into clusters/azure-gpu.yaml: (1) $location  (3) abfss://runs@$account.dfs.core.windows.net/"
