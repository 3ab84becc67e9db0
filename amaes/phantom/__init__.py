"""Synthetic heads: brain-like MRI with lesions, drawn from seeded parameters, for the demo, the tests and a first run.

In: a seed and the number of a subject. Out: a scan with its label map (`phantom`), NIfTI files (`write_phantoms`,
`python -m amaes.phantom`) or a store (`make_demo_data`). The scans of a subject share the anatomy, not the grid.

    head.py     the anatomy: signed distances in millimetres
    scan.py     a scan of it: grid, tissues, signal, noise      begin here
    write.py    files and stores

The heads are drawings, not simulations: good for seeing whether the whole chain works, not for judging a method.
"""

from amaes.phantom.scan import LABELS, SCANNERS, SIGNAL, TISSUES, Phantom, Scanner, phantom
from amaes.phantom.write import make_demo_data, write_phantoms

__all__ = [
    "LABELS",
    "SCANNERS",
    "SIGNAL",
    "TISSUES",
    "Phantom",
    "Scanner",
    "make_demo_data",
    "phantom",
    "write_phantoms",
]
