"""The microbenchmark suite: every backend beside what a user would pick instead, on the same work.

`python -m bench --help`. A cell (cells.py) is one operator, block, model or training step at one
shape, batch, dtype and mode; plan.py says which a run takes. It becomes work (work.py, and one file
per stem), every contender (contenders.py with calls.py, runtimes.py and convnext.py) is checked
against float64 (verify.py) before it is timed (timing.py),
and the record goes to a results folder (store.py), from which tables, plots and the README's
figures are made (report.py, plots.py, readme.py).
"""
