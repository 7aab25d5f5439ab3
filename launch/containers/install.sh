#!/usr/bin/env bash
# What both images run while they are built: system packages, a virtual environment in /opt/venv, this software in it.
#   install.sh SOURCE            the folder with setup.cfg and constraints.txt
# TORCH_INDEX names the index that torch comes from (default: that of pip).
set -euo pipefail

source=$1
export DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# The compiler, headers and libaio are for the ops that DeepSpeed compiles; ssh and pdsh for hostfiles.
apt-get update
apt-get install --yes --no-install-recommends \
    ca-certificates g++ libaio-dev numactl openssh-client pdsh python3 python3-dev python3-venv
rm -rf /var/lib/apt/lists/*

python3 -m venv /opt/venv
/opt/venv/bin/python -m pip install -c "$source/constraints.txt" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
/opt/venv/bin/python -m pip install -c "$source/constraints.txt" "$source"

# Arbitrary users run it: what is installed is for all to read.
chmod --recursive a+rX /opt/venv
/opt/venv/bin/rlhf --help > /dev/null
