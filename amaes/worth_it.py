"""Is pretraining worth it on my data? Pretrain, fine-tune with few labelled cases with and without it, and one page.

    python -m amaes.worth_it --unlabelled SCANS --images IMAGES --labels LABELS --cases 5 10 20 --seeds 3 --out RUN

Runs the commands that a user would type, for a night or more, and says the hours ahead. For every number of labelled
cases, fold and seed it trains two networks on the same cases, from scratch and from the pretrained encoder, and tests
both on all other labelled cases. RUN/worth-it.md says what came out. The same command again continues.
"""

from __future__ import annotations

import argparse
import math
import runpy
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from amaes import cli
from amaes.__main__ import COMMANDS, find_script
from amaes.choices import DEVICES
from amaes.cli import say
from amaes.demo import printed, report_failure, run_step, start_of
from amaes.files import read_json, write_json, write_text
from amaes.models.build import ARCHITECTURES

STARTS = ("scratch", "pretrained")
OWN = {  # options that this command gives to others, and what would change the cases or the networks of a pair
    "preprocess": ("--images", "--labels", "--out"),
    "pretrain": ("--data", "--out", "--arch", "--patch-size", "--steps", "--epochs"),
    "finetune": (
        *("--data", "--out", "--arch", "--patch-size", "--steps", "--weights", "--seed"),
        *("--folds", "--fold", "--train-cases", "--splits", "--protocol"),
    ),
}
SURE = 0.95  # of the intervals
LEARNED = 0.8  # a training Dice that says how early a network learned
MEANING = f"""\
What it can claim. A pair of networks had the same labelled cases and the same seed. Networks of one fold share their
labelled cases, those of one seed their first weights, so that pairs are not independent: the interval is the widest of
three, over pairs, over the means of folds and over the means of seeds. Where it leaves out 0, another draw of cases and
seed is expected to come out the same way; one fold alone, or one seed, does not tell how much another would change. All
pretrained networks share one encoder: another pretraining may come out otherwise. A pair without a Dice, since no
tested case has anything to find, is left out. The p value is of the two-sided Wilcoxon signed-rank test over the tested
cases, each the mean of the networks that tested it: a small one says that these networks differ on such cases, not that
networks trained again would, since all cases share them. Scans that were tested and that pretraining has seen, without
labels, are listed in `leakage.json` of each pretrained run.

Steps to a training Dice of {100 * LEARNED:.0f} %: median over networks, on the patches that are trained on. A start
that gets there earlier and is not ahead in Dice had a head start and no better end."""


@dataclass(frozen=True)
class Comparison:
    """Networks with one number of labelled cases: their Dice in percent, pair by pair, and p over the tested cases.

    `networks` has the fold and seed of each pair; `steps` per start and network the optimizer steps until the Dice of
    its own training patches was LEARNED.
    """

    cases: int
    networks: list[tuple[int, int]]
    scratch: list[float]
    pretrained: list[float]
    tested: int
    p: float
    steps: dict[str, list[float]]

    @property
    def differences(self) -> list[float]:
        return [b - a for a, b in zip(self.scratch, self.pretrained, strict=True)]

    @property
    def interval(self) -> tuple[float, float, float]:
        """Mean difference and the ends of its interval, the widest over pairs, means of folds and means of seeds."""
        samples = [self.differences]
        for shared in zip(*self.networks, strict=True):  # the folds, the seeds
            groups: dict[int, list[float]] = {}
            for group, difference in zip(shared, self.differences, strict=True):
                groups.setdefault(group, []).append(difference)
            samples += [[_mean(group) for group in groups.values()]] if len(groups) > 1 else []
        halves = [(high - low) / 2 for _, low, high in map(mean_interval, samples)]
        mean = _mean(self.differences)
        return mean, mean - max(halves), mean + max(halves)


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = cli.Parser(description="Find out whether pretraining helps on your data.")
    add = parser.add_argument
    add("--unlabelled", type=Path, required=True, metavar="DIR", help="NIfTI files to pretrain on")
    add("--images", type=Path, required=True, metavar="DIR", help="NIfTI files of the labelled cases")
    add("--labels", type=Path, required=True, metavar="DIR", help="their labels, of the same names")
    add("--out", type=Path, default=Path("runs/worth-it"), metavar="RUN", help="folder for everything")
    explanation = "numbers of labelled cases to train on; all others are tested"
    add("--cases", type=cli.positive_int, nargs="+", default=[5, 10, 20], metavar="N", help=explanation)
    add("--folds", type=cli.folds, default=3, metavar="N", help="choices of those cases")
    add("--seeds", type=cli.folds, default=3, metavar="N", help="networks of each choice and start")
    add("--arch", choices=list(ARCHITECTURES), default="unet_b", help="network")
    parser.add_patch_size(add)
    add("--pretrain-steps", type=cli.positive_int, default=10_000, metavar="N", help="optimizer steps of pretraining")
    add("--finetune-steps", type=cli.positive_int, default=2500, metavar="N", help="optimizer steps of each network")
    add("--device", choices=DEVICES, default="auto", help="auto: CUDA where there is a GPU")
    explanation = "further options of %s, in quotes and after =, e.g. --%s='--lr 1e-3'"
    for name in ("preprocess", "pretrain", "finetune"):
        add(f"--{name}", default="", metavar="OPTIONS", help=explanation % (name, name))
    args = parser.parse_args(argv)
    args.patch_size = parser.three_sides(args.patch_size)
    args.cases = sorted(set(args.cases))
    for name, own in OWN.items():
        try:
            words = shlex.split(getattr(args, name))
        except ValueError as error:
            parser.error(f"--{name} {getattr(args, name)}: {error}")
        if given := [word for word in words if word.partition("=")[0] in own]:
            parser.error(f"--{name} {getattr(args, name)}: {given[0]} is for this command to set; leave it out")
    return args


