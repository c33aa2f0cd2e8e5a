"""Classes that declare the experimental design of a paper: arms, contrasts, studies and metrics.

<paper>/studies.py defines `design(scale, settings)`, which returns a Design. make's rules, plot.py, the HTML page,
`make cost` and the tests read it. Needs only the standard library, because make reads it before .venv exists.
"""

import importlib
import re
import shlex
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from common.cli import SCALES
from common.study.names import in_setting, setting_of, without_setting

RATES = {"third": "--lr-factor 0.333", "triple": "--lr-factor 3"}  # setting of an arm -> flags
# At demo scale seeds 0-9 were seen while the recipes were designed, and 100-102 are pilots.
FIRST_SEED = {"demo": 10, "gpu": 0, "paper": 0}
MAX_SEEDS = {"demo": 10, "gpu": 5, "paper": 5}
FINDINGS = ("no difference", "worse", "better", "higher", "lower")  # verdicts that count as a finding
ROBUSTNESS = "Do the primary contrasts hold at a third and at three times the learning rate?"


class DesignError(ValueError):
    """The design is invalid. The message is one sentence for the user."""


class SettingError(DesignError):
    """The variable PAIRS or TASKS is invalid, not the design."""


@dataclass(frozen=True)
class Settings:
    """User settings of a design: make's PAIRS and TASKS. `own_data`: EXTRA or DATA selects another data set."""

    pairs: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    own_data: bool = False


@dataclass(frozen=True)
class Metric:
    """A number in metrics.json: label, unit, decimal places, and which direction is `better` ("higher", "lower" or "").

    `judged` is False if the metric gets no verdict (for example the training loss of arms with different losses).
    """

    label: str
    unit: str = ""
    digits: int = 1
    better: str = ""
    judged: bool = True

    @property
    def title(self) -> str:
        """Label and unit, the title of a panel."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


@dataclass(frozen=True)
class Arm:
    """One configuration (set of flags) of train.py. `reference` is the arm that it is compared with in a study.

    `needs` is the teacher whose weights it loads. `data` is the file under DATA that its runs need, if not that of the
    design. `name` may end in "@setting" (a task, a data set or a pair of networks).
    """

    name: str
    flags: str = ""
    reference: str = ""
    needs: str = ""
    data: str = ""


@dataclass(frozen=True)
class MustBeat:
    """Baseline that `arm` must beat in `metric`. Otherwise contrasts with it are uninformative (`required_baselines`).

    The baseline is another metric of the same arm (`baseline_metric`) or the same metric of `baseline_arm`.
    `name` is its label on the page.
    """

    arm: str
    name: str
    metric: str
    baseline_metric: str = ""
    baseline_arm: str = ""


@dataclass(frozen=True)
class Sweep:
    """Options of a study that sweeps one argument of train.py. `metrics` are plotted, `label` is the x-axis label.

    `covarying` lists arguments that change together with `argument`. Without `argument` it is the robustness study.
    """

    metrics: Sequence[str]
    argument: str = ""
    label: str = ""
    covarying: Sequence[str] = ()


@dataclass(frozen=True)
class Study:
    """A study: one research question, its contrasts and metric. Its name is a make target.

    A contrast is "arm:reference", or an Arm that is declared here and names its reference. The verdict comes from the
    first `primary` contrasts on `metric`. The verdict "no difference" requires an interval within ± `margin`, in the
    unit of the metric. The margin is declared before any run. The same contrasts are also reported on `second_metric`,
    next to the verdict.

    The arms of primary contrasts and their baselines run `n` seeds, all other arms the first `n_other` of these (at
    most MAX_SEEDS of the scale). `seeds` are filled in by the Design. `extra`: not one of the main studies; `make all`
    does not run it. `published`: the paper's result, shown on the page. `sweep`: see Sweep.

    `expected` maps each primary arm to the verdict that it should get: that of a published effect, or "no difference"
    for equal arms (A/A). Such a study is a calibration and needs no baseline.
    """

    name: str
    question: str
    contrasts: Sequence[str | Arm]
    metric: str
    primary: int = 1
    must_beat: Sequence[MustBeat] = ()
    margin: float | None = None
    published: str = "none published"
    n: int = 10
    n_other: int = 5
    seeds: tuple[int, ...] = ()
    extra: bool = False
    sweep: Sweep | None = None
    expected: Mapping[str, str] = field(default_factory=dict)
    second_metric: str = ""

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(arm, reference) of every contrast."""
        names = [c if isinstance(c, str) else f"{c.name}:{c.reference}" for c in self.contrasts]
        return [(arm, reference) for arm, _, reference in (name.partition(":") for name in names)]

    @property
    def arms(self) -> list[str]:
        """All arms that the study runs: references first, then the other arms as declared, then baselines."""
        references = [reference for _, reference in self.pairs]
        arms = [arm for arm, _ in self.pairs]
        baselines = [arm for item in self.must_beat for arm in (item.arm, item.baseline_arm) if arm]
        return list(dict.fromkeys(references + arms + baselines))

    @property
    def primary_only(self) -> "Study":
        """A copy of the study with only its primary contrasts and the baselines that they require."""
        contrasts = self.contrasts[: self.primary]
        return replace(self, contrasts=contrasts, must_beat=self.primary_baselines)

    @property
    def primary_baselines(self) -> list[MustBeat]:
        """The baselines that the primary contrasts require."""
        tested = [(item.arm, item.baseline_arm) for item in self.must_beat]
        indices = {index for pair in self.pairs[: self.primary] for index in required_baselines(*pair, tested)}
        return [self.must_beat[index] for index in sorted(indices)]

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """Return the seeds of an arm: all if a primary contrast or its baseline needs the arm."""
        return self.seeds if arm in self.primary_only.arms else self.seeds[: self.n_other]

    @property
    def group(self) -> str:
        """The make target that includes the study: "all", "calibration", "robustness", "curves", or "" for others."""
        if self.expected:
            return "calibration"
        if not self.extra:
            return "all"
        if not self.sweep:
            return ""
        return "curves" if self.sweep.argument else "robustness"


