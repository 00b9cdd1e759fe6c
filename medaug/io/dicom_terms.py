"""Defined terms of the standard: the only header text that may be published. Whatever else stands in a header may be a name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# PS3.3 C.7.3.1.1.1, retired terms included.
MODALITIES = frozenset(
    re.findall(
        r"\w+",
        "ANN AR ASMT AU BDUS BI BMD CFM CR CT CTPROTOCOL DG DMS DOC DX ECG EEG EMG EOG EPS ES FID GM HC HD IO IOL IVOCT IVUS KER "
        "KO LEN LS M3D MG MR NM OAM OCT OP OPM OPT OPTBSV OPTENF OPV OSS OT PA PLAN POS PR PT PX REG RESP RF RG RTDOSE RTIMAGE "
        "RTINTENT RTPLAN RTRAD RTRECORD RTSEGANN RTSTRUCT RWV SEG SM SMR SR SRF STAIN TEXTUREMAP TG US VA XA XAPROTOCOL XC "
        "AS CD CF CP CS DD DF DM DS EC FA FS LP MA MS OPR ST VF",
    )
)
# Values of ImageType and FrameType: PS3.3 C.7.6.1.1.2, and those of single modalities: C.8.2.1 (CT), C.8.3.1 (MR), C.8.4.9 (NM),
# C.8.7.1 (XA), C.8.8.2 (RT), C.8.12.4 (SM), C.8.13 and C.8.15 (enhanced MR and CT), C.8.16 (their common values), C.8.21 (X-ray 3-D);
# the last lines are words of scanners that name a way to compute pictures.
IMAGE_TYPES = frozenset(
    re.findall(
        r"[^|]+",
        "ORIGINAL|DERIVED|MIXED|PRIMARY|SECONDARY|"
        "AXIAL|LOCALIZER|REFORMATTED|VOLUME|NONE|OTHER|RESAMPLED|"
        "DENSITY MAP|DIFFUSION MAP|IMAGE ADDITION|MODULUS SUBTRACT|MPR|PHASE MAP|PHASE SUBTRACT|PROJECTION IMAGE|T1 MAP|T2 MAP|VELOCITY MAP|"
        "STATIC|DYNAMIC|GATED|WHOLE BODY|TOMO|GATED TOMO|RECON TOMO|RECON GATED TOMO|EMISSION|TRANSMISSION|"
        "SINGLE PLANE|BIPLANE A|BIPLANE B|SINGLE A|SINGLE B|"
        "DRR|PORTAL|SIMULATOR|RADIOGRAPH|BLANK|FLUENCE|LABEL|THUMBNAIL|OVERVIEW|"
        "ANGIO|ANGIO_TIME|ATTENUATION|CARDIAC|CARDIAC_GATED|CARDIAC_CTA|CARDIAC_CASCORE|CARDRESP_GATED|CINE|DIFFUSION|DIXON|FLOW_ENCODED|"
        "FLUID_ATTENUATED|FLUOROSCOPY|FMRI|MAX_IP|METABOLITE_MAP|MIN_IP|MOTION|MULTIECHO|M_MODE|NON_PARALLEL|PARALLEL|PERFUSION|"
        "POST_CONTRAST|PRE_CONTRAST|PROTON_DENSITY|REALTIME|REFERENCE|RESP_GATED|REST|STIR|STRESS|T1|T2|T2_STAR|TAGGING|TEMPERATURE|"
        "TOF|VELOCITY|WHOLE_BODY|"
        "ADDITION|DIVISION|MASKED|MAXIMUM|MEAN|MEDIAN|MINIMUM|MULTIPLICATION|QUANTITY|STD_DEVIATION|SUBTRACTION|FILTERED|ENERGY_PROP_WT|"
        "TOMOSYNTHESIS|TOMO_2D|TOMO_PROJ|GENERATED_2D|"
        "ADC|FA|TRACEW|MIP|MINIP|MNIP|MAGNITUDE|PHASE|REAL|IMAGINARY|M|P|R|I|M_FFE|M_SE|M_IR|WATER|FAT|IN_PHASE|OUT_PHASE|"
        "NORM|DIS2D|DIS3D|ND|MFSPLIT|FM|HELICAL|SCOUT|AVERAGE|SUB|SCREEN SAVE|SCREENSHOT|SCREEN CAPTURE",
    )
)
VOI_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
_WHOLE = 3  # letters; shorter parts of names and identifiers are in too many terms


def published_types(values: Iterable[str], secrets: Iterable[str] = ()) -> list[str]:
    """The values of an ImageType that are defined terms and no part of a secret of the same file, in their order."""
    return _without([value for value in values if value in IMAGE_TYPES], secrets)


def published_modality(value: str, secrets: Iterable[str] = ()) -> str:
    """A modality if it is a defined term and no part of a secret of the same file, else ""."""
    return "".join(_without([value] if value in MODALITIES else [], secrets))


def _without(terms: Sequence[str], secrets: Iterable[str]) -> list[str]:
    if not terms:
        return []
    parts = {part for secret in secrets for part in [secret.strip().upper(), *re.split(r"[\W_]+", secret.upper())]}
    parts = {part for part in parts if len(part) >= _WHOLE}
    return [term for term in terms if term not in parts and parts.isdisjoint(re.split(r"[\W_]+", term))]
