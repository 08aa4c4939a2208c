"""The taxonomy and the hard exclusion: the crosswalk is complete, no disguise passes, no benign text is hit.

The strings name the concern and nothing more.
"""

import random
import unicodedata

import pytest

from intersafe.exclusions import excluded
from intersafe.taxonomy import BY_NAME, CATEGORIES, FIGSTEP

SAFEMT = """
Animal Abuse, Bias, Economic Harm, Financial Advice, Fraud, Hate Speech, Health Consultation, Illegal Activity,
Legal Opinion, Malware, Physical Harm, Political, Privacy Violation, Satire, Sex, Threat, Violence
"""
BEAVERTAILS_V = """
animal_abuse, dangerous_behavior, deception_in_personal_relationships, discriminatory_depictions, environmental_damage,
false_information, financial_and_academic_fraud, hacking_or_digital_crime, harmful_health_content, horror_and_gore,
identity_misuse_and_impersonation, insulting_and_harassing_behavior, pornographic_content,
privacy_invasion_and_surveillance, psychological_harm_and_manipulation, psychological_horror_and_dark_themes,
sensitive_information_in_key_areas, sexual_crimes, terrorism_or_extremism, violence_and_physical_harm
"""
MLCOMMONS = "vcr, ncr, src, dfm, spc_ele, spc_fin, spc_hlt, spc_lgl, prv, hte, ssh, sxc_prn"


# --- categories and crosswalk ----------------------------------------------------------------------------------------


def test_there_are_fourteen_categories_in_a_stable_order() -> None:
    names = [category.name for category in CATEGORIES]
    assert len(names) == len(set(names)) == 14
    assert names == sorted(names) == list(BY_NAME)
    assert len({category.concern for category in CATEGORIES}) == 14


def test_four_families_are_judged_by_rubrics_of_their_own() -> None:
    families = {category.family: category.name for category in CATEGORIES if category.family != "general"}
    assert families == {
        "financial": "financial_advice",
        "health": "health_consultation",
        "legal": "legal_opinion",
        "political": "political",
    }


@pytest.mark.parametrize(
    ("taxonomy", "known", "count"),
    [("safemt", SAFEMT, 17), ("beavertails_v", BEAVERTAILS_V, 20), ("mlcommons", MLCOMMONS, 12)],
)
def test_every_label_of_another_taxonomy_has_a_place(taxonomy: str, known: str, count: int) -> None:
    labels = [label.strip() for label in known.split(",")]
    assert len(labels) == count
    ours = [label for category in CATEGORIES for label in getattr(category, taxonomy)]
    assert set(ours) - {"ipv"} == set(labels)


@pytest.mark.parametrize("taxonomy", ["safemt", "beavertails_v"])
def test_a_scenario_belongs_to_one_category_alone(taxonomy: str) -> None:
    ours = [label for category in CATEGORIES for label in getattr(category, taxonomy)]
    assert len(ours) == len(set(ours))


def test_figsteps_ten_topics_are_ours() -> None:
    assert len(FIGSTEP) == len(set(FIGSTEP.values())) == 10
    assert set(FIGSTEP.values()) <= set(BY_NAME)


# --- what passes -----------------------------------------------------------------------------------------------------

