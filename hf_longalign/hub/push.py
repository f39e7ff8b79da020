"""Pushing files into a repository of the Hub: complete or not at all, repeated over failures that pass."""

import json
import logging
import os
import pickle
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from httpx2 import HTTPError, Request, Timeout
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    parse_ratelimit_headers,
    validate_repo_id,
)
from huggingface_hub.utils.sha import git_hash

from hf_longalign.cards.page import CARD, REPOSITORY, merge_card


logger = logging.getLogger(__name__)

ATTEMPTS = 6  # about a minute of waiting, on top of the client's own repetitions of uploads
# A request that came too late, another push that was first (409, 412), too many requests.
PASSING = {408, 409, 412, 429}
REMEDIES = {
    401: "The token is not valid. Log in with `hf auth login` or set `token`.",
    402: "Its owner's plan does not cover it. Ask the owner, or set `private=False`.",
    403: "The token has no right to write there. Take one that has (`hf auth login`), or set `create_pr=True`.",
    404: "It does not exist, or the token may not see it. Correct `repo_id`, or take another token.",
}
# Few enough for one commit, so that no reader sees half a push.
MAX_FILES = 50
# No push takes longer; a process that waits is let go the moment the main process ends or dies.
_PATIENCE = timedelta(days=30)
# Seconds without a byte after which a request is given up; the client itself waits forever.
TIMEOUT = 300.0
Files = Mapping[str, Path | bytes]
Result = TypeVar("Result")


class PublishError(RuntimeError):
    """A push that is not complete; the message says how to go on."""


def _passes(error: BaseException) -> bool:
    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code in PASSING
    if isinstance(error, OSError):
        return isinstance(error, (ConnectionError, TimeoutError))  # and no file that is missing or may not be read
    return True


def _seconds(error: BaseException, attempt: int) -> float:
    """Seconds to wait: what the Hub asks for, else exponentially longer with jitter."""
    headers: Any = error.response.headers if isinstance(error, HfHubHTTPError) else {}
    asked = headers.get("Retry-After", "").strip()
    if asked.isdigit():
        return float(asked)
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    # Spread, as many pushes that failed in one outage would otherwise come back together.
    return random.uniform(0.5, 1.0) * 2**attempt


def _message(error: BaseException, repo_id: str, resume_command: str) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    parts = (
        f"The push to {repo_id} is not complete: {_line(error)}.",
        "Unset `HF_HUB_OFFLINE`." if isinstance(error, OfflineModeIsEnabled) else REMEDIES.get(status, ""),
        f"What readers see is as it was or complete, never half. To go on, run: {resume_command}",
    )
    return " ".join(filter(None, parts))


