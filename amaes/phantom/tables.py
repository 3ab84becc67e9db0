"""What the synthetic heads are made of, and the scanners: tissues, their signal, grids. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

LABELS = {0: "background", 1: "lesion", 2: "ventricle"}
FOV = (32.0, 256.0)  # mm, smallest and largest field of view

# In the order of painting; those from fluid on lie inside the skull.
TISSUES = (
    "air",
    "skin",
    "fat",
    "muscle",
    "eye",
    "skull",
    "marrow",
    "fluid",
    "grey",
    "white",
    "deep",
    "rim",
    "ventricle",
    "choroid",
    "lesion",
)
# Relative signal of each tissue, by sequence. Lesions are bright on FLAIR and T2w, dark against white matter on T1w.
# Fat, choroid plexus and pulsating fluid come close to them, so that a threshold does not solve the task.
SIGNAL = {
    "T1w": (0, 0.42, 1.00, 0.42, 0.18, 0.08, 0.45, 0.16, 0.52, 0.76, 0.62, 0.66, 0.14, 0.40, 0.50),
    "T2w": (0, 0.38, 0.75, 0.25, 0.98, 0.06, 0.40, 0.95, 0.60, 0.42, 0.48, 0.55, 1.00, 0.75, 0.74),
    "FLAIR": (0, 0.42, 0.90, 0.35, 0.12, 0.06, 0.35, 0.12, 0.62, 0.47, 0.57, 0.68, 0.08, 0.74, 0.84),
}


@dataclass(frozen=True)
class Scanner:
    """How a head is sampled and stored."""

    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)  # voxel size along the stored axes, mm
    orientation: str = "RAS"  # where the stored axes point
    oblique: float = 0.0  # angle between the stored axes and the room's, degrees
    contrast: float = 1.0  # exponent on SIGNAL; above 1 the tissues lie further apart
    noise: float = 0.02  # standard deviation of the Rician noise; the brightest tissue is 1
    air: str = "noise"  # "noise" as reconstructed, "zero" set to 0, "stripped" everything outside the brain 0
    dtype: str = "float32"  # on disk
    full_scale: float = 1.0  # value of the brightest tissue
    slope: float = 1.0  # scl_slope of integer files
    form: str = "both"  # what carries the geometry: "sform", "qform" or "both"


SCANNERS = (
    Scanner(),
    Scanner((0.9, 0.9, 3.0), "LPS", oblique=9.0, contrast=0.95, noise=0.03, dtype="uint16", full_scale=1250),
    Scanner((1.0, 1.0, 1.2), "PSR", contrast=1.1, noise=0.025, dtype="int16", full_scale=4e3, slope=0.25, form="qform"),
    Scanner((1.2, 1.0, 1.5), "LAS", oblique=4.0, noise=0.03, air="zero", full_scale=3.1e4, form="sform"),
    Scanner((1.0, 2.0, 1.0), "RIA", oblique=12.0, contrast=0.9, dtype="uint16", full_scale=600),
    Scanner((1.0, 1.0, 1.0), "LAS", contrast=1.05, air="stripped", dtype="int16", full_scale=900, slope=2.0),
)
