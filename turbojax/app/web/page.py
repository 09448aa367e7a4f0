"""The page in the browser, and the HTTP API that comes with it; see docs/web.md. Needs the extra `web`."""

import functools
import html
import logging as standard_logging
import random
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import jax
from absl import logging
from gradio.utils import get_upload_folder, is_in_or_equal
from ml_collections import ConfigDict

from turbojax.app.generate import PipelineCache, image_path, limits, makes_from_images, plan
from turbojax.app.web.album import Album, Entry
from turbojax.app.web.form import AS_STARTED, MOST_FRAMES, NAMES, first_values, read_form, resolutions
from turbojax.app.web.jobs import MOST, Job, Jobs
from turbojax.config import changed
from turbojax.errors import UserError
from turbojax.files import user_path
from turbojax.media.video import SIZES
from turbojax.memory.planner import gigabytes, short_of_memory
from turbojax.pipeline.timing import Progress

POLL = 0.2  # seconds between looks at a job
SHOWN = 24  # videos in the gallery
UPLOAD = 20 * 2**20  # bytes of an image
STAGES = {
    "load": "Loading the model",
    "compile": "Compiling",
    "text": "Reading the prompt",
    "image": "Reading the image",
    "experts": "Moving the network to the GPU",
    "diffusion": "Denoising",
    "vae": "Decoding",
    "file": "Writing the file",
}
CSS = """
.gradio-container {width: 100% !important; max-width: 1200px !important; margin: auto}
.memory p {color: var(--body-text-color); font-size: var(--text-sm)}
#video video {max-height: 60vh}
#gallery, #gallery .grid-wrap {min-height: 0 !important; height: auto !important}
#seed button {flex-grow: 0; align-self: end}
.status progress {appearance: none; width: 100%; height: .5em; border: 0; border-radius: .25em; overflow: hidden;
  background: var(--border-color-primary)}
.status progress::-webkit-progress-bar {background: none}
.status progress::-webkit-progress-value {background: var(--color-accent)}
.status progress::-moz-progress-bar {background: var(--color-accent)}
.status progress:indeterminate::-moz-progress-bar {background: none}
.status progress:indeterminate {background: linear-gradient(90deg, transparent, var(--color-accent), transparent)
  0 0 / 40% 100% no-repeat var(--border-color-primary); animation: pass 1.5s linear infinite}
@keyframes pass {from {background-position: -70% 0} to {background-position: 170% 0}}
"""


def as_file(payload: Any) -> str | None:
    """Returns an uploaded image as its file, unread: `turbojax.media.image` says in a sentence what is wrong with one.

    Gradio looks where a file is only if the caller says that it is one, and would give away those of the server.
    """
    path = payload and payload.path
    if path and not is_in_or_equal(path, get_upload_folder()):
        raise gr.Error("the image was not uploaded; upload it, and give the path that comes back")
    return path