def required_baselines(arm: str, reference: str, tested: Sequence[tuple[str, str]]) -> list[int]:
    """Return the indices of the baselines that arm:reference requires: a failure makes the contrast uninformative.

    `tested` lists for each baseline the arm that must beat it, and the baseline's own arm or "". Required are the
    baselines of the reference, else those of the arm. A contrast with a baseline arm requires none.
    """
    required = [index for index, (name, _) in enumerate(tested) if name == reference]
    if required or reference in [baseline for _, baseline in tested]:
        return required
    return [index for index, (name, _) in enumerate(tested) if name == arm]


@dataclass(frozen=True)
class Robustness:
    """Options of a paper's robustness study: the plotted metrics, and what the paper published.

    `fixed` lists baseline arms that the learning rate does not affect: they run once.
    """

    metrics: Sequence[str]
    published: str = "none published"
    fixed: Sequence[str] = ()


@dataclass
class Design:
    """All arms and studies of a paper at one scale. Raises DesignError if a name is undeclared or declared twice.

    `paper` is the folder. `data` is the file under DATA that the runs need ("" for none). `arms` lists arms that no
    study declares. `baselines` lists metrics that serve only as baselines and appear in no table. `chance` has the
    value that a diverged run gets, by metric and data set ("": any other data set). `base` is the arm that the A/A
    study runs a second time. After construction every contrast is a string "arm:reference", and every study has seeds.
    """

    paper: str
    title: str
    scale: str
    metrics: Mapping[str, Metric]
    studies: Sequence[Study]
    arms: Sequence[Arm] = ()
    teachers: Sequence[Arm] = ()
    data: str = ""
    baselines: Sequence[str] = ()
    chance: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    robustness: Robustness | None = None
    base: str = "base"
    by_name: dict[str, Arm] = field(init=False)

    def __post_init__(self) -> None:
        arms = [*self.arms, *self.teachers]
        arms += [arm for study in self.studies for arm in study.contrasts if isinstance(arm, Arm)]
        self.studies = [
            replace(study, contrasts=[_contrast_name(study, contrast) for contrast in study.contrasts])
            for study in self.studies
        ]
        arms += self._add_base_again(arms)
        arms += self._add_robustness(arms)
        self.studies = [self._with_seeds(study) for study in self.studies]
        self._check_arms(arms)
        self.by_name = {arm.name: arm for arm in arms}
        for study in self.studies:
            self._check_study(study)

    def _add_base_again(self, arms: Sequence[Arm]) -> list[Arm]:
        """Add the A/A study and return its arm; add nothing if no main study has the arm `base`."""
        base = next((arm for arm in arms if arm.name == self.base), None)
        main_studies = [study for study in self.studies if not study.extra]
        if base is None or not any(base.name in study.arms for study in main_studies):
            return []
        arm, study = _base_again(self.paper, base, main_studies[0])
        self.studies = [*self.studies, study]
        return [arm]

    def _add_robustness(self, arms: Sequence[Arm]) -> list[Arm]:
        """Add the robustness studies after the main studies. Return the arms at the other learning rates."""
        if not self.robustness:
            return []
        main_studies = [study for study in self.studies if not study.extra]
        robustness = _robustness(self.paper, main_studies, self.robustness)
        extras = [study for study in self.studies if study.extra]
        self.studies = [*main_studies, *robustness, *extras]
        used = {arm for study in robustness for arm in study.arms}
        return [
            replace(arm, name=in_setting(arm.name, rate), flags=f"{arm.flags} {flags}".strip())
            for rate, flags in RATES.items()
            for arm in arms
            if arm.name in used and arm.name not in self.robustness.fixed
        ]

    def _with_seeds(self, study: Study) -> Study:
        """Return the study with the seeds of the scale, unless it declares its own."""
        first, n = FIRST_SEED[self.scale], min(study.n, MAX_SEEDS[self.scale])
        return study if study.seeds else replace(study, seeds=tuple(range(first, first + n)))

    def _check_arms(self, arms: Sequence[Arm]) -> None:
        """Raise DesignError if the name of an arm is invalid or declared twice, or if its teacher is not declared."""
        names = [arm.name for arm in arms]
        for arm in arms:
            if not re.fullmatch(r"[\w+-][\w.+-]*(@[\w.+-]+)*", arm.name):
                raise DesignError(
                    f"invalid arm name '{arm.name}': use letters, digits and ._+-, optionally followed by @SETTING"
                )
            if names.count(arm.name) > 1:
                raise DesignError(f"arm '{arm.name}' is declared twice")
            if arm.needs and arm.needs not in self.teacher_names():
                raise DesignError(f"arm '{arm.name}' needs the undeclared teacher '{arm.needs}'")

    def _check_study(self, study: Study) -> None:
        """Raise DesignError if the study uses an undeclared name, or if its verdict could never be informative."""
        names = [other.name for other in self.studies]
        if names.count(study.name) > 1:
            raise DesignError(f"study '{study.name}' is declared twice")
        if not re.fullmatch(rf"{self.paper}-[a-z0-9-]+", study.name):
            raise DesignError(
                f"invalid study name '{study.name}': start with '{self.paper}-', then lower-case letters, digits and -"
            )
        if not study.seeds or len(set(study.seeds)) < len(study.seeds) or min(study.seeds) < 0:
            raise DesignError(f"{study.name}: give at least one seed; seeds are distinct non-negative integers")
        for arm in study.arms:
            if arm not in self.by_name:
                raise DesignError(f"{study.name}: arm '{arm}' is not declared: add it to the Design's arms")
        primary_arms = sorted(arm for arm, _ in study.pairs[: study.primary])
        if study.expected and sorted(study.expected) != primary_arms:
            raise DesignError(f"{study.name}: expected must name the arms of the primary contrasts, each once")
        for word in study.expected.values():
            if word not in FINDINGS:
                raise DesignError(f"{study.name}: invalid expected '{word}': give one of {', '.join(FINDINGS)}")
        self._check_metrics(study)
        self._check_contrasts(study)
        self._check_flags(study)

    def _check_metrics(self, study: Study) -> None:
        for name, declared in self.metrics.items():
            if declared.better not in ("higher", "lower", ""):
                raise DesignError(f"metric '{name}': set better to 'higher', 'lower' or ''")
        metrics = [study.metric, *self.chance] + [item.metric for item in study.must_beat]
        metrics += [study.second_metric] if study.second_metric else []
        if study.sweep:
            metrics += study.sweep.metrics
        for metric in metrics:
            if metric not in self.metrics:
                raise DesignError(f"{study.name}: metric '{metric}' is not declared: add it to METRICS")
        for item in study.must_beat:
            if bool(item.baseline_metric) == bool(item.baseline_arm):
                raise DesignError(
                    f"{study.name}: baseline of '{item.arm}': give exactly one of baseline_metric and baseline_arm"
                )
            if item.baseline_metric and item.baseline_metric not in {*self.metrics, *self.baselines}:
                baseline = f"baseline metric '{item.baseline_metric}'"
                raise DesignError(f"{study.name}: {baseline} is not declared: add it to the Design's baselines")
            if not self.metrics[item.metric].better:
                raise DesignError(f"{study.name}: metric '{item.metric}' must declare better='higher' or 'lower'")
        if not self.metrics[study.metric].judged:
            raise DesignError(f"{study.name}: its primary metric '{study.metric}' has judged=False")
        if study.sweep and study.metric not in study.sweep.metrics:
            raise DesignError(f"{study.name}: add its primary metric '{study.metric}' to the metrics of its sweep")

    def _check_contrasts(self, study: Study) -> None:
        count = len(study.contrasts)
        if not 1 <= study.primary <= count:
            raise DesignError(
                f"{study.name}: primary={study.primary}, but there are {count} contrasts: give 1 to {count}"
            )
        if len(set(study.contrasts)) < count:
            raise DesignError(f"{study.name} declares a contrast twice")
        for arm, reference in study.pairs[: study.primary]:
            tested = [(item.arm, item.baseline_arm) for item in study.must_beat]
            if not study.expected and not required_baselines(arm, reference, tested):
                raise DesignError(
                    f"{study.name}: primary contrast {arm}:{reference} has no baseline: "
                    f"add MustBeat({reference!r}, ...) to must_beat"
                )

    def _check_flags(self, study: Study) -> None:
        by_flags: dict[tuple[str, ...], str] = {}
        for arm in study.arms:
            other = by_flags.setdefault(tuple(shlex.split(self.by_name[arm].flags)), arm)
            if other != arm:
                raise DesignError(f"{study.name}: the arms '{other}' and '{arm}' have the same flags")
        flags = {word for arm in study.arms for word in self.by_name[arm].flags.split()}
        for argument in (study.sweep.argument, *study.sweep.covarying) if study.sweep else ():
            flag = f"--{argument.replace('_', '-')}"
            if argument and flag not in flags:
                raise DesignError(f"{study.name}: no arm has {flag}: add it to the flags")

    def study(self, name: str) -> Study:
        """Return the study with this name. Raises DesignError if it is not declared."""
        for study in self.studies:
            if study.name == name:
                return study
        names = ", ".join(study.name for study in self.studies)
        raise DesignError(f"{self.paper} has no study '{name}': give one of {names}")

    def arm(self, name: str) -> Arm:
        """Return the arm or teacher with this name. Raises DesignError if it is not declared."""
        if name not in self.by_name:
            raise DesignError(f"{self.paper} has no arm '{name}': run make for a list")
        return self.by_name[name]

    def teacher_names(self) -> set[str]:
        """Return the names of all teachers."""
        return {arm.name for arm in self.teachers}


