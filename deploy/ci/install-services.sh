#!/bin/sh
# Installs what tests start for themselves: PostgreSQL, Redis, Prometheus, Chromium and Node.js (for a client in JavaScript),
# as Debian or Ubuntu packages. Run it as root. Nothing is left running: the tests use instances of their own in temporary folders.
set -eu

if [ "$(id -u)" -ne 0 ]; then
    echo "install-services.sh: run it as root (it calls apt-get)" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
# The packages must not start services of their own: they would take memory and ports of a CI machine.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod 0755 "$policy"
fi
apt-get update
apt-get install -y --no-install-recommends postgresql redis-server prometheus
# Only where there is none, because it is large.
command -v chromium >/dev/null || apt-get install -y --no-install-recommends chromium
# A Node.js that is there already, whoever installed it, must not be replaced by Debian's.
command -v npm >/dev/null || apt-get install -y --no-install-recommends nodejs npm
for each in /usr/lib/postgresql/*/bin/initdb; do
    test -x "$each" || { echo "install-services.sh: initdb is missing after the installation" >&2; exit 1; }
done
for each in redis-server npm promtool chromium; do
    command -v "$each" || { echo "install-services.sh: $each is missing after the installation" >&2; exit 1; }
done
