"""An open-loop load of many sessions, the same on vLLM alone and with a memory, and a report against objectives.

| file | is |
|---|---|
| `trace.py` | what arrives when, from a seed |
| `replay.py` | sending it, and what was measured of each answer |
| `arms.py` | the two servers, what their users send, and cold starts |
| `summary.py` | percentiles, goodput, tables |
| `picture.py` | a plot of it |

``python -m loadtests.slo`` runs all of it; ``--help`` has the objectives and sizes.

Why not a load generator off the shelf: Locust's users wait for their answers, so that its arrivals slow down with the
server (a closed loop); aiperf brings some fifty packages, and wants older ones than vLLM does here. Neither tells a
turn that finds its session busy (409) from a failure, nor reads from a stream when its commit was durable.
"""
