"""Durable sessions: the protocol every store keeps, the record's bytes, the stores, and the group-commit writer.

Import from the modules: ``protocol`` (what a store promises), ``codec`` (a record as verified bytes), ``crypto`` (the
same, encrypted), ``sqlite``, ``postgres``, ``redis`` and ``memory`` (stores), ``url`` (which one a URL names),
``writer`` (the one thread that commits). ``ledger`` decides for all stores what a write changes, ``verify`` what they
check of a row they read. Neither torch nor vLLM is imported here; psycopg, redis and cryptography only by the module
that needs them.
"""
