"""Synthetic images out of a cohort: DICOM, NIfTI or PNG files that say what they are, and a manifest to check them by."""
