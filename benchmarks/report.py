"""The tables and pictures of the documentation, made from result files. Text between `<!-- table:NAME -->` and
`<!-- /table -->` is replaced; nobody types a number.

    python benchmarks/report.py           writes them
    python benchmarks/report.py --check   changes nothing, and fails if something would change

Every file of this folder may have `tables(results)`, which makes tables by name from a folder of result files, and
`pictures(results, images)`, which draws. All of them are asked; there is no list to enter.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer
from rich.progress import track

from mnemic.cli.results import refuse_edited
from mnemic.cli.show import console, need
from scripts import launch

HERE = Path(__file__).resolve().parent
BLOCK = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def fill(path: Path, tables: dict[str, str], *, write: bool = True) -> bool:
    """Fills the tables of one file; returns whether it changes. Raises `KeyError` for a table nobody makes."""
    text = path.read_text()

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{tables[match['name']]}\n\n{match[3]}"

    filled = BLOCK.sub(table, text)
    if write and filled != text:
        path.write_text(filled)
    return filled != text


def slices() -> list[ModuleType]:
    """Every file of this folder but this one."""
    return [importlib.import_module(path.stem) for path in sorted(HERE.glob("*.py")) if path.stem != "report"]


def every_table(results: Path) -> dict[str, str]:
    """Every table that can be made from a folder of results, by name. Raises `ValueError` for a name used twice."""
    made: dict[str, str] = {}
    for each in slices():
        found = each.tables(results) if hasattr(each, "tables") else {}
        if twice := sorted(made.keys() & found.keys()):
            raise ValueError(
                f"{each.__name__}.py makes the table {twice[0]!r}, which another file makes too; rename it"
            )
        made |= found
    return made


app = typer.Typer(add_completion=False)


@app.command()
def main(
    results: Annotated[Path, typer.Option(help="The result files.")] = HERE.parent / "results",
    root: Annotated[Path, typer.Option(help="Where README.md and docs/ are.")] = HERE.parent,
    check: Annotated[bool, typer.Option(help="Change nothing; fail if something would change.")] = False,
) -> None:
    """Writes the tables and pictures of the documentation. A result file that was edited is refused."""
    if not (root / "docs").is_dir() or not results.is_dir():
        raise typer.BadParameter(
            f"{root} needs docs/, and {results} result files; name others with --root and --results"
        )
    if not check:
        need("matplotlib")
    refuse_edited(results)
    made = every_table(results)
    pages = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    changed = [page for page in pages if page.is_file() and fill(page, made, write=not check)]
    drawing = [] if check else [each for each in slices() if hasattr(each, "pictures")]
    for each in track(drawing, "pictures", console=console, transient=True, disable=not console.is_terminal):
        each.pictures(results, root / "docs" / "images")
    for page in changed:
        console.print(("stale: " if check else "wrote: ") + str(page))
    if check and changed:
        raise typer.Exit(1)


if __name__ == "__main__":
    launch(app)
