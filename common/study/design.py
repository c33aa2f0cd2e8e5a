"""The experimental design of one paper as data: arms, contrasts, studies and metrics.

<paper>/studies.py has one function, `design(scale, settings)`, that returns a Design. make's rules, plot.py, the page,
the costs and the tests read it. Standard library alone: make reads it before any environment exists.
"""

import importlib
import re
import shlex
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from common.cli import SCALES

RATES = {"third": "--lr-factor 0.333", "triple": "--lr-factor 3"}  # setting of an arm -> its flags
ROBUSTNESS = "Do the primary contrasts hold at a third and at three times the learning rate?"


class DesignError(ValueError):
    """The design is wrong; the message is one sentence for the user."""


class SettingError(DesignError):
    """PAIRS or TASKS is wrong, not the design."""


@dataclass(frozen=True)
class Settings:
    """What a user may choose about a design: make's PAIRS and TASKS, and whether EXTRA or DATA names other data."""

    pairs: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    own_data: bool = False


@dataclass(frozen=True)
class Metric:
    """A number of metrics.json: its label, unit and digits, and which way is `better` ("higher", "lower", or neither).

    `judged` is False where no verdict is due (the training loss of arms with different losses).
    """

    label: str
    unit: str = ""
    digits: int = 1
    better: str = ""
    judged: bool = True

    @property
    def title(self) -> str:
        """Label and unit, as a panel is headed."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


@dataclass(frozen=True)
class Arm:
    """One setting of the flags of train.py. In a study's list of contrasts, `against` names its reference.

    `needs` is the teacher whose weights it gets. Its name may end in "@setting" (a task, a pair of networks).
    """

    name: str
    flags: str = ""
    against: str = ""
    needs: str = ""


@dataclass(frozen=True)
class MustBeat:
    """`arm` must be better in `metric` than a baseline, else contrasts to it tell nothing.

    The baseline is another metric of the same arm (`baseline_metric`) or the same metric of another `baseline_arm`.
    """

    arm: str
    name: str
    metric: str
    baseline_metric: str = ""
    baseline_arm: str = ""


@dataclass(frozen=True)
class Sweep:
    """A study along one number. `metrics`: what is drawn. `argument`: the argument of train.py that varies.

    Without an argument it is the paper's robustness study. `moving`: arguments that change together with it.
    """

    metrics: Sequence[str]
    argument: str = ""
    label: str = ""
    moving: Sequence[str] = ()


@dataclass(frozen=True)
class Study:
    """One question. Its name is a make target.

    `contrasts` are "arm:reference", or an Arm that is declared here and names its reference. The first `primary` of
    them carry the verdict, on `metric`. "No difference" is said only within `margin`, in the metric's unit, which is
    declared before any run.
    """

    name: str
    question: str
    contrasts: Sequence[str | Arm]
    metric: str
    primary: int = 1
    must_beat: Sequence[MustBeat] = ()
    margin: float | None = None
    published: str = "none published"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    extra: bool = False
    sweep: Sweep | None = None

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(arm, reference) of every contrast."""
        return [(arm, reference) for arm, _, reference in (str(one).partition(":") for one in self.contrasts)]

    @property
    def arms(self) -> list[str]:
        """Every arm that is needed: references first, then the others as declared, then baselines."""
        baselines = [arm for one in self.must_beat for arm in (one.arm, one.baseline_arm) if arm]
        return list(dict.fromkeys([b for _, b in self.pairs] + [a for a, _ in self.pairs] + baselines))

    @property
    def primary_only(self) -> "Study":
        """The study with its primary contrasts alone, and the baselines that guard them."""
        contrasts = self.contrasts[: self.primary]
        return replace(self, contrasts=contrasts, must_beat=self.primary_guards)

    @property
    def primary_guards(self) -> list[MustBeat]:
        """The baselines that guard the primary contrasts."""
        arms = [one.arm for one in self.must_beat]
        places = {place for one in self.pairs[: self.primary] for place in guards_of(*one, arms)}
        return [self.must_beat[place] for place in sorted(places)]

    @property
    def group(self) -> str:
        """The make target that runs it together with others: all, robustness, curves, or none for other extras."""
        if not self.extra:
            return "all"
        return ("curves" if self.sweep.argument else "robustness") if self.sweep else ""


def guards_of(arm: str, reference: str, guarded: Sequence[str]) -> list[int]:
    """Which of the `guarded` arms (places in the list) must beat their baseline for arm:reference to tell something.

    The reference if it is among them, else the arm, else all arms of the reference's setting.
    """
    for name in (reference, arm):
        if own := [place for place, one in enumerate(guarded) if one == name]:
            return own
    setting = reference.partition("@")[2]
    return [place for place, one in enumerate(guarded) if one.partition("@")[2] == setting]


