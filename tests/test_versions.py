"""What pyproject.toml says holds elsewhere, too: Pythons, version, checks; and the files for GitHub are well formed."""

import tomllib
from pathlib import Path

import yaml

import turbojax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_workflow_runs_on_every_python():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["test"]
    versions = [tuple(map(int, v.split("."))) for v in job["strategy"]["matrix"]["python"]]
    first, last = versions[0], versions[-1]
    assert versions == [(3, minor) for minor in range(first[1], last[1] + 1)]
    assert job["steps"][-1] == {"run": ".ci/run"}
    assert PROJECT["project"]["requires-python"] == f">=3.{first[1]},<3.{last[1] + 1}"
    assert PROJECT["tool"]["mypy"]["python_version"] == f"3.{first[1]}"
    assert f"Python 3.{first[1]} to 3.{last[1]}." in (ROOT / "README.md").read_text()
    named = [name.rpartition(" ")[2] for name in PROJECT["project"]["classifiers"] if "Python :: 3." in name]
    assert named == [f"3.{minor}" for _, minor in versions]


def test_the_version_has_its_changes():
    assert f"\n## {turbojax.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_hooks_before_a_commit_are_checks_of_ci():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    commands = (ROOT / ".ci" / "run").read_text().splitlines()
    for hook in local["hooks"]:
        assert any(line.startswith(hook["name"]) for line in commands), hook["name"]


def test_the_citation_names_the_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["repository-code"] == PROJECT["project"]["urls"]["Homepage"]
    for paper in citation["references"]:
        (identifier,) = paper["identifiers"]
        assert paper["url"] == f"https://arxiv.org/abs/{identifier['value'].removeprefix('arXiv:')}"


def test_issue_forms_are_well_formed():
    forms = [path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"]
    assert forms
    for form in map(yaml.safe_load, (path.read_text() for path in forms)):
        assert form.keys() >= {"name", "description", "body"}
        names = [field["id"] for field in form["body"]]
        assert len(set(names)) == len(names)
        assert all(field["attributes"]["label"] for field in form["body"])
