"""What the site is made with: links that hold in the repository and on the site, pages made from the code."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs" / "site"))

import links  # noqa: E402
import messages  # noqa: E402
import rows  # noqa: E402
import settings  # noqa: E402

from launch.stages import STAGES  # noqa: E402
from rlhf.config_options import known_keys  # noqa: E402


def test_no_link_of_the_repository_is_broken():
    assert [*links.broken(ROOT)] == []


@pytest.mark.parametrize(
    ("link", "fault"),
    [
        ("other.md", None),
        ("other.md#a-heading-with-code", None),
        ("#here", None),
        ("sub/", None),
        ("https://example.org/nowhere", None),
        ("othr.md", "no such file"),
        ("other.md#a-headng", "no such heading"),
        ("#not-here", "no such heading"),
        ("sub/none.png", "no such file"),
        ("other.md#in-code", "no such heading"),
    ],
)
def test_a_link_to_what_is_not_there_is_named_with_its_line(tmp_path, link, fault):
    (tmp_path / "sub").mkdir()
    (tmp_path / "other.md").write_text("# Other\n\n## A heading with `code`\n\n```\n# in code\n```\n")
    (tmp_path / "page.md").write_text(f"# Here\n\ntext [link]({link}) text\n\n```\n[not a link](nowhere.md)\n```\n")
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    assert [*links.broken(tmp_path)] == ([f"page.md:3: {link}: {fault}"] if fault else [])


@pytest.mark.parametrize(
    ("page", "link", "there"),
    [
        ("reward.md", "data.md#files", "data.md#files"),
        ("deepspeed.md", "../ds_configs/README.md", "files/ds_configs/README.md"),
        ("slurm.md", "../launch/clusters/example.yaml", "files/launch/clusters/example.yaml.md"),
        ("slurm.md", "../launch/scripts", "files/launch/scripts/index.md"),
        ("files/benchmarks/README.md", "../docs/plan.md#how-to-read-it", "../../plan.md#how-to-read-it"),
        ("files/CHANGELOG.md", "docs/data.md", "../data.md"),
        ("plan.md", "https://example.org", "https://example.org"),
        ("plan.md", "#here", "#here"),
    ],
)
def test_a_link_leads_to_the_same_thing_on_the_site(page, link, there):
    assert links.for_site(f"see [it]({link}).", page) == f"see [it]({there})."


@pytest.mark.parametrize(
    ("html", "shown"),
    [
        ("<p><code>rlhf x --any-code -f</code></p>", "<p><code>rlhf x {--any-code} {-f}</code></p>"),
        ("<code>step-0001 a--b</code> --no-code", "<code>step-0001 a--b</code> --no-code"),
        ("<pre><code>x --two-words</code></pre>", "<pre><code>x --two-words</code></pre>"),
    ],
)
def test_an_option_in_a_sentence_is_a_word_that_no_line_breaks(html, shown):
    marked = shown.replace("{", '<span class="option">').replace("}", "</span>")
    assert links.with_whole_options(html) == marked


def test_files_that_pages_link_to_are_pages_and_what_these_link_to_as_well():
    pages = links.pages()
    assert "files/benchmarks/margin_study/README.md" in pages and "files/CHANGELOG.md" in pages
    assert "partition:" in pages["files/launch/clusters/example.yaml.md"]
    assert "## torchrun_nodes.sh" in pages["files/launch/scripts/index.md"]


@pytest.mark.parametrize("stage", STAGES)
def test_every_setting_of_a_stage_is_on_its_page(stage):
    page = settings.pages()[f"{settings.FOLDER}/{stage}.md"]
    assert [key for key in known_keys(STAGES[stage].config_class()) if key.rpartition(".")[2] not in page] == []


SOURCE = """
class Config:
    def __post_init__(self):
        if self.a:
            raise ValueError(f"a = {self.a}: expected less than {_bound(self.b)}, or none")

def read(path):
    raise ValueError("for our own eyes")
    if path:
        raise DataError(
            f"{path}: no such file; "
            "give another"
        )
    raise ConfigError("\\n".join([f"{PROGRAM}: first", *others]))

def check(rows):
    problems = [f"{row}: is not good" for row in rows]
    for row in rows:
        problems.append(f"{row}: is worse, give another")
    more = "no message of ours"
    if problems:
        raise DataError("\\n  ".join(problems))
    raise ModelError(_why(rows))

def _why(rows):
    if rows:
        return f"{rows[0]} has no end; close it"
    return _other()

def _other():
    yield f"none of {len(rows)} rows" + " can be read"

def _complaint(value):
    return f"a word too many, namely {value}" if value else ""

def refused(detail: str) -> DataError:
    return DataError(f"{detail}: mend the file")

def use(row):
    raise row.refused("there is no column for it") if row else TypeError("for programmers alone")
"""


def test_messages_are_collected_with_the_names_of_their_values_and_however_they_are_put_together():
    tree = ast.parse(SOURCE)
    assert [*messages.makers_of(tree)] == ["refused"]
    found = [*messages.messages_of(tree, makers=["refused"])]
    assert {*found} == {
        "a = {a}: expected less than {b}, or none",
        "{path}: no such file; give another",
        "{PROGRAM}: first\n{...}",
        "{row}: is not good",
        "{row}: is worse, give another",
        "{rows} has no end; close it",
        "none of {rows} rows can be read",
        "{detail}: mend the file",
        "there is no column for it",
        "a word too many, namely {value}",
    }
    assert "for our own eyes" in {*messages.messages_of(tree, settings=True)}


def test_the_page_of_messages_has_those_of_every_package_once():
    section = messages.section()
    lines = [line for line in section.splitlines() if line.startswith("* ")]
    assert len(lines) > 200 and "no recipe of this name ships" in section and "\n### Data\n" in section
    assert "unknown key (did you mean *near*?)" in section
    assert {package for package, _, _ in (module.partition(".") for module, _ in messages.collected())} == {
        *messages.PACKAGES
    }


def test_every_example_of_the_page_on_data_can_be_downloaded():
    text = (ROOT / "docs" / rows.PAGE).read_text()
    shown = rows.with_downloads(text)
    assert len(rows.files()) > 15 and all(f"({path}){{ download }}" in shown for path in rows.files())
    assert all(content.startswith("{") for content in rows.files().values())
