"""Every Python block of the README and of the documentation runs, in order, page by page."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text):
    """Return the Python blocks of a page, each shifted to its line so that errors point there."""
    found = BLOCK.finditer(text)
    return ["\n" * text[: match.start(1)].count("\n") + match[1] for match in found]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)  # as for a reader
    names = {"__name__": "__main__"}
    for block in blocks(page.read_text()):
        exec(compile(block, str(page), "exec"), names)


def test_a_block_keeps_its_line():
    (block,) = blocks("one\n\n```python\n1 / 0\n```\n\n```text\nnothing\n```\n")
    with pytest.raises(ZeroDivisionError) as error:
        exec(compile(block, "page.md", "exec"), {})
    assert error.traceback[-1].lineno + 1 == 4
