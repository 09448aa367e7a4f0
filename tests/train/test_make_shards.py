"""Videos and captions to shards, with the demo's models: what is written, left out, kept and refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.app.test_generate import ROOT, run_all
from turbojax.errors import UserError
from turbojax.media.video import read_video, save_video
from turbojax.models import vae as vae_model
from turbojax.train import make_shards as module
from turbojax.train.data import batches, open_shards
from turbojax.train.make_shards import find_clips, identity, make_index, make_shards
from turbojax.weights.io import read_tensors, write_safetensors

SCRIPT = str(ROOT / "scripts" / "make_shards.py")
CAPTIONS = {"a.mp4": "a red bird", "b.mp4": "the blue sea, \u732b", "deep/c.mp4": ""}
SIZE = {"num_frames": 5, "height": 16, "width": 32}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three videos of different sizes and rates with captions beside them, a short one, a broken one, one without."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for i, (name, caption) in enumerate({**CAPTIONS, "short.mp4": "a car"}.items()):
        frames = 3 if name == "short.mp4" else 12
        video = rng.integers(0, 256, (frames, 4, 6, 3), np.uint8).repeat(8 + 2 * i, axis=1).repeat(8, axis=2)
        save_video(video, folder / name, fps=32 if name == "b.mp4" else 16)
        (folder / name).with_suffix(".txt").write_text(caption + "\n")
    (folder / "broken.mp4").write_text("no video")
    (folder / "broken.txt").write_text("a dog")
    (folder / "silent.mp4").write_text("no caption")
    return folder


def index_of(pipe, **changes):
    settings = {**SIZE, "identities": ("v", "t"), "fps": 16, "negative_prompt": "rain", "shard_size": 2}
    return make_index(pipe.vae, pipe.text, **(settings | changes))


@pytest.fixture(scope="module")
def made(videos, demo_pipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("made") / "data"
    clips = find_clips(videos)
    return output, make_shards(clips, output, demo_pipe.vae, demo_pipe.text, index_of(demo_pipe))


def whole(text: np.ndarray) -> np.ndarray:
    """The rows of a sample, `[S, D]`, with the zero rows behind them that data leaves out, `[512, D]`."""
    return np.pad(text, ((0, 512 - len(text)), (0, 0)))


def test_samples_are_what_the_models_give(made, videos, demo_pipe):
    output, summary = made
    assert summary == (3, 0, 2)
    shards = open_shards(output)
    assert [shards.describe(i) for i in range(len(shards))] == list(CAPTIONS.items())
    assert (
        sorted(path.name for path in output.iterdir())
        == [
            *("index.json", "negative.safetensors", "shard-00000.safetensors"),
            *(
                "shard-00001.safetensors",
                "shard-00002.safetensors",
            ),  # a and b, broken and c, short: the last is not there
        ][:4]
    )
    for i, (name, caption) in enumerate(CAPTIONS.items()):
        video = read_video(videos / name, **SIZE).astype(np.float32)
        latents = vae_model.encode(demo_pipe.vae, video[None] / 127.5 - 1)[0]
        np.testing.assert_array_equal(shards[i]["latents"], latents)
        np.testing.assert_array_equal(whole(shards[i]["text"]), demo_pipe.text([caption])[0])
    np.testing.assert_array_equal(whole(shards.negative()), demo_pipe.text(["rain"])[0])
    assert shards.index.latents == (2, 2, 4, 16)
    assert shards.index.dtype == "float32"
    assert next(batches(shards, batch_size=3, seed=0))["latents"].shape == (3, 2, 2, 4, 16)


def test_a_stopped_run_goes_on(videos, demo_pipe, tmp_path, monkeypatch):
    """Stopped in the second shard; the first is kept, bit for bit the same file as of a run without a stop."""
    clips, index = find_clips(videos), index_of(demo_pipe)
    encode, encoded = module.encode_clip, []

    def stop_at_c(clip, *arguments):
        encoded.append(clip.source)
        if clip.source == "deep/c.mp4" and encoded.count(clip.source) == 1:
            raise KeyboardInterrupt
        return encode(clip, *arguments)

    monkeypatch.setattr(module, "encode_clip", stop_at_c)
    with pytest.raises(KeyboardInterrupt):
        make_shards(clips, tmp_path, demo_pipe.vae, demo_pipe.text, index)
    assert len(open_shards(tmp_path)) == 2  # what is there can be read meanwhile
    first = tmp_path / "shard-00000.safetensors"
    before = first.stat().st_mtime_ns
    assert make_shards(clips, tmp_path, demo_pipe.vae, demo_pipe.text, index) == (1, 2, 2)
    assert first.stat().st_mtime_ns == before
    assert encoded == ["a.mp4", "b.mp4", "deep/c.mp4", "deep/c.mp4"]
    assert [open_shards(tmp_path).describe(i)[0] for i in range(3)] == list(CAPTIONS)

    first.write_bytes(first.read_bytes()[:-10])  # a damaged one is made again
    assert make_shards(clips, tmp_path, demo_pipe.vae, demo_pipe.text, index) == (2, 1, 2)
    assert len(open_shards(tmp_path)) == 3


def test_other_clips_make_a_shard_again(videos, demo_pipe, tmp_path):
    clips, index = find_clips(videos), index_of(demo_pipe)
    a, b = clips[:2]
    assert make_shards([a], tmp_path, demo_pipe.vae, demo_pipe.text, index).written == 1
    assert make_shards([a, b], tmp_path, demo_pipe.vae, demo_pipe.text, index) == (2, 0, 0)
    assert make_shards([b], tmp_path, demo_pipe.vae, demo_pipe.text, index) == (1, 0, 0)
    assert open_shards(tmp_path).describe(0) == ("b.mp4", CAPTIONS["b.mp4"])


def test_data_of_other_settings_is_not_mixed(made, videos, demo_pipe):
    output, _ = made
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    for change in ({"height": 32}, {"fps": 8}, {"identities": ("another", "t")}, {"shard_size": 3}):
        with pytest.raises(UserError, match=r"holds data made with \w+=.*; choose another folder"):
            make_shards(find_clips(videos), output, demo_pipe.vae, demo_pipe.text, index_of(demo_pipe, **change))
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_nothing_to_write(videos, demo_pipe, tmp_path):
    clips = [clip for clip in find_clips(videos) if clip.source in ("broken.mp4", "short.mp4")]
    with pytest.raises(UserError, match="none of the 2 clips could be used"):
        make_shards(clips, tmp_path / "data", demo_pipe.vae, demo_pipe.text, index_of(demo_pipe))
    with pytest.raises(UserError, match="holds no index"):
        open_shards(tmp_path / "data")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file' cannot be made"):
        make_shards(clips, tmp_path / "file", demo_pipe.vae, demo_pipe.text, index_of(demo_pipe))


def test_nan_is_not_written(videos, demo_pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(module.vae_model, "encode", lambda vae, video: jnp.full((1, 2, 2, 4, 16), jnp.nan))
    with pytest.raises(UserError, match=r"gives NaN for .*a\.mp4"):
        make_shards(find_clips(videos), tmp_path, demo_pipe.vae, demo_pipe.text, index_of(demo_pipe))
    assert not list(tmp_path.glob("shard-*"))


def test_settings_that_cannot_be(demo_pipe):
    for change in ({"num_frames": 6}, {"height": 20}, {"fps": 0}, {"shard_size": 0}):
        with pytest.raises(UserError, match=rf"{next(iter(change))}="):
            index_of(demo_pipe, **change)


# Lists of captions.


def test_lists(tmp_path):
    lines = '{"file": "x.mp4", "caption": "one\u2028line"}\n\n{"file": "y.mp4", "caption": "two, 2"}\n'
    (tmp_path / "my.jsonl").write_text(lines, encoding="utf-8")
    table = '\ufefffile,caption,more\nx.mp4,one\u2028line,3\ny.mp4,"two, 2",4\n'
    (tmp_path / "my.csv").write_text(table, encoding="utf-8")
    expected = [("x.mp4", "one\u2028line"), ("y.mp4", "two, 2")]
    for name in ("my.jsonl", "my.csv"):
        clips = find_clips(tmp_path, tmp_path / name)
        assert [(clip.source, clip.caption) for clip in clips] == expected
        assert clips[0].path == tmp_path / "x.mp4"
    (tmp_path / "my.csv").rename(tmp_path / "captions.csv")
    assert [clip.source for clip in find_clips(tmp_path)] == ["x.mp4", "y.mp4"]


def test_names_in_lists(tmp_path):
    """Names go into folders below, and may be whole paths to there."""
    names = ["./x.mp4", "a/b/../x.mp4", f"{tmp_path}/deep/x.mp4"]
    lines = [f'{{"file": "{name}", "caption": "c"}}' for name in names]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    assert [clip.source for clip in find_clips(tmp_path)] == names
    assert [clip.path.resolve() for clip in find_clips(tmp_path)] == [
        tmp_path / "x.mp4",
        tmp_path / "a" / "x.mp4",
        tmp_path / "deep" / "x.mp4",
    ]


def test_captions_beside_videos(videos):
    clips = find_clips(videos)
    assert [clip.source for clip in clips] == ["a.mp4", "b.mp4", "broken.mp4", "deep/c.mp4", "short.mp4"]
    assert [clip.caption for clip in clips if clip.source in CAPTIONS] == list(CAPTIONS.values())


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_of_captions(videos, tmp_path, encoding, end):
    rows = ['{"file": "x.mp4", "caption": "a caf\u00e9\u2028by night"}', '{"file": "y.mp4", "caption": "b"}']
    (tmp_path / "my.jsonl").write_bytes(end.join(rows).encode(encoding))
    (tmp_path / "my.csv").write_bytes(
        end.join(["file,caption", "x.mp4,a caf\u00e9\u2028by night", "y.mp4,b"]).encode(encoding)
    )
    (tmp_path / "x.mp4").touch()
    (tmp_path / "x.txt").write_bytes(f"a caf\u00e9\u2028by night{end}".encode(encoding))
    assert [clip.caption for clip in find_clips(tmp_path)] == ["a caf\u00e9\u2028by night"]
    for name in ("my.jsonl", "my.csv"):
        clips = find_clips(tmp_path, tmp_path / name)
        assert [clip.caption for clip in clips] == ["a caf\u00e9\u2028by night", "b"]


@pytest.mark.parametrize("name", ["x.txt", "captions.jsonl", "captions.csv"])
def test_captions_in_another_encoding_are_refused_by_file_and_line(tmp_path, name):
    (tmp_path / "x.mp4").touch()
    (tmp_path / name).write_bytes("file,caption\r\nx.mp4,caf\u00e9".encode("cp1252"))
    with pytest.raises(UserError, match=rf"line 2 of '.*{name}' is neither UTF-8 nor UTF-16"):
        find_clips(tmp_path)


def test_empty_captions_are_counted(tmp_path, caplog):
    (tmp_path / "x.csv").write_text("file,caption\na.mp4,one\nb.mp4,\nc.mp4, \n")
    clips = find_clips(tmp_path, tmp_path / "x.csv")
    assert len(clips) == 3
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("2 of 3 captions are empty, the first is that of b.mp4")


def test_captions_that_are_cut_are_told_once(videos, demo_pipe, tmp_path, caplog):
    clip = next(clip for clip in find_clips(videos) if clip.source == "a.mp4")
    words = " ".join(f"{i:03}" for i in range(200))  # four tokens each
    long = [clip._replace(caption=words), clip, clip._replace(caption=f"{words} x")]
    make_shards(long, tmp_path / "data", demo_pipe.vae, demo_pipe.text, index_of(demo_pipe, negative_prompt=words))
    told = [record.getMessage() for record in caplog.records if "is cut at" in record.getMessage()]
    assert len(told) == 2
    assert told[0].startswith("2 of 3 captions are cut, the first is that of a.mp4: it has 800 tokens, of which")
    assert "it is cut at '127 128 129" in told[0]
    assert told[1].startswith("negative_prompt: the prompt has 800 tokens")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.jsonl",
            '{"file": "x.mp4", "caption": "one"}\n{"file": "y.mp4"}',
            "line 2 of .*: caption is missing; a line is",
        ),
        (
            "x.jsonl",
            '{"video_path": "x.mp4", "caption": "one"}',
            r'line 1 of .*: file is missing; a line is {"file": NAME',
        ),
        ("x.jsonl", "x.mp4: one", "line 1 of .* is no JSON"),
        ("x.jsonl", '["x.mp4", "one"]', "line 1 of .*: it is .* and must be an object"),
        ("x.jsonl", '{"file": 3, "caption": "one"}', "line 1 of .*: file is 3 and must be text"),
        ("x.jsonl", 100_000 * "[", "line 1 of .*: it is nested 100000 deep"),
        (
            "x.jsonl",
            '{"file": "../../x.mp4", "caption": ""}',
            r"line 1 of .*: file is '../../x.mp4' and must be a path below",
        ),
        ("x.jsonl", '{"file": "/etc/passwd", "caption": ""}', "line 1 of .*: file is '/etc/passwd' and must be a path"),
        ("x.jsonl", '{"file": "a/../../x.mp4", "caption": ""}', "file is 'a/../../x.mp4' and must be a path below"),
        ("x.jsonl", '{"file": ".", "caption": ""}', "file is '.' and must be a path below"),
        ("x.jsonl", '{"file": "", "caption": ""}', "file is '' and must be a path below"),
        ("x.jsonl", '{"file": "x\\u0000", "caption": ""}', r"file is 'x\\x00' and must be a path below"),
        (
            "x.csv",
            "x.mp4,one\ny.mp4,two\n",
            r"has the columns \['x.mp4', 'one'\]; name those to be read file and caption",
        ),
        ("x.csv", "video_path,text\ny.mp4,two\n", r"has the columns \['video_path', 'text'\]; name those to be read"),
        ("x.csv", "file;caption\ny.mp4;two\n", "separates its columns by semicolons; write it with commas"),
        ("x.csv", "file\tcaption\ny.mp4\ttwo\n", "separates its columns by tabs; write it with commas"),
        (
            "x.csv",
            "file,caption\nx.mp4,a cat, a dog\n",
            "line 2 of .* more columns than the first line; a caption with commas",
        ),
        ("x.csv", "file,caption\nx.mp4\n", "line 2 of .* has no file and caption"),
        ("x.csv", "file,caption\n../x.mp4,a\n", "line 2 of .*: file is '../x.mp4' and must be a path below"),
        (
            "x.csv",
            'file,caption\nx.mp4,"one\ny.mp4,two\n',
            "cannot be read as CSV behind line [123]: unexpected end of data",
        ),
        ("x.csv", "", "has no videos with captions"),
        ("x.csv", "file,caption\nx.mp4," + 200_000 * "x", "cannot be read as CSV behind line 1: field larger than"),
        ("x.txt", "x.mp4 one", r"must end in \.jsonl or \.csv"),
        ("x.jsonl", None, "cannot be read"),
    ],
)
def test_bad_lists(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        find_clips(tmp_path, tmp_path / name)
    assert len(str(caught.value)) < 400 + 2 * len(str(tmp_path))
    with pytest.raises(UserError, match="is no folder of videos"):
        find_clips(tmp_path / "nothing")


def test_identity(demo, tmp_path):
    name, digest = identity(demo / "Wan2.1_VAE.pth").split()
    tensors = {key: np.array(value) for key, value in read_tensors(demo / "Wan2.1_VAE.pth").items()}
    assert (name, len(digest)) == ("Wan2.1_VAE.pth", 12)
    tensors["conv2.bias"][0] += 1
    write_safetensors(tmp_path / "x.safetensors", tensors.items(), tensors)
    assert identity(tmp_path / "x.safetensors").split()[1] != digest


def test_the_script(videos, tmp_path, demo):
    size = ["--num_frames=1", "--height=16", "--width=16"]
    base = [SCRIPT, f"--videos={videos}", "--output=FOLDER/data", "--weights=demo", *size]
    (tmp_path / "nothing").mkdir()
    outcomes = run_all(
        {
            "made": base,
            "no flags": [SCRIPT],
            "no videos": [*base, "--videos=FOLDER/nothing"],
            "vae": [*base, "--vae=FOLDER/x.pth"],
            "help": [SCRIPT, "--help"],
        },
        tmp_path,
    )
    code, _, stderr = outcomes.pop("made")
    assert code == 0, stderr
    assert "4 samples written, 0 there before, 1 clips left out" in stderr.splitlines()[-1]
    assert "broken.mp4 is no video that ffmpeg can read" in stderr
    assert open_shards(tmp_path / "data").index.dtype == "bfloat16"
    code, stdout, _ = outcomes.pop("help")
    assert (code, "--captions" in stdout) == (0, True)
    messages = {
        "no flags": "give --videos=FOLDER and --output=FOLDER",
        "no videos": "has no videos with captions",
        "vae": "x.pth does not exist",
    }
    for name, (code, _, stderr) in outcomes.items():
        assert code == 2, stderr
        assert stderr.splitlines()[-1].startswith("error: ")
        assert messages[name] in stderr.splitlines()[-1]
