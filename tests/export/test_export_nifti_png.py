from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from export_cohorts import WEIGHTS, accepted_cohort, placed, real_cohort
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medaug.export.export import export_cohort
from medaug.export.facts import MARK, ImageFacts
from medaug.export.nifti import encode_nifti
from medaug.io.nifti import read_nifti
from medaug.io.raster import read_unit_png


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory):
    """Grey CT with geometry, grey without, and colour: name -> (real, accepted)."""
    folder = tmp_path_factory.mktemp("cohorts")
    made = {}
    for name, options in {
        "ct": {},
        "bare": {"geometry": False, "modality": ""},
        "colour": {"channels": 3, "modality": ""},
    }.items():
        real = real_cohort(folder / name / "real", **options)
        made[name] = real, accepted_cohort(real, folder / name / "accepted")
    return made


def exported(cohorts, name, out, **options):
    """Paths of the exported images by case, with the unit image each was made from."""
    real, accepted = cohorts[name]
    export_cohort(accepted.root, out, reference_cohort=real.root, **options)
    units = {case.id: read_unit_png(accepted.path(case)).astype(np.float64) for case in accepted.training}
    paths = [path for path in sorted(out.rglob("*")) if path.stem in units]
    assert len(paths) == len(units)
    return [(path, units[path.stem]) for path in paths]


# NIfTI


@pytest.mark.parametrize("bits", [8, 16])
def test_nifti_holds_hounsfield_units_and_the_affine(cohorts, tmp_path, bits):
    for path, unit in exported(cohorts, "ct", tmp_path / "out", format="nifti", bits=bits):
        image = nib.load(path)
        header = image.header
        assert header["descrip"].item().decode() == MARK
        assert (int(header["sform_code"]), int(header["qform_code"]), header.get_xyzt_units()[0]) == (1, 1, "mm")
        half_step = 1500 / (2**bits - 1) / 2
        assert np.abs(image.get_fdata()[..., 0].T - (unit * 1500 - 1350)).max() <= half_step + 1e-3  # scl_slope is float32
        assert np.allclose(header.get_zooms(), (1.4, 1.6, 2.0))
        assert np.allclose(header.get_qform(), header.get_sform(), atol=1e-4)


def test_nifti_places_pixels_where_dicom_does(cohorts, tmp_path):
    """The centre of column c and row r by PS3.3 C.7.6.2.1.1, with x and y turned from LPS to RAS."""
    path, _ = exported(cohorts, "ct", tmp_path / "out", format="nifti")[0]
    index = int(path.stem[3])  # s<r><patient><slice><copy>
    source = placed(index)
    along_row, along_column = np.array(source["orientation"][:3]), np.array(source["orientation"][3:])
    # Pixel 3, 5 covers the source columns 6, 7 and the padded rows 10, 11, that is rows 4 and 5.
    expected = np.array(source["position_mm"]) + along_row * 0.7 * 6.5 + along_column * 0.8 * 4.5
    found = nib.load(path).affine @ [3, 5, 0, 1]
    assert np.allclose(found[:3], expected * [-1, -1, 1], atol=1e-4)


def test_nifti_without_geometry_says_so_and_stands_upright(cohorts, tmp_path):
    for path, unit in exported(cohorts, "bare", tmp_path / "out", format="nifti"):
        header = nib.load(path).header
        assert (int(header["sform_code"]), int(header["qform_code"]), header.get_xyzt_units()[0]) == (0, 0, "unknown")
        (picture,) = read_nifti(path)
        assert np.array_equal(picture.pixels, np.rint(unit * 65535))
        assert "spacing_mm" not in picture.acquisition


def test_nifti_keeps_colour(cohorts, tmp_path):
    path, unit = exported(cohorts, "colour", tmp_path / "out", format="nifti")[0]
    data = np.asarray(nib.load(path).dataobj)[..., 0]
    colours = np.stack([data[name] for name in "RGB"], axis=-1)
    assert np.array_equal(np.swapaxes(colours, 0, 1), np.rint(unit * 255))  # with geometry: rows from the top


def test_nifti_extension_holds_the_facts(cohorts, tmp_path):
    path, _ = exported(cohorts, "ct", tmp_path / "out", format="nifti")[0]
    (extension,) = nib.load(path).header.extensions
    facts = json.loads(extension.get_content())
    assert extension.get_code() == 6 and facts["synthetic"] is True and facts["notice"] == MARK
    assert facts["lineage"]["weights_sha256"] == WEIGHTS and "private_remark" not in facts["lineage"]


@given(
    lower=st.floats(-4000, 3000, allow_nan=False),
    width=st.floats(1, 6000, allow_nan=False),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=25)
def test_nifti_hounsfield_round_trip(lower, width, seed):
    stored = np.random.default_rng(seed).integers(0, 65536, (4, 6), dtype=np.uint16)
    facts = ImageFacts("s", 0, "any", {}, "SYN0", hounsfield=(lower, lower + width))
    image = nib.Nifti1Image.from_bytes(encode_nifti(stored, facts))
    expected = lower + stored / 65535 * width
    # slope and intercept are float32: up to 2^-24 of each, over the whole range
    assert np.abs(image.get_fdata()[:, ::-1, 0].T - expected).max() <= width / 65535 / 2 + (abs(lower) + width) * 2**-23


# PNG


@pytest.mark.parametrize(("name", "bits", "mode"), [("ct", 16, "I;16"), ("ct", 8, "L"), ("colour", None, "RGB")])
def test_png_holds_the_pixels_and_the_facts(cohorts, tmp_path, name, bits, mode):
    for path, unit in exported(cohorts, name, tmp_path / "out", format="png", bits=bits):
        with Image.open(path) as image:
            assert image.mode == mode
            assert np.array_equal(np.asarray(image), np.rint(unit * (65535 if mode == "I;16" else 255)))
            text = image.text
        assert text["Title"] == text["Disclaimer"] == MARK and "guided_ddpm" in text["Description"]
        facts = json.loads(text["medaug"])
        assert facts["synthetic"] is True and facts["lineage"]["seed"] == 7
        assert b"iTXt" in path.read_bytes() and b"tIME" not in path.read_bytes()


def test_png_pixel_size_is_written_only_if_known(cohorts, tmp_path):
    known = exported(cohorts, "ct", tmp_path / "known", format="png")[0][0]
    unknown = exported(cohorts, "bare", tmp_path / "unknown", format="png")[0][0]
    with Image.open(known) as image:
        assert np.allclose(image.info["dpi"], (25.4 / 1.4, 25.4 / 1.6), atol=0.1)
    with Image.open(unknown) as image:
        assert "dpi" not in image.info
