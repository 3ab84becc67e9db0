"""From a store to batches of patches.

In: the folder that `amaes.preprocess` wrote. Out: batches {"image": (B, C, X, Y, Z), "label", "epoch", "case", ...},
the same for any number of workers, ranks and restarts.

Begin with `store.Store` (the folder) and `patches.Patches` (where a patch is cut). `splits` says which cases are for
training, validation and testing, `order` which of them is read when, `loader` reads ahead. `several_stores` reads many
stores as one, `classes` joins their labels. `quality` looks at a store: statistics, outliers, contact sheets.
"""
