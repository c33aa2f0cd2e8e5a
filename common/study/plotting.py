"""The shared main program of every paper's plot.py: read the runs of a study, write its figures and tables."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.cli import SCALES, Parser, fail, int_in
from common.lock import exit_codes
from common.study import figures, page, sweeps, tables
from common.study.analysis import RemarkFunction, summarise
from common.study.design import Design, DesignError, Metric, Settings, Study
from common.study.results import Runs, View, data_seeds, read_runs


def parse_args(description: str | None, argv: Sequence[str] | None) -> Any:
    """Parse the command line of plot.py."""
    parser = Parser(description)
    parser.add_argument("study", help="name of a study in studies.py")
    parser.add_argument("--scale", choices=SCALES, default="demo", help="scale of the design")
    parser.add_argument("--runs", type=Path, help="folder that contains the arms (default: runs/SCALE/PAPER)")
    parser.add_argument("--seeds", type=int_in(0), nargs="+", help="default: the seeds that the study declares")
    parser.add_argument("--results", type=Path, help="output folder (default: runs/SCALE/report)")
    parser.add_argument("--reproduce", default="", help="command that the page shows for this study")
    parser.add_argument("--pairs", nargs="+", default=[], help="CoCoRD: pairs TEACHER-STUDENT (make PAIRS=...)")
    parser.add_argument("--tasks", nargs="+", default=[], help="Seq-VCR: tasks (make TASKS=...)")
    return parser.parse_args(argv)


def drop_arms_without_runs(study: Study, runs: Runs) -> tuple[Study, list[str]]:
    """Return the study without the secondary contrasts whose arms have no run, and the names of the dropped arms.

    Primary contrasts are always kept; their missing runs are reported.
    """
    started = {
        arm for arm, by_seed in runs.items() if any(run.args or run.metrics or run.notes for run in by_seed.values())
    }
    contrasts = [
        contrast
        for index, (contrast, pair) in enumerate(zip(study.contrasts, study.pairs, strict=True))
        if index < study.primary or started.issuperset(pair)
    ]
    compared = {arm for contrast in contrasts for arm in str(contrast).split(":")}
    must_beat = [item for item in study.must_beat if item.arm in compared or item in study.primary_baselines]
    reduced = replace(study, contrasts=contrasts, must_beat=must_beat)
    return reduced, [arm for arm in study.arms if arm not in started and arm not in reduced.arms]


def measured_metrics(study: Study, design: Design, runs: Runs) -> dict[str, Metric]:
    """Return the metrics that the study needs or that a finished run has, and all metrics if no run is finished.

    Some metrics exist only on some data (BSA's planted atoms, for example).
    """
    saved = [run.metrics for by_seed in runs.values() for run in by_seed.values() if run.metrics]
    finished = [metrics for metrics in saved if not metrics.get("diverged")]
    keys = {study.metric, *(item.metric for item in study.must_beat), *(study.sweep.metrics if study.sweep else ())}
    keys |= {key for metrics in finished for key in metrics}
    return {key: metric for key, metric in design.metrics.items() if key in keys or not finished}


def varies_with_seed(paper: Design, study: Study, runs: Runs) -> str:
    """Return what differs between the seeds of a study, for the captions."""
    if not data_seeds(runs) - {0}:
        return "initial weights and order"
    given = paper.data or any(paper.arm(arm).data for arm in study.arms)
    return f"{'the split of the same data' if given else 'data'}, initial weights and order"


def main(
    argv: Sequence[str] | None,
    description: str | None,
    design: Callable[[str, Settings], Design],
    describe: Callable[[Runs], str],
    draw: Callable[[View], Mapping[str, figures.Drawing]],
    remark_of: RemarkFunction | None = None,
    rule: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> None:
    """Run a paper's plot.py: write figures and tables of one study from its existing runs and print its finding.

    `describe` returns data and training setup in words, or "" if there are no runs. `draw` returns the figures by name
    and may change the summary of its View. `remark_of`: see `summarise`. `rule` returns the summary after a rule of the
    paper. Exits with code 2 if the design does not declare the study.
    """
    args = parse_args(description, argv)
    try:
        paper = design(args.scale, Settings(tuple(args.pairs), tuple(args.tasks)))
        study = paper.study(args.study)
    except DesignError as error:
        fail(str(error))
    folder = args.runs or Path("runs", args.scale, paper.paper)
    report = args.results or Path("runs", args.scale, "report")
    runs = read_runs(folder, {arm: args.seeds or study.seeds_of(arm) for arm in study.arms}, paper.chance)
    study, not_run = drop_arms_without_runs(study, runs)
    runs = {arm: runs[arm] for arm in study.arms}
    data = describe(runs)
    if not data:
        print(f"{study.name}: no finished runs in {folder}; make {study.name} SCALE={args.scale} trains them")
        for note in (note for by_seed in runs.values() for run in by_seed.values() for note in run.notes):
            print(note)
        return
    try:
        report.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--results {report} cannot be written ({error.strerror}): give another folder")
    summary = rule(summarise(study, runs, measured_metrics(study, paper, runs), remark_of)) | {
        "paper": paper.title,
        "scale": args.scale,
        "data": data,
        "reproduce": args.reproduce or f"make {study.name} SCALE={args.scale}",
        "not_run": not_run,
        "seed_draws": varies_with_seed(paper, study, runs),
    }
    if not_run:
        summary["notes"].insert(0, f"Not run: {', '.join(not_run)}.")
    styles = figures.arm_styles(list(paper.by_name), [other.arms for other in paper.studies if not other.sweep])
    caption = f"{data[0].upper()}{data[1:]}. "
    view = View(folder, args.seeds or study.seeds, study, runs, summary, caption, styles, paper.chance)
    drawn = sweeps.draw(view) if study.sweep else draw(view)
    if not study.sweep:
        drawn = {"differences": figures.differences(summary), **drawn}
    summary["captions"] = {f"{study.name}-{name}": caption for name, (_, caption) in drawn.items()}
    with exit_codes(report):
        write_report(report, study.name, summary, drawn)
    print(f"{study.name}: {' '.join(summary['finding'])}")


def write_report(folder: Path, study: str, summary: Mapping[str, Any], drawn: Mapping[str, figures.Drawing]) -> None:
    """Write the figures and tables of a study and delete its outdated figures."""
    for old in page.find_figures(folder, [study])[study]:
        if old.stem.removeprefix(f"{study}-") not in drawn:  # from other runs
            for suffix in (".png", ".svg"):
                old.with_suffix(suffix).unlink(missing_ok=True)
    for name, drawing in drawn.items():
        figures.save(drawing.figure, folder, f"{study}-{name}")
    tables.write_tables(summary, folder)
