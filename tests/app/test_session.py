"""Many prompts for one pipeline: what a person types, and files of prompts that are gone on with."""

import json
import logging

import imageio.v2 as imageio
import pytest

from tests.app.small import SMALL
from turbojax import TurboVideoPipeline, UserError
from turbojax.app import session
from turbojax.app.records import Records
from turbojax.config import base_config, changed, parse_value

pytestmark = pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called")


@pytest.fixture
def config(tmp_path):
    return base_config(**SMALL, output=str(tmp_path / "video.mp4"))


def typed(config, *lines):
    """What a session shows after each line; an exception is raised in place of one."""
    shown, lines = [], iter(lines)

    def read(prompt):
        shown.append([])
        if (line := next(lines, None)) is None:
            raise EOFError
        if isinstance(line, str):
            return line
        raise line

    session.interactive(config, read=read, write=lambda text: shown and shown[-1].append(text))
    return ["\n".join(texts) for texts in shown]


def test_prompts_one_after_another(config, loads, tmp_path):
    for older in ("video_0001.mp4", "video_0002_0000.mp4"):
        (tmp_path / older).write_text("an older video")
    shown = typed(config, "a red cat", "/size 64x32", "", "a dog", "/quit", "never read")
    assert len(loads) == 1
    assert (shown[1], shown[2]) == ("width = 64, height = 32", "")
    assert shown[0].startswith(f"{tmp_path}/video_0000.mp4, ")
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [f"video_{name}.mp4" for name in ("0000", "0001", "0002_0000", "0003")]
    assert (tmp_path / "video_0001.mp4").read_text() == "an older video"
    assert imageio.mimread(tmp_path / "video_0003.mp4")[0].shape == (32, 64, 3)
    assert len(shown) == 5


def test_what_a_prompt_has_that_the_model_does_not_know_is_told_once(config, loads, caplog):
    typed(config, "a red cat", "/seed 5", "a red cat", "a blue dog")
    told = [record.getMessage() for record in caplog.records if "this small model knows" in record.getMessage()]
    assert [line.split(" names")[0] for line in told] == ["'a red cat'", "'a blue dog'"]


def test_another_network_is_loaded_for_what_needs_one(config, loads):
    typed(config, "a", "/seed 5", "/steps 2", "b", "/attention_type sla", "c", "/attention_type none", "d")
    assert [own.attention_type for own in loads] == [None, "sla", None]


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("/seed 7", "seed = 7"),
        ("/topk 0.05", "sla_topk = 0.05"),
        ("/topk none", "sla_topk = None"),
        ("/ode on", "ode = True"),
        ("/negative low quality, blurred", "negative_prompt = low quality, blurred"),
        ("/size 480p 9:16", "resolution = 480p, aspect_ratio = 9:16, width = None, height = None"),
        ("/size 720p", "resolution = 720p, width = None, height = None"),
    ],
)
def test_commands(config, line, shown):
    assert session.command(config, line) == shown
    assert shown.split(", ")[0] in session.command(config, "/show")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/sed 7", "there is no command /sed, perhaps seed; see /help"),
        ("/seed", "/seed needs a value; see /help"),
        ("/seed x", "seed='x' is no whole number"),
        ("/seed -1", "seed=-1 must be in 0..18446744073709551615"),
        ("/topk much", "sla_topk='much' is no number"),
        ("/topk 3", "sla_topk=3.0 must be in (0, 1]; 0.1 and 0.15 are usual"),
        ("/sigma_max -1", "sigma_max=-1.0 must be finite and above 0"),
        ("/samples 0", "1 prompts and num_samples=0 ask for no video"),
        ("/boundary 3", "boundary=3.0 must be an RF time between 0 and 1"),
        ("/attention_type dense", "attention_type='dense' is unknown; choose original or sla"),
        ("/sage_values float16", "sage_values='float16' is unknown; choose exact or float8"),
        ("/quant_scheme int4", "quant_scheme='int4' is unknown; choose one of block128"),
        ("/dtype float16", "dtype='float16' is unknown; choose bfloat16 or float32"),
        ("/memory much", "memory='much' is unknown; choose auto"),
        ("/ode maybe", "ode='maybe' is no switch: true or false"),
        ("/steps 9", "num_steps=9"),
        ("/size 500p", "resolution='500p' is unknown"),
        ("/size 50x32", "width=50 must be a multiple of 16"),
        ("/size 48xhigh", "height='high' is no whole number"),
        ("/image nothing.png", "the image 'nothing.png' does not exist"),
        ("/output x.avi", "has no video format"),
    ],
)
def test_mistakes_are_a_line_and_change_nothing(config, line, error):
    before = config.to_dict()
    (shown, _) = typed(config, line)
    assert shown.startswith("error: ")
    assert error in shown
    assert "\n" not in shown
    assert config.to_dict() == before


