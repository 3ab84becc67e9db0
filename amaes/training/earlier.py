"""Options that earlier versions did not have, or had with another default: a run continues as it began."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from amaes.files import read_json

EARLIER = {  # what training did before there was the option
    "target": "absolute",
    "warmup": 0.0,
    "decoder_warmup": 0,
    "val_cases": 0,
    **{"transfer": "encoder", "stem": "repeat", "allow_partial": False},  # of pretraining
}
EARLIER_DEFAULTS = {"token_size": 4}  # a run that has recorded it goes on with it, unless the command line has another


def options_of_earlier_runs(args: argparse.Namespace) -> dict:
    """Those of EARLIER that the run in `args.out` does not know, and those of EARLIER_DEFAULTS that it has, where it
    would be continued; else none.
    """
    if args.overwrite or args.resume == "never":
        return {}
    try:
        recorded = read_json(args.out / "config.json")["options"]
        kept = {name: was for name, was in EARLIER_DEFAULTS.items() if name in recorded and recorded[name] == was}
        return {name: value for name, value in EARLIER.items() if name not in recorded} | kept
    except (OSError, ValueError, KeyError, TypeError):  # no run; what else is there, the run folder says
        return {}


def with_later_options(recorded: Mapping[str, object], now: Mapping[str, object]) -> dict:
    """The recorded options of a run, and of those that came later what the run did, as far as `now` has a value."""
    return {name: value for name, value in EARLIER.items() if now.get(name) is not None} | dict(recorded)