def steps(args: argparse.Namespace) -> dict[str, list[str]]:
    """The command lines, by name, in order."""
    out, device = shlex.quote(str(args.out)), args.device
    command = {name: shlex.join(start_of(name)) for name in ("preprocess", "pretrain", "finetune", "evaluate")}
    images, labels, unlabelled = (shlex.quote(str(path)) for path in (args.images, args.labels, args.unlabelled))
    patch = " ".join(map(str, args.patch_size))
    network = f"--arch {args.arch} --patch-size {patch} --device {device}"
    lines = {
        "preprocess-labelled": f"{command['preprocess']} --images {images} --labels {labels} "
        f"--out {out}/stores/labelled {args.preprocess}",
        "preprocess-unlabelled": f"{command['preprocess']} --images {unlabelled} --out {out}/stores/unlabelled "
        f"{args.preprocess}",
        "pretrain": f"{command['pretrain']} --data {out}/stores/unlabelled {network} --steps {args.pretrain_steps} "
        f"--val-fraction 0.1 --crop patch --out {out}/pretrain {args.pretrain}",
    }
    weights = {"scratch": "scratch", "pretrained": f"{out}/pretrain/checkpoints/step-{args.pretrain_steps}.pt"}
    for cases in args.cases:
        runs = {(start, seed): f"{out}/{name_of(cases, start, seed)}" for seed in range(args.seeds) for start in STARTS}
        for (start, seed), run in runs.items():
            lines[f"finetune-{name_of(cases, start, seed)}"] = (
                f"{command['finetune']} --data {out}/stores/labelled {network} --steps {args.finetune_steps} "
                f"--folds {args.folds} --train-cases {cases} --augment spatial --seed {seed} "
                f"--weights {weights[start]} --out {run} {args.finetune}"
            )
        lines[f"evaluate-{cases}"] = f"{command['evaluate']} {' '.join(runs.values())} --metrics dice --device {device}"
    return {name: shlex.split(line) for name, line in lines.items()}


def name_of(cases: int, start: str, seed: int) -> str:
    """Of the run of `folds` networks."""
    return f"{cases}-cases-{start}-seed{seed}"


def ahead(todo: Sequence[str], seconds: Mapping[str, float]) -> str:
    """One line: what is left to do, and how long that will take, as far as the steps before tell.

    Args:
        todo: names of all steps.
        seconds: of those that are done.
    """
    left = [name for name in todo if name not in seconds]
    hours, unknown = 0.0, []
    for kind in dict.fromkeys(name.split("-")[0] for name in left):
        known = [value for name, value in seconds.items() if name.split("-")[0] == kind]
        count = sum(name.split("-")[0] == kind for name in left)
        if known:
            hours += count * sum(known) / len(known) / 3600
        else:
            unknown.append(f"{count} x {kind}")
    text, shown = f"{len(todo) - len(left)} of {len(todo)} steps done", timedelta(seconds=round(3600 * hours))
    if not unknown:
        return f"{text}, {shown} ahead"
    known = f"{shown} ahead, and " if hours else ""
    return f"{text}, {known}not known yet how long: {', '.join(unknown)}"


# What came out --------------------------------------------------------------------------------------------------------


