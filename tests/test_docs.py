"""The documentation: its code runs, its sections are the README's, its reference is complete."""

import importlib.util
import re
from pathlib import Path

import pyro
import pytest
import torch
import yaml

import pyro_lightning

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = sorted(DOCS.rglob("*.md"))


def module(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize(
    "page", [page.relative_to(DOCS).as_posix() for page in PAGES if CODE.search(page.read_text())]
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"pyro": pyro}
    with pyro.get_param_store().scope():
        for block in CODE.findall((DOCS / page).read_text()):
            exec(compile(block, page, "exec"), names)


def test_every_public_name_is_in_the_reference():
    named = re.findall(r"^::: pyro_lightning\.(\w+)$", (DOCS / "reference.md").read_text(), re.M)
    assert sorted(named) == sorted(pyro_lightning.__all__)


def test_every_example_is_in_the_list_of_examples():
    listed = re.findall(r"^\| `(\w+\.py)` ", (DOCS / "examples.md").read_text(), re.M)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def test_every_example_runs_in_make_examples():
    run = set(re.findall(r"python examples/(\w+\.py)", (ROOT / "Makefile").read_text()))
    assert run == {path.name for path in (ROOT / "examples").glob("*.py")}


README = """# Title

## One

text of one

```python
# no heading
## nor this
```

### Part

text of the part

## Two

text of two
"""


@pytest.mark.parametrize(
    ("name", "begins", "ends", "within"),
    [
        ("One", "text of one", "text of the part", "# no heading"),
        ("Part", "text of the part", "text of the part", ""),
        ("Two", "text of two", "text of two", ""),
    ],
)
def test_a_section_of_the_readme_goes_up_to_the_next_of_its_level(name, begins, ends, within):
    found = module("readme").section(README, name)
    assert found.startswith(begins) and found.endswith(ends) and within in found


@pytest.mark.parametrize("name", ["Three", "no heading"])
def test_a_section_that_the_readme_does_not_have_is_an_error(name):
    with pytest.raises(ValueError, match=f"0 headings '{name}'"):
        module("readme").section(README, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_section_that_a_page_asks_for_is_in_the_readme(page):
    readme = module("readme")
    for name in readme._HERE.findall(page.read_text()):
        assert readme.section((ROOT / "README.md").read_text(), name)


def test_links_of_a_section_lead_from_its_page():
    readme, text = (
        module("readme"),
        "see [speed](docs/speed.png), [how](CONTRIBUTING.md), [b](#two)",
    )
    linked = readme._LINK.sub(lambda link: readme._linked(link, "../"), text)
    assert linked == "see [speed](../speed.png), [how], [b]"


def test_roles_and_formulas_of_docstrings_become_markdown():
    pytest.importorskip("griffe", reason="griffe comes with the extra 'docs'")
    text = "One :class:`~pyro_lightning.A` and :meth:`b`.\n\n.. math:: x +\n    y\n\nExample:\n"
    found = module("rst").as_markdown(text)
    assert found == "One `pyro_lightning.A` and `b`.\n\n$$\nx + y\n$$\n\nExamples:\n"


def test_the_site_is_built_of_pages_that_are_there():
    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        parts = entry if isinstance(entry, list) else list(entry.values())
        return [page for part in parts for page in pages(part)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)
