"""Runs the commands of README.md and docs/, and puts what they print and draw back there.

``python docs/refresh.py`` rewrites every ``console`` block and the pictures in ``docs/images``;
``--check`` only says which blocks are out of date. Tests use the functions of this file.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

#: Pictures of the documentation and the figure of the report that each is a copy of.
PICTURES = {"speed.png": "memory"}
DRAWING = (
    "compare --trace traces/samples/granular-64x8.parquet --sizes qwen3-30b "
    "--policy lru --policy lfru --policy predictive --policy belady "
    "--cache 13% --cache 25% --cache 50% --cache 75% --report figures"
)

_FENCE = re.compile(r"^```(?P<kind>\S*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its text and where it begins and ends."""

    page: Path
    kind: str
    body: str
    start: int
    end: int


def blocks(page: Path) -> list[Block]:
    """Every fenced block of *page* in order."""
    return [
        Block(page, found["kind"], found["body"], found.start("body"), found.end("body"))
        for found in _FENCE.finditer(page.read_text(encoding="utf-8"))
    ]


def commands(body: str, kinds: tuple[str, ...] = ("simctl",)) -> Iterator[str]:
    """The commands of *kinds* in a shell or console block, continued lines joined."""
    joined = re.sub(r"\s*\\\n\s*", " ", body)
    for line in joined.splitlines():
        command = line.removeprefix("$ ").split(" # ")[0].strip()
        if command.partition(" ")[0] in kinds:
            yield command


def placeholders(command: str) -> bool:
    """Whether *command* names something only the reader has, in capitals."""
    return re.search(r"\b(MODELS?|PROMPTS|FOLDER)\b", command) is not None


def written_files(page: Path) -> Mapping[str, str]:
    """The files that a page tells its reader to write: ``# name.py`` comes first in the block."""
    files = {}
    for block in blocks(page):
        first, _, rest = block.body.partition("\n")
        if block.kind in ("python", "toml") and re.fullmatch(r"# \S+\.(py|toml)", first):
            files[first[2:]] = rest
    return files


def furnish(folder: Path, page: Path, samples: Path = ROOT / "traces/samples") -> None:
    """Put into *folder* what the commands of *page* expect beside them."""
    shutil.copytree(samples, folder / "traces/samples", dirs_exist_ok=True)
    shutil.copytree(ROOT / "traces/predictors", folder / "traces/predictors", dirs_exist_ok=True)
    shutil.copytree(ROOT / "examples", folder / "examples", dirs_exist_ok=True)
    for name, text in written_files(page).items():
        (folder / name).write_text(text, encoding="utf-8")


def run(command: str) -> tuple[int, str]:
    """Exit code and standard output of a ``simctl`` command; ``| head -n N`` is understood."""
    import simctl

    command, _, pipe = command.partition(" | ")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = int(simctl.main(shlex.split(command)[1:]) or 0)
    lines = printed.getvalue().splitlines(keepends=True)
    if pipe:
        tool, _, count = shlex.split(pipe)
        lines = {"head": lines[: int(count)], "tail": lines[-int(count) :]}[tool]
    return code, "".join(lines)


def replayed(block: Block) -> str:
    """The text of a console block if its commands were typed now."""
    text = ""
    for command in commands(block.body):
        code, output = run(command)
        if code:
            raise SystemExit(f"{block.page}: {command} left with {code}")
        text += f"$ {_wrapped(block.body, command)}\n{output.rstrip()}\n\n"
    return text.rstrip() + "\n"


def _wrapped(body: str, command: str) -> str:
    """*command* as the block breaks it into lines."""
    pattern = r"\s+(?:\\\n\s*)?".join(map(re.escape, command.split()))
    found = re.search(pattern, body)
    return found.group() if found else command


def draw(folder: Path) -> None:
    """Make the pictures of the documentation in *folder*."""
    import simctl

    with contextlib.redirect_stdout(io.StringIO()):
        if simctl.main(shlex.split(DRAWING)):
            raise SystemExit(f"simctl {DRAWING} failed")
    folder.mkdir(exist_ok=True)
    for picture, figure in PICTURES.items():
        shutil.copy(Path("figures/figures") / f"{figure}.png", folder / picture)


def main() -> int:
    """Refresh, or with ``--check`` compare."""
    check, stale = "--check" in sys.argv[1:], 0
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        for page in PAGES:
            furnish(Path(work), page)
            text = page.read_text(encoding="utf-8")
            shown = [block for block in blocks(page) if block.kind == "console"]
            for block, fresh in reversed([(block, replayed(block)) for block in shown]):
                stale += fresh != block.body
                text = text[: block.start] + fresh + text[block.end :]
            if not check:
                page.write_text(text, encoding="utf-8")
        if not check:
            draw(ROOT / "docs/images")
    print(f"{stale} blocks {'are' if check else 'were'} out of date")
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