def _line(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return "what the Hub answered is not JSON"
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


@dataclass(frozen=True)
class Destination:
    """Where a push goes; the fields are arguments of `publish_dataset`, `repo_type` is "dataset" or "model"."""

    repo_id: str
    repo_type: str
    private: bool | None = None
    branch: str | None = None
    create_pr: bool = False
    tag: str | None = None
    token: str | None = None
    endpoint: str | None = None
    message: str = "Publish with hf_longalign"

    def check(self) -> None:
        """Raise a ValueError for what no Hub could do."""
        validate_repo_id(self.repo_id)
        if self.create_pr and (self.branch or self.tag):
            raise ValueError(
                "`create_pr` must be alone: a pull request goes to main and is tagged once it is merged, got "
                f"`branch={self.branch!r}` and `tag={self.tag!r}` with it. Leave them out."
            )


def push(files: Files, to: Destination, *, owned: Callable[[str], bool], resume_command: str) -> str:
    """Push files as one commit, compare what arrived, and return its URL: see `hf_longalign.publish_dataset`.

    Args:
        files: path in the repository -> file or content, `README.md` among them.
        to: where to.
        owned: whether a path of the repository is written by pushes of this kind alone: it is deleted if it is not in
            `files`.
        resume_command: the command that goes on, for the error.
    """
    to.check()
    # Under torchrun and accelerate every process runs the same lines, and they would race for the commit.
    if int(os.environ.get("RANK") or 0) != 0:
        raise ValueError(
            f"Only the main process must push, got process {os.environ['RANK']}. Call it through "
            "`hf_longalign.hub.on_main_process` in every process."
        )
    if get_token() is None and to.token is None:
        raise ValueError("`token` must have the right to write, got none. Run `hf auth login` first, or set it.")
    api = HfApi(endpoint=to.endpoint, token=to.token)
    attempt = 0
    while True:
        attempt += 1
        try:
            with _patience():
                return _Attempt(api, to, files, owned).run()
        except (HTTPError, OSError, RuntimeError, json.JSONDecodeError) as error:
            # The client wraps what happens to an upload in a RuntimeError "Error while uploading …".
            cause: BaseException = error
            while isinstance(cause, RuntimeError) and not isinstance(cause, PublishError) and cause.__cause__:
                cause = cause.__cause__
            if not _passes(cause) or attempt == ATTEMPTS:
                raise PublishError(_message(cause, to.repo_id, resume_command)) from error
            wait = _seconds(cause, attempt)
            logger.warning("Push to %s failed (%s); again in %.0f s.", to.repo_id, _line(cause), wait)
            time.sleep(wait)


def write_dry_run(files: Files, to: Destination, folder: str | Path) -> str:
    """Write exactly the files that `push` would push into an absent or empty folder, and return it.

    The card holds the edits of the one published now; if the Hub cannot be asked, a warning says that it does not.
    """
    to.check()
    folder = check_dry_run(folder)
    api, card = HfApi(endpoint=to.endpoint, token=to.token), None
    try:
        with _patience():
            if api.file_exists(to.repo_id, CARD, repo_type=to.repo_type, revision=to.branch):
                card = _read_card(api, to, to.repo_id, to.branch)
    except (HTTPError, OSError) as error:
        logger.warning("The card published now cannot be read, so edits of it are not in the dry run: %s", error)
    for name, content in _final(files, to.repo_id, card).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            shutil.copy2(content, path)
    logger.info("Dry run: what would go to %s is in %s.", to.repo_id, folder)
    return str(folder)


def check_dry_run(folder: str | Path) -> Path:
    """Return the folder of a dry run; raise a ValueError unless it is absent or empty."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`dry_run` must be a folder that is absent or empty, got {folder}. Choose another.")
    return folder


@dataclass
class _Attempt:
    """One run through all steps of a push; any of them may fail, and the next attempt starts over."""

    api: HfApi
    to: Destination
    files: Files
    owned: Callable[[str], bool]
    repo: dict[str, Any] = field(default_factory=dict)

    def run(self) -> str:
        # Every step looks before it writes, so that an attempt after a lost answer finds its own work done.
        url = self._create()
        if self.to.branch is not None:
            self.api.create_branch(**self.repo, branch=self.to.branch, exist_ok=True)
        info: Any = self.api.repo_info(**self.repo, revision=self.to.branch)
        head = str(info.sha)
        held = self._held(head)
        card = _read_card(self.api, self.to, self.repo["repo_id"], head) if CARD in held else None
        final = _final(self.files, self.repo["repo_id"], card)
        additions = [CommitOperationAdd(name, content) for name, content in sorted(final.items())]
        stale = [name for name in sorted(held) if self.owned(name) and name not in self.files]
        # Only what an earlier push of ours left may go: our cards name the package, other people's do not.
        if stale and "hf_longalign" not in (card or ""):
            raise ValueError(
                f"`repo_id` must be new or an earlier push, got {self.to.repo_id}, whose {stale[0]} is another's and "
                "would have to go. Choose another name, or delete it there."
            )
        if stale:
            logger.info("Deleted with this push, as it is of an earlier one: %s.", ", ".join(stale))
        # Before the commit: a tag that is taken must stop the push while nothing has changed.
        tag, tags = self.to.tag, self.api.list_repo_refs(**self.repo).tags if self.to.tag else []
        tagged = next((ref.target_commit for ref in tags if ref.name == tag), None)
        if tagged is not None and _differing(self._held(tagged), additions):
            raise ValueError(
                f"`tag` must be new, got {tag!r}, with which {self.to.repo_id} has other files. Choose another tag."
            )
        if stale or _differing(held, additions):
            if self.to.create_pr:
                return self._pull_request(additions, stale, head)
            head = self._commit(additions, stale, head).oid
            # An answer is no proof: what is there now is compared with what was meant.
            self._compare(head, additions, stale)
        if tag is not None and tagged is None:
            self.api.create_tag(**self.repo, tag=tag, revision=head)
        return f"{url}/tree/{quote(self.to.branch, safe='')}" if self.to.branch else url

    def _create(self) -> str:
        """Create the repository unless it is there, and return its URL."""
        to = self.to
        name = to.repo_id if "/" in to.repo_id else f"{self.api.whoami()['name']}/{to.repo_id}"
        self.repo = {"repo_type": to.repo_type, "repo_id": name}
        info: Any
        try:
            info = self.api.repo_info(**self.repo)
        except RepositoryNotFoundError:
            # Looked for first: a token may have the right to write into a repository and none to make one.
            self.api.create_repo(**self.repo, private=to.private, exist_ok=True)
            info = self.api.repo_info(**self.repo)
        if to.private is not None and info.private is not None and bool(info.private) != to.private:
            present = "private" if info.private else "public"
            raise ValueError(
                f"`private` must be what {to.repo_id} is, {present}, got {to.private}. Change it in the settings on "
                "the Hub, or leave `private` out."
            )
        kind = "datasets/" if to.repo_type == "dataset" else ""
        return f"{self.api.endpoint}/{kind}{self.repo['repo_id']}"

    def _held(self, revision: str) -> dict[str, RepoFile]:
        tree = self.api.list_repo_tree(**self.repo, recursive=True, revision=revision)
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    def _commit(self, additions: list[CommitOperationAdd], stale: list[str], head: str) -> Any:
        return self.api.create_commit(
            **self.repo,
            operations=[*map(CommitOperationDelete, stale), *additions],
            commit_message=self.to.message,
            revision=self.to.branch,
            create_pr=self.to.create_pr,
            parent_commit=head,  # of two pushes at once one wins, whole; the other is repeated on top of it
        )

    def _pull_request(self, additions: list[CommitOperationAdd], stale: list[str], head: str) -> str:
        """The URL of the open pull request that holds exactly this: an earlier one, or one made now."""
        pulls = self.api.get_repo_discussions(**self.repo, discussion_type="pull_request", discussion_status="open")
        # A push repeated after a lost answer would open the same pull request twice.
        for pull in pulls:
            if pull.title == self.to.message:
                held = self._held(f"refs/pr/{pull.num}")
                if not _differing(held, additions) and not held.keys() & set(stale):
                    return str(pull.url)
        commit = self._commit(additions, stale, head)
        self._compare(commit.pr_revision, additions, stale)
        return str(commit.pr_url)

    def _compare(self, revision: str, additions: list[CommitOperationAdd], stale: list[str]) -> None:
        """Raise unless the revision holds the files that were meant, with their sizes and hashes."""
        held = self._held(revision)
        wrong = [*_differing(held, additions), *(name for name in stale if name in held)]
        if wrong:
            raise PublishError(f"the remote differs from what was meant in {', '.join(sorted(wrong)[:5])}")


def _differing(held: Mapping[str, RepoFile], additions: list[CommitOperationAdd]) -> list[str]:
    """The files among those to add that are not there already, by size and hash."""

    def is_there(item: CommitOperationAdd, file: RepoFile | None) -> bool:
        if file is None or file.size != item.upload_info.size:
            return False
        # Git's own hash of small files, SHA-256 of those in LFS or Xet: the Hub tells no other.
        if file.lfs is not None:
            return bool(file.lfs.sha256 == item.upload_info.sha256.hex())
        with item.as_file() as content:
            return bool(file.blob_id == git_hash(content.read()))

    return [item.path_in_repo for item in additions if not is_there(item, held.get(item.path_in_repo))]


def _final(files: Files, repo_id: str, published: str | None) -> dict[str, Any]:
    """The files as they go: ours with the repository's whole name, the card with what people wrote in it."""
    named = {
        name: content.replace(REPOSITORY.encode(), repo_id.encode()) if isinstance(content, bytes) else content
        for name, content in files.items()
    }
    card = files[CARD]
    text = (card if isinstance(card, bytes) else card.read_bytes()).decode("utf-8")
    return {**named, CARD: merge_card(text.replace(REPOSITORY, repo_id), published).encode("utf-8")}


def _read_card(api: HfApi, to: Destination, repo_id: str, revision: str | None) -> str:
    url = hf_hub_url(repo_id, CARD, repo_type=to.repo_type, revision=revision, endpoint=api.endpoint)
    response = get_session().get(url, headers=build_hf_headers(token=to.token))
    hf_raise_for_status(response)
    return response.content.decode("utf-8")


@contextmanager
def _patience() -> Iterator[None]:
    """Give requests that get no answer up after `TIMEOUT` seconds.

    By a hook, as the client asks for no time-out in so many words (`HfApi.list_repo_tree` and others).
    """
    session = get_session()
    before = session.event_hooks

    def limit(request: Request) -> None:
        request.extensions = {**request.extensions, "timeout": Timeout(TIMEOUT).as_dict()}

    # The session is shared with everything else in the process, so the hook is taken away again.
    session.event_hooks = {**before, "request": [*before["request"], limit]}
    try:
        yield
    finally:
        session.event_hooks = before


def on_main_process(function: Callable[[], Result]) -> Result:
    """Call a function in the main process and return its result in every process.

    The others wait in a group of their own, on gloo with a time-out of its own: an ordinary barrier gives up after 10
    (NCCL) or 30 minutes (gloo), in the midst of a long push. Every process must call this at about the same time.

    Args:
        function: what to do; its result must be picklable where there are several processes.

    Raises:
        RuntimeError: in the other processes, when the function failed in the main process, which raises its own error.

    Example:

    >>> on_main_process(lambda: "https://huggingface.co/user/adapter")
    'https://huggingface.co/user/adapter'

    ```python
    url = on_main_process(lambda: publish_adapter("outputs/adapter", "user/adapter"))
    ```
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return function()
    # Not NCCL: it would need a GPU for a string, and its watchdog ends processes that wait long.
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    outcome: list[Any] = [None]
    try:
        if dist.get_rank() == 0:
            try:
                result = function()
                # Here, where it is an error of the main process; in the broadcast it would leave the others waiting.
                pickle.dumps(result)
                outcome = [(True, result)]
            except BaseException as error:
                outcome = [(False, f"{type(error).__name__}: {error}")]
                raise
            finally:
                dist.broadcast_object_list(outcome, src=0, group=group, device=None)
            return result
        dist.broadcast_object_list(outcome, src=0, group=group)
    finally:
        dist.destroy_process_group(group)
    done, value = outcome[0]
    if not done:
        raise RuntimeError(f"The main process failed: {value}")
    return value
