"""Chaos: servers under load while something is broken on purpose, and a ledger that the store must bear out afterwards.

| file | is |
|---|---|
| `scripts.py` | what is said in a session: the same tokens each time, so that its memory after each turn is known |
| `ledger.py` | what clients were told, and the check of it against what is stored |
| `clients.py` | clients that send their turns until they are told an outcome |
| `cluster.py` | servers on one store, and what they have stored |
| `replicas.py` | replicas on one PostgreSQL, killed in turn |
| `stores.py` | the store cut, slow, or full |
| `soak.py` | memory and descriptors of a server over many sessions |

``python -m loadtests.chaos replicas`` (and so on) runs one; ``--help`` has the sizes.
"""