def _contrast_name(study: Study, contrast: str | Arm) -> str:
    """Return a contrast as "arm:reference"."""
    name = contrast if isinstance(contrast, str) else f"{contrast.name}:{contrast.reference}"
    arm, _, reference = name.partition(":")
    if not arm or not reference or ":" in reference:
        raise DesignError(f"{study.name}: invalid contrast '{name}': write arm:reference")
    return name


def _base_again(paper: str, base: Arm, main_study: Study) -> tuple[Arm, Study]:
    """Return the arm `base-again` and its A/A study, with metric and margin of a main study.

    The arm equals `base`, with other initial weights and order on the same data. It needs no baseline: a false
    difference counts, whatever the arms have learned.
    """
    name = in_setting(f"{without_setting(base.name)}-again", setting_of(base.name))
    arm = replace(base, name=name, flags=f"{base.flags} --seed-offset 1000".strip())
    study = Study(
        name=f"{paper}-base-again",
        question="A/A test: does the analysis report a difference between two equal arms?",
        contrasts=[f"{arm.name}:{base.name}"],
        metric=main_study.metric,
        margin=main_study.margin,
        published="no difference, since the arms are equal",
        extra=True,
        expected={arm.name: "no difference"},
    )
    return arm, study


def _robustness(paper: str, main_studies: Sequence[Study], robustness: Robustness) -> list[Study]:
    """Return the robustness studies: the primary contrasts of the main studies at three learning rates.

    There is one study for each primary metric. The first one has the shortest name.
    """
    studies: list[Study] = []
    for metric in dict.fromkeys(study.metric for study in main_studies):
        name = "-".join([paper, "robustness", *([metric.replace("_", "-")] if studies else [])])
        same_metric = [study for study in main_studies if study.metric == metric]
        studies.append(_robustness_on(name, same_metric, robustness))
    return studies


