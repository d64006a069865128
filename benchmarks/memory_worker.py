"""The process that memory.py starts: peaks of the variants named on standard input."""

import json
import sys

import torch

from benchmarks.memory import peak_of
from benchmarks.suite import Settings, all_cases


def main() -> None:
    """Print one line of JSON for each ``[case key, peer, backend]``, in order."""
    settings = Settings.from_json(sys.argv[1])
    torch.set_num_threads(settings.threads)
    cases = {case.key: case for case in all_cases(settings)}
    for key, peer, backend in json.load(sys.stdin):
        case = cases[key]
        (variant,) = (v for v in case.variants if (v.peer, v.backend) == (peer, backend))
        print(json.dumps(peak_of(case, variant)), flush=True)


if __name__ == "__main__":
    main()
