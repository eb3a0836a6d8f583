"""The study: what a composite costs in quality per byte written, by replaying every strategy along one training run.

A run is trained once and stored in full at every commit. Every contender, a strategy with its settings, is then led
along it: the full state of each commit is loaded and committed to the contender's own store under its mask, so that
masks, measures and bytes are real ones. At some commits the composite is restored, its held-out loss is compared with
that of the full checkpoint, and both are trained on with the same batches.
"""
