"""DICOM files in one folder for each class, grouped by patient.

The layout is that of `imagefolder`; files need no extension. Unless folders or file names give the
group, it is a hash of the patient id: no patient is in two splits, and no id is in a table. A
warning counts the files whose header does not exclude text burned into the picture. Needs the extra
`dicom`.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Literal

import pyarrow as pa

from engine.core import rows
from engine.core.errors import DataError
from engine.core.notice import Notice
from engine.data.dataset import replace_column
from engine.data.dicom import patient_hash, read_header
from engine.data.images import Rejected
from engine.data.source import Source
from engine.readers.imagefolder import FolderSpec, Imagefolder

_THREADS = 16
_HEAD = 2**20
_EXTENSIONS = (".dcm", ".dicom", ".ima", "")
_NOT_IMAGES = ("DICOMDIR", "LICENSE", "README", "VERSION")


class DicomSpec(FolderSpec):
    name: Literal["dicom"] = "dicom"


class Dicom(Imagefolder):
    version = 2
    Spec = DicomSpec

    def wanted(self, name: str) -> bool:
        path = PurePosixPath(name)
        # Scanners name files by numbers separated by dots.
        known = path.suffix.lower() in _EXTENSIONS or path.suffix[1:].isdigit()
        return known and path.name.upper() not in _NOT_IMAGES

    def records(self) -> pa.Table:
        records = super().records()
        source = Source(self.spec.root)

        def header(uri: str) -> dict[str, str]:
            try:
                return read_header(source.head(uri, _HEAD))
            except Rejected as rejected:
                if rejected.reason == "format_not_allowed":
                    raise DataError(f"reader: {rejected}") from None
                return {}  # decoding reports the error

        with ThreadPoolExecutor(_THREADS) as pool:
            headers = list(pool.map(header, records[rows.URI].to_pylist()))
        self.burned_in = Counter(fields.get("burned_in", "") for fields in headers)
        if self.spec.group_separator:
            return records
        if "group" in self.spec.layout:
            # Patient folders are often named by patient ids.
            folders = [patient_hash(name) for name in records[rows.GROUP_ID].to_pylist()]
            return replace_column(records, rows.GROUP_ID, folders)
        # An unreadable file is a group of its own.
        groups = [
            fields.get("patient") if fields else image_id
            for fields, image_id in zip(headers, records[rows.IMAGE_ID].to_pylist(), strict=True)
        ]
        return replace_column(records, rows.GROUP_ID, [group or None for group in groups])

    def warnings(self) -> list[Notice]:
        unknown, yes = (self.burned_in[word] for word in ("", "YES"))
        warnings = []
        if yes:
            warnings.append(Notice.of("burned_in", files=yes))
        if unknown:
            warnings.append(Notice.of("burned_in_unknown", files=unknown))
        return warnings
