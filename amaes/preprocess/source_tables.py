"""How data sets are distributed: the nine sources of BRAINS-45K and two layouts that many others share.

A table per source (Munk et al. 2024, arXiv 2408.00640, Table 1); `amaes.preprocess.sources` reads folders by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

CORPUS_FILTER = ("auto", "on", "off")  # auto: as each source says


@dataclass(frozen=True)
class Source:
    """How one data set is distributed.

    Attributes:
        dataset: first part of the ids; empty: the name of the folder.
        layouts: regular expressions for the end of a path without its extension, from the start of a folder's or file's
            name on; the first that fits takes the file. Groups: site, scanner and subject together are the subject;
            visit; description, which `keep` and `drop` look at; sequence or suffix, from which the sequence is read
            (else from the description); run and entities, which go into the id.
        excluded: (reason, expression) of paths below the folder that are left out whatever the layouts say.
        keep, drop: expressions for descriptions of a series: which to take, and which of them not to.
        sequences: (name, expression) of this source, tried before `amaes.preprocess.file_names.SEQUENCES`.
        volumes: sequences of the volumes of a 4-D file; empty: files are 3-D.
        labels: expressions for the end of the path of a label file, with groups for the subject and visit of its case;
            empty: labels of this source are not supported.
        label_map: old value of the label files to new.
        corpus_filter: the published corpus holds only volumes that pass `amaes.preprocess.read_case.check_corpus`.
        published: subjects, visits and volumes in Table 1; None: the table does not list this source.
        listed: sequences in Table 1.
        held_out: seed and number of cases of the published evaluation split; see `hold_out`.
        corpus_is_pool: Table 1 counts the cases without those held out.
        remark: a note for the user: which of its cases are evaluated on, or where it differs from Table 1.
    """

    dataset: str
    layouts: tuple[str, ...]
    excluded: tuple[tuple[str, str], ...] = ()
    keep: str = ""
    drop: str = "(?!)"  # never matches
    sequences: tuple[tuple[str, str], ...] = ()
    volumes: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    label_map: Mapping[int, int] = field(default_factory=dict)
    corpus_filter: bool = False
    published: tuple[int, int, int] | None = None
    listed: str = ""
    held_out: tuple[int, int] | None = None
    corpus_is_pool: bool = False
    remark: str = ""


# The tables -----------------------------------------------------------------------------------------------------------

ENTITIES = r"(?P<entities>(?:_[a-z0-9]+-[^_/]+)*)"  # _acq-TSE_run-01 of BIDS names
MINIP = ("minip", r"minip")  # a projection of a susceptibility-weighted scan


def _wmh(file: str) -> tuple[str, ...]:
    """A file of a case of WMH: as released since 2022, in older downloads, and below the folder of a site."""
    subject = rf"(?P<subject>(?!pre/)[^/]+)/{file}"
    return (
        rf"(?:training|test)/(?P<site>[^/]+)/(?:(?P<scanner>[^/]+)/)?{subject}",
        rf"(?P<site>[^/]+)/(?:Train|Test)(?:_(?P<scanner>[^/]+))?/{subject}",
        rf"(?P<site>Utrecht|Singapore|Amsterdam)/(?:(?P<scanner>[^/]+)/)?(?=\d+/){subject}",
    )


def _oasis(number: int, **table) -> Source:
    """OASIS3 and OASIS4: the download scripts' folders, and those of the archive itself."""
    visit = rf"(?P<subject>OAS{number}\d{{4}})_MR_(?P<visit>d\d+)"
    scan = r"(?P<description>(?P<run>[^/-]+)[^/]*)"
    name = rf"sub-OAS{number}\d{{4}}_sess?-d\d+{ENTITIES}_(?P<suffix>[a-z0-9]+)"
    return Source(
        dataset=f"OASIS{number}",
        layouts=(rf"{visit}/{scan}/(?:NIFTI/)?{name}", rf"{visit}/scans/{scan}/resources/NIFTI/files/{name}"),
        excluded=(
            ("freesurfer", r"(?:^|/)[^/]*freesurfer[^/]*/|/(?:aseg|orig)[^/]*$"),
            ("not_mr", r"(?:^|/)OAS\d+_(?!MR_)[^/]*_d\d+/"),
            MINIP,
        ),
        drop="fmri|func",
        corpus_filter=True,
        **table,
    )


