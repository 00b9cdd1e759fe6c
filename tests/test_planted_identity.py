"""Forty identifying strings are planted in an export; after intake not one of them is in any byte that was written or said."""

from __future__ import annotations

import gzip
import io
import logging
import zipfile
from pathlib import Path

import pydicom
import pytest
from identity_search import IdentitySearch, spellings_of_date
from PIL import Image, PngImagePlugin
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medaug.draws import numpy_generator
from medaug.intake.records import IntakeOptions

# Where -> what is planted there. Values that no file holds by accident.
ELEMENTS = {
    "PatientName": "Zwetschgenbaum^Kunigunde^Adelheid",
    "PatientID": "ZQX4711908",
    "PatientBirthDate": "19530917",
    "PatientBirthTime": "035917.417",
    "OtherPatientNames": "Schnurrpfeil^Kuni",
    "PatientBirthName": "Obertupfinger^Kunigunde",
    "PatientMotherBirthName": "Wackernagel^Theodora",
    "PatientAddress": "Quittengasse 17, 99817 Eisenach",
    "PatientTelephoneNumbers": "+49 3691 8846271",
    "PatientComments": "Tochter der Apothekerin Vogelweide",
    "Occupation": "Glockengiesserin",
    "MilitaryRank": "Obristwachtmeister",
    "AccessionNumber": "ACCV883102",
    "StudyID": "STUD90817",
    "StudyDate": "20210312",
    "SeriesDate": "20210313",
    "AcquisitionDate": "20210314",
    "ContentDate": "20210315",
    "AcquisitionDateTime": "20210316081542.123456",
    "StudyDescription": "Verlauf nach Pilzvergiftung im Stadtwald",
    "SeriesDescription": "Thorax fuer Dr Silberzahn",
    "ReferringPhysicianName": "Silberzahn^Balduin",
    "PerformingPhysicianName": "Krautwickel^Hieronymus",
    "OperatorsName": "Federspiel^Walburga",
    "NameOfPhysiciansReadingStudy": "Morgentau^Sibylle",
    "InstitutionName": "Klinikum Siebenschlaefer",
    "InstitutionAddress": "Am Froschteich 3, Buxtehude",
    "StationName": "CTKELLER77",
    "DeviceSerialNumber": "SNR5590183",
    "AdmissionID": "ADM66120934",
    "ProtocolName": "Protokoll Knusperhaeuschen",
    "ImageComments": "siehe Vorbefund Zimmer 4417B",
    "AdditionalPatientHistory": "Sturz vom Kirschbaum 1998",
    "RequestingPhysician": "Donnerkeil^Amalie",
}
PRIVATE = "Privatbefund Haselnussweg"
NESTED = "Anforderung Pfefferminz 8829"
FOLDER = "Zwetschgenbaum_K_1953"
FILE = "Kunigunde_Thorax_88Q"
TABLE_NOTE = "Nachbarin heisst Lavendel"
READER = "Chefarzt Brombeer"
DATES = ("PatientBirthDate", "StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate")
NUM_PATIENTS = 12
# The smallest job that goes all the way: it shows what is written, not what can be learnt.
TINY = {
    "network_settings#backbone_options": {"channels": [8, 8], "patch": 2},
    "batch_size": 4,
    "max_epochs": 1,
    "epoch_length": 4,
    "preview_every": 1,
    "synthetic_per_real": 1.0,
    "device_name": "cpu",
    "augment#gate_threshold": 0.0,
    "augment#seeds": 1,
    "augment#filter": {"num_steps": 4, "evaluate_every": 2, "batch_size": 8},
}


def planted() -> list[str]:
    values = [*ELEMENTS.values(), PRIVATE, NESTED, FOLDER, FILE, TABLE_NOTE, READER]
    assert len(set(values)) == 40
    words = [word for value in values for word in value.replace("^", " ").replace(",", " ").split() if len(word) >= 8]
    dates = [spelling for keyword in DATES for spelling in spellings_of_date(ELEMENTS[keyword])]
    return sorted({*values, *words, *dates, "20210316", "8846271", "4417B"})


