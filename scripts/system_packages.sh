#!/usr/bin/env bash
# Installs the Debian programs that the integration tests talk to: an Orthanc PACS with DICOMweb, dcmtk, dciodvfy, and Chromium.
# Does nothing when they are there. Needs root; on another system install them by hand.
set -euo pipefail

packages=(orthanc orthanc-dicomweb dcmtk dicom3tools chromium)
missing=()
for package in "${packages[@]}"; do
    dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null | grep -q '^installed$' || missing+=("$package")
done
if [ "${#missing[@]}" -eq 0 ]; then exit 0; fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then as_root=(sudo); fi
# The packages' own Orthanc must not start: tests run their own, on loopback, and stop it.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
    "${as_root[@]}" chmod 755 "$policy"
    trap '"${as_root[@]}" rm -f "$policy"' EXIT
fi
"${as_root[@]}" apt-get update -qq
DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
