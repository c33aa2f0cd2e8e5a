"""What the plot.py of every paper shares: its command line, and the way from a study's name to figures and tables."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from common.cli import SCALES, Parser, fail, int_min
from common.study import figures, page, sweeps, tables
from common.study.analysis import Rule, summarise
from common.study.design import Design, DesignError, Metric, Settings, Study
from common.study.results import Runs, View, read_runs


def parse_args(description: str | None, argv: Sequence[str] | None) -> Any:
    """The command line of every plot.py."""
    parser = Parser(description)
    parser.add_argument("study", help="name of a study in studies.py")
    parser.add_argument("--scale", choices=SCALES, default="demo")
    parser.add_argument("--runs", type=Path, help="folder of the arms (default: runs/SCALE/PAPER)")
    parser.add_argument("--seeds", type=int_min(0), nargs="+", help="default: the study's own")
    parser.add_argument("--results", type=Path, help="where figures and tables go (default: runs/SCALE/report)")
    parser.add_argument("--reproduce", default="", help="the command that the page gives for this study")
    parser.add_argument("--pairs", nargs="+", default=[], help="CoCoRD's pairs of networks, where make was given PAIRS")
    parser.add_argument("--tasks", nargs="+", default=[], help="Seq-VCR's tasks, where make was given TASKS")
    return parser.parse_args(argv)


def begun(study: Study, runs: Runs) -> tuple[Study, list[str]]:
    """The study without the further contrasts of arms that have no run at all, and the names of these arms.

    Primary contrasts stay: what they lack is a hole.
    """
    there = {arm for arm, by_seed in runs.items() if any(run.args or run.metrics for run in by_seed.values())}
    kept = [
        contrast
        for place, (contrast, pair) in enumerate(zip(study.contrasts, study.pairs, strict=True))
        if place < study.primary or there.issuperset(pair)
    ]
    named = {arm for one in kept for arm in str(one).split(":")}
    guards = [one for one in study.must_beat if one.arm in named or one in study.primary_guards]
    shown = replace(study, contrasts=kept, must_beat=guards)
    return shown, [arm for arm in study.arms if arm not in there and arm not in shown.arms]


def measured(study: Study, design: Design, runs: Runs) -> dict[str, Metric]:
    """The metrics that some finished run has (other data know no planted atoms); all while no run is finished."""
    every = [run.metrics for by_seed in runs.values() for run in by_seed.values() if run.metrics]
    finished = [metrics for metrics in every if not metrics.get("diverged")]
    known = {study.metric, *(one.metric for one in study.must_beat), *(study.sweep.metrics if study.sweep else ())}
    known |= {key for metrics in finished for key in metrics}
    return {key: metric for key, metric in design.metrics.items() if key in known or not finished}


def draw(
    argv: Sequence[str] | None,
    description: str | None,
    design: Callable[[str, Settings], Design],
    describe: Callable[[Runs], str],
    draw_figures: Callable[[View], Mapping[str, Figure]],
    rule: Rule | None = None,
) -> None:
    """Command line of a paper's plot.py: figures, tables and finding of one study, from what there is of its runs.

    `describe` turns runs into data and recipe in words, "" where there are none. `draw_figures` may add to the summary
    of the View that it gets. `rule`: see `summarise`. Stops (exit 2) on a study that the design does not declare.
    """
    args = parse_args(description, argv)
    try:
        found = design(args.scale, Settings(tuple(args.pairs), tuple(args.tasks)))
        study = found.study(args.study)
    except DesignError as error:
        fail(str(error))
    args.runs = args.runs or Path("runs", args.scale, found.paper)
    args.seeds = args.seeds or list(study.seeds)
    args.results = args.results or Path("runs", args.scale, "report")
    runs = read_runs(args.runs, study.arms, args.seeds)
    study, not_run = begun(study, runs)
    runs = {arm: runs[arm] for arm in study.arms}
    data = describe(runs)
    if not data:
        print(f"{study.name}: no runs in {args.runs} yet")
        return
    summary = summarise(study, runs, measured(study, found, runs), rule) | {
        "paper": found.title,
        "scale": args.scale,
        "data": data,
        "reproduce": args.reproduce or f"make {study.name} SCALE={args.scale}",
        "not_run": not_run,
    }
    if not_run:
        summary["notes"].insert(0, f"Not run: {', '.join(not_run)}.")
    view = View(args, study, runs, summary, data, f"{data[0].upper()}{data[1:]}. ")
    drawn = sweeps.draw(view) if study.sweep else draw_figures(view)
    args.results.mkdir(parents=True, exist_ok=True)
    for old in page.pictures(args.results, [study.name])[study.name]:
        if old.stem.removeprefix(f"{study.name}-") not in drawn:  # drawn once, from other runs
            for kind in (".png", ".svg"):
                old.with_suffix(kind).unlink(missing_ok=True)
    for name, figure in drawn.items():
        figures.save(figure, args.results, f"{study.name}-{name}")
    tables.write_tables(view.summary, args.results)
    print(f"{study.name}: {view.summary['finding']}")