def write_export(root: Path) -> tuple[Path, list[str]]:
    """The export and the UIDs it holds; the first patient carries all planted values, the others a number each."""
    uids, rows = [], ["PatientID,Grade,Arzt,Notiz"]
    for patient in range(NUM_PATIENTS):
        study, series = (generate_uid(entropy_srcs=[kind, str(patient)]) for kind in ("study", "series"))
        identifier = ELEMENTS["PatientID"] if patient == 0 else f"ZQX47119{patient:02d}X"
        folder = root / "DICOM" / (FOLDER if patient == 0 else f"{FOLDER}_{patient}")
        for index in range(2):
            meta = FileMetaDataset()
            meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
            meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["sop", str(patient), str(index)])
            data = FileDataset("", {}, file_meta=meta, preamble=(FILE.encode() * 10)[:128])
            data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
            for keyword, value in ELEMENTS.items():
                setattr(data, keyword, value)
            data.PatientID, data.Modality, data.SpecificCharacterSet = identifier, "CT", "ISO_IR 192"
            data.StudyInstanceUID, data.SeriesInstanceUID = study, series
            data.FrameOfReferenceUID = generate_uid(entropy_srcs=["frame", str(patient)])
            block = data.private_block(0x0009, "HAUSGEMACHT 1.0", create=True)
            block.add_new(0x01, "LO", PRIVATE)
            block.add_new(0x02, "UN", PRIVATE.encode())
            item, inner = Dataset(), Dataset()
            inner.StudyInstanceUID, inner.RequestedProcedureDescription = study, NESTED
            item.ReferencedSOPInstanceUID, item.ReferencedSOPClassUID = data.SOPInstanceUID, CTImageStorage
            item.RequestAttributesSequence = Sequence([inner])
            item.ContentDate, item.PersonName = ELEMENTS["ContentDate"], ELEMENTS["PatientName"]
            data.ReferencedImageSequence, data.RequestAttributesSequence = Sequence([item]), Sequence([inner])
            size = 64
            data.Rows = data.Columns = size
            data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, 5 * index], [1, 0, 0, 0, 1, 0]
            data.SamplesPerPixel, data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 1, 16, 12, 11, 0
            data.PhotometricInterpretation, data.RescaleSlope, data.RescaleIntercept = "MONOCHROME2", 1, -1024
            data.PixelSpacing, data.InstanceNumber = [0.7, 0.7], index + 1
            noise = numpy_generator("planted", patient, index).normal(300 + 40 * patient, 30, (size, size))
            data.PixelData = noise.clip(0, 4095).astype("<u2").tobytes()
            path = folder / (f"{FILE}_{index}" if index else f"{data.SOPInstanceUID}.dcm")
            path.parent.mkdir(parents=True, exist_ok=True)
            pydicom.dcmwrite(path, data, enforce_file_format=True)
            uids += [data.SOPInstanceUID, study, series, data.FrameOfReferenceUID]
        rows.append(f'{identifier},{patient % 2},{READER},"{TABLE_NOTE}"')
        if patient == 0:
            rows.append(f'{identifier},{patient % 2},Oberarzt Nelke,"{TABLE_NOTE}"')
    broken = root / "DICOM" / FOLDER / f"{FILE}_broken.dcm"
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["broken"])
    data.ImagePositionPatient = [0, 0, 10]
    pydicom.dcmwrite(broken, data, enforce_file_format=True)
    broken.write_bytes(broken.read_bytes()[:-900])
    rows.append(f"{ELEMENTS['AccessionNumber']},1,{READER},")
    (root / "labels.csv").write_text("\n".join(rows), encoding="utf-8")
    return root, sorted(set(uids))


def options(root: Path, out: Path, **changes: object) -> IntakeOptions:
    values = {
        "labels": root / "labels.csv",
        "key": "patient",
        "label_column": "Grade",
        "image_size": 32,
        "reader_column": "Arzt",
        "conflicts": "senior",
        "senior": READER,
    }
    return IntakeOptions(source=root, out=out, **(values | changes))  # type: ignore[arg-type]


def test_the_search_finds_what_is_hidden(tmp_path: Path) -> None:
    """The helper itself: every way of hiding is seen, and a clean folder is clean."""
    secret = "Zwetschgenbaum^Kunigunde"
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", secret, zip=True)
    picture = io.BytesIO()
    Image.new("L", (4, 4)).save(picture, "PNG", pnginfo=text)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner", secret)
    hidden = [
        secret.encode(),
        secret.upper().encode("utf-16-le"),
        gzip.compress(secret.encode()),
        picture.getvalue(),
        packed.getvalue(),
    ]
    for number, data in enumerate(hidden):
        search = IdentitySearch([secret])
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "file").write_bytes(data)
        search.folder(tmp_path / f"{number}")
        assert search.found, number
    search = IdentitySearch([secret])
    search.text("nothing here, Kunigunde")
    assert search.found == [] and search.looked_at == 1


