"""The command ``bids_varaug-power``: whether numerical noise could change a published result."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bids_varaug.cli.parser import build_power_parser
from bids_varaug.errors import ExitCode, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Print what numerical noise does to a statistic; returns the exit code."""
    try:
        given = build_power_parser().parse_args(argv)
    except UserError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return int(error.exit_code)
    from bids_varaug.variability.power import ALPHA, flip_probability, noise_of_statistics  # --help needs no scipy

    print(f"NPVR {given.npvr:g}, {given.n} people, p = {given.p:g} (two-sided)\n")
    print("statistic   value  SD by numerical noise")
    for name, (value, sd) in noise_of_statistics(given.npvr, given.n, given.p).iterrows():
        print(f"{name:9} {value:7.3f}  {sd:.3f}")
    rerun, clean = (float(flip_probability(given.npvr, given.n, given.p, rerun=again)) for again in (True, False))
    print(f"\nProbability that one more run of the pipeline has p on the other side of {ALPHA:g}: {rerun:.1%}")
    print(f"Probability that p without numerical noise is on the other side: {clean:.1%}")
    return int(ExitCode.DONE)
