"""The page in the browser, and the HTTP API that comes with it; see docs/web.md. Needs the extra `web`."""

import functools
import html
import logging as standard_logging
import random
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import jax
from absl import logging
from gradio.utils import get_upload_folder, is_in_or_equal
from ml_collections import ConfigDict

from turbojax.app.generate import PipelineCache, limits, makes_from_images, plan
from turbojax.app.web.album import Album, Entry
from turbojax.app.web.form import AS_STARTED, MOST_FRAMES, NAMES, first_values, image_of, read_form, resolutions
from turbojax.app.web.jobs import MOST, Job, Jobs
from turbojax.config import changed
from turbojax.errors import UserError
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
    "experts": "Bringing the network to the card",
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
    """An uploaded image as its file, unread: `turbojax.media.image` says in a sentence what is wrong with one.

    Gradio looks where a file is only if the caller says that it is one, and would give away those of the server.
    """
    path = payload and payload.path
    if path and not is_in_or_equal(path, get_upload_folder()):
        raise gr.Error("the image was not uploaded; upload it, and give the path that comes back")
    return path


class Server:
    """What the page's events call: one queue, one pipeline, one folder of videos for all who look at the page."""

    def __init__(self, config: ConfigDict, folder: Path):
        self.config, self.album, self.jobs, self.pipelines = config, Album(folder), Jobs(), PipelineCache()

    def make(self, config: ConfigDict, values: Mapping[str, Any], progress: Progress) -> tuple[Entry, list[str]]:
        """A job's work: a video in the album, and what the pipeline warns of."""
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
        """What to tell, as HTML, while a video is made, and the video at last."""
        with messages():
            config = changed(read_form(self.config, values), num_samples=1)
            if remark := limits(config):
                gr.Info(html.escape(remark, quote=False), duration=20)
            job = self.jobs.add(owner, functools.partial(self.make, config, values))
            told = ""
            while not job.wait(POLL):
                if (now := self.status(job)) != told:
                    yield now, None
                told = now
            try:
                entry, warnings = job.result()
            except CancelledError:
                yield line("Cancelled."), None
                return
            done = f"Done in {sum(entry.seconds.values()):.1f} s, {stages(entry)}."
            yield "".join(map(line, [done, *warnings])), entry

    def status(self, job: Job) -> str:
        if job.stage == "wait":
            return line("Cancelling …" if job.cancelled else f"Waiting: {self.jobs.before(job)} before you.", bar=None)
        stage = f"{STAGES.get(job.stage, job.stage)} …"
        if job.cancelled:
            return line(f"Cancelling, after this stage at the latest: {stage}", bar=None)
        return line(stage, bar=job.share)

    def memory(self, values: Mapping[str, Any]) -> str:
        """A line on what these settings need of the card; estimated, so that it is there at once."""
        try:
            config = read_form(self.config, dict(values) | {"prompt": values["prompt"] or "any"})
            found = plan(config, exact=False)
        except UserError as error:
            return html.escape(str(error), quote=False)
        need = f"Needs about {gigabytes(found.peak)} GB"
        if found.limit is None:
            return " ".join([f"{need} of memory.", *found.notes])
        return " ".join([f"{need} of the card's {gigabytes(found.limit)} GB.", *found.reasons, *found.notes])


@contextmanager
def messages() -> Iterator[None]:
    """Errors as messages on the page; what is no one's mistake goes to the log with its traceback."""
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
    """A line of the status; bar: the share that is done, 0 and None for one that only moves, negative for none."""
    if bar is not None and bar < 0:
        return f"<p>{html.escape(text)}</p>"
    value = f' value="{bar:.3f}"' if bar else ""
    return f'<p>{html.escape(text)}</p><progress aria-label="progress"{value}></progress>'


def stages(entry: Entry) -> str:
    named = {"diffusion": "denoising", "vae": "decoding", "compile": "compiling"}
    return ", ".join(f"{named[name]} {seconds:.1f} s" for name, seconds in entry.seconds.items() if name in named)


def details(entry: Entry) -> str:
    """A video's settings as Markdown; the prompt as code, so that nothing in it is markup."""
    s = entry.settings
    shown = {"resolution": s.get("resolution"), "frames": s.get("num_frames"), "steps": s.get("num_inference_steps")}
    shown |= {name: s[name] for name in NAMES[7:] if s.get(name) not in (None, "", AS_STARTED)}
    fence = "`" * 8
    return f"{fence}text\n{s['prompt']}\n{fence}\n" + " · ".join(f"{name} {value}" for name, value in shown.items())