@dataclass(frozen=True)
class Robustness:
    """How a paper's robustness study is derived: the metrics that it draws, and its baselines if not the studies'."""

    metrics: Sequence[str]
    must_beat: Sequence[MustBeat] | None = None
    published: str = "none published"
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass
class Design:
    """All arms and studies of a paper at one scale. Raises DesignError where a name is not declared, or twice.

    `paper` is the folder, `data` the file under DATA that the runs need ("" for none). `arms` are those that no study
    declares, `baselines` the metrics that an arm of its own must beat and that no table shows. Afterwards `arm` and
    `study` find by name, and every study's contrasts are "arm:reference".
    """

    paper: str
    title: str
    metrics: Mapping[str, Metric]
    studies: Sequence[Study]
    arms: Sequence[Arm] = ()
    teachers: Sequence[Arm] = ()
    data: str = ""
    baselines: Sequence[str] = ()
    robustness: Robustness | None = None
    by_name: dict[str, Arm] = field(init=False)

    def __post_init__(self) -> None:
        declared = [*self.arms, *self.teachers]
        declared += [one for study in self.studies for one in study.contrasts if isinstance(one, Arm)]
        self.studies = [
            replace(study, contrasts=[_text(study, one) for one in study.contrasts]) for study in self.studies
        ]
        if self.robustness:
            study = _robustness(self)
            declared += [
                replace(arm, name=f"{arm.name}@{rate}", flags=f"{arm.flags} {flags}".strip())
                for rate, flags in RATES.items()
                for arm in declared
                if arm.name in study.arms
            ]
            place = next((place for place, one in enumerate(self.studies) if one.extra), len(self.studies))
            self.studies = [*self.studies[:place], study, *self.studies[place:]]
        if odd := [key for key, metric in self.metrics.items() if metric.better not in ("higher", "lower", "")]:
            raise DesignError(f"metric '{odd[0]}': better is 'higher', 'lower' or nothing")
        names = [arm.name for arm in declared]
        if odd := [name for name in names if not re.fullmatch(r"[\w+-][\w.+-]*(@[\w.+-]+)*", name)]:
            raise DesignError(f"arm '{odd[0]}': letters, digits and ._+- make a name, and @ its setting")
        if twice := [name for name in names if names.count(name) > 1]:
            raise DesignError(f"arm '{twice[0]}' is declared twice")
        self.by_name = dict(zip(names, declared, strict=True))
        for study in self.studies:
            self._check(study)
        for arm in declared:
            if arm.needs and arm.needs not in {teacher.name for teacher in self.teachers}:
                raise DesignError(f"arm '{arm.name}' needs '{arm.needs}', which is not a declared teacher")

    def _check(self, study: Study) -> None:
        """Raise DesignError where the study names what is not declared, or cannot tell anything."""
        names = [one.name for one in self.studies]
        if names.count(study.name) > 1:
            raise DesignError(f"study '{study.name}' is declared twice")
        if not re.fullmatch(rf"{self.paper}-[a-z0-9-]+", study.name):
            raise DesignError(
                f"study '{study.name}': its name is '{self.paper}-' and small letters, digits and hyphens"
            )
        if not study.seeds or len(set(study.seeds)) < len(study.seeds) or min(study.seeds) < 0:
            raise DesignError(f"{study.name}: seeds are different whole numbers, at least one")
        for arm in study.arms:
            if arm not in self.by_name:
                raise DesignError(f"{study.name} names the arm '{arm}', which is not declared")
        metrics = [
            study.metric,
            *(one.metric for one in study.must_beat),
            *(study.sweep.metrics if study.sweep else ()),
        ]
        for metric in metrics:
            if metric not in self.metrics:
                raise DesignError(f"{study.name} names the metric '{metric}', which is not declared")
        for one in study.must_beat:
            if bool(one.baseline_metric) == bool(one.baseline_arm):
                raise DesignError(f"{study.name}: '{one.arm}' must beat one baseline, a metric or an arm")
            if one.baseline_metric and one.baseline_metric not in {*self.metrics, *self.baselines}:
                raise DesignError(f"{study.name} names the baseline '{one.baseline_metric}', which is not declared")
            if not self.metrics[one.metric].better:
                raise DesignError(f"{study.name}: '{one.metric}' does not say which way is better")
        if not self.metrics[study.metric].judged:
            raise DesignError(f"{study.name}: '{study.metric}' is not judged, so it cannot be the primary metric")
        if not 1 <= study.primary <= len(study.contrasts):
            raise DesignError(
                f"{study.name} has {len(study.contrasts)} contrasts, of which {study.primary} are primary"
            )
        if len(set(study.contrasts)) < len(study.contrasts):
            raise DesignError(f"{study.name} names a contrast twice")
        for arm, reference in study.pairs[: study.primary]:
            if not guards_of(arm, reference, [one.arm for one in study.must_beat]):
                raise DesignError(f"{study.name}: nothing is declared that {reference} must beat in {arm}:{reference}")
        if study.sweep and study.metric not in study.sweep.metrics:
            raise DesignError(f"{study.name}: its sweep does not show '{study.metric}', on which it is judged")
        by_flags: dict[tuple[str, ...], str] = {}
        for arm in study.arms:
            other = by_flags.setdefault(tuple(shlex.split(self.by_name[arm].flags)), arm)
            if other != arm:
                raise DesignError(f"{study.name}: the arms '{other}' and '{arm}' have the same flags")
        words = {word for arm in study.arms for word in self.by_name[arm].flags.split()}
        for argument in (study.sweep.argument, *study.sweep.moving) if study.sweep else ():
            if argument and f"--{argument.replace('_', '-')}" not in words:
                raise DesignError(f"{study.name} sweeps '{argument}', which no flag of its arms sets")

    def study(self, name: str) -> Study:
        """The study of this name. Raises DesignError."""
        for study in self.studies:
            if study.name == name:
                return study
        raise DesignError(f"{self.paper} has no study '{name}': it has {', '.join(one.name for one in self.studies)}")

    def arm(self, name: str) -> Arm:
        """The arm of this name, teachers included. Raises DesignError."""
        if name not in self.by_name:
            raise DesignError(f"{self.paper} has no arm '{name}'")
        return self.by_name[name]

    def teacher_names(self) -> set[str]:
        return {arm.name for arm in self.teachers}


