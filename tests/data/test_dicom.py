"""DICOM radiographs as hospitals, RSNA and VinDr give them read as the picture that they show."""

import io

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from charmlib import Run
from charmlib.cli import cli
from charmlib.data import dicom
from charmlib.data.cache import open_images
from charmlib.data.images import open_grey, open_picture
from charmlib.data.phantom import draw_phantom
from charmlib.training.predict import predict

pydicom = pytest.importorskip("pydicom", reason="needs pydicom (pip install pydicom)")
from pydicom import uid  # noqa: E402


@pytest.fixture(scope="module")
def grey():
    return draw_phantom(seed=3)[0]


@pytest.fixture(scope="module")
def twelve(grey):
    """The picture in 12 bits, with black and white inside the range."""
    return (grey.astype(np.uint16) * 13 + 300)


def file(values, bits=12, syntax=uid.ExplicitVRLittleEndian, drop=(), **tags):
    """The bytes of a DICOM radiograph."""
    f = pydicom.Dataset()
    f.file_meta = pydicom.dataset.FileMetaDataset()
    f.file_meta.TransferSyntaxUID = syntax
    f.file_meta.MediaStorageSOPClassUID = uid.DigitalXRayImageStorageForPresentation
    f.file_meta.MediaStorageSOPInstanceUID = uid.generate_uid()
    f.SOPClassUID, f.SOPInstanceUID = f.file_meta.MediaStorageSOPClassUID, uid.generate_uid()
    f.Modality, f.PhotometricInterpretation = "DX", "MONOCHROME2"
    f.Rows, f.Columns = values.shape[:2]
    f.SamplesPerPixel, f.BitsAllocated, f.BitsStored, f.HighBit = 1, values.dtype.itemsize * 8, bits, bits - 1
    f.PixelRepresentation, f.PixelData = int(values.dtype.kind == "i"), values.tobytes()
    for tag, value in tags.items():
        setattr(f, tag, value)
    for tag in drop:
        delattr(f, tag)
    out = io.BytesIO()
    f.save_as(out, enforce_file_format=True)
    return out.getvalue()


def lut(**tags):
    item = pydicom.Dataset()
    for tag, (vr, value) in tags.items():
        item.add_new(tag, vr, value)
    return pydicom.sequence.Sequence([item])


WINDOW = {"WindowCenter": 2048, "WindowWidth": 4096}


def through(values, center, width):
    """PS3.3 C.11.2.1.2.1, pixel by pixel."""
    out = np.empty(values.shape)
    for at, x in np.ndenumerate(values):
        if x <= center - 0.5 - (width - 1) / 2:
            out[at] = 0
        elif x > center - 0.5 + (width - 1) / 2:
            out[at] = 255
        else:
            out[at] = ((x - (center - 0.5)) / (width - 1) + 0.5) * 255
    return out


def test_a_window_shows_the_same_whatever_else_is_in_the_picture(twelve):
    wide = np.asarray(open_grey(file(twelve, **WINDOW)))
    assert np.abs(wide - through(twelve, 2048, 4096)).max() <= 0.51
    marked = twelve.copy()
    marked[:5, :9] = 4095
    assert np.array_equal(np.asarray(open_grey(file(marked, **WINDOW)))[5:], wide[5:])
    narrow = np.asarray(open_grey(file(twelve, WindowCenter=1800, WindowWidth=900)))
    assert np.abs(narrow - through(twelve, 1800, 900)).max() <= 0.51 and (narrow == 255).any() and (narrow == 0).any()


