"""A fine-tuned run in, its Dice out: predictions of the test cases, scores per case, tables over folds.

In: a folder of train_finetune.py and the store of its cases. Out, written by evaluate.py: predictions and results.json
in every fold, summary.json, summary.md, cases.csv and report.html in the run.

Begin with `folds` (which checkpoint is tested on which cases), then `predictions` (what is compared on which grid),
`measure` (the cases of a fold), `scores` (means over cases and folds, comparison of two runs), `tables` (their
Markdown), `report` and `case_pictures` (the page of HTML) and `outputs` (what is written). `folder_scores` is for
predictions made elsewhere. The scores of one case are in `amaes.metrics`. `leakage` looks for test cases that
pretraining has seen.
"""
