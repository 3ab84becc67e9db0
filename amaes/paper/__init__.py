"""The paper that this package rebuilds (AMAES, arXiv 2408.00640): its experiments and its numbers.

In: the names of the cases of a store, or the options and scores of a finished run. Out: the folds of an experiment, or
the run beside the published row.

    protocols.py   which cases are trained and tested on      begin here
    numbers.py     results, settings, what the paper leaves open
    compare.py     a run beside them
"""
