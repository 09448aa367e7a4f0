"""Every Python that the package allows is one that the workflow runs the tests on."""

import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def test_the_workflow_runs_on_every_python():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    versions = [tuple(map(int, v.split("."))) for v in workflow["jobs"]["test"]["strategy"]["matrix"]["python"]]
    first, last = versions[0], versions[-1]
    assert versions == [(3, minor) for minor in range(first[1], last[1] + 1)]
    assert project["project"]["requires-python"] == f">=3.{first[1]},<3.{last[1] + 1}"
    assert project["tool"]["mypy"]["python_version"] == f"3.{first[1]}"
    assert f"Python 3.{first[1]} to 3.{last[1]}." in (ROOT / "README.md").read_text()
