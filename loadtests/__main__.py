"""Every benchmark in turn: ``python -m loadtests`` (``make bench``)."""

import sys

from loadtests import commits, hooks, kernels


def main() -> None:
    """Run them with their default sizes."""
    del sys.argv[1:]
    for name, benchmark in (("delta-rule operators", kernels), ("durable commits", commits), ("engine hooks", hooks)):
        print(f"\n{name}", flush=True)  # noqa: T201
        benchmark.main()


if __name__ == "__main__":
    main()
