"""Turn old files of weights into files of tensors and plain data.

python -m amaes.weights model_final.model weights.pt
"""

from __future__ import annotations

import argparse
from pathlib import Path

from amaes import cli


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked: OUT is not there yet."""
    description = "Write the weights of a file, and plain data beside them, as a file without code."
    examples = ["model_final.model weights.pt", "old.ckpt weights.safetensors"]
    parser = cli.Parser(description=description, examples=examples)
    parser.add_argument("file", type=Path, metavar="FILE", help="of torch.save, also of a whole network")
    parser.add_argument("out", type=cli.output_file, metavar="OUT", help="file to write; X.safetensors: in that format")
    explanation = "read FILE as it is, if nothing else helps; that runs the code in it, so know where it comes from"
    parser.add_argument("--trust", action="store_true", help=explanation)
    args = parser.parse_args(argv)
    if args.out.exists():
        parser.error(f"{args.out}: exists; take another name")
    return args


def main(args: argparse.Namespace) -> int:
    """Write OUT; say what it holds, what was left out, and which network it fits."""
    from amaes.models.transfer import fitting_architectures
    from amaes.published import convert
    from amaes.weights.convert import convert_weights
    from amaes.weights.plan import find_plan
    from amaes.weights.tensor_files import find_state_dict, read

    log = cli.logger(True)
    done = convert_weights(args.file, args.out, args.trust)
    log(f"{args.file}: read {done.how}")
    content = read(args.out)
    log(f"{args.out}: {len(find_state_dict(content)[1])} tensors; also kept: {', '.join(done.kept) or 'nothing'}")
    if done.left_out:
        log(f"left out: {'; '.join(done.left_out)}")
    try:
        imported = convert(content, args.out, find_plan(content, args.out))
        log(f"{imported.family}; {fitting_architectures(imported.tensors)}")
    except ValueError as error:
        log(f"not recognised: {error}")
    return cli.EXIT_OK


if __name__ == "__main__":
    cli.run(main, parse_options())
