"""The table of job kinds. A new kind is one entry here, one in `run/kinds.py`, and one module with its parts."""

from intersafe.generation import dialogues, refusals, twins
from intersafe.generation.grow import grow_dialogue, grow_refusal, grow_twin
from intersafe.generation.job_kind import JobKind
from intersafe.generation.shortfall import all_tried
from intersafe.run.kinds import RECORDS

KINDS: dict[str, JobKind] = {
    "dialogues": JobKind(
        records=RECORDS["dialogues"],
        wanted=dialogues.wanted,
        job_count=dialogues.count,
        jobs=dialogues.all_jobs,
        grow=grow_dialogue,
        gates=dialogues.DialogueGates,
        met=dialogues.met,
        shortfall=dialogues.shortfall,
        rehearsed=dialogues.rehearsed,
        sizes=dialogues.sizes,
        reconsider=dialogues.reconsider,
        stops_if_all_fail=True,
        compares_images=True,
    ),
    "refusals": JobKind(
        records=RECORDS["refusals"],
        wanted=refusals.wanted,
        job_count=refusals.count,
        jobs=refusals.all_jobs,
        grow=grow_refusal,
        gates=refusals.RefusalGates,
        met=refusals.met,
        shortfall=refusals.shortfall,
        rehearsed=refusals.rehearsed,
        group_of=refusals.group_of,
        sizes=refusals.sizes,
        reconsider=refusals.reconsider,
        divisor=8,
    ),
    "twins": JobKind(
        records=RECORDS["twins"],
        wanted=twins.wanted,
        job_count=twins.count,
        jobs=twins.all_jobs,
        grow=grow_twin,
        gates=twins.TwinGates,
        met=twins.met,
        shortfall=all_tried,
        rehearsed=twins.rehearsed,
        follows_dialogues=True,
        may_fall_short=True,
    ),
}
"""By name, in the order in which a run starts them. Dialogues are in every run."""

DIALOGUES = KINDS["dialogues"]
