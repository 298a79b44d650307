"""The command ``bids_varaug-power``: whether numerical noise could change a published result."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bids_varaug import __version__
from bids_varaug.cli.parser import Parser
from bids_varaug.errors import ExitCode, UsageError


def build_parser() -> Parser:
    """Parser of ``bids_varaug-power``."""
    text = "Could numerical noise change a published result? For two groups of equal size, or a correlation."
    parser = Parser(prog="bids_varaug-power", description=text)
    add = parser.add_argument
    add("--npvr", type=float, required=True, help="numerical-to-population variability ratio: models/power.tsv, npv")
    add("--n", type=int, required=True, help="people in the study")
    add("--p", type=float, required=True, help="published p-value, two-sided")
    add("--version", action="version", version=f"bids_varaug {__version__}", help="show the version and exit")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print what numerical noise does to each statistic; returns the exit code."""
    from bids_varaug.variability.power import ALPHA, flip_probability, noise_of_statistics

    try:
        given = build_parser().parse_args(argv)
        table = noise_of_statistics(given.npvr, given.n, given.p)
    except (UsageError, ValueError) as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return int(ExitCode.USAGE)
    print(f"NPVR {given.npvr:g}, {given.n} people, p = {given.p:g} (two-sided)\n")
    print(table.rename(columns={"sd": "SD by numerical noise"}).round(3).to_string())
    rerun, clean = (flip_probability(given.npvr, given.n, given.p, rerun=again) for again in (True, False))
    print(f"\nProbability that one more run of the pipeline has p on the other side of {ALPHA:g}: {rerun:.1%}")
    print(f"Probability that p without numerical noise is on the other side: {clean:.1%}")
    return int(ExitCode.DONE)