def read_comparison(args: argparse.Namespace, cases: int) -> Comparison:
    """The networks of one number of labelled cases, from what `evaluate` wrote."""
    from amaes.evaluation.scores import compare_runs  # takes a second to import

    networks = [(fold, seed) for seed in range(args.seeds) for fold in range(args.folds)]
    folds, steps = {}, {}
    for start in STARTS:
        folders = [args.out / name_of(cases, start, seed) / f"fold{fold}" for fold, seed in networks]
        folds[start] = [_null_to_nan(read_json(folder / "results.json")) for folder in folders]
        steps[start] = [steps_until_learned(folder / "metrics.jsonl") for folder in folders]
    of_cases = compare_runs(*folds.values())["mean"]
    dice = ([100 * fold["dice"] for fold in of_start] for of_start in folds.values())
    pairs = [pair for pair in zip(networks, *dice, strict=True) if not math.isnan(sum(pair[1:]))]
    networks, scratch, pretrained = ([pair[i] for pair in pairs] for i in range(3))
    return Comparison(cases, networks, scratch, pretrained, of_cases["n"], of_cases["p"], steps)


def steps_until_learned(metrics: Path) -> float:
    """The step at which training Dice was LEARNED for the first time, from a fold's metrics.jsonl; inf where never."""
    from amaes.training.verdict import metrics_lines  # imports torch

    lines = (line for line in metrics_lines(metrics) if isinstance(line.get("dice"), float))
    return min((line["step"] for line in lines if line["dice"] >= LEARNED), default=math.inf)


