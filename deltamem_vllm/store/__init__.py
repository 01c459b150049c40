"""Durable sessions: the protocol every store keeps, the record's bytes, SQLite, and the group-commit writer.

Import from the modules: ``protocol`` (what a store promises), ``codec`` (a record as verified bytes),
``sqlite`` and ``memory`` (stores), ``url`` (which one a URL names), ``writer`` (the one thread that
commits). Neither torch nor vLLM is imported here.
"""
