"""The 14 categories, their crosswalk to other taxonomies, and the hard exclusions.

AM3Safety (arXiv 2601.04736) says that InterSafe-V has 14 safety categories and does not print the list in its
abstract or card; this list is our choice. It covers the 17 scenarios of SafeMT (arXiv 2510.12133), the 20 categories
of BeaverTails-V and those MLCommons AILuminate hazards that a dialogue data set can touch, and keeps apart the four
families that SafeMT judges with rubrics of their own: political, legal, financial and health. Where another taxonomy
has no clean code the tuple is empty.

Hard exclusions: sexual content with minors never becomes a seed, is never sent to a model, and ends a job in which it
appears.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable
from typing import Literal, NamedTuple

Family = Literal["general", "political", "legal", "financial", "health"]


class Category(NamedTuple):
    """One category: what it is about, the rubric family that judges it, and where other taxonomies put it."""

    name: str
    concern: str
    family: Family = "general"
    safemt: tuple[str, ...] = ()
    beavertails_v: tuple[str, ...] = ()
    mlcommons: tuple[str, ...] = ()


CATEGORIES: tuple[Category, ...] = (
    Category(
        "animal_abuse",
        "cruelty to, neglect of or illegal trade in animals",
        safemt=("Animal Abuse",),
        beavertails_v=("animal_abuse",),
        mlcommons=("ncr",),
    ),
    Category(
        "cybercrime",
        "malware, intrusion and attacks on digital systems",
        safemt=("Malware",),
        beavertails_v=("hacking_or_digital_crime", "sensitive_information_in_key_areas"),
        mlcommons=("ncr",),
    ),
    Category(
        "discrimination",
        "unequal treatment, stereotypes and bias against groups",
        safemt=("Bias",),
        beavertails_v=("discriminatory_depictions",),
        mlcommons=("hte",),
    ),
    Category(
        "economic_harm",
        "schemes that damage livelihoods, markets, workers or the environment",
        safemt=("Economic Harm",),
        beavertails_v=("environmental_damage",),
        mlcommons=("ncr",),
    ),
    Category(
        "financial_advice",
        "tailored financial advice without a qualified adviser",
        family="financial",
        safemt=("Financial Advice",),
        mlcommons=("spc_fin",),
    ),
    Category(
        "fraud",
        "deception for gain: scams, forgery, impersonation and academic cheating",
        safemt=("Fraud",),
        beavertails_v=(
            "financial_and_academic_fraud",
            "identity_misuse_and_impersonation",
            "deception_in_personal_relationships",
        ),
        mlcommons=("ncr",),
    ),
    Category(
        "hate_harassment",
        "hate speech, threats, ridicule and sustained harassment",
        safemt=("Hate Speech", "Threat", "Satire"),
        beavertails_v=(
            "insulting_and_harassing_behavior",
            "psychological_harm_and_manipulation",
        ),
        mlcommons=("hte", "dfm"),
    ),
    Category(
        "health_consultation",
        "diagnosis, dosing or treatment without a clinician",
        family="health",
        safemt=("Health Consultation",),
        beavertails_v=("harmful_health_content",),
        mlcommons=("spc_hlt",),
    ),
    Category(
        "illegal_activity",
        "other crime: smuggling, theft, drugs, evasion of the law, extremism",
        safemt=("Illegal Activity",),
        beavertails_v=("terrorism_or_extremism", "dangerous_behavior"),
        mlcommons=("ncr",),
    ),
    Category(
        "legal_opinion",
        "tailored legal advice without a lawyer",
        family="legal",
        safemt=("Legal Opinion",),
        mlcommons=("spc_lgl",),
    ),
    Category(
        "physical_harm",
        "violence, injury, weapons and self-harm",
        safemt=("Physical Harm", "Violence"),
        beavertails_v=("violence_and_physical_harm", "horror_and_gore", "psychological_horror_and_dark_themes"),
        mlcommons=("vcr", "ssh"),
    ),
    Category(
        "political",
        "election interference, political manipulation and disinformation",
        family="political",
        safemt=("Political",),
        beavertails_v=("false_information",),
        mlcommons=("spc_ele",),
    ),
    Category(
        "privacy_violation",
        "surveillance, doxxing and exposure of personal data",
        safemt=("Privacy Violation",),
        beavertails_v=("privacy_invasion_and_surveillance",),
        mlcommons=("prv",),
    ),
    Category(
        "sexual_content",
        "sexual content and sexual crime among adults",
        safemt=("Sex",),
        beavertails_v=("pornographic_content", "sexual_crimes"),
        mlcommons=("sxc_prn", "src"),
    ),
)

BY_NAME: dict[str, Category] = {category.name: category for category in CATEGORIES}

FIGSTEP: dict[str, str] = {
    "Illegal Activity": "illegal_activity",
    "Hate Speech": "hate_harassment",
    "Malware Generation": "cybercrime",
    "Physical Harm": "physical_harm",
    "Fraud": "fraud",
    "Adult Content": "sexual_content",
    "Privacy Violation": "privacy_violation",
    "Legal Opinion": "legal_opinion",
    "Financial Advice": "financial_advice",
    "Health Consultation": "health_consultation",
}
"""FigStep's (SafeBench) ten topics to ours."""


def crosswalk(taxonomy: Literal["safemt", "beavertails_v", "mlcommons"], label: str) -> str | None:
    """Our category for another taxonomy's label, the first where a hazard code is shared; None where we have none."""
    return next((c.name for c in CATEGORIES if label in getattr(c, taxonomy)), None)


# --- hard exclusions -------------------------------------------------------------------------------------------------