def _null_to_nan(content: object) -> object:
    if isinstance(content, dict):
        return {key: _null_to_nan(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_null_to_nan(value) for value in content]
    return math.nan if content is None else content


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its interval (Student's t) at the level SURE; NaN where there are too few values."""
    from scipy.stats import t

    count, mean = len(values), _mean(values)
    if count < 2:
        return mean, math.nan, math.nan
    sd = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(t.ppf(0.5 + SURE / 2, count - 1)) * sd / math.sqrt(count)
    return mean, mean - half, mean + half


def _interval_text(row: Comparison, digits: int) -> str:
    _, low, high = row.interval
    few = "one pair, no interval" if row.differences else "no pair has a Dice"
    return few if math.isnan(low) else f"{low:+.{digits}f} to {high:+.{digits}f}"


def verdict(comparisons: Sequence[Comparison]) -> str:
    """One line: with how many labelled cases the pretrained encoder was ahead, by how much, and where not."""
    groups: dict[str, list[str]] = {"ahead": [], "behind": [], "open": []}
    for row in comparisons:
        mean, low, high = row.interval
        where = "ahead" if low > 0 else "behind" if high < 0 else "open"
        groups[where].append(f"{row.cases} ({mean:+.1f} points, {_interval_text(row, 1)})")
    texts = {"ahead": "worth it with {}", "behind": "worse than scratch with {}", "open": "no difference shown with {}"}
    parts = [texts[where].format(", ".join(rows)) for where, rows in groups.items() if rows]
    return f"Pretraining here: {'; '.join(parts)} labelled cases"


def page(comparisons: Sequence[Comparison], commands: Sequence[str], picture: str | None, pretraining: str) -> str:
    """The page, Markdown: the verdict, that of pretraining, a table, the picture, what it can claim, the commands."""
    rows = []
    for row in comparisons:
        differences = row.differences
        wins = sum(difference > 0 for difference in differences)
        cells = [row.cases, *(f"{_mean(values):.2f} ± {_sd(values):.2f}" for values in (row.scratch, row.pretrained))]
        cells += [f"{_mean(differences):+.2f} ({_interval_text(row, 2)})", f"{wins} of {len(differences)}"]
        cells += [row.tested]
        medians = ", ".join(_steps_text(row.steps[start]) for start in STARTS)
        rows.append("| " + " | ".join(map(str, [*cells, f"{row.p:.2g}", medians])) + " |")
    head = "| labelled | scratch | pretrained | difference (95 % interval) | networks ahead | tested | p over cases |"
    head += f" steps to a training Dice of {100 * LEARNED:.0f} %: scratch, pretrained |"
    parts = [
        "# Is pretraining worth it here?",
        f"**{verdict(comparisons)}.**",
        f"The last line of pretraining: {pretraining}",
        "Dice in percent, mean ± sd over networks (folds and seeds), and the mean of the paired differences.",
        "\n".join([head, "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", *rows]),
        *([f"![Dice against labelled cases]({picture})"] if picture else []),
        MEANING,
        "## Commands\n\n```\n" + "\n".join(commands) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _steps_text(steps: Sequence[float]) -> str:
    middle, never = median(steps), sum(map(math.isinf, steps))
    if math.isinf(middle):
        return "never" if never == len(steps) else f"never in {never} of {len(steps)}"
    return f"{middle:.0f}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _sd(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) if len(values) > 1 else math.nan


def draw_curve(path: Path, comparisons: Sequence[Comparison]) -> None:
    """Write the learning curve, Dice against the number of labelled cases, with the sd over networks, as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    cases = [row.cases for row in comparisons]
    for start, colour in zip(STARTS, ("#555555", "#0072b2"), strict=True):
        values = [getattr(row, start) for row in comparisons]
        axes.errorbar(cases, [_mean(v) for v in values], [_sd(v) for v in values], color=colour, capsize=3, label=start)
        for count, of_count in zip(cases, values, strict=True):
            axes.plot([count] * len(of_count), of_count, ".", color=colour, alpha=0.4)
    axes.set(xscale="log", xlabel="labelled cases", ylabel="Dice, %")
    axes.minorticks_off()
    axes.set_xticks(cases, labels=map(str, cases))
    axes.legend()
    figure.savefig(path, dpi=120)


# The run --------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run every step that is not done yet; returns the exit status of the first that fails, else 0."""
    args = parse_options(argv)
    todo, record = steps(args), args.out / "worth-it.json"
    check_options(todo)
    done = read_json(record) if record.is_file() else {}  # {step: {"command", "seconds", "said": its last line}}
    done = {name: done[name] for name, words in todo.items() if name in done and done[name]["command"] == words}
    (args.out / "logs").mkdir(parents=True, exist_ok=True)
    for name, command in todo.items():
        if name in done:
            continue
        if name in ("preprocess-unlabelled", "pretrain"):
            check_cases(args)
        for later in resting_on(name, todo):
            done.pop(later, None)
        say(f"{ahead(list(todo), {step: entry['seconds'] for step, entry in done.items()})}\n$ {printed(command)}")
        began, log = time.perf_counter(), args.out / "logs" / f"{name}.log"
        status = run_step(command, log, shown=False)
        if status == cli.EXIT_REJECTED and name.startswith("preprocess") and not crashed(log):
            say(f"WARNING: some inputs were rejected, and are left out; {log} names them")
        elif status:
            return report_failure(name, status, log)
        seconds = round(time.perf_counter() - began, 1)
        done[name] = {"command": command, "seconds": seconds, "said": last_line(log)}
        write_json(record, done)
        if name == "pretrain":
            say(done[name]["said"])
    comparisons = [read_comparison(args, cases) for cases in args.cases]
    picture = "worth-it.png" if find_spec("matplotlib") else None
    if picture:
        draw_curve(args.out / picture, comparisons)
    pretraining = done["pretrain"].get("said", "not recorded")
    text = page(comparisons, [printed(command) for command in todo.values()], picture, pretraining)
    write_text(args.out / "worth-it.md", text)
    say(f"{args.out / 'worth-it.md'}: {verdict(comparisons)}")
    return 0


def last_line(log: Path) -> str:
    """Of the output of a step, such as the verdict of pretraining."""
    return log.read_text(errors="replace").rstrip().rpartition("\n")[2]


def crashed(log: Path) -> bool:
    """A step ended with an error of its own, of which Python makes the status that rejected inputs have."""
    return "Traceback (most recent call last)" in log.read_text(errors="replace")


def check_options(todo: Mapping[str, list[str]]) -> None:
    """Let the training scripts read their options: what is mistyped for the last of them ends this command now.

    Raises:
        ValueError: a patch size that the network or the mask cannot divide.
    """
    from amaes.training.checks import check_patch_size  # imports torch

    for script in ("pretrain", "finetune"):
        parse = runpy.run_path(str(find_script(COMMANDS[script].target)))["parse_options"]
        for words in (words for name, words in todo.items() if name.split("-")[0] == script):
            given = parse(words[words.index("--data") :])
            check_patch_size(given.patch_size, given.arch, getattr(given, "token_size", None) or 1)


def resting_on(name: str, todo: Sequence[str]) -> list[str]:
    """The later steps that what a step makes changes."""
    kind, _, cases = name.partition("-")
    if kind == "finetune":
        return [f"evaluate-{cases.split('-')[0]}"]
    return [] if kind == "evaluate" else list(todo)[list(todo).index(name) + 1 :]


def check_cases(args: argparse.Namespace) -> None:
    """Refuse more labelled cases for training than there are, before pretraining.

    Raises:
        ValueError: names the number, and how many there are.
    """
    from amaes.data.splits import fold_splits  # imports torch
    from amaes.data.store import Store

    store = Store(args.out / "stores" / "labelled")
    for cases in args.cases:
        try:
            fold_splits(store, args.folds, cases)
        except ValueError as error:
            raise ValueError(str(error).replace("`train_cases`", "`cases`")) from None


if __name__ == "__main__":
    cli.run(main)
