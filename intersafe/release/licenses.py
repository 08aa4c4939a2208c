"""The licence of a release, from the licences of its sources.

The strictest one applies. If no single licence can hold for all rows (non-commercial with share-alike, no derivatives,
or an unknown name) the release has the licence `other` and its card a table. This is bookkeeping, not legal advice.
"""

from collections.abc import Mapping

OTHER = "other"

_FREE = ("cc0-1.0", "pddl", "unlicense", "mit", "isc", "bsd-2-clause", "bsd-3-clause", "apache-2.0")
_CREDIT = ("cdla-permissive-1.0", "cdla-permissive-2.0", "odc-by", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0")
_ALIKE = ("cc-by-sa-3.0", "cc-by-sa-4.0", "odbl", "cdla-sharing-1.0")
_NC = ("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0")
_NC_ALIKE = ("cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0")
_ORDER = (*_FREE, *_CREDIT, *_ALIKE, *_NC, *_NC_ALIKE)
"""The Hub's identifiers, from the most permissive to the strictest."""
_SPELLINGS = {"pddl-1.0": "pddl", "odc-by-1.0": "odc-by", "odbl-1.0": "odbl", "cc0": "cc0-1.0", "apache2": "apache-2.0"}


def hub_license(license_name: str) -> str:
    """The Hub's identifier of a licence; `other` for an unknown one."""
    name = "-".join(license_name.casefold().split())
    name = _SPELLINGS.get(name, name)
    return name if name in _ORDER else OTHER


def license_of(sources: Mapping[str, int]) -> str:
    """The Hub's identifier of one licence for all sources (licence name to rows); `other` if none holds for all."""
    names = {hub_license(name) for name, rows in sources.items() if rows}
    alike = {name.rpartition("-")[0] for name in names if name in _ALIKE + _NC_ALIKE}
    conflict = len(alike) > 1 or (bool(names & set(_ALIKE)) and is_noncommercial(sources))
    if not names or OTHER in names or conflict:
        return OTHER
    return max(names, key=_ORDER.index)


def is_noncommercial(sources: Mapping[str, int]) -> bool:
    """True if the name of any licence (licence name to rows) says that it forbids commercial use."""
    words = [name.casefold().replace("_", "-").replace(" ", "-") for name, rows in sources.items() if rows]
    return any("-nc" in word or "noncommercial" in word or "non-commercial" in word for word in words)
