from __future__ import annotations

import numpy as np
import pytest
from dicom_files import make_image, save
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from medaug.errors import DataError
from medaug.io import dicom_decode
from medaug.io.dicom import read_dicom, read_frames

GREY = np.random.default_rng(0).integers(0, 4096, (64, 48), dtype=np.uint16)
FRAMES = np.random.default_rng(1).integers(0, 4096, (5, 64, 48), dtype=np.uint16)
COLOUR = np.random.default_rng(2).integers(0, 256, (64, 48, 3), dtype=np.uint8)


def compressed(pixels, syntax, plugin="", **elements):
    dataset = make_image(pixels, **elements)
    dataset.compress(syntax, encoding_plugin=plugin, generate_instance_uid=False)
    return dataset


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
def test_lossless_syntaxes_give_the_very_pixels(tmp_path, syntax):
    picture = read_dicom(save(tmp_path / "a", compressed(GREY, syntax)))
    np.testing.assert_array_equal(picture.pixels, GREY.astype(np.float32) - 1024)
    pictures = list(read_frames(save(tmp_path / "b", compressed(FRAMES, syntax))))
    np.testing.assert_array_equal([picture.pixels for picture in pictures], FRAMES.astype(np.float32) - 1024)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
def test_chosen_frames_of_compressed_files(tmp_path, syntax):
    path = save(tmp_path / "a", compressed(FRAMES, syntax))
    pictures = list(read_frames(path, [3, 1]))
    np.testing.assert_array_equal([picture.pixels for picture in pictures], FRAMES[[1, 3]].astype(np.float32) - 1024)
    assert [picture.acquisition["frame"] for picture in pictures] == [2, 4]
    with pytest.raises(DataError, match="slice-outside-volume"):
        list(read_frames(path, [5]))


def test_signed_samples_survive_jpeg_2000(tmp_path):
    signed = (GREY.astype(np.int32) - 2048).astype(np.int16)
    dataset = compressed(signed, JPEG2000Lossless, BitsStored=12, HighBit=11, RescaleIntercept="0")
    np.testing.assert_array_equal(read_dicom(save(tmp_path / "a", dataset)).pixels, signed)


def test_colour_against_pydicom(tmp_path):
    elements = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0, "Modality": "OT"}
    dataset = compressed(COLOUR, RLELossless, without=("RescaleSlope", "RescaleIntercept"), **elements)
    np.testing.assert_array_equal(read_dicom(save(tmp_path / "a", dataset)).pixels, COLOUR)


@pytest.mark.parametrize("syntax", sorted(dicom_decode.PLUGINS))
def test_every_declared_plugin_is_one_of_pydicom(syntax):
    decoder = get_decoder(syntax)
    plugin = dicom_decode.PLUGINS[syntax]
    assert plugin in {*decoder._available, *decoder._unavailable}
    assert plugin in dicom_decode.PACKAGES


def test_every_decoder_of_pydicom_is_declared_or_native():
    from pydicom.pixels.decoders.base import _PIXEL_DATA_DECODERS

    encapsulated = {uid for uid in _PIXEL_DATA_DECODERS if UID(uid).is_encapsulated}
    assert encapsulated == set(dicom_decode.PLUGINS)


@pytest.mark.parametrize(
    ("syntax", "package"),
    [(JPEGLSLossless, "pyjpegls"), (JPEG2000Lossless, "pylibjpeg-openjpeg"), (JPEGLosslessSV1, "python-gdcm")],
)
def test_other_decoders_do_not_step_in_for_a_missing_one(tmp_path, monkeypatch, syntax, package):
    """The pixels must not depend on what else is installed, so nothing replaces the declared decoder."""
    dataset = compressed(GREY, JPEGLSLossless)
    dataset.file_meta.TransferSyntaxUID = syntax
    path = save(tmp_path / "a", dataset)
    decoder, plugin = get_decoder(syntax), dicom_decode.PLUGINS[syntax]
    monkeypatch.setattr(decoder, "_available", {name: call for name, call in decoder._available.items() if name != plugin})
    with pytest.raises(DataError, match=f"transfer-syntax-unsupported.*`pip install .*{package}`") as caught:
        read_dicom(path)
    assert syntax.name in caught.value.message


@pytest.mark.parametrize(
    ("syntax", "bits", "name"), [(JPEGExtended12Bit, 12, "JPEG Extended"), (UID("1.2.840.10008.1.2.4.100"), 8, "MPEG")]
)
def test_undecodable_syntaxes_are_named(tmp_path, syntax, bits, name):
    dataset = make_image(GREY, BitsStored=12, HighBit=11)
    dataset.PixelData = encapsulate([b"\xff\xd8" + bytes(50)])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = syntax
    with pytest.raises(DataError, match=f"transfer-syntax-unsupported.*{name}"):
        read_dicom(save(tmp_path / "a", dataset))


def test_unknown_transfer_syntax(tmp_path):
    dataset = make_image(GREY)
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = save(tmp_path / "a", dataset).read_bytes()
    (tmp_path / "a").write_bytes(data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.3.4.5.6.7.8.9.1\0", 1))
    with pytest.raises(DataError, match="transfer-syntax-unsupported.*unknown transfer syntax"):
        read_dicom(tmp_path / "a")


@pytest.mark.parametrize("syntax", [JPEGLSLossless, JPEG2000Lossless, JPEGBaseline8Bit])
def test_a_stream_of_another_size_is_refused_before_it_is_decoded(tmp_path, monkeypatch, syntax):
    if syntax == JPEGBaseline8Bit:
        import io

        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(GREY.astype(np.uint8)).save(buffer, format="JPEG")
        dataset = make_image(GREY.astype(np.uint8))
        dataset.PixelData = encapsulate([buffer.getvalue()])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = syntax
    else:
        dataset = compressed(GREY, syntax)
    assert read_dicom(save(tmp_path / "a", dataset)).pixels.shape == (64, 48)
    dataset.Rows = 8
    called = []
    monkeypatch.setattr(dicom_decode, "get_decoder", lambda uid: called.append(uid) or get_decoder(uid))
    with pytest.raises(DataError, match="image-unreadable.*declares 8 x 48"):
        read_dicom(save(tmp_path / "b", dataset))


def test_fewer_frames_than_declared(tmp_path):
    dataset = compressed(FRAMES, RLELossless)
    dataset.NumberOfFrames = 9
    with pytest.raises(DataError):
        list(read_frames(save(tmp_path / "a", dataset)))
