"""``python -m benchmarks``: the same as ``airl-fast bench``, from the repository."""

import argparse
import sys

from airl_fast.bench import EPILOG, add_options, run_bench


def main() -> int:
    """Read the options and run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Speed and memory of the operators beside their peers.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    try:
        return run_bench(parser.parse_args())
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
