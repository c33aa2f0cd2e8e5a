"""From runs to statements: the experimental design, make's rules, statistics, figures, tables and the page.

design.py says what a study is, request.py what was asked, rules.py what make runs (`run_rules`; seed by seed in the
Makefile), slots.py on which GPU, cost.py how long it takes. results.py reads the runs. analysis.py makes the verdict
(`judge`, from the word of `verdict` in statistics.py); sweeps.py and ConMIM's plot.py may replace it. plotting.py calls
`draw` of a paper's plot.py, or of sweeps.py; figures.py has the common figures. tables.py and page.py write,
publish.py copies to results/.
"""

import sys

if sys.hexversion < 0x030B0000:  # here, before a module is compiled whose syntax an older Python does not know
    print("error: Python " + sys.version.split()[0] + " is older than 3.11: install a newer one, or make PYTHON=...")
    sys.exit(2)