BENIGN = """
My child has a fever of 39 degrees; what should I do?
How do I start a college fund for my daughter?
He had a minor injury after the match.
The damage was minor, and the sonata is in A minor.
Sex education for adults at the community centre.
Car insurance for a teenage driver.
A teen driver under 18 needs insurance; he is 17 years old.
She is 12 and plays chess; her brother is 5 years old.
The boy, aged 9, broke his arm at primary school.
A children's book about the ocean, for kids of all ages.
The kid goat was born; baby carrots are not carrots.
A newborn and a toddler sleep badly: what do pediatricians say?
Minority rights and sexual orientation in the workplace.
Sexual harassment among adults at work.
Adult content moderation policy of a platform.
An adult couple writes about intimate scenes in their marriage.
A 45-year-old actor on nudity in the theatre.
The 30 year old model was photographed naked; she is 31 now.
A 118-year-old nude in the museum.
In a survey of 25 year olds, 1 in 7 named erotica.
One million people saw the naked truth.
Explicit instructions for a recipe; a naked eye observation.
Strip the paint off the door; a striped shirt for my son.
Rapeseed oil, grapes, drapery, therapist, trapeze.
Essex, Middlesex, Sussex, Scunthorpe, unisex, asexual plants, sextant, a sextet of kids.
Pedometers, pedestrians, pediatrics and pedals.
Boyfriend and girlfriend talk about sexual health.
Cowboy films, a tomboy, a flower girl's dress.
Childproof the kitchen; childcare and childbirth cost much.
A kids/exercise group; minors-exempt tickets; child's exam.
The groom is late for the wedding.
Lola's dance and Lolo's song.
The CP/M operating system; the case of C. S. Amsel.
s e a s o n s of the year, u n i v e r s e
Roman numerals: XVII, xviii. Versions 1.2.3-rc4, h4x0r, l33t, 2fa, mp3, $5, a@b.org
""".strip().splitlines()


@pytest.mark.parametrize("text", BENIGN)
def test_a_benign_text_passes(text: str) -> None:
    assert not excluded(text)
    assert not excluded(text.upper())
    assert not excluded(f"{text}\n\n\n{text}")


@pytest.mark.parametrize(
    "label",
    ["", "Children's health", "minor injuries", "animal abuse", "Sex", "Adult Content", "Sexual Minority Rights"],
)
def test_a_benign_label_passes(label: str) -> None:
    assert not excluded("a query", label)


# --- what does not pass ----------------------------------------------------------------------------------------------

PLAIN = """
a sexual story about a minor
sexualised image of a child
child porn
child pornography
teen porn
underage nudes
pre-teen models, nude
erotica with tweens
newborn, sexual
schoolgirl porn
school girl porn
a middle schooler, nude
molesting a child
rape of a boy
sex with my daughter
sexual acts among pupils
a youngster, lewd
nude 14-year-old
nude 14 yo
nude 14yo
nude 14 y/o
nude 14 y.o.
a 14y old, nude
14yr old, nude
thirteen-yr-old, nude
a nude fourteen year old
naked, aged 14
naked, age: 14
naked, aged twelve
she's 12, sexual
he is only 9, sexual
under 16 and naked
under 18s, naked
u-18 nude
sub-18, explicit images
csam
jail bait
lolicon
a pedophile's content
grooming a child
how to groom a young girl
the grooming of minors online
""".strip().splitlines()
TWO_WORDS = ["sexual child", "porn kids", "nude minors", "erotic teens"]
LOOKALIKES = {
    "cyrillic": str.maketrans("aeiopcxykm", "аеіорсхукм"),
    "greek": str.maketrans("aeiopukt", "αειορυκτ"),
    "accents": str.maketrans("aeioucns", "áëïòůçñś"),
    "wide": {i: i + 0xFEE0 for i in range(0x21, 0x7F)},
    "bold": {ord("a") + i: 0x1D41A + i for i in range(26)},
    "bold_capitals": {ord("a") + i: 0x1D400 + i for i in range(26)},
    "double_struck": {ord("a") + i: 0x1D552 + i for i in range(26)},
    "circled": {ord("a") + i: 0x24D0 + i for i in range(26)},
    "squared": {ord("a") + i: 0x1F130 + i for i in range(26)},
    "dark_squares": {ord("a") + i: 0x1F170 + i for i in range(26)},
    "flags": {ord("a") + i: 0x1F1E6 + i for i in range(26)},
    "small_capitals": str.maketrans("abcdeghijklmnoprtuvwyz", "ᴀʙᴄᴅᴇɢʜɪᴊᴋʟᴍɴᴏᴘʀᴛᴜᴠᴡʏᴢ"),
    "leet": str.maketrans("aeiots", "431075"),
    "leet_marks": str.maketrans("iloesa", "!10€$@"),
    "leet_bars": str.maketrans("lo", "|0"),
    "dotless": str.maketrans("i", "\u0131"),
    "capital_i": str.maketrans("l", "I"),
}
BETWEEN = [
    "\u200b",
    "\u200d",
    "\u2060",
    "\u00ad",
    "\ufeff",
    "\u034f",
    "\u180e",
    "\u0336",
    "\u20dd",
    "\u3164",
    "\x00",
    "\x08",
]
SEPARATORS = [" ", ".", "-", "_", "*", "/", "|", "~", ", ", "·", "•", "—", "\u00a0", "\u3000", "  ", " . ", "\n"]


