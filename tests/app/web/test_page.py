"""The page as people use it: in a headless Chromium, and over HTTP."""

import html
import json
import shutil
import threading

import httpx
import imageio.v2 as imageio
import pytest
from gradio.utils import get_upload_folder
from PIL import Image

from tests.app.small import SMALL
from turbojax.app import generate
from turbojax.app.web.form import first_values
from turbojax.app.web.page import Server, build, launch
from turbojax.config import base_config

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio"),
]

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
PATIENCE = 300  # seconds that nothing takes, however busy the machine is


class Gate:
    """The demo's pipeline, whose calls wait after the prompt is read while the gate is shut."""

    def __init__(self, pipe):
        self.pipe, self.open, self.held = pipe, threading.Event(), threading.Event()
        self.open.set()

    def generate(self, request, *, progress):
        def held(stage, share):
            progress(stage, share)
            if stage == "diffusion":
                self.held.set()
                assert self.open.wait(PATIENCE)
                progress(stage, share)

        return self.pipe.generate(request, progress=held)


@pytest.fixture(scope="module")
def gate(demo_pipe):
    return Gate(demo_pipe)


@pytest.fixture
def shut(gate):
    """The gate, shut until the end of the test or before."""
    gate.held.clear()
    gate.open.clear()
    yield gate
    gate.open.set()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A file of 200 MB, which are nowhere on the disk."""
    path = tmp_path_factory.mktemp("large") / "large.png"
    with path.open("wb") as file:
        file.truncate(200 * 2**20)
    return path


@pytest.fixture(scope="module")
def url(gate, folder, demo):
    config = base_config(**SMALL, prompt="A red bird")
    server = Server(config, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "load_pipeline", lambda options, prepare: gate)
        patch.setattr("turbojax.app.web.page.makes_from_images", lambda config: True)  # there is a field for one
        page = build(server)
        address = launch(page, server, port=0)
        yield address.rstrip("/")
        gate.open.set()
        server.jobs.close()
        page.close()


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, url):
    """Opens the page as another person, at a width in pixels."""
    contexts = []

    def visit(width=1280):
        contexts.append(browser.new_context(viewport={"width": width, "height": 844}))
        page = contexts[-1].new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.goto(url)
        page.wait_for_selector("#generate")
        return page

    yield visit
    for context in contexts:
        context.close()


def ask(page, prompt):
    page.fill("#prompt textarea", prompt)
    page.click("#generate")


def says(page, text):
    page.wait_for_selector(f"#status >> text={text}")


def shown(page):
    """The stem of the video's file, once it plays."""
    page.wait_for_function(
        "(() => {const v = document.querySelector('#video video'); return v && v.currentTime > 0})()"
    )
    return page.evaluate("document.querySelector('#video video').src").rsplit("/", 1)[1].removesuffix(".mp4")


def saved(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def values(**changes):
    return list((first_values(base_config(**SMALL, prompt="A red bird")) | changes).values())


def call(url, name, data, session="someone"):
    """The events of a call of the API, as curl shows them: pairs of event and data."""
    made = httpx.post(f"{url}/gradio_api/call/{name}", json={"data": data, "session_hash": session}, timeout=PATIENCE)
    made.raise_for_status()
    text = httpx.get(f"{url}/gradio_api/call/{name}/{made.json()['event_id']}", timeout=PATIENCE).text
    lines = [line.partition(": ")[2] for line in text.splitlines() if line]
    return [(event, json.loads(data)) for event, data in zip(lines[::2], lines[1::2], strict=True)]


@pytest.mark.parametrize("width", [1280, 390])
def test_from_an_empty_page_to_a_playing_video(visit, folder, width):
    page = visit(width)
    ask(page, f"A cat, {width} wide")
    says(page, "Done in")
    name = shown(page)
    assert saved(folder, name)["settings"]["prompt"] == f"A cat, {width} wide"
    assert len(imageio.mimread(folder / f"{name}.mp4")) == 5
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.path().read_bytes() == (folder / f"{name}.mp4").read_bytes()

    ask(page, f"A dog, {width} wide")
    page.wait_for_selector(f"#gallery button:has-text('A dog, {width} wide')")
    page.click(f"#gallery button:has-text('A cat, {width} wide')")
    page.wait_for_function(f"document.querySelector('#video video').src.endsWith('{name}.mp4')")
    page.click("#reuse")
    page.wait_for_function(f"document.querySelector('#prompt textarea').value == 'A cat, {width} wide'")


def test_two_at_once(visit, shut, folder):
    first, second = visit(), visit(390)
    ask(first, "A red car")
    assert shut.held.wait(PATIENCE)
    says(first, "Denoising")
    ask(second, "A blue car")
    says(second, "Waiting: 1 before you")
    shut.open.set()
    for page, prompt in ((first, "A red car"), (second, "A blue car")):
        says(page, "Done in")
        assert saved(folder, shown(page))["settings"]["prompt"] == prompt


def test_cancel(visit, shut, folder):
    first, second = visit(), visit()
    before = set(folder.iterdir())
    ask(first, "A car that never comes")
    assert shut.held.wait(PATIENCE)
    ask(second, "A car that leaves the queue")
    says(second, "Waiting: 1 before you")
    second.click("#cancel")
    says(second, "Cancelled")
    first.click("#cancel")
    says(first, "Cancelling, after this stage at the latest: Denoising")
    shut.open.set()
    says(first, "Cancelled")
    assert set(folder.iterdir()) == before
    ask(first, "A car after that")
    says(first, "Done in")


def test_mistakes_are_messages(visit):
    page = visit()
    for prompt, message in (("word " * 10_000, "characters; give at most 4000"), (" ", "the prompt is empty")):
        ask(page, prompt)
        page.wait_for_selector(f"text={message}")
        says(page, "No video")
    ask(page, "A cat")
    says(page, "Done in")


def test_a_large_image_is_a_message(visit, large):
    page = visit()
    page.set_input_files("input[type=file]", large)
    page.wait_for_selector("text=exceed the maximum allowed size of 20.0 Mb")
    ask(page, "A cat without an image")
    says(page, "Done in")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "word " * 10_000}, "50000 characters"),
        ({"resolution": "1080p"}, "1080p"),
        ({"num_frames": 6}, "nearest: 5, 9"),
        ({"seed": -1}, "seed"),
        ({"seed": None}, "seed is empty"),
        ({"num_inference_steps": 2, "sigma_max": 1e-3}, "sigma_max"),
        ({"sla_topk": "0.2"}, "no effect on attention_type"),
        ({"sla_topk": "many"}, "no number"),
        ({"negative_prompt": "rain"}, "needs guidance"),
        ({"image": {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}}, None),
    ],
)
def test_the_api_says_what_is_wrong(url, changes, message):
    event, data = call(url, "generate", values(**changes))[-1]
    assert event == "error"
    if message:
        assert message in data["error"]
    assert "Traceback" not in json.dumps(data)