def _text(study: Study, contrast: str | Arm) -> str:
    """A contrast as "arm:reference"."""
    text = contrast if isinstance(contrast, str) else f"{contrast.name}:{contrast.against}"
    arm, _, reference = text.partition(":")
    if not arm or not reference or ":" in reference:
        raise DesignError(f"{study.name}: the contrast '{text}' needs an arm and a reference, arm:reference")
    return text


def _robustness(design: Design) -> Study:
    """The primary contrasts of all plan studies, then the same at other rates, then their baselines as contrasts."""
    assert design.robustness
    plan = [study for study in design.studies if not study.extra]
    primary = list(dict.fromkeys(pair for study in plan for pair in study.pairs[: study.primary]))
    guards = design.robustness.must_beat
    if guards is None:
        guards = list(dict.fromkeys(one for study in plan for one in study.primary_guards))
    baselines = [pair for one in guards if one.baseline_arm and (pair := (one.arm, one.baseline_arm)) not in primary]

    def at(rate: str, name: str) -> str:
        return f"{name}@{rate}" if rate and name else name

    rates = ["", *RATES]
    contrasts = [f"{at(rate, arm)}:{at(rate, reference)}" for rate in rates for arm, reference in primary]
    contrasts += [f"{at(rate, arm)}:{at(rate, reference)}" for rate in rates for arm, reference in baselines]
    beaten = [
        replace(one, arm=at(rate, one.arm), baseline_arm=at(rate, one.baseline_arm)) for rate in rates for one in guards
    ]
    first = plan[0]
    return Study(
        f"{design.paper}-robustness", ROBUSTNESS, contrasts, first.metric, len(primary), beaten, first.margin,
        design.robustness.published, seeds=design.robustness.seeds, extra=True, sweep=Sweep(design.robustness.metrics),
    )  # fmt: skip


def load(paper: str, scale: str, settings: Settings | None = None) -> Design:
    """The design of `paper` at `scale`. Raises DesignError, in one sentence that names the file."""
    if scale not in SCALES:
        raise DesignError(f"SCALE: there is no '{scale}', but {', '.join(SCALES)}")
    try:
        return importlib.import_module(f"{paper}.studies").design(scale, settings or Settings())
    except SettingError:
        raise
    except DesignError as error:
        raise DesignError(f"{paper}/studies.py: {error}") from None
    except Exception as error:  # a broken table may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name in (paper, f"{paper}.studies"):
            raise DesignError(f"PAPERS: there is no paper '{paper}'") from None
        frames = [one for one in traceback.extract_tb(error.__traceback__) if one.filename.endswith("studies.py")]
        line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else "?"
        raise DesignError(f"{paper}/studies.py, line {line}: {type(error).__name__}: {error}") from None