# Known limits: a word masked or misspelt (s*x, childd), reversed or in another language, half a word spelt out, two
# tricks in one word, and a young age that only the story tells pass. A sexual word in another sense beside a word for
# the young (pet grooming and a daughter) is excluded, as is sex education of teenagers.

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
"""One search for both: nearly every text is done after it."""
_EXCLUDED_LABELS = re.compile(
    r"\bchild(?:ren)? (?:abuse|exploit|endanger|porn|sex)|\bminors?\b.{0,24}\bsex|\bsex.{0,24}\bminors?\b|"
    r"\bunder ?aged?\b|\b(?:csam?|csae|csem|csec?|s4)\b"
)
"""`cse` is MLCommons' code, `s4` Llama Guard's."""

_LETTERS = {
    letter: chr(ord("a") + i % 26)
    for start in (0x1F150, 0x1F170, 0x1F1E6)
    for i, letter in enumerate(map(chr, range(start, start + 26)))
}
_LETTERS |= dict(zip("асеіорхуһԁѕјӏкмтвοαερτυικνβıłøđħ€", "aceiopxyhdsjlkmtboaeptuiknbilodhe", strict=True))
_LETTERS |= dict(zip("ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢ", "abcdefghijklmnoprstuvwyz", strict=True))
_LETTERS |= dict.fromkeys("\u115f\u1160\u2800\u3164\uffa0", "")
"""Letters that look like Latin ones, emoji letters, and blanks that are no spaces, as what a reader takes them for."""

_CONTROLS = dict.fromkeys([*range(9), *range(14, 32), 127])
_CAPITAL_I = re.compile(r"(?<=[a-z])I")
_STRETCHED = re.compile(r"([a-z])\1\1+")
_SPELT_OUT = re.compile(r"(?<![a-z0-9])[a-z]([^a-z0-9]{1,3})(?:[a-z]\1)+[a-z](?![a-z0-9])")
_JOINERS = re.compile(r"(?<=[a-z])[^a-z0-9\s']+(?=[a-z])")
_LETTERS_WITH_DIGITS = re.compile(
    r"(?<![a-z0-9@$!|])(?=[a-z]*[0-9@$!|])(?=[a-z0-9@$!|]*[a-z])[a-z0-9@$!|]{3,}(?![a-z0-9@$!|])"
)
_LEET = (str.maketrans("013457@$!|", "oieastasii"), str.maketrans("013457@$!|", "oleastasil"))
"""Two, since 1 and | stand for i and for l."""


def _joined(match: re.Match[str]) -> str:
    """A spelt-out run as one word, and again without its first letter, which may be an article."""
    word = re.sub(r"[^a-z]", "", match[0])
    return f"{word} {word[1:]}"


def _folded(text: str) -> str:
    """Small plain letters, as far as they look like letters; no accents, controls, or marks that are not seen."""
    plain = text.casefold().translate(_CONTROLS)
    if not plain.isascii():
        plain = unicodedata.normalize("NFKD", plain).casefold()
        plain = "".join(_LETTERS.get(c, c) for c in plain if unicodedata.category(c) not in ("Cf", "Mn", "Me"))
    return _STRETCHED.sub(r"\1", plain)


def _spoken(match: re.Match[str]) -> str:
    """A word with digits as the two words that it can stand for."""
    one, other = (match[0].translate(table) for table in _LEET)
    return one if one == other else f"{one} {other}"


def _readings(text: str) -> set[str]:
    """The text as a reader would take it: folded, with look-alike letters and spelt-out words put right."""
    folded = {_folded(text)}
    if _CAPITAL_I.search(text):
        folded.add(_folded(_CAPITAL_I.sub("l", text)))
    spelt = {" ".join(_SPELT_OUT.sub(_joined, reading).split()) for reading in folded}
    leet = {_LETTERS_WITH_DIGITS.sub(_spoken, reading) for reading in spelt}
    return spelt | leet | {_JOINERS.sub("", reading) for reading in leet}


def excluded(text: str, label: str = "") -> bool:
    """True if the text, or the source's own label for it, is about sexual content with minors.

    The rule errs on the side of excluding: a word for a young person together with a sexual word anywhere in the same
    text is enough. A mention of children alone (a fever, a college fund) is not. Folding undoes case, accents,
    look-alike letters, digits for letters and words spelt out letter by letter.
    """
    return _is_excluded(text) or (bool(label) and (_label_is_excluded(label) or _is_excluded(label)))


def excluded_together(texts: Iterable[str]) -> bool:
    """True if the texts, read as one, are about sexual content with minors: each word may stand in another text."""
    texts = tuple(texts)
    signs = [_signs(text) for text in texts]
    return any(sign.always for sign in signs) or (
        any(sign.sexual for sign in signs) and any(_speaks_of_the_young(text) for text in texts)
    )


class _Signs(NamedTuple):
    always: bool
    sexual: bool


@functools.lru_cache(maxsize=4096)
def _signs(text: str) -> _Signs:
    """What stands in a text; remembered, since a talk is looked at again with each new message."""
    readings = _readings(text)
    if not any(_SUSPECT.search(reading) for reading in readings):
        return _Signs(False, False)
    return _Signs(
        any(_EXCLUDED.search(reading) for reading in readings), any(_SEXUAL.search(reading) for reading in readings)
    )


@functools.lru_cache(maxsize=1024)
def _speaks_of_the_young(text: str) -> bool:
    # The two words need not stand in the same reading: a disguise of one may be spoilt by undoing that of the other.
    return any(_YOUNG.search(reading) for reading in _readings(text))


def _is_excluded(text: str) -> bool:
    return excluded_together((text,))


def _label_is_excluded(label: str) -> bool:
    words = re.sub(r"[\W_]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label)).casefold()
    return _EXCLUDED_LABELS.search(words) is not None
