"""Whether a release may go to a repository: the token, the right to write, private and gated as the options ask."""

from intersafe.release.client import Hub, RepoState
from intersafe.release.failures import AccessRefused, status_of
from intersafe.release.push_job import PushJob


def authenticate(hub: Hub) -> None:
    """`AccessRefused` without a token, or for one that may only read."""
    if not hub.token:
        raise AccessRefused("no token; set HF_TOKEN, or log in with `hf auth login`")
    who = hub.call("asking who the token is", lambda: hub.api.whoami(cache=True))
    role = who.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        name = who.get("name")
        raise AccessRefused(f"the token of {name} may only read; create one that may write and set HF_TOKEN")


def prepare_repository(job: PushJob) -> RepoState | None:
    """Finds or creates the repository, closes its gate, and checks that it is as closed as it has to be.

    Returns its state; None in a dry run if it does not exist. `AccessRefused` if the release may not go there.
    """
    hub, options = job.hub, job.options
    state = hub.state()
    if state is None and not options.dry_run:
        hub.say(f"creating {hub.repo_id}, {'public' if options.public else 'private'}")
        state = hub.call("creating the repository", lambda: _create(job))
        if state is None:
            raise AccessRefused(f"{hub.repo_id} exists, but this token may not see it")
    if state is not None:
        hub.call("asking for the right to write", lambda: hub.api.auth_check(**hub.where, write=True))
        if options.gate and not state.gated and not options.dry_run:
            _refuse_open(job, state._replace(gated=True))
            hub.call("closing the gate", lambda: hub.api.update_repo_settings(gated="manual", **hub.where))
            state = hub.state()
    return check_closed(job, state)


def check_closed(job: PushJob, state: RepoState | None) -> RepoState | None:
    """Returns the state; `AccessRefused` if the repository is more open than the options allow."""
    if state is not None:
        _refuse_open(job, state if not job.options.dry_run else state._replace(gated=True))
    return state


def _create(job: PushJob) -> RepoState | None:
    """The new repository, or one that was created meanwhile; None if this token may not see it."""
    hub = job.hub
    try:
        hub.api.create_repo(**hub.where, private=not job.options.public)
    except hub.failures as error:
        if (state := hub.state()) is None and status_of(error) != 409:
            raise
        return state
    return hub.state()


def _refuse_open(job: PushJob, state: RepoState) -> None:
    hub, options = job.hub, job.options
    if not state.private and not options.public:
        raise AccessRefused(f"{hub.repo_id} is public; make it private on its settings page, or give --public")
    if not state.gated and options.gate:
        raise AccessRefused(f"{hub.repo_id} has no gate; set one on its settings page, or give --no-gate")
    if job.release.manifest.includes_unsafe and not (state.private and state.gated):
        raise AccessRefused(f"{hub.repo_id} is open and the release holds unsafe replies in full; close it first")
