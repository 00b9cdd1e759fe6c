"""What names a patient and what does not, in every spelling; and which file names may be written."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medaug.intake.identity import dates_in, is_counting_name, may_write_name, names_patient, patient_of, reveals


@pytest.mark.parametrize(
    ("label", "secret"),
    [
        ("Mueller Joerg 1", "Müller^Jörg"),
        ("Muller Jorg", "Müller^Jörg"),
        ("Müller, Jörg", "MUELLER^JOERG"),
        ("Mu\u0308ller Jo\u0308rg", "Müller^Jörg"),
        ("strasse maria", "Straße^Maria"),
        ("ZEPHYRINE QUORRA", "ZEPHYRINE^QUORRA"),
        ("QuorraZephyrine", "ZEPHYRINE^QUORRA"),
        ("Wójcik Zofia", "WOJCIK^ZOFIA"),
        ("17.01.1940", "19400117"),
        ("1940-1-17", "19400117"),
        ("01/17/1940", "19400117"),
        ("17 January 1940", "19400117"),
        ("17.1.40", "19400117"),
        ("170140", "19400117"),
        ("19400117", "1940-01-17"),
        ("MRN-471", "MRN-471"),
        ("case 004711", "4711"),
    ],
)
def test_a_class_name_that_names_a_patient(label: str, secret: str) -> None:
    assert names_patient(label, secret) and reveals(label, secret)


@pytest.mark.parametrize(
    ("label", "secret"),
    [
        ("grade2", "ZEPH^Q2"),
        ("2", "P-2"),
        ("1", "1"),
        ("covid", "COVID^PATIENT"),
        ("1940", "19400117"),
        ("grade 17", "19400117"),
        ("94711", "4711"),
        ("normal", ""),
        ("unknown", "unknown"),
    ],
)
def test_a_class_name_that_does_not(label: str, secret: str) -> None:
    assert not names_patient(label, secret)


@given(st.dates(min_value=__import__("datetime").date(1900, 1, 1)))
def test_every_date_is_found_as_people_write_it(date) -> None:
    wanted = (date.year, date.month, date.day)
    for form in ("%Y%m%d", "%d.%m.%Y", "%Y-%m-%d", "%d%m%Y", "%d %B %Y", "%B %d %Y"):
        assert wanted in set(dates_in(f"grade {date.strftime(form)} a")), form


@pytest.mark.parametrize("name", ["img_0001.png", "0001.png", "7.jpg", "slice_12.nii.gz", "grade2_0003.png", "a_1.png"])
def test_names_that_count_pass(name: str) -> None:
    assert is_counting_name(name) and may_write_name(Path(name), "raster", (), keep=False)


@pytest.mark.parametrize(
    "name", ["ZEPHYRINE_1.png", "1943-12-17.png", "171243.png", "4711023.png", "scan.png", "Q_1.png", "dead1beef.png", "1\n.png"]
)
def test_names_that_may_identify_do_not(name: str) -> None:
    assert not may_write_name(Path(name), "raster", (), keep=False)


@pytest.mark.parametrize(
    ("name", "kind", "secrets", "allowed"),
    [
        ("scan.png", "raster", (), True),
        ("mueller_1.png", "raster", ("Müller^Jörg",), False),
        ("19431217.png", "raster", ("19431217",), False),
        ("QUORRA.dcm", "raster", (), False),  # a DICOM name is not believed, whatever the content
        ("QUORRA", "dicom", (), False),
        ("IM170014.dcm", "dicom", (), True),
        ("IM170014.dcm", "dicom", ("170014",), False),
    ],
)
def test_names_that_the_user_vouches_for(name: str, kind: str, secrets: tuple[str, ...], allowed: bool) -> None:
    assert may_write_name(Path(name), kind, secrets, keep=True) is allowed


def test_a_patient_without_identifier_is_name_and_birth_date() -> None:
    assert patient_of("MRN-1", "A^B", "19400117") == "MRN-1"
    assert patient_of("", "A^B", "19400117") == patient_of("0", "A B", "19400117") == "A B 19400117"
    assert patient_of("", "A^B", "") == patient_of("", "anonymous", "19400117") == patient_of("", "", "19400117") == ""


def test_a_grade_is_not_the_study_of_that_number() -> None:
    assert not names_patient("3", "0003")
    assert not names_patient("grade 3", "0003")
    assert names_patient("0003", "0003")
    assert names_patient("47119", "00047119")