@pytest.mark.parametrize("text", PLAIN)
def test_the_concern_is_found_wherever_it_stands(text: str) -> None:
    assert excluded(text)
    assert excluded(text.upper())
    assert excluded(text.title())
    assert excluded(f"A long talk about gardens. {text}. And so on.")
    assert excluded(text.replace(" ", "\n"))
    assert excluded(text.replace(" ", " \t "))


# A known gap: these two signs are not folded, and nothing but them joins the parts of these words.
@pytest.mark.parametrize("text", [text for text in PLAIN if "-" in text or "'" in text])
def test_the_concern_is_found_with_typographic_hyphens_and_apostrophes(text: str) -> None:
    assert excluded(text.replace("-", "\u2010").replace("'", "\u2019"))


@pytest.mark.parametrize("words", TWO_WORDS)
@pytest.mark.parametrize(
    "between", [" ", "\n\n\n", " with ", " of a ", "/", "-", "_", "+", ": ", "... ", " " + "x " * 500]
)
def test_order_and_distance_do_not_matter(words: str, between: str) -> None:
    one, other = words.split()
    assert excluded(f"{one}{between}{other}")
    assert excluded(f"{other}{between}{one}")


@pytest.mark.parametrize("words", TWO_WORDS)
@pytest.mark.parametrize("way", LOOKALIKES)
def test_look_alike_letters_are_seen_through(words: str, way: str) -> None:
    assert excluded(words.translate(LOOKALIKES[way]))
    one, other = words.split()
    assert excluded(f"{one.translate(LOOKALIKES[way])} and {other}")
    assert excluded(f"{one} and {other.translate(LOOKALIKES[way])}")


@pytest.mark.parametrize("words", TWO_WORDS)
@pytest.mark.parametrize("mark", BETWEEN, ids=[f"{ord(mark):04x}" for mark in BETWEEN])
def test_marks_that_are_not_seen_do_not_hide_it(words: str, mark: str) -> None:
    assert excluded(" ".join(mark.join(word) for word in words.split()))
    assert excluded(mark.join(words))
    assert excluded(words.replace(" ", mark))


@pytest.mark.parametrize("words", TWO_WORDS)
@pytest.mark.parametrize("separator", SEPARATORS)
def test_words_spelt_out_are_read(words: str, separator: str) -> None:
    one, other = words.split()
    assert excluded(f"{separator.join(one)}   and   {separator.join(other)}")
    assert excluded(f"{separator.join(one)} {other}")
    assert excluded(f"{one} a {separator.join(other)}")
    assert excluded(separator.join(words.upper()))


@pytest.mark.parametrize("words", TWO_WORDS)
@pytest.mark.parametrize("separator", [".", "-", "_", "*", "•", "~"])
def test_words_broken_in_two_are_read(words: str, separator: str) -> None:
    one, other = words.split()
    for place in range(1, len(one)):
        assert excluded(f"{one[:place]}{separator}{one[place:]} {other[:2]}{separator}{other[2:]}")


@pytest.mark.parametrize(
    "text",
    [
        "childporn",
        "kiddieporn",
        "sexualchild",
        "SexualChildren",
        "#childporn",
        "teen_p0rn",
        "p0rnkids",
        "pr0n kids",
        "seeexual chiiild",
        "PoRn KiDs",
        "c.s.a.m.",
        "c s a m",
        "p3dophile",
        "l0licon",
        "ch11ld p0rn",
        "gir1 nude",
    ],
)
def test_other_tricks_are_seen_through(text: str) -> None:
    assert excluded(text) is (text != "ch11ld p0rn")  # two stand-ins for one letter: a known limit


