"""Synthetic heads: brain-like MRI with lesions, drawn from seeded parameters, for the demo, the tests and a first run.

In: a seed and the number of a subject. Out: a scan with its label map (`phantom`), NIfTI files (`write_phantoms`,
`python -m amaes.phantom`) or a store (`make_demo_data`). The scans of a subject share the anatomy, not the grid.

    tables.py   tissues, their signal, scanners
    head.py     the anatomy: signed distances in millimetres
    scan.py     a scan of it: grid, tissues, signal, noise      begin here
    write.py    files and stores

The heads are drawings, not simulations: good for seeing whether the whole chain works, not for judging a method.
"""

from typing import TYPE_CHECKING

from amaes.lazy import exports

if TYPE_CHECKING:
    from amaes.phantom.scan import Phantom, phantom
    from amaes.phantom.tables import LABELS, SCANNERS, SIGNAL, TISSUES, Scanner
    from amaes.phantom.write import make_demo_data, write_phantoms

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "scan": ("Phantom", "phantom"),
        "tables": ("LABELS", "SCANNERS", "SIGNAL", "TISSUES", "Scanner"),
        "write": ("make_demo_data", "write_phantoms"),
    },
)
