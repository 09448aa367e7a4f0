"""Tokenizer: cleaning, cutting and padding; both file formats against each other, on a model trained here."""

import html
import json
import random

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from turbojax.errors import CheckpointError, UserError
from turbojax.models.tokenizer import Tokenizer, clean

SENTENCE = "a cat walks along the beach at sunset . two dogs run & jump in rain ! <b> café 猫 走る 海 10 % 'so'"
PROMPTS = [
    "a cat walks along the beach",
    "",
    "  two   dogs\n\trun ! ",
    "café & 猫 走る 海",
    "ﬁne print ①",
    "unseen: quixotic Ωμέγα 🐈🐈!",
    "a" * 40,
    "the cat's <b>beach</b> <extra_id_0> 10%",
]


@pytest.fixture(scope="module", params=[True, False], ids=["byte_fallback", "unknown"])
def folder(request, tmp_path_factory):
    """A folder with a spiece.model and the same model as tokenizer.json."""
    path = tmp_path_factory.mktemp("tokenizer")
    draw, words = random.Random(0), SENTENCE.split()
    lines = [" ".join(draw.choices(words, k=8)) for _ in range(400)]
    (path / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(path / "corpus.txt"),
        model_prefix=str(path / "spiece"),
        model_type="unigram",
        vocab_size=400,
        hard_vocab_limit=False,
        normalization_rule_name="nfkc",
        byte_fallback=request.param,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    as_json(path / "spiece.model", byte_fallback=request.param).save(str(path / "tokenizer.json"))
    return path


def as_json(path, *, byte_fallback: bool) -> tokenizers.Tokenizer:
    """The model in Hugging Face's format, with end token, cut and padding of its own, which must not show."""
    piece = sentencepiece.SentencePieceProcessor(model_file=str(path))
    vocab = [(piece.IdToPiece(i), piece.GetScore(i)) for i in range(piece.GetPieceSize())]
    model = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=piece.unk_id(), byte_fallback=byte_fallback))
    model.normalizer = normalizers.NFKC()
    model.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    model.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    model.add_special_tokens(["<pad>", "</s>"])
    model.enable_truncation(5)
    model.enable_padding(length=9, pad_id=0, pad_token="<pad>")
    return model


@pytest.fixture(params=["tokenizer.json", "spiece.model"])
def tokenizer(request, folder):
    return Tokenizer.from_path(folder / request.param)


def test_ids_mask_and_end(tokenizer):
    ids, mask = tokenizer(PROMPTS, 64)
    assert ids.dtype == mask.dtype == np.int32
    assert ids.shape == mask.shape == (len(PROMPTS), 64)
    for row, tokens in zip(ids, mask, strict=True):
        length = tokens.sum()
        assert tokens[:length].all()
        assert not row[length:].any()
        assert row[length - 1] == tokenizer.end_id == 1
        assert not np.isin(row[: length - 1], (0, 1)).any()
    assert ids.max() < tokenizer.vocab_size
    assert (ids[1] == [1] + [0] * 63).all()  # the empty prompt


def test_default_length_is_the_text_length(tokenizer):
    ids, mask = tokenizer(["a cat"])
    assert ids.shape == mask.shape == (1, 512)


def test_long_prompts_are_cut_before_the_end_token(tokenizer):
    full, _ = tokenizer(["a cat walks along the beach at sunset"], 64)
    ids, mask = tokenizer(["a cat walks along the beach at sunset"], 6)
    assert mask.all()
    np.testing.assert_array_equal(ids[0], [*full[0, :5], 1])
    np.testing.assert_array_equal(tokenizer(["a cat"], 1)[0], [[1]])


