"""NIfTI files to a store."""
