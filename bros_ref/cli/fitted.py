"""A table that fits its terminal: where the columns do not fit side by side, the rest continues below.

No figure is ever cut or broken. The first columns, which say what a row is about, are repeated in every part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

BETWEEN = 3  # columns of the terminal between two columns of a table
PROSE_WIDTH = 20  # to which a column of words may shrink before it moves to the next part


@dataclass(frozen=True)
class Column:
    """A heading, which may break at its spaces, and the alignment of the cells below it.

    Attributes:
        is_text: words, aligned left; otherwise figures, aligned right.
        is_prose: sentences, which may break too.
    """

    heading: str
    is_text: bool = False
    is_prose: bool = False


@dataclass
class FittedTable:
    """Rows of text under `columns`; the first `num_keys` columns are repeated in every part."""

    title: str
    columns: Sequence[Column]
    rows: list[list[str]] = field(default_factory=list)
    caption: str = ""
    num_keys: int = 1

    def add_row(self, *cells: str) -> None:
        """Adds a row, one cell for each column."""
        if len(cells) != len(self.columns):
            raise ValueError(f"a row needs {len(self.columns)} cells, got {len(cells)}")
        self.rows.append(list(cells))

    def parts(self, width: int) -> list[list[int]]:
        """The columns of each part: as many as fit `width`, at least one beside the keys."""
        keys = list(range(self.num_keys))
        parts = [keys.copy()]
        for place in range(self.num_keys, len(self.columns)):
            if len(parts[-1]) > self.num_keys and self._width_of([*parts[-1], place]) > width:
                parts.append(keys.copy())
            parts[-1].append(place)
        return parts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield Text(self.title, style="bold")
        for number, places in enumerate(self.parts(options.max_width)):
            yield from [Text()] * (number > 0)
            yield self._part(places, options.max_width)
        if self.caption:
            yield Text("\n" + self.caption, style="dim")
        yield Text()

    def _part(self, places: Sequence[int], width: int) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
        spare = width - self._width_of(places)
        for place in places:
            column, wide = self.columns[place], self._narrowest(place)
            if column.is_prose:
                more = max(0, min(spare, self._longest(place) - wide))
                wide, spare = wide + more, spare - more
            table.add_column(column.heading, width=wide, justify="left" if column.is_text or column.is_prose
                             else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(row[place]) for place in places))
        return table

    def _width_of(self, places: Sequence[int]) -> int:
        return sum(map(self._narrowest, places)) + BETWEEN * (len(places) - 1)

    def _narrowest(self, place: int) -> int:
        """Terminal columns that this column needs."""
        heading = max(map(cell_len, self.columns[place].heading.split()), default=0)
        longest = self._longest(place)
        if self.columns[place].is_prose:
            words = max((cell_len(word) for row in self.rows for word in row[place].split()), default=0)
            longest = max(words, min(PROSE_WIDTH, longest))
        return max(heading, longest, 1)

    def _longest(self, place: int) -> int:
        return max((cell_len(row[place]) for row in self.rows), default=0)
