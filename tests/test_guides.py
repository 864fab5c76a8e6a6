"""Every command in the guides runs, in order, in a folder that has what the guide says that its reader has."""

from __future__ import annotations

import pytest

from tests.documents import ROOT
from tests.guides import NOT_RUN, blocks_of, run_guide

GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
QUICK = {"five-minutes"}  # those that need no model; the others start a dozen processes that load torch
COMMANDS = [page for page in GUIDES if any(block.language in ("bash", "python") for block in blocks_of(page))]


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.stem, marks=[] if page.stem in QUICK else [pytest.mark.slow]) for page in COMMANDS],
)
@pytest.mark.timeout(900)
def test_the_commands_of_a_guide_run_one_after_the_other(page, tmp_path):
    assert run_guide(page, tmp_path) > 0


@pytest.mark.parametrize("page", GUIDES, ids=[page.stem for page in GUIDES])
def test_what_a_guide_does_not_run_it_says(page):
    """In the title, which the site shows, and in the text beside it, which every reader of the file sees."""
    blocks = blocks_of(page)
    assert page.read_text(encoding="utf-8").count("```") == 2 * len(blocks), "a fence that the tests do not see"
    for number, block in enumerate(blocks):
        assert block.language not in ("sh", "console", "shell"), f"{block.language}: write bash, so that it is run"
        if block.skipped:
            after = blocks[number + 1].before if number + 1 < len(blocks) else page.read_text().split(block.code)[-1]
            assert NOT_RUN in (block.before + after).lower()


def test_a_command_that_fails_and_a_text_that_differs_are_found(tmp_path):
    page = tmp_path / "page.md"
    for number, (code, complaint) in enumerate(
        [
            ("```bash\nafresh-curate dedup nowhere out\n```\n", "no such file"),
            ("```bash\necho a\n```\n\n```text\nb\n```\n", "printed:\na"),
            ("```bash\nexport A=1\ncd photos\n```\n\n```bash\ntest $A = 2\n```\n", "block 1"),
        ]
    ):
        page.write_text(code)
        (tmp_path / str(number)).mkdir()
        with pytest.raises(AssertionError, match=complaint):
            run_guide(page, tmp_path / str(number))