@pytest.mark.slow
@pytest.mark.integration
def test_no_planted_string_leaves_the_house(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Intake, training, generation, gate, grading, reports, tracking and the three exports."""
    from medaug.augment import run_augment
    from medaug.export.export import export_cohort
    from medaug.stages import take_in

    root, uids = write_export(tmp_path / "in")
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    caplog.set_level(logging.DEBUG)
    logging.getLogger("matplotlib").setLevel(logging.INFO)  # pages about fonts
    tracking = {"uri": f"sqlite:///{outputs / 'mlflow.db'}", "experiment": "planted"}
    chosen = options(root, outputs / "cohort", keep_dicom=outputs / "copies", mapping=tmp_path / "private" / "mapping.csv")
    result = take_in(chosen, tracking=tracking)
    assert result.counts["used"] == 2 * NUM_PATIENTS and result.counts["patients"] == NUM_PATIENTS
    assert result.report["copies"]["files"] == 2 * NUM_PATIENTS, result.quarantine
    run_augment(
        "guided_ddpm", outputs / "cohort", outputs / "job", profile="tiny", overrides=TINY, allow_short=True, tracking=tracking
    )
    for form in ("dicom", "nifti", "png"):
        made = export_cohort(outputs / "job" / "accepted", outputs / form, format=form, reference_cohort=outputs / "cohort")
        assert made["images"] > 0
    captured = capfd.readouterr()
    search = IdentitySearch([*planted(), *uids])
    search.folder(outputs)
    for place, text in (("log", caplog.text), ("stdout", captured.out), ("stderr", captured.err), ("result", repr(result))):
        # The folder of this test is named in the log of the database's own set-up; it holds no planted string.
        search.text(text, place)
    assert search.found == []
    assert (outputs / "mlflow.db").is_file() and search.looked_at > 100
    # The planted strings were there to be found: the mapping table, which stays outside of the outputs, has some.
    assert ELEMENTS["PatientID"] in (tmp_path / "private" / "mapping.csv").read_text()
    source = IdentitySearch(planted())
    source.folder(root)
    assert {secret for _, secret in source.found} >= set(ELEMENTS.values()) - set(spellings_of_date("x" * 8))


def test_copies_are_images_of_the_same_pixels_with_new_identities(tmp_path: Path) -> None:
    from medaug.intake.build import run_intake

    root, uids = write_export(tmp_path / "in")
    run_intake(options(root, tmp_path / "cohort", keep_dicom=tmp_path / "copies"))
    copies = [pydicom.dcmread(path) for path in sorted((tmp_path / "copies").rglob("*.dcm"))]
    originals = {
        pydicom.dcmread(path).PixelData
        for path in root.rglob("*")
        if path.is_file() and path.suffix != ".csv" and "broken" not in path.name
    }
    assert {copy.PixelData for copy in copies} == originals
    assert len({copy.StudyInstanceUID for copy in copies}) == len({copy.PatientID for copy in copies}) == NUM_PATIENTS
    assert len({copy.SOPInstanceUID for copy in copies}) == 2 * NUM_PATIENTS
    for copy in copies:
        assert copy.PatientIdentityRemoved == "YES" and copy.file_meta.MediaStorageSOPInstanceUID == copy.SOPInstanceUID
        assert [code.CodeValue for code in copy.DeidentificationMethodCodeSequence] == ["113100"]
        assert copy.LongitudinalTemporalInformationModified == "REMOVED" and copy.preamble == b"\0" * 128
        # References still point to the instance they meant.
        assert copy.ReferencedImageSequence[0].ReferencedSOPInstanceUID == copy.SOPInstanceUID
        assert not [element for element in copy.iterall() if element.tag.is_private]
        assert copy.RescaleIntercept == -1024 and list(copy.PixelSpacing) == [0.7, 0.7]
    assert not {str(element.value) for copy in copies for element in copy.iterall() if element.VR == "UI"} & set(uids)
