"""Tells what a prompt asks for that the small model does not know, in a friendly line."""

import re

from turbojax.errors import UserError
from turbojax.shapes.scene import caption, knows, parse
from turbojax.shapes.words import caption_words

SMALL = {"as", "at", "by", "is", "it", "its", "of", "please", "the", "then", "there"}  # words that ask for nothing


def remark(prompt: str) -> str | None:
    """Tells what lies outside its world, with a way out; None for a prompt of words that it has learnt."""
    try:
        scene = parse(prompt)
    except UserError as error:
        return str(error)
    known = SMALL | caption_words()
    unknown = [word for word in dict.fromkeys(re.findall(r"[a-z0-9]+", prompt.lower())) if word not in known]
    if not unknown:
        return None
    return f"{prompt!r} has words that it never learnt ({', '.join(unknown)}), try {caption(scene)!r}; {knows()}"
