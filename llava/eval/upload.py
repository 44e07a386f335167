"""Files for a benchmark's server or official script: lines of text, and the workbook that MMBench's server reads.

Every file appears complete or not at all, and the same answers give the same bytes, on whatever day.
"""

import datetime
import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from llava.files import write_bytes

# The earliest time that a zip archive can hold stands for "no time".
NO_TIME = datetime.datetime(1980, 1, 1)
PROPERTY_FILE = "docProps/core.xml"

Cell = str | int | None


def write_workbook(path: Path, rows: Sequence[Sequence[Cell]]) -> Path:
    """Write an Excel workbook (`.xlsx`) of one sheet and return its path.

    Args:
        path: the file.
        rows: cells, the first row being the titles; None leaves a cell empty. Texts stay texts, also those that look
            like a formula; control characters, which the format can't hold, are dropped.
    """
    # Only this needs the library.
    from openpyxl import Workbook
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    from openpyxl.xml.functions import tostring

    workbook = Workbook()
    sheet = workbook.active
    sheet.title = "Sheet1"
    for number, row in enumerate(rows, start=1):
        for column, value in enumerate(row, start=1):
            if value is None:
                continue
            if isinstance(value, int):
                sheet.cell(number, column, value)
                continue
            # A plain assignment would guess the type from the text.
            cell = sheet.cell(number, column, ILLEGAL_CHARACTERS_RE.sub("", value))
            cell.data_type = "s"
    saved = BytesIO()
    workbook.save(saved)
    workbook.properties.created = workbook.properties.modified = NO_TIME
    return write_bytes(path, _drop_times(saved, tostring(workbook.properties.to_tree())))


def _drop_times(archive: BytesIO, properties: bytes) -> bytes:
    """Pack a workbook anew, with the given properties and without the time of day."""
    repacked = BytesIO()
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(repacked, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            content = properties if name == PROPERTY_FILE else source.read(name)
            target.writestr(zipfile.ZipInfo(name, NO_TIME.timetuple()[:6]), content, zipfile.ZIP_DEFLATED)
    return repacked.getvalue()