def build(server: Server) -> gr.Blocks:
    """The page: a form on the left, the video and the gallery on the right; below each other on a phone."""
    config = server.config
    first, with_image = first_values(config), makes_from_images(config)
    picture = str(image_of(config) or "") or None if with_image else None
    with gr.Blocks(title="turbojax", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        shown, names = gr.State(None), gr.State([])
        gr.Markdown(f"# turbojax\n{html.escape(str(config.weights))}")
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                form: dict[str, Any] = {}
                form["prompt"] = gr.Textbox(first["prompt"], label="Prompt", lines=4, max_lines=12, elem_id="prompt")
                form["negative_prompt"] = gr.Textbox(
                    first["negative_prompt"], label="Negative prompt", placeholder="needs a guidance scale above 1"
                )
                form["image"] = gr.Image(
                    picture, label="First frame", sources=["upload"], height=220, visible=with_image
                )
                form["image"].preprocess = as_file  # Gradio would open it
                with gr.Row():
                    form["resolution"] = gr.Dropdown(resolutions(config), value=first["resolution"], label="Resolution")
                    form["aspect_ratio"] = gr.Dropdown(list(SIZES["480p"]), value=first["aspect_ratio"], label="Aspect")
                with gr.Row():
                    form["num_frames"] = gr.Slider(1, MOST_FRAMES, first["num_frames"], step=4, label="Frames")
                    form["num_inference_steps"] = gr.Slider(
                        1, 4 if config.sampler == "rcm" else 100, first["num_inference_steps"], step=1, label="Steps"
                    )
                with gr.Row(elem_id="seed"):
                    form["seed"] = gr.Textbox(  # a browser's numbers would round one of 64 bits
                        str(first["seed"]), label="Seed", max_lines=1, min_width=120
                    )
                    dice = gr.Button("New seed", size="md", min_width=120)
                with gr.Accordion("Advanced settings", open=False):
                    form["quant_linear"] = gr.Dropdown(
                        [AS_STARTED, "on", "off"], value=first["quant_linear"], label="Quant Linear (Int8)"
                    )
                    form["attention_type"] = gr.Dropdown(
                        [AS_STARTED, "original", "sla", "sagesla"], value=first["attention_type"], label="Attention"
                    )
                    gr.Markdown("Another choice of these two loads the model again.")
                    form["sla_topk"] = gr.Textbox(
                        str(first["sla_topk"] or ""), label="SLA top-k", placeholder=AS_STARTED,
                        info="share of key blocks that sla and sagesla attend to",
                    )  # fmt: skip
                    form["sigma_max"] = gr.Textbox(
                        str(first["sigma_max"] or ""), label="Sigma max", placeholder=AS_STARTED,
                        info="first noise level",
                    )  # fmt: skip
                    form["ode"] = gr.Checkbox(first["ode"], label="ODE", info="no noise between steps: sharper")
                    form["guidance_scale"] = gr.Number(
                        first["guidance_scale"], label="Guidance scale", info="1 for distilled models"
                    )
                memory = gr.Markdown(elem_classes="memory")
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", elem_id="generate", min_width=120)
                    stop = gr.Button("Cancel", elem_id="cancel", min_width=120)
            with gr.Column(scale=1, min_width=320):
                status = gr.HTML(line("Ready."), elem_id="status", elem_classes="status")
                video = gr.Video(label="Video", autoplay=True, loop=True, buttons=[], elem_id="video")
                about = gr.Markdown(visible=False)
                with gr.Row():
                    download = gr.DownloadButton(
                        "Download", interactive=False, size="md", min_width=120, elem_id="download"
                    )
                    reuse = gr.Button(
                        "Reuse these settings", interactive=False, size="md", min_width=120, elem_id="reuse"
                    )
                gallery = gr.Gallery(
                    label="Videos", columns=3, height="auto", fit_columns=False, object_fit="cover",
                    allow_preview=False, interactive=False, buttons=[], elem_id="gallery",
                )  # fmt: skip
        assert tuple(form) == NAMES
        fields = list(form.values())

        def show(entry: Entry) -> dict[Any, Any]:
            return {
                video: str(entry.video),
                shown: entry.video.stem,
                about: gr.Markdown(details(entry), visible=True),
                download: gr.DownloadButton(value=str(entry.video), interactive=True),
                reuse: gr.Button(interactive=True),
            }

        def generate(
            prompt, negative_prompt, image, resolution, aspect_ratio, num_frames, num_inference_steps, seed,
            quant_linear, attention_type, sla_topk, sigma_max, ode, guidance_scale, request: gr.Request,
        ):  # fmt: skip
            """Makes a video; the first output tells how far it is, the second is the video's file."""
            values = (
                *(prompt, negative_prompt, image, resolution, aspect_ratio, num_frames, num_inference_steps, seed),
                *(quant_linear, attention_type, sla_topk, sigma_max, ode, guidance_scale),
            )
            owner = str(request.session_hash)
            for text, entry in server.generate(dict(zip(NAMES, values, strict=True)), owner):
                yield {status: text} | (show(entry) if entry else {})

        def cancel(request: gr.Request):
            """Cancels the videos that this session waits for."""
            server.jobs.cancel(str(request.session_hash))

        def latest():
            entries = server.album.latest(SHOWN)
            pictures = [(str(entry.poster), entry.settings["prompt"][:60]) for entry in entries]
            return pictures, [entry.video.stem for entry in entries]

        def select(known: list[str], event: gr.SelectData):
            with messages():
                return show(server.album.get(known[event.index]))

        def again(name: str):
            with messages():
                settings = server.album.get(name).settings
                return [str(settings.get(field)) if field == "seed" else settings.get(field) for field in NAMES]

        hidden: dict[str, Any] = dict(api_visibility="private", show_progress="hidden")
        views = [video, shown, about, download, reuse]
        made = start.click(
            generate, fields, [status, *views], api_name="generate", show_progress="hidden", concurrency_limit=None
        )
        made.success(latest, None, [gallery, names], **hidden)
        made.failure(lambda: line("No video; the message says why."), None, status, **hidden)
        stop.click(cancel, None, None, api_name="cancel", show_progress="hidden", queue=False)
        dice.click(lambda: str(random.randrange(2**32)), None, form["seed"], **hidden)
        gallery.select(select, names, views, **hidden)
        reuse.click(again, shown, fields, **hidden)
        page.load(latest, None, [gallery, names], **hidden)
        sized = [form[name].change for name in NAMES if name not in ("prompt", "negative_prompt", "seed", "ode")]
        gr.on([page.load, *sized], lambda *values: server.memory(dict(zip(NAMES, values, strict=True))), fields, memory,
              trigger_mode="always_last", **hidden)  # fmt: skip
    page.queue(max_size=4 * MOST)
    return page


def launch(
    page: gr.Blocks,
    server: Server,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: tuple[str, str] | None = None,
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
