"""What the stages share about a job and its conversation."""

from typing import Any

from intersafe.records import Job, RefusalJob
from intersafe.taxonomy import BY_NAME


def concern_of(job: Job | RefusalJob) -> dict[str, Any]:
    """What every prompt about the job's seed is offered."""
    category = BY_NAME[job.seed.category]
    return {
        "category": category.name,
        "concern": category.concern,
        "query": job.seed.query,
        "has_image": job.seed.image is not None,
    }


def seed_images(job: Job | RefusalJob) -> tuple[str, ...]:
    """References of the seed's images: none or one."""
    return (job.seed.image,) if job.seed.image else ()
