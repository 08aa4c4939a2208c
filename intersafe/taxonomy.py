"""The 14 categories and their crosswalk to other taxonomies.

AM3Safety (arXiv 2601.04736) says that InterSafe-V has 14 safety categories and does not print the list in its
abstract or card; this list is our choice. It covers the 17 scenarios of SafeMT (arXiv 2510.12133), the 20 categories
of BeaverTails-V and those MLCommons AILuminate hazards that apply to dialogues. It separates the four families that
SafeMT judges with rubrics of their own: political, legal, financial and health. Where another taxonomy has no matching
code the tuple is empty.
"""

from typing import Literal, NamedTuple

Family = Literal["general", "political", "legal", "financial", "health"]


class Category(NamedTuple):
    """One category: its concern, the family of its rubric, and its labels in other taxonomies."""

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
"""Our category for each of the ten topics of FigStep (SafeBench)."""
