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
OTHER_DEFAULTS = {"token_size": int}  # had another default: what a run has recorded goes before today's


def options_of_earlier_runs(args: argparse.Namespace) -> dict:
    """Of the run in `args.out`, where it would be continued: those of EARLIER that it does not know, and its own of
    OTHER_DEFAULTS; else none."""
    if args.overwrite or args.resume == "never":
        return {}
    try:
        recorded = read_json(args.out / "config.json")["options"]
        kept = {name: recorded[name] for name, kind in OTHER_DEFAULTS.items() if isinstance(recorded.get(name), kind)}
        return {name: value for name, value in EARLIER.items() if name not in recorded} | kept
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ):  # no run; what else is there, the run folder says
        return {}


def with_later_options(recorded: Mapping[str, object], now: Mapping[str, object]) -> dict:
    """The recorded options of a run, and of those that came later what the run did, as far as `now` has a value."""
    return {name: value for name, value in EARLIER.items() if now.get(name) is not None} | dict(recorded)