class Server:
    """Answers the page's events: one queue, one pipeline, one folder of videos for all who look at the page."""

    def __init__(self, config: ConfigDict, folder: Path):
        self.config, self.album, self.jobs, self.pipelines = config, Album(folder), Jobs(), PipelineCache()

    def make(self, config: ConfigDict, values: Mapping[str, Any], progress: Progress) -> tuple[Entry, list[str]]:
        """Makes a job's video for the album; returns it with the pipeline's warnings."""
        path = self.album.new_path()
        try:
            result = self.pipelines.make(config, path, progress)
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not short_of_memory(error):
                raise
            raise UserError(
                "memory is not enough for this; choose a smaller resolution, fewer frames, or Quant Linear"
            ) from error
        entry = self.album.add(
            path,
            result.videos[0],
            settings=values,
            weights=str(config.weights),
            seconds={name: round(seconds, 3) for name, seconds in result.timings.items()},
        )
        return entry, result.warnings

    def generate(self, values: Mapping[str, Any], owner: str) -> Iterator[tuple[str, Entry | None]]:
        """Makes a video; yields the status as HTML whenever it changes, and at last the video."""
        with messages():
            config = changed(read_form(self.config, values), num_samples=1)
            if remark := limits(config):
                gr.Info(html.escape(remark, quote=False), duration=20)
            job = self.jobs.add(owner, functools.partial(self.make, config, values))
            before = ""
            while not job.wait(POLL):
                if (now := self.status(job)) != before:
                    yield now, None
                before = now
            try:
                entry, warnings = job.result()
            except CancelledError:
                yield line("Cancelled."), None
                return
            done = f"Done in {sum(entry.seconds.values()):.1f} s, {stages(entry)}."
            yield "".join(map(line, [done, *warnings])), entry

    def status(self, job: Job) -> str:
        """Returns a line on a job that is not done."""
        if job.stage == "wait":
            return line("Cancelling …" if job.cancelled else f"Waiting: {self.jobs.before(job)} before you.", bar=None)
        stage = f"{STAGES.get(job.stage, job.stage)} …"
        if job.cancelled:
            return line(f"Cancelling, after this stage at the latest: {stage}", bar=None)
        return line(stage, bar=job.share)

    def memory(self, values: Mapping[str, Any]) -> str:
        """Returns a line on the memory that these settings need; estimated, so that it is there at once."""
        try:
            config = read_form(self.config, dict(values) | {"prompt": values["prompt"] or "any"})
            found = plan(config, exact=False)
        except UserError as error:
            return html.escape(str(error), quote=False)
        need = f"Needs about {gigabytes(found.peak)} GB"
        if found.limit is None:
            return " ".join([f"{need} of memory.", *found.notes])
        return " ".join([f"{need} of the GPU's {gigabytes(found.limit)} GB.", *found.reasons, *found.notes])


@contextmanager
def messages() -> Iterator[None]:
    """Shows errors as messages on the page; what is no one's mistake goes to the log with its traceback."""
    try:
        yield
    except UserError as error:
        raise gr.Error(html.escape(str(error), quote=False), duration=None, print_exception=False) from error
    except (gr.Error, GeneratorExit):
        raise
    except Exception as error:
        logging.exception("A request failed")
        text = "Something went wrong on the server; its log says what. The other settings may still work."
        raise gr.Error(text, duration=None, print_exception=False) from error


def line(text: str, *, bar: float | None = -1) -> str:
    """Returns a line of the status; bar: the fraction done, 0 and None for one that only moves, negative for none."""
    if bar is not None and bar < 0:
        return f"<p>{html.escape(text)}</p>"
    value = f' value="{bar:.3f}"' if bar else ""
    return f'<p>{html.escape(text)}</p><progress aria-label="progress"{value}></progress>'


def stages(entry: Entry) -> str:
    """Returns the seconds of a video's main stages in words."""
    named = {"diffusion": "denoising", "vae": "decoding", "compile": "compiling"}
    return ", ".join(f"{named[name]} {seconds:.1f} s" for name, seconds in entry.seconds.items() if name in named)


def details(entry: Entry) -> str:
    """Returns a video's settings as Markdown; the prompt as code, so that nothing in it is markup."""
    s = entry.settings
    shown = {"resolution": s.get("resolution"), "frames": s.get("num_frames"), "steps": s.get("num_inference_steps")}
    shown |= {name: s[name] for name in NAMES[7:] if s.get(name) not in (None, "", AS_STARTED)}
    fence = "`" * 8
    return f"{fence}text\n{s['prompt']}\n{fence}\n" + " · ".join(f"{name} {value}" for name, value in shown.items())


class Controls(NamedTuple):
    """Parts that stand between and below the fields of the form."""

    new_seed: gr.Button
    memory: gr.Markdown
    start: gr.Button
    stop: gr.Button


class Views(NamedTuple):
    """Parts that show a video, and the names of those that are shown."""

    status: gr.HTML
    video: gr.Video
    shown: gr.State
    about: gr.Markdown
    download: gr.DownloadButton
    reuse: gr.Button
    gallery: gr.Gallery
    names: gr.State

    def of(self, entry: Entry) -> dict[Any, Any]:
        """Returns the components' values for one video."""
        return {
            self.video: str(entry.video),
            self.shown: entry.video.stem,
            self.about: gr.Markdown(details(entry), visible=True),
            self.download: gr.DownloadButton(value=str(entry.video), interactive=True),
            self.reuse: gr.Button(interactive=True),
        }


