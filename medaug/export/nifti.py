"""NIfTI-1 files of synthetic images: one slice each, uncompressed, facts as a comment extension."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
from nibabel.nifti1 import Nifti1Extension

from medaug.export.facts import MARK, ImageFacts
from medaug.io import limits

COMMENT = 6  # extension code of plain text, https://nifti.nimh.nih.gov/nifti-1/documentation/faq
_RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])


def encode_nifti(stored: np.ndarray, facts: ImageFacts) -> bytes:
    """The bytes of one ``.nii`` file of shape (columns, rows, 1).

    With known geometry the affine is the source's, qform and sform code 1 (scanner). Without it both codes are 0 and
    the rows are stored from the bottom up, the way viewers show an image that has no orientation. The units are mm
    only if the spacing is known.

    Args:
        stored: (N, N) uint8 or uint16, or (N, N, 3) uint8.
        facts: `hounsfield` becomes scl_slope and scl_inter.
    """
    affine = facts.geometry.affine()
    turned = np.swapaxes(stored if affine is not None else stored[::-1], 0, 1)
    data = np.ascontiguousarray(turned)
    data = data.view(_RGB)[..., 0] if stored.ndim == 3 else data
    image = nib.Nifti1Image(np.asarray(data)[..., None], affine)
    header = image.header
    header.set_data_dtype(data.dtype)
    if affine is not None:
        image.set_sform(affine, code=1)
        image.set_qform(affine, code=1, strip_shears=True)
        header.set_xyzt_units("mm")
    elif facts.geometry.spacing_mm is not None:
        rows, columns = facts.geometry.spacing_mm
        header.set_zooms((columns, rows, facts.geometry.slice_spacing_mm or facts.geometry.thickness_mm or 1.0))
        header.set_xyzt_units("mm")
    header["descrip"] = MARK.encode()
    header["cal_min"], header["cal_max"] = (0, 0) if facts.hounsfield is None else facts.hounsfield
    text = json.dumps(facts.to_json(), sort_keys=True, ensure_ascii=False)
    header.extensions.append(Nifti1Extension(COMMENT, text.encode()))
    if facts.hounsfield is not None:
        lower, upper = facts.hounsfield
        header.set_slope_inter((upper - lower) / np.iinfo(stored.dtype).max, lower)
    return bytes(image.to_bytes())


def says_synthetic(data: bytes) -> bool:
    """True if a NIfTI file still says in its header that it is synthetic."""
    with limits.decoding("NIfTI"):
        header = nib.Nifti1Header(data[:348], check=False)
        return bytes(header["descrip"].item()).rstrip(b"\0") == MARK.encode()
