"""What both training scripts need around their loops.

In: the options of a script. Out: the folder of a run: config.json, metrics.jsonl, checkpoints.

Begin with the loop, in train_pretrain.py or train_finetune.py at the root; it calls `optim` (optimizer, learning rate),
`progress` (what is logged, and what happens to a loss that is not finite), `stopping` (signals, when to save) and
`run_folder` (what lies on disk, how a run continues). `options` are those that the scripts share, `presets` the
published values, `checks` what is refused before any work, `validation` and `panels` what is looked at meanwhile,
`verdict` what is said at the end, `earlier` what older runs did, `benchmark` the timing.
"""
