"""Publishing a folder of Parquet configurations and its card as a data set on the Hub."""

import logging
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile


logger = logging.getLogger(__name__)

# Few enough for one commit, so that no reader sees half a push; `upload_folder` may split one into several.
MAX_FILES = 50
ATTEMPTS = 5
# A request that came too late, another push that was first (409, 412), too many requests.
PASSING = {408, 409, 412, 429}
Result = TypeVar("Result")


class PublishError(RuntimeError):
    """A push that is not complete; the message says how to go on."""


def publish_dataset(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Push a folder written by the synthesis as one commit, compare what arrived, and return the data set's URL.

    Data and card travel in the same commit, and files of an earlier push that are no longer there are deleted in it:
    a reader sees the old data set or the new one. The whole push is repeated over failures that pass; after a commit
    whose answer was lost the repetition changes nothing.

    Args:
        folder: holds `README.md` and a folder of Parquet files per configuration.
        repo_id: `user/name` or `organisation/name`.
        private: whether a new repository is private; `None`: the default of its owner.
        token: a token with the right to write; `None`: the one of this machine.
        endpoint: URL of the Hub; `None`: the one of `HF_ENDPOINT`.

    Raises:
        ValueError: a folder with other files, without card or data, or with too many files for one commit.
        PublishError: the push did not arrive whole; running it again goes on.
    """
    folder = Path(folder)
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    _check(folder, files)
    api = HfApi(endpoint=endpoint, token=token)

    def push() -> str:
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        head = api.repo_info(repo_id, repo_type="dataset").sha
        old = [name for name in _remote_files(api, repo_id, head) if name.endswith(".parquet") and name not in files]
        commit = api.create_commit(
            repo_id,
            [CommitOperationDelete(name) for name in old]
            + [CommitOperationAdd(name, folder / name) for name in sorted(files)],
            commit_message="Publish with hf_longalign",
            repo_type="dataset",
            parent_commit=head,  # of two pushes at once one wins, whole; the other is repeated on top of it
        )
        _compare(_remote_files(api, repo_id, commit.oid), files)
        return f"{api.endpoint}/datasets/{repo_id}"

    return _repeat(push, repo_id)


def _check(folder: Path, files: dict[str, int]) -> None:
    if "README.md" not in files or not any(name.endswith(".parquet") for name in files):
        raise ValueError(f"`folder` must hold README.md and Parquet files, got {folder}. Write it with the synthesis.")
    other = sorted(name for name in files if name != "README.md" and not name.endswith(".parquet"))
    if other:
        raise ValueError(f"`folder` must hold README.md and Parquet files alone, got {other[0]}. Move it elsewhere.")
    if len(files) > MAX_FILES:
        raise ValueError(
            f"`folder` must hold at most {MAX_FILES} files to be pushed as one commit, got {len(files)}. "
            "Write fewer shards."
        )


def _remote_files(api: HfApi, repo_id: str, revision: str | None) -> dict[str, int]:
    """The sizes of the data and the card in a revision."""
    tree = api.list_repo_tree(repo_id, recursive=True, revision=revision, repo_type="dataset")
    files = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    return {name: size for name, size in files.items() if name == "README.md" or name.endswith(".parquet")}


def _compare(remote: dict[str, int], files: dict[str, int]) -> None:
    """Raise unless the commit holds exactly the files that were meant, with their sizes."""
    wrong = sorted(name for name in {*remote, *files} if remote.get(name) != files.get(name))
    if wrong:
        raise PublishError(f"the remote differs from what was meant in {', '.join(wrong[:5])}")


def _repeat(push: Callable[[], Result], repo_id: str) -> Result:
    """Run a push until it succeeds, waiting longer each time; what cannot pass by itself is raised at once."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return push()
        except (HTTPError, OSError, PublishError) as error:
            response = getattr(error, "response", None)
            status = response.status_code if response is not None else None
            lasting = isinstance(error, HfHubHTTPError) and status is not None and status < 500
            if (lasting and status not in PASSING) or attempt == ATTEMPTS:
                raise PublishError(
                    f"The push to {repo_id} is not complete: {error}. The repository is as it was or complete, never "
                    "half; run the same command again to go on."
                ) from error
            wait = _seconds(response, attempt)
            logger.warning("Push to %s failed (%s); again in %.0f s.", repo_id, error, wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _seconds(response: object, attempt: int) -> float:
    """Seconds to wait: what the Hub asks for, else exponentially longer with jitter."""
    asked = getattr(response, "headers", {}).get("Retry-After", "")
    return float(asked) if asked.isdigit() else random.uniform(0.5, 1.0) * 2**attempt
