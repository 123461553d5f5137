"""An array on disk that grows: rows in memory until `sync`, and cut back by a process that resumes."""

from pathlib import Path

import numpy as np


class ArrayFile:
    """Rows of uint64 numbers, appended to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unsaved: list[np.ndarray] = []
        self._saved = 0

    def append(self, rows: np.ndarray) -> None:
        """Add rows, in memory."""
        self._unsaved.append(rows)

    def sync(self) -> int:
        """Append the new rows to the file; returns how many it has, for `truncate`."""
        with self.path.open("ab") as file:
            for rows in self._unsaved:
                rows.tofile(file)
                self._saved += len(rows)
        self._unsaved = []
        return self._saved

    def truncate(self, count: int, columns: int = 1) -> None:
        """Keep the first `count` rows of the file, and none in memory."""
        with self.path.open("r+b") as file:
            file.truncate(8 * columns * count)
        self._saved, self._unsaved = count, []