def test_both_formats_agree(folder):
    from_json, from_model = (Tokenizer.from_path(folder / name) for name in ("tokenizer.json", "spiece.model"))
    for ours, theirs in zip(from_json(PROMPTS, 128), from_model(PROMPTS, 128), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert from_json.vocab_size == from_model.vocab_size


def test_ids_are_the_models_own(folder):
    piece = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    expected = piece.EncodeAsIds("a cat walks along the beach")
    ids, mask = Tokenizer.from_path(folder)(["a cat walks along the beach"], 32)
    assert ids[0, : mask.sum()].tolist() == [*expected, 1]


def test_spelling_variants_give_the_same_ids(tokenizer):
    plain, _ = tokenizer(["two dogs run & jump"], 32)
    for variant in ("two dogs run &amp; jump", " two\tdogs \n run &amp;amp; jump\u3000"):
        np.testing.assert_array_equal(tokenizer([variant], 32)[0], plain)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        (" \n\t ", ""),
        ("a   cat\r\n\r\nwalks\u00a0along\u3000the\u2003beach ", "a cat walks along the beach"),
        ("salt &amp; pepper", "salt & pepper"),
        ("&lt;b&gt; and &amp;lt;b&amp;gt;", "<b> and <b>"),
        ("cafÃ© in the rain", "café in the rain"),
        ("schÃ¶n â€¢ sunny", "schön • sunny"),
        ("&nbsp;the end&nbsp;", "the end"),
        ("“quoted” ﬁne", '"quoted" fine'),
        ("color \x1b[36mcyan\x00", "color cyan"),
    ],
)
def test_cleaning(text, expected):
    assert clean(text) == expected


def test_cleaning_keeps_what_is_clean():
    for text in ("猫が海辺を走る。", "Здравствуй, мир!", "a 50% grey #wall; 3 < 4"):
        assert clean(text) == text
        assert clean(html.escape(text)) == text


def test_json_is_preferred(folder, tmp_path):
    (tmp_path / "spiece.model").write_bytes((folder / "spiece.model").read_bytes())
    assert Tokenizer.from_path(tmp_path).end_id == 1
    (tmp_path / "tokenizer.json").write_text("{")  # taken, and not passed over for the model beside it
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is no tokenizer or damaged"):
        Tokenizer.from_path(str(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2]", b"hello", b"\xff\xfe\x00"])
def test_bad_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="is no tokenizer or damaged") as caught:
        Tokenizer.from_path(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
def test_cut_off_files_are_refused(folder, tmp_path, name):
    content = (folder / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="is no tokenizer or damaged"):
        Tokenizer.from_path(tmp_path)


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor spiece\.model"):
        Tokenizer.from_path(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        Tokenizer.from_path(tmp_path / "nowhere")
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        Tokenizer.from_path(tmp_path / "vocab.txt")


def test_foreign_vocabulary_is_refused(folder, tmp_path):
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"][1][0] = "<end>"
    content["added_tokens"], content["post_processor"] = [], None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="no </s> token"):
        Tokenizer.from_path(tmp_path)


def test_wrong_arguments_are_refused(tokenizer):
    with pytest.raises(UserError, match="list of prompts"):
        tokenizer("a cat")
    with pytest.raises(UserError, match="at least 1"):
        tokenizer(["a cat"], 0)


def test_where_a_prompt_is_cut(tokenizer):
    prompt = " ".join(f"w{i}" for i in range(300)) + " beach"
    assert tokenizer.cut(prompt, len(tokenizer.encode(prompt)) + 1) is None
    count = len(tokenizer.encode(prompt))
    for length in (20, 21, 22, 512):
        if length > count:
            continue
        kept = tokenizer([prompt], length)[0][0, : length - 1].tolist()
        line = tokenizer.cut(f" {prompt}\n", length)
        first = line.partition("it is cut at '")[2].split()[0]
        before = prompt[: prompt.index(f"{first} ")].strip()
        assert line.startswith(f"{count} tokens, of which the text encoder reads {length - 1}: it is cut at 'w")
        assert line.endswith(" ...'")
        assert len(tokenizer.encode(before)) <= length - 1 < len(tokenizer.encode(f"{before} {first}"))
        assert tokenizer.encode(before) == kept[: len(tokenizer.encode(before))]


@pytest.mark.parametrize("prompt", ["猫" * 200, "ab" * 50_000, "海 " * 50 + "y" * 500])
def test_where_a_prompt_without_spaces_is_cut(tokenizer, prompt):
    line = tokenizer.cut(prompt, 32)
    assert len(line) < 180
    assert line.partition("cut at ")[2].strip("'")[0] in prompt


def test_text_that_was_no_utf8(tokenizer):
    with pytest.raises(UserError, match="the prompt is not UTF-8 after 'a caf'; write it in UTF-8"):
        tokenizer(["a caf\udce9 at night"])