def _robustness_on(name: str, main_studies: Sequence[Study], robustness: Robustness) -> Study:
    """Return the robustness study of main studies with the same metric.

    Contrasts of arms with their baseline arms follow the primary ones, at the same rates.
    """
    primary = list(dict.fromkeys(pair for study in main_studies for pair in study.pairs[: study.primary]))
    must_beat = list(dict.fromkeys(item for study in main_studies for item in study.primary_baselines))
    baselines = [(item.arm, item.baseline_arm) for item in must_beat if item.baseline_arm]
    baselines = [pair for pair in baselines if pair not in primary]

    def at(rate: str, name: str) -> str:
        return in_setting(name, rate) if name and name not in robustness.fixed else name

    rates = ["", *RATES]
    contrasts = [f"{at(rate, arm)}:{at(rate, reference)}" for rate in rates for arm, reference in primary]
    contrasts += [f"{at(rate, arm)}:{at(rate, reference)}" for rate in rates for arm, reference in baselines]
    return Study(
        name=name,
        question=ROBUSTNESS,
        contrasts=contrasts,
        metric=main_studies[0].metric,
        primary=len(primary),
        must_beat=[
            replace(item, arm=at(rate, item.arm), baseline_arm=at(rate, item.baseline_arm))
            for rate in rates
            for item in must_beat
        ],
        margin=main_studies[0].margin,
        published=robustness.published,
        n=5,
        extra=True,
        sweep=Sweep(robustness.metrics),
    )


def load(paper: str, scale: str, settings: Settings | None = None) -> Design:
    """Load the design of `paper` at `scale`. Raises DesignError with one sentence that names file and line."""
    if scale not in SCALES:
        raise DesignError(f"invalid SCALE={scale}: give {', '.join(SCALES[:-1])} or {SCALES[-1]}")
    try:
        return importlib.import_module(f"{paper}.studies").design(scale, settings or Settings())
    except SettingError:
        raise
    except DesignError as error:
        raise DesignError(f"{paper}/studies.py: {error}") from None
    except Exception as error:  # code in studies.py may raise any exception
        if isinstance(error, ModuleNotFoundError) and error.name in (paper, f"{paper}.studies"):
            raise DesignError(f"invalid PAPERS: no paper '{paper}' (no {paper}/studies.py)") from None
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename.endswith("studies.py")]
        if isinstance(error, SyntaxError):
            lines.append(error.lineno)
        line = lines[-1] if lines else "?"
        raise DesignError(f"{paper}/studies.py, line {line}: {type(error).__name__}: {error}") from None
