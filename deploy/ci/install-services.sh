#!/bin/sh
# Installs the servers that the store tests start for themselves: PostgreSQL and Redis, as Debian or Ubuntu
# packages. Run it as root. Nothing is left running: the tests use instances of their own in temporary folders.
set -eu

if [ "$(id -u)" -ne 0 ]; then
    echo "install-services.sh: run it as root (it calls apt-get)" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
# No cluster and no service of the distribution's own: they would hold the ports and the memory of a CI machine.
mkdir -p /etc/postgresql-common
[ -e /etc/postgresql-common/createcluster.conf ] || echo "create_main_cluster = false" > /etc/postgresql-common/createcluster.conf
made_policy=no
if [ ! -e /usr/sbin/policy-rc.d ]; then
    printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
    chmod 0755 /usr/sbin/policy-rc.d
    made_policy=yes
fi
apt-get update
apt-get install -y --no-install-recommends postgresql redis-server
[ "$made_policy" = no ] || rm -f /usr/sbin/policy-rc.d
ls /usr/lib/postgresql/*/bin/initdb
command -v redis-server
