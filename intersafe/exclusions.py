"""Hard exclusions: sexual content with minors never becomes a seed, is never sent to a model, and ends a job.

Known limits. These pass: a masked or misspelt word (s*x, childd), a word that is reversed or in another language, a
word half spelt out, two disguises in one word, and a young age that only the story implies. These are excluded by
mistake: a sexual word in another sense with a word for the young (pet grooming and a daughter), and sex education of
teenagers.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

_AGE = (
    r"(?<!\d)(?:[1-9]|1[0-7]|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|"
    r"sixteen|seventeen)"
)
_YOUNG_WORDS = (
    r"child(?:ren|hood|like)?|kids?|kiddies?|minors?|under-?\s?aged?|pre-?\s?teens?|teen(?:s|age|aged|ager|agers)?|"
    r"adolescents?|juveniles?|infants?|newborns?|toddlers?|bab(?:y|ies)|youngsters?|youths?|"
    r"school-?\s?(?:girl|boy|child|kid)s?(?:ren)?|(?:girl|boy)s?|tweens?|pupils?|"
    r"(?:middle|high|elementary|primary)[-\s]school(?:ers?)?|"
    r"(?:son|daughter|niece|nephew|grandchild|step-?(?:son|daughter|child))s?|not\s+yet\s+18|"
    r"(?:sub|u)-?1[0-8]s?(?!\d)|(?:under|below|younger\s+than|less\s+than)\s+(?:the\s+age\s+of\s+)?"
    r"(?:(?:18|17|16|15|14|13|12)s?(?!\d)|eighteen|seventeen|sixteen|fifteen)|"
    rf"{_AGE}[-\s]*(?:years?[-\s]*olds?|y[\s/.]?o(?:lds?)?|yrs?\.?(?:[-\s]*olds?)?)|"
    rf"age[ds]?:?\s+{_AGE}(?!\d)|s?he(?:'s|\s+is|\s+was|\s+turned)\s+(?:only\s+|just\s+)?(?:[1-9]|1[0-7])(?!\d)"
)
_SEXUAL_WORDS = (
    r"sex|sexy|sexual(?:ly|ity|i[sz](?:e|ed|es|ing|ation))?|sext(?:s|ing|ed)?|porn(?:o|s|ography|ographic)?|pr0n|"
    r"erotic(?:a|ally|ism)?|nud(?:e|es|ity|ist)|naked|undress(?:ed|ing)?|strip(?:ping|tease|pers?)|intercourse|orgasms?|"
    r"masturbat\w*|genitals?|grooming|molest\w*|rap(?:e|es|ed|ist|ists|ing)|incest\w*|fetish\w*|x-?rated|nsfw|"
    r"prostitut\w*|seduc(?:e|es|ed|ing|tion|tive)|lewd|hentai|"
    r"explicit\s+(?:content|images?|pictures?|photos?|videos?|scenes?|details?|material|stor(?:y|ies))|"
    r"adult\s+(?:content|videos?|films?|material)|intimate\s+(?:images?|pictures?|photos?|videos?|scenes?|acts?)"
)
_ALWAYS = (
    r"csam|csem|cp\s+(?:images?|videos?|links?)|p(?:a)?edo(?:phil\w*|s)?|lolis?|lolicons?|lolitas?|shota(?:con)?s?|jail\s?bait|"
    r"child\s+(?:abuse|exploitation|molest\w*)\s+(?:images?|content|material|videos?)|child\s+grooming|"
    r"groom(?:ing)?\s+(?:an?\s+|the\s+)?(?:young\s+|little\s+)?(?:child(?:ren)?|minors?|teens?|teenagers?|kids?|girls?|boys?)|"
    r"(?:child|kid|kiddie|kiddy|preteen|teen|minor|underage)s?(?:porno?|pornography|sex|sexy|sexual|nudes?|nudity|erotica?)|"
    r"(?:porn|sex|sexual|nude|erotic)(?:child|children|kids?|preteens?|teens?|minors?|underage)"
)
_YOUNG = re.compile(rf"(?<![a-z])(?:{_YOUNG_WORDS})(?![a-z])")
_SEXUAL = re.compile(rf"(?<![a-z])(?:{_SEXUAL_WORDS})(?![a-z])")
_EXCLUDED = re.compile(rf"(?<![a-z])(?:{_ALWAYS})(?![a-z])")
_SUSPECT = re.compile(rf"(?<![a-z])(?:{_ALWAYS}|{_SEXUAL_WORDS})(?![a-z])")
"""One search for both: nearly every text needs no other."""
_EXCLUDED_LABELS = re.compile(
    r"\bchild(?:ren)? (?:abuse|exploit|endanger|porn|sex)|\bminors?\b.{0,24}\bsex|\bsex.{0,24}\bminors?\b|"
    r"\bunder ?aged?\b|\b(?:csam?|csae|csem|csec?|s4)\b"
)
"""Labels of sources: `cse` is MLCommons' code, `s4` Llama Guard's."""
_LETTERS = {
    letter: chr(ord("a") + i % 26)
    for start in (0x1F150, 0x1F170, 0x1F1E6)
    for i, letter in enumerate(map(chr, range(start, start + 26)))
}
_LETTERS |= dict(zip("асеіорхуһԁѕјӏкмтвοαερτυικνβıłøđħ€", "aceiopxyhdsjlkmtboaeptuiknbilodhe", strict=True))
_LETTERS |= dict(zip("ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢ", "abcdefghijklmnoprstuvwyz", strict=True))
_LETTERS |= dict.fromkeys("\u2010\u2012\u2013\u2212", "-") | dict.fromkeys("\u2018\u2019\u02bc", "'")
_LETTERS |= dict.fromkeys("\u115f\u1160\u2800\u3164\uffa0", "")
"""Look-alike letters, emoji letters, typographic hyphens and apostrophes, and blanks that are no spaces, each as what
a reader takes it for."""
_CONTROLS = dict.fromkeys([*range(9), *range(14, 32), 127])
_CAPITAL_I = re.compile(r"(?<=[a-z])I")
_STRETCHED = re.compile(r"([a-z])\1\1+")
_SPELT_OUT = re.compile(r"(?<![a-z0-9])[a-z]([^a-z0-9]{1,3})(?:[a-z]\1)+[a-z](?![a-z0-9])")
_JOINERS = re.compile(r"(?<=[a-z])[^a-z0-9\s']+(?=[a-z])")
_LETTERS_WITH_DIGITS = re.compile(
    r"(?<![a-z0-9@$!|])(?=[a-z]*[0-9@$!|])(?=[a-z0-9@$!|]*[a-z])[a-z0-9@$!|]{3,}(?![a-z0-9@$!|])"
)
_LEET = (str.maketrans("013457@$!|", "oieastasii"), str.maketrans("013457@$!|", "oleastasil"))
"""Two tables, since 1 and | stand for i and for l."""


def _joined(match: re.Match[str]) -> str:
    """A spelt-out run as one word, and again without its first letter, which may be an article."""
    word = re.sub(r"[^a-z]", "", match[0])
    return f"{word} {word[1:]}"


def _folded(text: str) -> str:
    """The text in lower-case Latin letters, without accents, control characters and invisible marks."""
    plain = text.casefold().translate(_CONTROLS)
    if not plain.isascii():
        plain = unicodedata.normalize("NFKD", plain).casefold()
        plain = "".join(_LETTERS.get(c, c) for c in plain if unicodedata.category(c) not in ("Cf", "Mn", "Me"))
    return _STRETCHED.sub(r"\1", plain)


def _without_digits(match: re.Match[str]) -> str:
    """A word with digits, read in the two ways that the digits allow."""
    one, other = (match[0].translate(table) for table in _LEET)
    return one if one == other else f"{one} {other}"


def _readings(text: str) -> set[str]:
    """The ways in which a reader may read the text: folded, with disguised letters and spelt-out words undone."""
    folded = {_folded(text)}
    if _CAPITAL_I.search(text):
        folded.add(_folded(_CAPITAL_I.sub("l", text)))
    spelt = {" ".join(_SPELT_OUT.sub(_joined, reading).split()) for reading in folded}
    leet = {_LETTERS_WITH_DIGITS.sub(_without_digits, reading) for reading in spelt}
    return spelt | leet | {_JOINERS.sub("", reading) for reading in leet}


def excluded(text: str, label: str = "") -> bool:
    """True if the text, or the source's own label for it, is about sexual content with minors.

    The rule errs on the side of excluding: a word for a young person and a sexual word anywhere in the same text are
    enough. A mention of children alone (a fever, a college fund) is not. Case, accents, look-alike letters, digits for
    letters and words spelt out letter by letter are undone first.
    """
    return _is_excluded(text) or (bool(label) and (_label_is_excluded(label) or _is_excluded(label)))


def excluded_together(texts: Iterable[str]) -> bool:
    """True if the texts, read as one, are about sexual content with minors; the words may be in different texts."""
    texts = tuple(texts)
    found = [_found_in(text) for text in texts]
    return any(words.always for words in found) or (
        any(words.sexual for words in found) and any(_mentions_the_young(text) for text in texts)
    )


class _Found(NamedTuple):
    always: bool
    """A word that is excluded by itself."""
    sexual: bool
    """A sexual word."""


@functools.lru_cache(maxsize=4096)
def _found_in(text: str) -> _Found:
    """Which words a text has; cached, since a conversation is checked again with each new message."""
    readings = _readings(text)
    if not any(_SUSPECT.search(reading) for reading in readings):
        return _Found(False, False)
    return _Found(
        any(_EXCLUDED.search(reading) for reading in readings), any(_SEXUAL.search(reading) for reading in readings)
    )


@functools.lru_cache(maxsize=1024)
def _mentions_the_young(text: str) -> bool:
    # Both words need not be in the same reading: undoing the disguise of one may spoil the other.
    return any(_YOUNG.search(reading) for reading in _readings(text))


def _is_excluded(text: str) -> bool:
    return excluded_together((text,))


def _label_is_excluded(label: str) -> bool:
    words = re.sub(r"[\W_]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label)).casefold()
    return _EXCLUDED_LABELS.search(words) is not None