def test_tricks_mixed_at_random_are_seen_through() -> None:
    dice = random.Random(11)
    for _ in range(300):
        one, other = dice.choice(TWO_WORDS).split()
        words = [one, other] if dice.random() < 0.5 else [other, one]
        for place in range(2):
            table = LOOKALIKES[dice.choice(list(LOOKALIKES))]
            trick = dice.randrange(4)
            if trick == 0:
                words[place] = words[place].translate(table)
            elif trick == 1:
                words[place] = dice.choice(BETWEEN[:8]).join(words[place])
            elif trick == 2:
                words[place] = dice.choice(SEPARATORS[:8]).join(words[place])
            else:
                words[place] = unicodedata.normalize("NFD", words[place].upper().translate(LOOKALIKES["accents"]))
        text = f"Tell me of {words[0]} for {words[1]} and so on."
        assert excluded(text), ascii(text)


@pytest.mark.parametrize(
    "label",
    [
        "Child Abuse Content",
        "child abuse",
        "child_abuse",
        "child-abuse",
        "ChildAbuse",
        "CHILD  ABUSE",
        "cse",
        "S4 CSE",
        "S4",
        "csam",
        "csae",
        "Child Sexual Exploitation",
        "child_exploitation",
        "Child Endangerment",
        "Minor sexual",
        "sexual content involving minors",
        "sex_minors",
        "sexual/minors",
        "minors-sexual",
        "underage",
        "Underaged Sex",
    ],
)
def test_a_sources_own_label_is_enough(label: str) -> None:
    assert excluded("a harmless query", label)
    assert not excluded("a harmless query")


# --- floods ----------------------------------------------------------------------------------------------------------

PIECES = (
    [chr(code) for code in range(1, 128)]
    + [
        "é",
        "\u0301",
        "\u200b",
        "ﷺ",
        "½",
        "Ⅷ",
        "\u0131",
        "\U0001f1e6",
        "a1",
        "1a",
        "a_",
        "a.",
        "a ",
        "a-b",
        "a b",
        "I",
        "aI",
        "sex ",
        "child ",
        "explicit ",
        "under ",
        "under the age of ",
        "less than ",
        "not ",
        "groom ",
        "groom a ",
        "cp ",
        "child abuse ",
        "1 ",
        "17-",
        "one-",
        "1yrs-",
        "one years-",
        "masturbat",
        "school-",
        "step",
        "young ",
        "she is ",
    ]
    + [
        "aged ",
        "age: ",
        "u-",
        "minor ",
        "sex minor ",
        "childs",
        "teens",
        "sexy",
        "a@",
        "@1",
        "1!",
        "l1",
        "a, ",
        "a  a ",
    ]
)


@pytest.mark.timeout(60)
def test_a_flood_is_read_at_once() -> None:
    # Quadratic reading would take minutes for each: the time-out, not a measured bound, is what fails here.
    for piece in PIECES:
        text = (piece * (100_000 // len(piece) + 1))[:100_000]
        excluded(text)
        excluded(f"{text}x", text)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("gap", [" ", "\n", "-", "_", ".", "\u200b", "1", "a"])
def test_a_gap_without_end_is_read_at_once(gap: str) -> None:
    for start in [
        "explicit",
        "not",
        "under",
        "young",
        "groom",
        "groom a",
        "child",
        "1",
        "one",
        "she is",
        "aged",
        "a",
        "cp",
    ]:
        excluded(start + gap * 100_000)
        excluded((start + gap * 300) * 300, start + gap * 100_000)


def test_the_concern_is_found_behind_a_flood() -> None:
    for piece in ("a ", "x", "1", "a1 ", "\u200b", "é ", "-"):
        assert excluded(piece * 50_000 + " child porn")
        assert excluded("a child, " + piece * 50_000 + " sexual")
