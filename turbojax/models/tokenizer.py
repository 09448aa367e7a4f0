"""umT5's tokenizer: prompts to token ids, from tokenizer.json or spiece.model.

Prompts are cleaned as in the public module `wan/modules/tokenizers.py` (Wan 2.1). Both file formats hold the
same unigram model (arXiv 1804.10959); cutting, ending and padding are done here, so that they agree.
"""

import dataclasses
import html
import os
import re
import textwrap
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

import ftfy
import numpy as np
import sentencepiece
import tokenizers

from turbojax.errors import CheckpointError, UserError
from turbojax.files import user_path
from turbojax.text_files import check_text

FILES = ("tokenizer.json", "spiece.model")  # in the order of preference
END, PAD = "</s>", "<pad>"
LONG_WORD, LONG_REST = 40, 80  # characters that a warning shows of a word, and of all that is cut off


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Callable as `tokenizer(texts, length)`; created by `Tokenizer.from_path`.

    encode: a cleaned prompt to its ids, without end and padding.
    vocab_size: number of ids; the embedding table may have more rows.
    end_id, pad_id: 1 and 0 in umT5.
    """

    encode: Callable[[str], list[int]]
    vocab_size: int
    end_id: int
    pad_id: int

    @classmethod
    def from_path(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Reads a tokenizer.json or a spiece.model, or the better of the two in a folder (the json).

        Raises CheckpointError if there is none or it cannot be read.
        """
        file = find_file(user_path(path))
        try:
            return from_json(file) if file.suffix == ".json" else from_sentencepiece(file)
        except CheckpointError:
            raise
        except Exception as error:  # plain Exception from tokenizers, RuntimeError from sentencepiece
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{file} is no tokenizer or damaged ({reason}); get it again") from error

    def __call__(self, texts: list[str], length: int = 512) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask, int32 `[B, length]` each; the mask is 1 for tokens with the end token, 0 for padding.

        A longer prompt is cut to its first length - 1 tokens; an empty one is just the end token.
        """
        if isinstance(texts, str) or length < 1:
            raise UserError(f"{texts=!r} must be a list of prompts, and {length=} at least 1")
        for text in texts:
            check_text("prompt", text)
        ids = np.full((len(texts), length), self.pad_id, np.int32)
        mask = np.zeros((len(texts), length), np.int32)
        for row, text in enumerate(texts):
            tokens = [*self.encode(clean(text))[: length - 1], self.end_id]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return ids, mask

    def cut(self, text: str, length: int = 512) -> str | None:
        """Describes a prompt that is cut: its length, and the words from there on; None for one that fits."""
        text, most = clean(text), length - 1
        count = len(self.encode(text))
        if count <= most:
            return None
        # The first character that makes it too long: both formats report it in ways that change with their versions.
        end = bisect_right(range(len(text)), most, key=lambda characters: len(self.encode(text[:characters]))) - 1
        word = text.rfind(" ", 0, end + 1) + 1
        rest = text[word if end - word < LONG_WORD else end :][: 2 * LONG_REST]  # some languages have no spaces
        shown = textwrap.shorten(rest, LONG_REST, placeholder=" ...") if " " in rest[:LONG_REST] else rest[:LONG_REST]
        return f"{count} tokens, of which the text encoder reads {most}: it is cut at {shown!r}"


def clean(text: str) -> str:
    """Repairs wrongly decoded characters, resolves HTML entities (&amp;lt; too), collapses white space."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def find_file(path: Path) -> Path:
    if path.is_dir():
        for name in FILES:
            if (path / name).is_file():
                return path / name
        raise CheckpointError(f"{path} holds neither {' nor '.join(FILES)}; give umT5's tokenizer folder")
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give {' or '.join(FILES)} or a folder with one")
    if path.suffix not in (".json", ".model"):
        raise CheckpointError(f"{path} is no tokenizer; give {' or '.join(FILES)} or a folder with one")
    return path


def from_json(path: Path) -> Tokenizer:
    """Hugging Face's format. Special tokens written out in a prompt ("</s>") become tokens, as upstream."""
    model = tokenizers.Tokenizer.from_file(str(path))
    model.no_truncation()
    model.no_padding()

    def encode(text: str) -> list[int]:
        # The file's post-processor would add the end token; it is left out, since __call__ adds it.
        return model.encode(text, add_special_tokens=False).ids

    return build(path, encode, model.get_vocab_size(), model.token_to_id)


def from_sentencepiece(path: Path) -> Tokenizer:
    """Google's format. The model says how white space becomes pieces; special tokens in a prompt are text."""
    model = sentencepiece.SentencePieceProcessor()
    model.Load(str(path))

    def token_id(token: str) -> int | None:
        found = model.PieceToId(token)  # the unknown piece's id for a token that is not there
        return found if model.IdToPiece(found) == token else None

    return build(path, model.EncodeAsIds, model.GetPieceSize(), token_id)


def build(
    path: Path, encode: Callable[[str], list[int]], vocab_size: int, token_id: Callable[[str], int | None]
) -> Tokenizer:
    end, pad = token_id(END), token_id(PAD)
    if end is None or pad is None:
        raise CheckpointError(f"{path} has no {END if end is None else PAD} token; use umT5's tokenizer")
    return Tokenizer(encode, vocab_size, end_id=end, pad_id=pad)
