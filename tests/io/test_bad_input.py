"""What hospitals and attackers send: every file ends in a coded DataError or in the right pixels, and tells no secret."""

from __future__ import annotations

import gzip
import io
import os
import struct
import subprocess
import sys
import textwrap
import warnings
import zlib

import nibabel as nib
import numpy as np
import pytest
from dicom_files import SECRETS, item, make_enhanced, make_image, save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.uid import (
    BasicTextSRStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from medaug.errors import DataError
from medaug.io.dicom import read_dicom, read_frames, read_header
from medaug.io.nifti import read_nifti, read_nifti_header
from medaug.io.raster import read_raster

# The long run: MEDAUG_FUZZ_EXAMPLES=100000 pytest tests/io/test_bad_input.py -k mutated
EXAMPLES = int(os.environ.get("MEDAUG_FUZZ_EXAMPLES", "500"))
GREY = np.random.default_rng(0).integers(0, 2048, (16, 16), dtype=np.uint16)
HU = GREY.astype(np.float32) - 1024
NAN = float("nan")


def code_of(read, path) -> str:
    """The code of the refusal, "" if the file is read; nothing else may be raised and no secret told."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            result = read(path)
            if hasattr(result, "__next__"):
                for _ in result:
                    pass
        except DataError as error:
            assert not any(secret in str(error) or secret in repr(error.args) for secret in SECRETS)
            assert error.__cause__ is None and str(path) not in str(error)
            return error.code
        finally:
            assert not any(secret in str(warning.message) for warning in told for secret in SECRETS)
    return ""


def patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) >= 1 and len(old) == len(new)
    return data.replace(old, new)


def dicom_bytes(**options) -> bytes:
    buffer = io.BytesIO()
    dataset = make_image(options.pop("pixels", GREY), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def without_preamble() -> bytes:
    dataset = make_image(GREY)
    del dataset.file_meta
    buffer = io.BytesIO()
    dataset.save_as(buffer, implicit_vr=False, little_endian=True)
    return buffer.getvalue()


def nested(depth: int) -> bytes:
    data = dicom_bytes()
    cut = data.index(b"\xe0\x7f\x10\x00")
    return data[:cut] + b"\x09\x00\x15\x12SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * depth + data[cut:]


def corrupt_jpeg_2000() -> bytes:
    dataset = make_image(np.tile(GREY, (4, 4)))
    dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    data = bytearray(buffer.getvalue())
    start = data.index(b"\xff\x4f\xff\x51") + 60
    data[start : start + 400] = b"\xff" * 400
    return bytes(data)


def report() -> bytes:
    dataset = make_image(GREY, SOPClassUID=BasicTextSRStorage, without=("Rows", "Columns"))
    del dataset.PixelData
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def long_element() -> bytes:
    """PixelData whose length points past the end of the file, although no pixel is missing."""
    data = dicom_bytes()
    place = data.index(b"\xe0\x7f\x10\x00OW\0\0") + 8
    return data[:place] + (0x7FFFFFFE).to_bytes(4, "little") + data[place + 4 :]


SIGNED = np.array([[-2000, -5], [0, 1000]], np.int16)
DICOM = {
    "empty": (lambda: b"", "image-empty"),
    "no preamble": (without_preamble, HU),
    "executable preamble": (lambda: b"MZ" + b"\x90" * 126 + dicom_bytes()[128:], HU),
    "length past the end": (long_element, HU),
    "nested 1000 deep": (lambda: nested(1000), "image-unreadable"),
    "no PixelData": (report, "not-an-image"),
    "unknown transfer syntax": (
        lambda: patched(dicom_bytes(), b"1.2.840.10008.1.2.1\0", b"1.2.840.99999.1.2.1\0"),
        "transfer-syntax-unsupported",
    ),
    "corrupt JPEG 2000": (corrupt_jpeg_2000, "image-unreadable"),
    "BitsStored > BitsAllocated": (lambda: dicom_bytes(BitsStored=17), "pixel-format-invalid"),
    "signed": (lambda: dicom_bytes(pixels=SIGNED, RescaleIntercept="0"), SIGNED),
    "padding -2000": (
        lambda: dicom_bytes(pixels=SIGNED, RescaleIntercept="0", PixelPaddingValue=-2000),
        np.array([[-5, -5], [0, 1000]]),
    ),
    "RescaleSlope 0": (lambda: dicom_bytes(RescaleSlope="0"), "rescale-invalid"),
    "RescaleSlope negative": (lambda: dicom_bytes(RescaleSlope="-1"), -1024 - GREY.astype(np.float32)),
    "RescaleSlope NaN": (lambda: patched(dicom_bytes(RescaleSlope="7777"), b"7777", b"NaN "), "rescale-invalid"),
    "RescaleSlope 1,0": (lambda: patched(dicom_bytes(RescaleSlope="7777"), b"7777", b"1,0 "), "rescale-invalid"),
    "WindowWidth 0": (lambda: dicom_bytes(WindowCenter="40", WindowWidth="0"), HU),
    "several windows": (lambda: dicom_bytes(WindowCenter=["40", "50"], WindowWidth=["400", "300"]), HU),
    "MONOCHROME1": (
        lambda: dicom_bytes(
            PhotometricInterpretation="MONOCHROME1",
            Modality="CR",
            without=("RescaleSlope", "RescaleIntercept"),
            BitsStored=12,
            HighBit=11,
        ),
        4095 - GREY.astype(np.float32),
    ),
    "missing orientation and position": (lambda: dicom_bytes(without=("PixelSpacing",)), HU),
    "UID that is a path": (lambda: dicom_bytes(SOPInstanceUID="../../etc/passwd"), HU),
    "blank PatientID": (lambda: dicom_bytes(PatientID=""), HU),
    "broken character set": (lambda: dicom_bytes(SpecificCharacterSet="ISO_IR 999"), HU),
    "huge Rows and Columns": (lambda: dicom_bytes(Rows=65535, Columns=65535), "image-too-large"),
    "huge NumberOfFrames": (lambda: dicom_bytes(NumberOfFrames="2147483647"), "image-too-large"),
    "many frames": (lambda: dicom_bytes(NumberOfFrames="16000"), "image-truncated"),
    "wrong extension": (lambda: dicom_bytes(), HU),
}


@pytest.mark.parametrize("name", DICOM)
def test_bad_dicom(tmp_path, name):
    make, expected = DICOM[name]
    path = tmp_path / "a.png"
    path.write_bytes(make())
    code = code_of(read_frames, path)
    if isinstance(expected, str):
        assert code == expected
    else:
        assert code == ""
        np.testing.assert_array_equal(read_dicom(path).pixels, expected)
    code_of(read_header, path)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless])
def test_dicom_truncated_anywhere(tmp_path, syntax):
    dataset = make_image(GREY, syntax=ExplicitVRLittleEndian if syntax == RLELossless else syntax)
    if syntax == RLELossless:
        dataset.compress(RLELossless, generate_instance_uid=False)
    data = save(tmp_path / "a", dataset).read_bytes()
    path = tmp_path / "b"
    # The encapsulated end: a missing sequence delimiter (8 bytes) loses no pixel.
    for length in range(0, len(data) - 16, 13):
        path.write_bytes(data[:length])
        assert code_of(read_frames, path)


def nifti_bytes(data=None, affine=None, **header) -> bytes:
    image = nib.Nifti1Image(
        np.arange(60, dtype=np.int16).reshape(3, 4, 5) if data is None else data, np.eye(4) if affine is None else affine
    )
    for field, value in header.items():
        image.header[field] = value
    return image.to_bytes()


def at(data: bytes, offset: int, values, dtype: str) -> bytes:
    part = np.asarray(values, dtype).tobytes()
    return data[:offset] + part + data[offset + len(part) :]


def forms(qform, sform) -> bytes:
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.eye(4))
    image.set_qform(np.asarray(qform), 1)
    image.set_sform(np.asarray(sform), 1)
    return image.to_bytes()


def with_value(value) -> np.ndarray:
    data = np.zeros((3, 4, 5), np.float32)
    data[1, 1, 1] = value
    return data


NIFTI = {
    "empty": (lambda: b"", "image-empty"),
    "truncated": (lambda: nifti_bytes()[:-1], "image-truncated"),
    "truncated in the header": (lambda: nifti_bytes()[:200], "image-unreadable"),
    "gz bomb": (lambda: gzip.compress(nifti_bytes() + bytes(1 << 24)), ""),
    "gz truncated": (lambda: gzip.compress(nifti_bytes())[:-12], "image-truncated"),
    "dims 0": (lambda: at(nifti_bytes(), 40, [3, 3, 0, 5], "<i2"), "shape-invalid"),
    "dims negative": (lambda: at(nifti_bytes(), 40, [3, 3, -4, 5], "<i2"), "shape-invalid"),
    "dims 2^45": (lambda: at(nifti_bytes(), 40, [3, 32767, 32767, 32767], "<i2"), "image-too-large"),
    "voxels of many bytes": (
        lambda: at(at(nifti_bytes(), 40, [3, 512, 512, 1024], "<i2"), 70, [64, 64], "<i2"),
        "image-too-large",
    ),
    "NaN": (lambda: nifti_bytes(with_value(NAN)), "image-not-finite"),
    "Inf": (lambda: nifti_bytes(with_value(np.inf)), "image-not-finite"),
    "singular affine": (lambda: at(nifti_bytes(), 280, np.zeros(12), "<f4"), "orientation-unknown"),
    "qform turned": (lambda: forms(np.diag([-1, 1, 1, 1]), np.eye(4)), "orientation-unknown"),
    "qform elsewhere": (lambda: forms(np.diag([1, 1, 1.5, 1]), np.eye(4)), ""),
    "scl_slope 0": (lambda: at(nifti_bytes(), 112, [0, 7], "<f4"), ""),
    "scl_slope NaN": (lambda: at(nifti_bytes(), 112, [NAN, 7], "<f4"), ""),
    "scl_slope Inf": (lambda: at(nifti_bytes(), 112, [np.inf, 0], "<f4"), "rescale-invalid"),
    "4-D": (lambda: nifti_bytes(np.zeros((3, 3, 3, 2), np.int16)), "multi-frame-unsupported"),
    "5-D": (lambda: nifti_bytes(np.zeros((2, 2, 2, 2, 2), np.int16)), "multi-frame-unsupported"),
    "complex": (lambda: nifti_bytes(np.zeros((3, 3, 3), np.complex64)), "pixel-format-invalid"),
    "vox_offset outside": (lambda: at(nifti_bytes(), 108, [1e30], "<f4"), "image-unreadable"),
    "vox_offset negative": (lambda: at(nifti_bytes(), 108, [-5], "<f4"), "image-unreadable"),
}


@pytest.mark.parametrize("name", NIFTI)
def test_bad_nifti(tmp_path, name):
    make, expected = NIFTI[name]
    path = tmp_path / "a.dcm"
    path.write_bytes(make())
    assert code_of(read_nifti, path) == expected
    code_of(read_nifti_header, path)


def test_nifti_slope_rules_and_byte_order(tmp_path):
    """scl_slope 0 or NaN means "not scaled", whatever scl_inter says (nifti1.h); big-endian gives the same values."""
    stored = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    expected = stored[::-1, ::-1, 0].T
    for slope in (0, NAN):
        (tmp_path / "a").write_bytes(at(nifti_bytes(), 112, [slope, 7], "<f4"))
        np.testing.assert_array_equal(next(read_nifti(tmp_path / "a")).pixels, expected)
    image = nib.Nifti1Image(stored.astype(">i2"), np.eye(4), nib.Nifti1Header(endianness=">"))
    (tmp_path / "b").write_bytes(image.to_bytes())
    np.testing.assert_array_equal(next(read_nifti(tmp_path / "b")).pixels, expected)


def test_nifti_forms_that_differ_are_noted_or_refused(tmp_path):
    (tmp_path / "a").write_bytes(forms(np.diag([1, 1, 1.5, 1]), np.eye(4)))
    assert next(read_nifti(tmp_path / "a")).acquisition["geometry_note"] == "qform-sform-differ"
    with pytest.raises(DataError, match="orientation-conflict"):
        read_nifti(tmp_path / "a", strict=True)
    (tmp_path / "b").write_bytes(forms(np.eye(4), np.eye(4)))
    assert "geometry_note" not in next(read_nifti(tmp_path / "b", strict=True)).acquisition


def png(width, height) -> bytes:
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "image-empty"),
        (png(60000, 60000), "image-too-large"),
        (png(0, 5), "image-unreadable"),
        (png(64, 64)[:60], "image-truncated"),
        (b"\x89PNG\r\n\x1a\n", "image-unreadable"),
    ],
)
def test_bad_png(tmp_path, data, code):
    (tmp_path / "a.dcm").write_bytes(data)
    assert code_of(read_raster, tmp_path / "a.dcm") == code


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_bombs_stay_under_a_gigabyte_and_a_half(tmp_path):
    squeezed = zlib.compressobj(1, wbits=-15)
    plain, deflated = dicom_bytes(), dicom_bytes(syntax=DeflatedExplicitVRLittleEndian)
    start = 144 + int.from_bytes(plain[140:144], "little")
    meta = deflated[: 144 + int.from_bytes(deflated[140:144], "little")]
    bomb = squeezed.compress(plain[start:]) + b"".join(squeezed.compress(bytes(1 << 24)) for _ in range(40)) + squeezed.flush()
    (tmp_path / "deflate").write_bytes(meta + bomb)  # 640 MB
    (tmp_path / "frames").write_bytes(dicom_bytes(NumberOfFrames="16000", Rows=4096, Columns=4096))
    header = at(at(nifti_bytes(), 40, [3, 512, 512, 500], "<i2"), 70, [16, 32], "<i2")
    with gzip.open(tmp_path / "nifti", "wb", compresslevel=1) as stream:
        stream.write(header)
        for _ in range(70):  # 500 MB that the header declares, and more
            stream.write(bytes(1 << 24))
    (tmp_path / "png").write_bytes(png(60000, 60000))
    rle = make_image(np.zeros((16, 16), np.uint16))
    rle.compress(RLELossless, generate_instance_uid=False)
    rle.Rows = rle.Columns = 8000
    save(tmp_path / "rle", rle)
    program = """
        import sys
        from pathlib import Path
        from medaug.errors import DataError
        from medaug.io.dicom import read_frames, read_header
        from medaug.io.nifti import read_nifti
        from medaug.io.raster import read_raster
        folder = Path(sys.argv[1])
        for name, read in [("deflate", read_frames), ("frames", read_frames), ("rle", read_frames), ("png", read_raster),
                           ("deflate", read_header), ("nifti", read_nifti)]:
            try:
                list(read(folder / name))
                raise SystemExit(f"{name} was read")
            except DataError:
                pass
        status = Path("/proc/self/status").read_text()  # ru_maxrss would begin at the peak of the process that started this one
        print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert int(done.stdout) < 1.5 * 1024**2


def valid_files() -> dict[str, tuple[bytes, object]]:
    """One small valid file of each kind that is read."""
    files: dict[str, tuple[bytes, object]] = {
        "explicit": (dicom_bytes(), read_frames),
        "implicit": (dicom_bytes(syntax=ImplicitVRLittleEndian), read_frames),
        "deflated": (dicom_bytes(syntax=DeflatedExplicitVRLittleEndian), read_frames),
        "nifti": (nifti_bytes(), read_nifti),
        "nifti.gz": (gzip.compress(nifti_bytes()), read_nifti),
    }
    many = np.stack([np.tile(GREY, (2, 2))] * 2)
    for name, syntax in {"rle": RLELossless, "jpeg-ls": JPEGLSLossless}.items():
        dataset = make_image(many)
        dataset.compress(syntax, generate_instance_uid=False)
        files[name] = (_saved(dataset), read_frames)
    enhanced = make_enhanced(many, [0, 1])
    enhanced.ReferencedImageSequence = [item(ReferencedSOPInstanceUID="1.2.3")]
    files["enhanced"] = (_saved(enhanced), read_frames)
    buffer = io.BytesIO()
    Image.fromarray(GREY).save(buffer, format="PNG")
    files["png"] = (buffer.getvalue(), read_raster)
    return files


def _saved(dataset) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


VALID = valid_files()


def test_the_valid_files_are_valid(tmp_path):
    for data, read in VALID.values():
        (tmp_path / "a").write_bytes(data)
        assert code_of(read, tmp_path / "a") == ""


@st.composite
def mutations(draw):
    """A kind of file, and its bytes after a few changes: bits, runs, cuts, insertions, lengths."""
    kind = draw(st.sampled_from(sorted(VALID)))
    data = bytearray(VALID[kind][0])
    for _ in range(draw(st.integers(1, 4))):
        # Headers are at the start, and more is at stake there.
        place = draw(st.one_of(st.integers(0, min(1200, len(data) - 1)), st.integers(0, len(data) - 1)))
        change = draw(st.sampled_from(["byte", "run", "cut", "insert", "length", "drop"]))
        if change == "byte":
            data[place] = draw(st.integers(0, 255))
        elif change == "run":
            data[place : place + 8] = draw(st.binary(min_size=1, max_size=8))
        elif change == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=16))
        elif change == "length":
            data[place : place + 4] = draw(st.sampled_from([b"\xff" * 4, bytes(4), b"\xfe\xff\xff\x7f", b"\xfe\xff\x00\xe0"]))
        elif change == "drop":
            del data[place : place + draw(st.integers(1, 40))]
        else:
            del data[place:]
        data = data or bytearray(b"\0")
    return kind, bytes(data)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(mutations())
def test_mutated_files_give_only_data_errors(tmp_path_factory, mutated):
    kind, data = mutated
    path = tmp_path_factory.getbasetemp() / "mutated"
    path.write_bytes(data)
    code_of(VALID[kind][1], path)
    if VALID[kind][1] is read_frames:
        code_of(read_header, path)
