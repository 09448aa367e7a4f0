"""What docs/web.md says over HTTP, by curl and as written but for the address, with the demo's settings and form."""

import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from tests.docs.pages import ROOT, blocks
from turbojax.app import generate
from turbojax.app.web.page import Server, build, launch
from turbojax.config import load_config
from turbojax.shapes.demo import demo_picture

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio"),
    pytest.mark.skipif(shutil.which("curl") is None, reason="no curl is installed"),
]

WRITTEN = "http://127.0.0.1:7860"
FIRST, UPLOAD, CANCEL, LOGIN = [block.text for block in blocks(ROOT / "docs" / "web.md") if "curl" in block.text]


@pytest.fixture(scope="module")
def serve(demo_pipe, tmp_path_factory):
    """Serves the page of configs/demo.py with tiny networks, for all or to a name and a password; gives its address."""
    served = []
    config = load_config("demo")

    def serve(auth=None):
        server = Server(config, tmp_path_factory.mktemp("videos"))
        page = build(server)
        served.append((server, page))
        return launch(page, server, port=0, auth=auth).rstrip("/")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "load_pipeline", lambda options, prepare: demo_pipe)
        yield serve
        for server, page in served:
            server.jobs.close()
            page.close()


def bash(script: str, address: str, folder) -> list[str]:
    """The lines that a script prints."""
    assert WRITTEN in script
    script = script.replace(WRITTEN, address)
    run = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_a_video_an_upload_and_a_cancellation(serve, tmp_path):
    address = serve()
    Image.fromarray(demo_picture()).save(tmp_path / "cat.png")
    server = FIRST.splitlines()[0]

    *_, event, data, _ = bash(FIRST, address, tmp_path)
    assert event == "event: complete", data
    status, video, *_ = json.loads(data.removeprefix("data: "))
    assert video["url"].endswith(".mp4"), status

    (uploaded,) = bash(f"{server}\n{UPLOAD}", address, tmp_path)
    (path,) = json.loads(uploaded)
    assert path.endswith("cat.png")

    (cancelled,) = bash(f"{server}\n{CANCEL}", address, tmp_path)
    assert "error" not in json.loads(cancelled)


def test_a_login(serve, tmp_path):
    (line,) = [
        line for line in (ROOT / "docs" / "web.md").read_text().splitlines() if line.startswith("TURBOJAX_PASSWORD")
    ]
    password, name = re.search(r"TURBOJAX_PASSWORD=(\S+) .* --user=(\S+)", line).groups()
    address = serve((name, password))
    (answer,) = bash(LOGIN, address, tmp_path)
    assert json.loads(answer) == {"success": True}
    *_, data, _ = bash(FIRST.replace("curl ", "curl -b cookies "), address, tmp_path)
    assert ".mp4" in data
