"""Every benchmark in turn: ``python -m loadtests`` (``make bench``)."""

import sys

from loadtests import hooks, kernels, sessions


def main() -> None:
    """Run them with their default sizes."""
    del sys.argv[1:]
    for name, benchmark in (("delta-rule operators", kernels), ("sessions", sessions), ("engine hooks", hooks)):
        print(f"\n{name}", flush=True)  # noqa: T201
        benchmark.main()


if __name__ == "__main__":
    main()