def test_what_the_pipeline_warns_of_is_below_the_time(url):
    words = " ".join(f"{i:03}" for i in range(200))  # four tokens each
    event, data = call(url, "generate", values(prompt=words))[-1]
    assert event == "complete"
    status = html.unescape(str(data[0]))
    assert "Done in" in status
    assert "the prompt has 800 tokens, of which the text encoder reads 511: it is cut at '127 128" in status


@pytest.mark.parametrize("seed", [6789012345678901234, "6789012345678901234"])
def test_seeds_of_64_bits_stay_as_they_are(url, folder, seed):
    before = set(folder.glob("*.json"))
    assert call(url, "generate", values(seed=seed))[-1][0] == "complete"
    (record,) = set(folder.glob("*.json")) - before
    assert json.loads(record.read_text())["settings"]["seed"] == "6789012345678901234"


def test_more_frames_than_trained_are_told_beside_the_memory(tmp_path):
    server = Server(base_config(**SMALL, prompt="A red bird"), tmp_path)
    form = first_values(server.config)
    assert "85 is more than the 81 that" in server.memory(form | {"num_frames": 85})
    assert "trained" not in server.memory(form | {"num_frames": 81})
    server.jobs.close()


def test_fields_of_what_is_not_said_are_empty(url):
    components = httpx.get(f"{url}/config", timeout=PATIENCE).json()["components"]
    shown = {c["props"].get("label"): c["props"].get("value") for c in components}
    assert shown["SLA top-k"] == shown["Sigma max"] == ""


def test_uploads_are_limited_and_checked(url, large):
    def upload(content):
        return httpx.post(f"{url}/gradio_api/upload", files={"files": ("cat.png", content)}, timeout=PATIENCE)

    with large.open("rb") as file:
        refused = upload(file)
    assert refused.status_code == 413
    assert "size" in refused.text.lower()
    path = upload(b"\x89PNG\r\n\x1a\n no more").json()[0]
    image = {"path": path, "orig_name": "cat.png", "meta": {"_type": "gradio.FileData"}}
    event, data = call(url, "generate", values(image=image))[-1]
    assert event == "error"
    assert "cat.png' cannot be read, it may be cut off" in data["error"]
    assert call(url, "generate", values())[-1][0] == "complete"


def test_files_of_the_server_are_none_that_were_uploaded(url, tmp_path):
    """Also where the caller does not say that the image is a file."""
    Image.new("RGB", (32, 32)).save(tmp_path / "private.png")
    for image in ({"path": str(tmp_path / "private.png")}, {"path": f"{get_upload_folder()}/../private.png"}):
        event, data = call(url, "generate", values(image=image))[-1]
        assert event == "error"
        assert "was not uploaded" in data["error"]


def test_the_api_makes_the_video_that_the_page_makes(url, folder):
    event, data = call(url, "generate", values(prompt="By HTTP"))[-1]
    assert event == "complete"
    assert "Done in" in data[0]
    name = data[1]["path"].rsplit("/", 1)[1]
    assert httpx.get(data[1]["url"], timeout=PATIENCE).content == (folder / name).read_bytes()


@pytest.mark.parametrize("own", [True, False])
def test_the_api_cancels_what_is_the_sessions_own(url, shut, own):
    events = []
    waiting = threading.Thread(target=lambda: events.extend(call(url, "generate", values(), "impatient")))
    waiting.start()
    assert shut.held.wait(PATIENCE)
    body = {"data": [], "session_hash": "impatient" if own else "a stranger"}
    httpx.post(f"{url}/gradio_api/run/cancel", json=body, timeout=PATIENCE).raise_for_status()
    shut.open.set()
    waiting.join(PATIENCE)
    assert ("Cancelled" if own else "Done in") in events[-1][1][0]


def test_password(gate, tmp_path, demo):
    server = Server(base_config(**SMALL), tmp_path)
    page = build(server)
    url = launch(page, server, port=0, auth=("me", "secret")).rstrip("/")
    try:
        with httpx.Client(base_url=url, timeout=PATIENCE) as client:
            assert client.post("/gradio_api/call/generate", json={"data": values()}).status_code == 401
            assert client.post("/login", data={"username": "me", "password": "guess"}).status_code == 400
            assert client.post("/login", data={"username": "me", "password": "secret"}).status_code == 200
            assert client.get("/config").status_code == 200
    finally:
        server.jobs.close()
        page.close()
