"""From NIfTI files to a store that networks are trained on.

In: folders of `.nii` and `.nii.gz` files, labels beside them or in a folder of their own, or the releases of known
data sets. Out: a store, that is a folder with `dataset.json` and, per case, the image (C, X, Y, Z), the label
(X, Y, Z) and the record of how to go back to the file's grid.

Begin reading at `case.preprocess_case`: what happens to one case. Which files are a case: `find_cases.collect`, or
`sources.collect_sources` for known data sets. A folder of cases: `write_store.write_store`. Options: `__main__`.
"""
