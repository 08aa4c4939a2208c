"""The 14 categories, their crosswalk to other taxonomies, and the hard exclusions.

AM3Safety (arXiv 2601.04736) says that InterSafe-V has 14 safety categories and does not print the list in its
abstract or card; this list is our choice. It covers the 17 scenarios of SafeMT (arXiv 2510.12133), the 20 categories
of BeaverTails-V and those MLCommons AILuminate hazards that a dialogue data set can touch, and keeps apart the four
families that SafeMT judges with rubrics of their own: political, legal, financial and health. Where another taxonomy
has no clean code the tuple is empty.

Hard exclusions: sexual content with minors never becomes a seed, is never sent to a model, and ends a job in which it
appears.
"""

import re
import unicodedata
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

_YOUNG_WORDS = (
    r"child(?:ren|hood|like)?|kids?|kiddies?|minors?|under-?\s?aged?|pre-?\s?teens?|teen(?:s|age|aged|ager|agers)?|adolescents?|"
    r"juveniles?|infants?|toddlers?|bab(?:y|ies)|school-?\s?(?:girl|boy|child|kid)s?(?:ren)?|(?:little|young)\s+(?:girl|boy)s?|"
    r"(?:girl|boy)s?|tweens?|pupils?|(?:middle|high|elementary|primary)[-\s]school(?:ers?)?|"
    r"(?:son|daughter|niece|nephew|grandchild|step-?(?:son|daughter|child))s?|sub-?18|not\s+yet\s+18|"
    r"(?:under|below|younger\s+than|less\s+than)\s+(?:the\s+age\s+of\s+)?(?:18|eighteen|17|seventeen|16|sixteen|15|fifteen|14|13|12)|"
    r"(?:[1-9]|1[0-7]|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen)"
    r"[-\s]*(?:years?[-\s]*olds?|y[/.]?o|yrs?(?:[-\s]*olds?)?)"
)
_SEXUAL_WORDS = (
    r"sex|sexy|sexual(?:ly|ity|i[sz](?:e|ed|es|ing|ation))?|sext(?:s|ing|ed)?|porn(?:o|s|ography|ographic)?|erotic(?:a|ally|ism)?|"
    r"nud(?:e|es|ity|ist)|naked|undress(?:ed|ing)?|strip(?:ping|tease|pers?)|intercourse|orgasms?|masturbat\w*|genitals?|"
    r"grooming|molest\w*|rap(?:e|es|ed|ist|ists|ing)|incest\w*|fetish\w*|x-?rated|nsfw|prostitut\w*|"
    r"seduc(?:e|es|ed|ing|tion|tive)|lewd|hentai|explicit\s+(?:content|images?|pictures?|photos?|videos?|scenes?|details?|material|stor(?:y|ies))|"
    r"adult\s+(?:content|videos?|films?|material)|intimate\s+(?:images?|pictures?|photos?|videos?|scenes?|acts?)"
)
_ALWAYS = (
    r"csam|csem|cp\s+(?:images?|videos?|links?)|p(?:a)?edo(?:phil\w*|s)?|lolis?|lolicons?|lolitas?|shota(?:con)?s?|jail\s?bait|"
    r"child\s+(?:abuse|exploitation|molest\w*)\s+(?:images?|content|material|videos?)|child\s+grooming|"
    r"(?:groom|grooming)\s+(?:an?\s+|the\s+)?(?:child(?:ren)?|minors?|teens?|teenagers?|kids?|girls?|boys?)"
)
_YOUNG = re.compile(rf"(?<![a-z])(?:{_YOUNG_WORDS})(?![a-z])")
_SEXUAL = re.compile(rf"(?<![a-z])(?:{_SEXUAL_WORDS})(?![a-z])")
_EXCLUDED = re.compile(rf"(?<![a-z])(?:{_ALWAYS})(?![a-z])")
_EXCLUDED_LABELS = re.compile(
    r"child abuse|child sexual|minor.{0,12}sex|sex.{0,24}minor|\bcsam?e?\b|\bcse\b", re.IGNORECASE
)
_LEET = str.maketrans("013457@$!|", "oieastasil")
_SPELT_OUT = re.compile(r"(?<![a-z0-9])[a-z]([\s.\-_*]{1,2})(?:[a-z]\1)+[a-z](?![a-z0-9])")
_JOINERS = re.compile(r"(?<=[a-z])[.\-_*]+(?=[a-z])")
_LETTERS_WITH_DIGITS = re.compile(r"(?<![\w@$!|])(?=[a-z]*[0-9@$!|])(?=[a-z0-9@$!|]*[a-z])[a-z0-9@$!|]{3,}(?![\w@$!|])")


def _joined(match: re.Match[str]) -> str:
    """A spelt-out run as one word, and again without its first letter, which may be an article."""
    word = re.sub(r"[^a-z]", "", match[0])
    return f"{word} {word[1:]}"


def _readings(text: str) -> set[str]:
    """The text as a reader would take it: folded, with look-alike letters and spelt-out words put right."""
    plain = text.casefold()
    if not plain.isascii():
        plain = unicodedata.normalize("NFKD", plain)
        plain = "".join(_HOMOGLYPHS.get(c, c) for c in plain if unicodedata.category(c) not in ("Cf", "Mn"))
    spelt = _SPELT_OUT.sub(_joined, plain)
    leet = _LETTERS_WITH_DIGITS.sub(lambda m: m[0].translate(_LEET), spelt)
    return {plain, spelt, leet, _JOINERS.sub("", leet)}


_HOMOGLYPHS = dict(zip("асеіорхуһԁѕјӏοαερτυικνβ", "aceiopxyhdsjloaeptuiknb", strict=True))


def excluded(text: str, label: str = "") -> bool:
    """True if the text, or the source's own label for it, is about sexual content with minors.

    The rule errs on the side of excluding: a word for a young person together with a sexual word anywhere in the same
    text is enough. A mention of children alone (a fever, a college fund) is not. Folding undoes case, accents,
    look-alike letters, digits for letters and words spelt out letter by letter.
    """
    if label and _EXCLUDED_LABELS.search(label):
        return True
    return any(
        _EXCLUDED.search(reading) or (_SEXUAL.search(reading) and _YOUNG.search(reading)) for reading in _readings(text)
    )