def test_the_session_outlives_a_stopped_and_a_failed_video(config, loads, monkeypatch, tmp_path):
    sample, failures = TurboVideoPipeline._sample, [KeyboardInterrupt(), UserError("no"), MemoryError()]

    def interrupted(*arguments):
        if failures:
            raise failures.pop(0)
        return sample(*arguments)

    monkeypatch.setattr(TurboVideoPipeline, "_sample", interrupted)
    shown = typed(config, "a", "b", "c", KeyboardInterrupt(), "d")
    assert shown[0] == "\nstopped; /quit ends the session"
    assert shown[1] == "error: no"
    assert shown[2].startswith("error: ")
    assert "memory" in shown[2]
    assert shown[3] == shown[0]
    assert [path.name for path in tmp_path.iterdir()] == ["video_0000.mp4"]
    assert shown[4].startswith(f"{tmp_path}/video_0000.mp4")
    assert len(loads) == 1


def test_a_file_of_prompts_is_gone_on_with(config, loads, monkeypatch, tmp_path):
    prompts, record = tmp_path / "prompts.txt", tmp_path / "video.jsonl"
    prompts.write_text("# animals\na cat\n\na dog \n a bird\n")
    made, generate, most = [], TurboVideoPipeline.generate, 2

    def counted(pipe, request, **options):
        if len(made) == most:
            raise KeyboardInterrupt
        made.append(request.prompt)
        return generate(pipe, request, **options)

    monkeypatch.setattr(TurboVideoPipeline, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        session.batch(config, prompts)
    assert len(record.read_text().splitlines()) == 2
    most = -1
    made.clear()
    files = session.batch(config, prompts)
    assert [named["prompt"] for named in map(json.loads, record.read_text().splitlines())] == [
        "a cat",
        "a dog",
        "a bird",
    ]
    assert [path.name for path in files] == ["video_0000.mp4", "video_0001.mp4", "video_0002.mp4"]
    assert made == ["a bird"]
    loads.clear()
    assert session.batch(config, prompts) == files
    assert not loads
    files[1].unlink()
    session.batch(config, prompts)
    assert len(made) == 2
    assert session.batch(config, prompts) == files
    assert len(made) == 2


@pytest.fixture
def batch(config, loads, tmp_path):
    """Makes the videos of a file of these prompts; returns their names, and keeps what was there to look for."""

    def batch(*prompts, **changes):
        (tmp_path / "prompts.txt").write_text("\n".join(prompts))
        before = {path: path.read_bytes() for path in tmp_path.glob("video_*")}
        names = [path.name for path in session.batch(changed(config, **changes), tmp_path / "prompts.txt")]
        assert {path: path.read_bytes() for path in before} == before
        assert all((tmp_path / name).is_file() for name in names)
        return names

    return batch


def numbers(*names):
    return [f"video_{number:04d}.mp4" for number in names]


def test_finished_videos_are_never_overwritten(batch, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="absl")
    assert batch("a cat", "a dog") == numbers(0, 1)
    assert batch("a cat", "a dog", seed=1) == numbers(2, 3)
    assert "video_0000.mp4 is there and stays; this prompt's video is video_0002.mp4" in caplog.text
    assert batch("a bird", "a cat", "a dog") == numbers(4, 0, 1)  # a line in front
    assert batch("a cat", "a dog", seed=1, memory="resident", cache_prompts=False) == numbers(2, 3)  # the same videos
    assert batch("a cat", fps=8) == numbers(5)
    records = [json.loads(line) for line in (tmp_path / "video.jsonl").read_text().splitlines()]
    assert [(record["prompt"], record["seed"], record["files"]) for record in records] == [
        ("a cat", 0, numbers(0)),
        ("a dog", 0, numbers(1)),
        ("a cat", 1, numbers(2)),
        ("a dog", 1, numbers(3)),
        ("a bird", 0, numbers(4)),
        ("a cat", 0, numbers(5)),
    ]


def test_videos_of_a_session_are_not_overwritten(batch, config, tmp_path):
    typed(config, "a cat", "a dog")
    (tmp_path / "video_0003_0001.mp4").write_text("a sample")
    assert batch("a cat", "a bird", "a wolf", "a fox") == numbers(2, 4, 5, 6)
    assert typed(config, "a cow")[0].startswith(f"{tmp_path}/video_0007.mp4")


def test_a_record_without_a_checksum_finishes_nothing(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"key": "k", "files": ["gone.mp4"]}\n{"key": "l", "files": ["there.mp4"]}\n')
    (tmp_path / "there.mp4").touch()
    assert (Records(tmp_path / "x.jsonl").get("k"), Records(tmp_path / "x.jsonl").get("l")) == (None, None)


def test_a_video_that_was_replaced_is_not_taken_for_the_prompts(batch, tmp_path):
    assert batch("a cat", "a dog") == numbers(0, 1)
    (tmp_path / "video_0000.mp4").write_text("my own cut of it")
    assert batch("a cat", "a dog") == numbers(2, 1)


def test_another_format_and_the_same_prompt_twice_are_other_videos(batch, tmp_path):
    assert batch("a cat", "a cat") == numbers(0, 1)
    assert batch("a cat", output=str(tmp_path / "video.gif")) == ["video_0002.gif"]
    assert batch("a cat", "a cat", "a cat") == numbers(0, 1, 3)


def test_another_picture_of_the_same_name_is_another_video(config, tmp_path):
    keys = set()
    for content in (b"one", b"two", b"one"):
        keys.add(session.video_key(changed(config, image="x.png"), {"image": content}, 0))
    assert len(keys) == 2


def test_a_line_that_is_not_utf8(config):
    broken = UnicodeDecodeError("utf-8", b"caf\xe9", 3, 4, "invalid")
    assert typed(config, broken, "caf\udce9", "/quit")[:2] == [
        "error: the line is not UTF-8; set the terminal to UTF-8",
        "error: the prompt is not UTF-8 after 'caf'; write it in UTF-8",
    ]


@pytest.mark.parametrize(
    ("content", "error"), [(b"", "has no prompt"), (b"# a\n", "has no prompt"), (b"\xff", "cannot be read")]
)
def test_no_prompts(config, tmp_path, content, error):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=error):
        session.batch(config, path)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        session.batch(config, path)


def test_foreign_record(config, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat")
    (tmp_path / "video.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match=r"video\.jsonl, line 1: .* it is no record of finished work"):
        session.batch(config, tmp_path / "prompts.txt")


def test_values():
    assert parse_value("memory", "12") == "12"
    assert parse_value("prompt", "none") == "none"
    assert parse_value("height", "none") is None
    assert parse_value("quant_linear", "TRUE") is True
    with pytest.raises(UserError, match="there is no setting sla_topc, perhaps sla_topk"):
        parse_value("sla_topc", "1")
