"""From runs to statements: the experimental design, make's rules, statistics, figures, tables and the page.

design.py says what a study is, rules.py what make runs, cost.py how long it takes; results.py reads the runs,
analysis.py makes the verdicts, figures.py and sweeps.py draw, tables.py and page.py write, publish.py keeps.
"""

import sys

if sys.hexversion < 0x030B0000:  # here, before a module is compiled whose syntax an older Python does not know
    print("error: Python " + sys.version.split()[0] + " is older than 3.11: install a newer one, or make PYTHON=...")
    sys.exit(2)
