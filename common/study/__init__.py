"""Experimental designs, generated make rules, and the analysis of finished runs.

| step | module |
| --- | --- |
| declare arms, contrasts and studies | design.py, names.py (ARM@SETTING) |
| check make's variables, write the rules for runs | request.py, rules.py (`run_rules`) |
| choose a GPU, estimate the cost | slots.py, cost.py |
| read the runs | results.py |
| intervals and verdicts | statistics.py (`verdict`), analysis.py (`verdict_with_baselines`), sweeps.py (robustness) |
| figures | plotting.py (calls `draw` of a paper's plot.py or of sweeps.py), figures.py |
| tables and HTML page | tables.py, page.py |
| copy to results/ | publish.py |

ConMIM's plot.py may replace the verdict of a study.
"""

import sys

if sys.hexversion < 0x030B0000:  # checked before any module is compiled whose syntax an older Python rejects
    print("error: Python " + sys.version.split()[0] + " is older than 3.11: install a newer one, or make PYTHON=...")
    sys.exit(2)