def build(server: Server) -> gr.Blocks:
    """Builds the page: a form on the left, the video and the gallery on the right; below each other on a phone."""
    with gr.Blocks(title="turbojax", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(f"# turbojax\n{html.escape(str(server.config.weights))}")
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                form, controls = build_form(server.config)
            with gr.Column(scale=1, min_width=320):
                views = build_views()
        connect(page, server, form, controls, views)
    page.queue(max_size=4 * MOST)
    return page


def build_form(config: ConfigDict) -> tuple[dict[str, Any], Controls]:
    """Builds the fields by their names, and what goes with them."""
    first, with_image = first_values(config), makes_from_images(config)
    picture = str(user_path(path)) if with_image and (path := image_path(config.image)) else None
    form: dict[str, Any] = {}
    form["prompt"] = gr.Textbox(first["prompt"], label="Prompt", lines=4, max_lines=12, elem_id="prompt")
    form["negative_prompt"] = gr.Textbox(
        first["negative_prompt"], label="Negative prompt", placeholder="needs a guidance scale above 1"
    )
    form["image"] = gr.Image(picture, label="First frame", sources=["upload"], height=220, visible=with_image)
    form["image"].preprocess = as_file  # Gradio would open it
    with gr.Row():
        form["resolution"] = gr.Dropdown(resolutions(config), value=first["resolution"], label="Resolution")
        form["aspect_ratio"] = gr.Dropdown(list(SIZES["480p"]), value=first["aspect_ratio"], label="Aspect")
    with gr.Row():
        form["num_frames"] = gr.Slider(1, MOST_FRAMES, first["num_frames"], step=4, label="Frames")
        most_steps = 4 if config.sampler == "rcm" else 100
        form["num_inference_steps"] = gr.Slider(1, most_steps, first["num_inference_steps"], step=1, label="Steps")
    with gr.Row(elem_id="seed"):
        seed = str(first["seed"])  # a browser's numbers would round one of 64 bits
        form["seed"] = gr.Textbox(seed, label="Seed", max_lines=1, min_width=120)
        new_seed = gr.Button("New seed", size="md", min_width=120)
    with gr.Accordion("Advanced settings", open=False):
        form |= build_advanced(first)
    assert tuple(form) == NAMES
    memory = gr.Markdown(elem_classes="memory")
    with gr.Row():
        start = gr.Button("Generate", variant="primary", elem_id="generate", min_width=120)
        stop = gr.Button("Cancel", elem_id="cancel", min_width=120)
    return form, Controls(new_seed, memory, start, stop)


def build_advanced(first: Mapping[str, Any]) -> dict[str, Any]:
    """Builds the fields that most people leave as they are."""
    quant_linear = gr.Dropdown([AS_STARTED, "on", "off"], value=first["quant_linear"], label="Quant Linear (Int8)")
    choices = [AS_STARTED, "original", "sla", "sagesla"]
    attention_type = gr.Dropdown(choices, value=first["attention_type"], label="Attention")
    gr.Markdown("Another choice of these two loads the model again.")
    return {
        "quant_linear": quant_linear,
        "attention_type": attention_type,
        "sla_topk": gr.Textbox(
            str(first["sla_topk"] or ""), label="SLA top-k", placeholder=AS_STARTED,
            info="fraction of key blocks that sla and sagesla attend to",
        ),
        "sigma_max": gr.Textbox(
            str(first["sigma_max"] or ""), label="Sigma max", placeholder=AS_STARTED, info="first noise level"
        ),
        "ode": gr.Checkbox(first["ode"], label="ODE", info="no noise between steps: sharper"),
        "guidance_scale": gr.Number(first["guidance_scale"], label="Guidance scale", info="1 for distilled models"),
    }  # fmt: skip


def build_views() -> Views:
    """Builds what shows how far a video is, the video, and those made before."""
    status = gr.HTML(line("Ready."), elem_id="status", elem_classes="status")
    video = gr.Video(label="Video", autoplay=True, loop=True, buttons=[], elem_id="video")
    about = gr.Markdown(visible=False)
    with gr.Row():
        quiet: dict[str, Any] = dict(interactive=False, size="md", min_width=120)
        download = gr.DownloadButton("Download", elem_id="download", **quiet)
        reuse = gr.Button("Reuse these settings", elem_id="reuse", **quiet)
    gallery = gr.Gallery(
        label="Videos", columns=3, height="auto", fit_columns=False, object_fit="cover",
        allow_preview=False, interactive=False, buttons=[], elem_id="gallery",
    )  # fmt: skip
    return Views(status, video, gr.State(None), about, download, reuse, gallery, gr.State([]))


def connect(page: gr.Blocks, server: Server, form: dict[str, Any], controls: Controls, views: Views) -> None:
    """Connects the page's events to the server."""

    def generate(
        prompt, negative_prompt, image, resolution, aspect_ratio, num_frames, num_inference_steps, seed,
        quant_linear, attention_type, sla_topk, sigma_max, ode, guidance_scale, request: gr.Request,
    ):  # fmt: skip
        """Makes a video; the first output tells how far it is, the second is the video's file."""
        given = locals()
        values = {name: given[name] for name in NAMES}
        for text, entry in server.generate(values, str(request.session_hash)):
            yield {views.status: text} | (views.of(entry) if entry else {})

    def cancel(request: gr.Request):
        """Cancels the videos that this session waits for."""
        server.jobs.cancel(str(request.session_hash))

    def latest():
        entries = server.album.latest(SHOWN)
        pictures = [(str(entry.poster), entry.settings["prompt"][:60]) for entry in entries]
        return pictures, [entry.video.stem for entry in entries]

    def select(known: list[str], event: gr.SelectData):
        with messages():
            return views.of(server.album.get(known[event.index]))

    def again(name: str):
        with messages():
            settings = server.album.get(name).settings
            return [str(settings.get(field)) if field == "seed" else settings.get(field) for field in NAMES]

    fields = list(form.values())
    hidden: dict[str, Any] = dict(api_visibility="private", show_progress="hidden")
    outputs = [views.video, views.shown, views.about, views.download, views.reuse]
    made = controls.start.click(
        generate, fields, [views.status, *outputs],
        api_name="generate", show_progress="hidden", concurrency_limit=None,
    )  # fmt: skip
    made.success(latest, None, [views.gallery, views.names], **hidden)
    made.failure(lambda: line("No video; the message says why."), None, views.status, **hidden)
    controls.stop.click(cancel, None, None, api_name="cancel", show_progress="hidden", queue=False)
    controls.new_seed.click(lambda: str(random.randrange(2**32)), None, form["seed"], **hidden)
    views.gallery.select(select, views.names, outputs, **hidden)
    views.reuse.click(again, views.shown, fields, **hidden)
    page.load(latest, None, [views.gallery, views.names], **hidden)
    sized = [form[name].change for name in NAMES if name not in ("prompt", "negative_prompt", "seed", "ode")]
    gr.on([page.load, *sized], lambda *values: server.memory(dict(zip(NAMES, values, strict=True))), fields,
          controls.memory, trigger_mode="always_last", **hidden)  # fmt: skip


def launch(
    page: gr.Blocks, server: Server, *, host: str = "127.0.0.1", port: int = 7860, auth: tuple[str, str] | None = None
) -> str:
    """Starts to serve in threads of its own and returns the address; port 0 takes a free one."""
    standard_logging.getLogger("httpx").setLevel(standard_logging.WARNING)  # Gradio looks whether it serves
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port or None,
            auth=auth,
            max_file_size=UPLOAD,
            allowed_paths=[str(server.album.folder)],
            theme=theme,
            css=CSS,
            footer_links=["api"],
            max_threads=2 * MOST + 8,
            prevent_thread_lock=True,
            share=False,
            ssr_mode=False,
            quiet=True,
        )
    except OSError as error:
        raise UserError(f"the page cannot be served at {host}:{port}: {error}") from error
    return url