@pytest.mark.parametrize("tags", [
    {"WindowCenter": [2048, 1000], "WindowWidth": [4096, 400]}, {"WindowCenter": [1000, 2048], "WindowWidth": [0, 4096]},
    {**WINDOW, "RescaleSlope": None, "RescaleIntercept": None}, {**WINDOW, "RescaleSlope": 1, "RescaleIntercept": 0},
    {**WINDOW, "RescaleSlope": 0}, {**WINDOW, "VOILUTFunction": ""}, {**WINDOW, "VOILUTFunction": "UNKNOWN"},
    {**WINDOW, "VOILUTSequence": pydicom.sequence.Sequence([])}, {**WINDOW, "Modality": "DR"}, {**WINDOW, "Modality": " dx "},
    {**WINDOW, "NumberOfFrames": "1"}, {**WINDOW, "Modality": None},
    {**WINDOW, "VOILUTSequence": lut(LUTDescriptor=("SS", None), LUTExplanation=("LO", "NORMAL"), LUTData=("OW", None))},
    {"VOILUTSequence": lut(LUTDescriptor=("US", [4096, 0, 12]), LUTData=("OW", np.arange(4096, dtype=np.uint16).tobytes()))},
    {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": 3096, "WindowWidth": 8192}], ids=str)
def test_windows_tables_and_empty_elements(twelve, tags):
    shown = np.asarray(open_grey(file(twelve, **tags)))
    assert np.abs(shown.astype(int) - np.asarray(open_grey(file(twelve, **WINDOW)))).max() <= 1


@pytest.mark.parametrize("tags", [{}, {"WindowCenter": None, "WindowWidth": None}, {"WindowWidth": 4096},
                                  {"WindowCenter": 2048, "WindowWidth": 0}, {"WindowCenter": 2048}], ids=str)
def test_without_a_window_the_values_are_given(twelve, tags):
    assert np.array_equal(open_picture(file(twelve, **tags)), twelve.astype(np.float32))


def test_monochrome1_is_inverted_in_every_form(twelve):
    want, mirrored = np.asarray(open_grey(file(twelve, **WINDOW))).astype(int), (4095 - twelve).astype(np.uint16)
    found = np.asarray(open_grey(file(mirrored, PhotometricInterpretation="MONOCHROME1", **WINDOW)))
    assert np.abs(found - want).max() <= 1
    assert np.array_equal(open_picture(file(mirrored, PhotometricInterpretation="MONOCHROME1")), twelve)
    signed = (twelve.astype(np.int16) - 2048)
    found = open_picture(file((-1 - signed).astype(np.int16), PhotometricInterpretation="MONOCHROME1", RescaleSlope=2,
                              RescaleIntercept=10))
    assert np.array_equal(found, signed * 2 + 10)


@pytest.mark.parametrize("kind, value", [("MONOCHROME2", 0), ("MONOCHROME2", 4095), ("MONOCHROME1", 0), ("MONOCHROME1", 4095)])
@pytest.mark.parametrize("window", [{}, WINDOW], ids=["values", "window"])
def test_padding_sets_no_scale_and_is_black(twelve, kind, value, window):
    stored = twelve if kind == "MONOCHROME2" else (4095 - twelve).astype(np.uint16)
    inner = np.ascontiguousarray(stored[20:, :-20])
    want = np.asarray(open_grey(file(inner, PhotometricInterpretation=kind, **window))).astype(int)
    padded = stored.copy()
    padded[:20] = padded[:, -20:] = value
    found = np.asarray(open_grey(file(padded, PhotometricInterpretation=kind, PixelPaddingValue=value, **window)))
    assert (found[:20] == 0).all() and (found[:, -20:] == 0).all()
    assert np.abs(found[20:, :-20] - want).max() <= 1


def test_padding_of_signed_values_and_of_a_range(twelve):
    signed = twelve.astype(np.int16) - 2048
    signed[:20] = -2000
    for value in (-2000, 2**16 - 2000):  # some files write it unsigned
        element = pydicom.DataElement("PixelPaddingValue", "SS" if value < 0 else "US", value)
        f = pydicom.dcmread(io.BytesIO(file(signed)))
        f.add(element)
        f.save_as(out := io.BytesIO(), enforce_file_format=True)
        assert np.isnan(open_picture(out.getvalue())[:20]).all()
    ranged = twelve.copy()
    ranged[:20] = np.arange(20)[:, None]
    found = open_picture(file(ranged, PixelPaddingValue=0, PixelPaddingRangeLimit=25))
    assert np.isnan(found[:20]).all() and not np.isnan(found[20:]).any()
    assert not np.isnan(open_picture(file(twelve * 0 + 7, PixelPaddingValue=7))).any()  # all of it cannot be padding


def test_stored_bits_wherever_they_stand(twelve):
    assert np.array_equal(open_picture(file((twelve << 4).astype(np.uint16), HighBit=15)), twelve)
    overlay = twelve | ((np.indices(twelve.shape).sum(0) % 50 == 0).astype(np.uint16) << 14)
    assert np.array_equal(open_picture(file(overlay.astype(np.uint16))), twelve)


@pytest.mark.parametrize("syntax", [uid.ExplicitVRBigEndian, uid.DeflatedExplicitVRLittleEndian, uid.ImplicitVRLittleEndian])
def test_transfer_syntaxes(twelve, syntax):
    values = twelve.astype(">u2") if syntax == uid.ExplicitVRBigEndian else twelve
    assert np.array_equal(open_picture(file(values, syntax=syntax)), twelve)


def test_without_preamble_and_meta(twelve):
    raw = file(twelve, syntax=uid.ImplicitVRLittleEndian)
    assert np.array_equal(open_picture(raw[raw.index(b"\x08\x00\x16\x00"):]), twelve)


def test_eight_bits_are_taken_as_they_are(grey):
    assert np.array_equal(np.asarray(open_picture(file(grey, bits=8))), grey)
    middle = grey * 0 + 128
    for kind, values in (("RGB", np.repeat(grey[..., None], 3, 2)), ("YBR_FULL", np.stack([grey, middle, middle], 2))):
        found = open_picture(file(values, bits=8, SamplesPerPixel=3, PlanarConfiguration=0, PhotometricInterpretation=kind))
        assert np.abs(np.asarray(found).astype(int) - grey).max() <= 1
    with pytest.raises(dicom.NotGrey, match="colour picture"):
        open_picture(file(np.stack([grey, 255 - grey, grey], 2), bits=8, SamplesPerPixel=3, PlanarConfiguration=0,
                          PhotometricInterpretation="RGB"))


def test_a_picture_that_claims_a_huge_size_is_refused_before_it_is_decoded(twelve):
    with pytest.raises(dicom.NotGrey, match="65535 x 65535 pixels, more than 10,000 a side"):
        dicom.read(file(twelve, Rows=65535, Columns=65535))


def test_what_is_no_radiograph_is_named(twelve):
    with pytest.raises(dicom.NotGrey, match="modality CT"):
        open_picture(file(twelve, Modality="CT"))
    with pytest.raises(dicom.NotGrey, match="2 frames"):
        open_picture(file(np.concatenate([twelve, twelve]), Rows=twelve.shape[0], NumberOfFrames=2))
    with pytest.raises(dicom.NotGrey, match="no picture in it"):
        open_picture(file(twelve, drop=["PixelData", "Rows"]))
    with pytest.raises(ValueError):
        open_picture(file(twelve)[:twelve.nbytes // 2])


def test_a_missing_decoder_is_named_with_its_remedy(grey, monkeypatch):
    f = pydicom.dcmread(io.BytesIO(file(grey, bits=8)))
    f.file_meta.TransferSyntaxUID = uid.JPEGLosslessSV1
    f.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8"])
    f["PixelData"].VR, f["PixelData"].is_undefined_length = "OB", True
    f.save_as(out := io.BytesIO())
    monkeypatch.setattr("pydicom.pixels.decoders.gdcm.HAVE_GDCM", False)
    from pydicom.pixels.decoders import JPEGLosslessSV1Decoder

    monkeypatch.setattr(JPEGLosslessSV1Decoder, "_available", {})
    with pytest.raises(ImportError, match=r"JPEG Lossless.*charmlib\[dicom\].*gdcm"):
        open_picture(out.getvalue())


@pytest.mark.parametrize("name", ["JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless", "RLELossless"])
def test_compressed_files_equal_the_plain_one(tmp_path, twelve, name):
    gdcm = pytest.importorskip("gdcm", reason="needs python-gdcm (pip install charmlib[dicom])")
    (tmp_path / "plain.dcm").write_bytes(file(twelve))
    reader = gdcm.ImageReader()
    reader.SetFileName(str(tmp_path / "plain.dcm"))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, name)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(tmp_path / "packed.dcm"))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write() and (tmp_path / "packed.dcm").stat().st_size < (tmp_path / "plain.dcm").stat().st_size
    assert np.array_equal(open_picture(tmp_path / "packed.dcm"), twelve)


def test_dicom_files_train_to_the_bits_of_the_same_pictures_as_png(tmp_path, tiny, monkeypatch):
    """With findings told by the brightness, on 200 files of 8 bits, of 14 bits, and with a window, as PNG and as DICOM."""
    monkeypatch.setenv("CHARM_CACHE", str(tmp_path / "cache"))
    rows = ["image_id,patient_id,A,B"]
    for kind in ("png", "dicom"):
        (tmp_path / kind).mkdir()
    for i in range(200):
        picture = draw_phantom(seed=i, size=48)[0] // (1 + i % 2)
        deep = picture.astype(np.uint16) * 60
        rows.append(f"{i:032x},{i // 2},{i % 2},{int(i % 3 == 0)}")
        stored, how = {0: (picture, {"bits": 8}), 1: (deep, {"bits": 14}),
                       2: (deep, {"bits": 14, "WindowCenter": 6000, "WindowWidth": 9000})}[i % 3]
        (tmp_path / "dicom" / f"{i:032x}.dicom").write_bytes(file(stored, **how))
        shown = open_picture(tmp_path / "dicom" / f"{i:032x}.dicom")
        (Image.fromarray(deep) if i % 3 == 1 else shown).save(tmp_path / "png" / f"{i:032x}.png")
    runs = {}
    for kind in ("png", "dicom"):
        (tmp_path / kind / "t.csv").write_text("\n".join(rows))
        run = Run.open(tiny, data_root=str(tmp_path / kind), csv="t.csv", classes="own", split="patient",
                       run_dir=str(tmp_path / f"run_{kind}"))
        run.train()
        runs[kind] = run
    first, second = (run.net.state_dict() for run in runs.values())
    assert all(torch.equal(first[name], second[name]) for name in first)
    scale = runs["dicom"].folder.card["data"]["scale"]
    assert scale == runs["png"].folder.card["data"]["scale"] and scale[1] > scale[0]
    assert "values of more than 8 bits" in str(runs["dicom"].data.index.report)
    found = predict(runs["dicom"].folder.path, [tmp_path / "dicom" / f"{1:032x}.dicom"], device="cpu")
    row = np.flatnonzero(runs["dicom"].data.index.frame["id"].str.startswith(f"{1:032x}"))
    logits, _ = runs["dicom"].logits("train", row)  # predict reads a deep file by the scale of training
    np.testing.assert_allclose(found[["p_A", "p_B"]].to_numpy(float), 1 / (1 + np.exp(-logits)), rtol=1e-5)


def test_a_run_is_not_scored_on_pictures_of_another_scale(tmp_path, tiny, monkeypatch):
    """The cache command finds the scale on the training images of its split, as a run does."""
    (tmp_path / "data").mkdir()
    rows = ["image_id,patient_id,A"]
    for i in range(40):
        deep = draw_phantom(seed=i, size=48)[0].astype(np.uint16) * (20 + i)
        Image.fromarray(deep).save(tmp_path / "data" / f"{i}.png")
        rows.append(f"{i},{i},{i % 2}")
    (tmp_path / "data/t.csv").write_text("\n".join(rows))
    how = {**tiny, "data_root": str(tmp_path / "data"), "csv": "t.csv", "classes": "own", "split": "patient"}
    done = CliRunner().invoke(cli, ["cache", how["data_root"], "--csv", "t.csv", "--size", "32", "--cache-dir",
                                    str(tmp_path / "a")])
    assert done.exit_code == 0, done.output
    run = Run.open(how, cache_dir=str(tmp_path / "a"))
    monkeypatch.setenv("CHARM_CACHE", str(tmp_path / "scratch"))
    assert run.data.images.folder.is_relative_to(tmp_path / "a")
    assert Run.open(how, cache_dir=str(tmp_path / "b")).data.images.scale == run.data.images.scale
    run.train()
    open_images(run.data.index.frame["id"].tolist(), run.data.index.frame["path"].tolist(), 32, train=lambda: range(3),
                cache_dir=tmp_path / "c")
    monkeypatch.setenv("CHARM_CACHE", str(tmp_path / "c"))
    with pytest.raises(ValueError, match="more than 8 bits scaled by .*Name the cache_dir"):
        Run.load(run.folder.path, cache_dir=str(tmp_path / "c"))
    assert Run.load(run.folder.path, cache_dir=str(tmp_path / "b")).data.images.scale == run.data.images.scale
