#!/usr/bin/env bash
# Certificates for Ray's own traffic (RAY_USE_TLS=1): an authority for one cluster, and a certificate for each node.
#
#   clusters/tls.sh ca AUTHORITY                    a new authority in this folder; whoever holds ca.key can join
#   clusters/tls.sh node AUTHORITY FOLDER ADDRESS...  node.crt and node.key for a node with these addresses
#
# On every node, and for every driver: RAY_USE_TLS=1, RAY_TLS_CA_CERT=AUTHORITY/ca.crt, RAY_TLS_SERVER_CERT and
# RAY_TLS_SERVER_KEY. Needs OpenSSL 3; they hold for 30 days. Ray's control messages and objects are covered. The
# tensors that workers and keepers exchange (gloo, NCCL, snapshots) are not: those belong on a private network.
set -euo pipefail
umask 077

days=30

usage() {
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 2
}

case ${1:-} in
    ca)
        [[ $# -eq 2 ]] || usage
        mkdir -p "$2"
        openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -sha256 -days "$days" \
            -subj "/CN=elastictrain cluster" -addext "keyUsage=critical,keyCertSign,cRLSign" \
            -keyout "$2/ca.key" -out "$2/ca.crt" 2>/dev/null
        ;;
    node)
        [[ $# -ge 4 ]] || usage
        authority=$2 folder=$3
        names=DNS:localhost,IP:127.0.0.1
        for address in "${@:4}"; do names+=,IP:$address; done
        mkdir -p "$folder"
        openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -sha256 -days "$days" \
            -CA "$authority/ca.crt" -CAkey "$authority/ca.key" -subj "/CN=$4" -addext "subjectAltName=$names" \
            -addext "basicConstraints=critical,CA:FALSE" -addext "extendedKeyUsage=serverAuth,clientAuth" \
            -keyout "$folder/node.key" -out "$folder/node.crt" 2>/dev/null
        ;;
    *) usage ;;
esac