def _loni(dataset: str, subject: str, **table) -> Source:
    """ADNI and PPMI: subject/series/date/series number/file of the LONI archive."""
    folders = rf"(?P<subject>{subject})/(?P<description>[^/]+)/(?P<visit>\d{{4}}-\d\d-\d\d)_[^/]*"
    return Source(
        dataset=dataset,
        layouts=(
            rf"{folders}/[SI]\d+/(?:[^/]+/)*{dataset}_[^/]*_MR_[^/]*_(?P<run>I\d+)",
            rf"{folders}/(?P<run>[SI]\d+)/(?:[^/]+/)*[^/]+",
        ),
        excluded=(("not_mr", rf"(?:^|/){dataset}_{subject}_(?!MR_)[a-z]{{2}}_[^/]*$"), MINIP),
        sequences=(("FLAIR", r"flair"), ("T2star", r"t2[-_ ]?(?:star|\*)"), ("T1", r"mp-?_?rage|^mpr(?![a-z])")),
        corpus_filter=True,
        **table,
    )


SOURCES: dict[str, Source] = {
    "adni": _loni(
        "ADNI",
        r"\d{3}_S_\d{4,5}",
        published=(1563, 8019, 9548),
        listed="T1, FLAIR, T2*",
        remark="which images of the archive were requested is not published: counts will differ",
    ),
    "oasis3": _oasis(
        3,
        keep="t1|t2|mprage|flair|gre|dwi|swi|grappa|anat",
        published=(1376, 2839, 15872),
        listed="T1, T2, FLAIR, TOF, DWI, T2*, SWI",
    ),
    "oasis4": _oasis(4, published=(661, 674, 4021), listed="T1, T2, FLAIR, T2*, SWI"),
    "ppmi": _loni(
        "PPMI",
        r"\d{4,6}",
        keep="t1|t2|mprage|flair|gre|dwi|swi|grappa",
        drop="2d|resting_state|fmri|corrected|mt|repeat|space",
        published=(2011, 2979, 9554),
        listed="T1, T2, FLAIR, DWI, T2*",
    ),
    "brats21": Source(
        dataset="BraTS21",
        layouts=(
            r"(?P<subject>BraTS2021_\d+)/(?P=subject)_(?P<sequence>flair|t1ce|t1|t2)",
            r"(?P<subject>BraTS2021_\d+)_(?P<sequence>flair|t1ce|t1|t2)",
        ),
        excluded=(("label", r"_seg$"), ("other_part", r"(?:^|/)[^/]*(?:validation|(?<![a-z])test)[^/]*/")),
        labels=(r"(?P<subject>BraTS2021_\d+)_seg",),
        label_map={4: 3},
        published=(938, 938, 3752),
        listed="T1, T2, FLAIR, T1ce",
        held_out=(4215532, 1251),
        corpus_is_pool=True,
    ),
    "isles22": Source(
        dataset="ISLES22",
        layouts=(
            r"(?P<subject>sub-strokecase\d+)/(?P<visit>ses-\d+)/(?:(?:anat|dwi)/)?"
            r"(?P=subject)_(?P=visit)_(?P<sequence>flair|dwi|adc)",
            r"(?P<subject>sub-strokecase\d+)_(?P<visit>ses-\d+)_(?P<sequence>flair|dwi|adc)",
        ),
        excluded=(("label", r"(?:^|/)(?:\w+_)?derivatives/|_msk$"),),
        labels=(r"(?P<subject>sub-strokecase\d+)_(?P<visit>ses-\d+)_msk",),
        published=(250, 250, 750),
        listed="DWI, FLAIR, ADC",
        held_out=(859032, 250),
        remark="all its images, also those evaluated on, are seen in pretraining, without labels",
    ),
    "wmh": Source(
        dataset="WMH",
        layouts=_wmh("pre/(?P<sequence>FLAIR|T1)"),
        excluded=(
            ("label", r"(?:^|/)wmh$|(?:^|/)additional_annotations/"),
            ("other_part", r"(?:^|/)test(?:_[^/]*)?/"),
            ("not_preprocessed", r"(?:^|/)orig/"),
        ),
        labels=_wmh("(?:pre/)?wmh"),
        label_map={2: 0},  # other pathology
        published=(60, 60, 120),
        listed="T1, FLAIR",
        remark="the 60 training images are evaluated on in cross-validation, and 90 of the 110 test images come from "
        "their three scanners: those are not out-of-domain",
    ),
    "msseg1": Source(
        dataset="MSSEG1",
        layouts=(
            r"(?P<site>Center_\d+)/(?P<subject>Patient_\d+)/Preprocessed_Data/"
            r"(?P<sequence>FLAIR|T1|T2|DP|GADO)(?:_preprocessed)?",
        ),
        excluded=(
            ("label", r"(?:^|/)Masks/"),
            ("other_part", r"(?:^|/)testing/"),
            ("not_preprocessed", r"(?:^|/)Raw_Data/"),
        ),
        published=(15, 15, 75),
        listed="T1, T2, FLAIR, T1ce",
        remark="75 volumes are five sequences of 15: proton density (DP) as well, which Table 1 does not list",
    ),
    "msd_task01": Source(
        dataset="MSD_Task01",
        layouts=(
            r"imagesT[sr]/(?P<subject>BRATS_\d+)",
            r"imagesT[sr]/(?P<subject>BRATS_\d+)_(?P<sequence>000[0-3])",  # as nnU-Net splits them
        ),
        excluded=(("label", r"(?:^|/)labelsT[sr]/"), ("other_part", r"(?:^|/)imagesTr/")),
        sequences=(("FLAIR", "^0000$"), ("T1", "^0001$"), ("T1ce", "^0002$"), ("T2", "^0003$")),
        volumes=("FLAIR", "T1", "T1ce", "T2"),
        published=(266, 266, 1064),
        listed="T1, T2, FLAIR, T1ce",
        remark="its patients are those of BraTS 2016 and 2017, under other names: some may be among the cases of "
        "BraTS21 that are evaluated on. Table 1 says train, its 266 are imagesTs",
    ),
    "bids": Source(
        dataset="",
        layouts=(
            rf"(?P<subject>sub-[^_/]+)(?:_(?P<visit>ses-[^_/]+))?{ENTITIES}_(?P<suffix>[a-z0-9]+)",
            r"(?P<subject>sub-[^_/]+)/(?:(?P<visit>ses-[^_/]+)/)?(?:(?:anat|dwi|swi)/)?(?P<suffix>[^/]+)",
        ),
        excluded=(
            ("derivative", r"(?:^|/)(?:\w+_)?(?:derivatives|sourcedata|code|stimuli)/"),
            ("datatype", r"(?:^|/)(?:func|fmap|perf|pet|meg|ieeg|eeg|nirs|micr|mrs|motion|beh)/"),
            ("label", r"(?:mask|_seg|_dseg|_probseg|_msk|_label|_lesion|_roi)$"),
            ("part", r"_part-(?:phase|real|imag)_"),
            MINIP,
        ),
    ),
    "fomo60k": Source(
        dataset="FOMO60K",
        layouts=(
            r"(?P<site>PT\d+[^/]*)/(?P<subject>sub[-_][^/]+)/(?P<visit>ses[-_][^/]+)/(?P<suffix>[^/]+)",
            r"(?P<subject>sub[-_][^/]+)/(?P<visit>ses[-_][^/]+)/(?:[^/]+/)?(?P<suffix>[^/]+)",
        ),
        excluded=(
            ("derivative", r"(?:^|/)(?:\w+_)?derivatives/"),
            ("label", r"(?:mask|seg|msk|label|lesion|roi)$"),
            MINIP,
        ),
    ),
}
ALIASES = {"isles2022": "isles22"}


def source_name(text: str) -> str:
    """The key of a source by its name in upper or lower case.

    Raises:
        ValueError: no such source; lists them.
    """
    name = ALIASES.get(text.lower(), text.lower())
    if name not in SOURCES:
        raise ValueError(f"source {text!r} is unknown; choose from {', '.join(SOURCES)}")
    return name
