"""Publishing a folder of Parquet configurations and its card as a data set on the Hub."""

import re
from collections.abc import Collection
from pathlib import Path

from hf_longalign.hub.private import Machine
from hf_longalign.hub.push import CARD, MAX_FILES, Destination, push, write_dry_run
from hf_longalign.hub.scan import check_private


# What a folder may hold.
_PUBLISHED = re.compile(r"README\.md|.+\.parquet|assets/[^/]+\.png")
# A shard as the synthesis and `datasets` name it: <configuration>/<split>-00000-of-00001.parquet
_SHARD = re.compile(r"[^/]+/[^/]+-\d{5}-of-\d{5}\.parquet")


def publish_dataset(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    dry_run: str | Path | None = None,
    allow: Collection[str] = (),
    resume_command: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Push a folder written by the synthesis as one commit, compare what arrived, and return the data set's URL.

    Everything that is about to go is searched for tokens, keys, local paths and the names of this machine first. Data
    and card travel in the same commit, and shards of an earlier push that are no longer there are deleted in it: a
    reader sees the old data set or the new one. What people wrote into the card on the Hub stays. The whole push is
    repeated over failures that pass; after a commit whose answer was lost the repetition changes nothing.

    Args:
        folder: holds `README.md`, a folder of Parquet files per configuration, and the card's pictures in `assets`.
        repo_id: `user/name` or `organisation/name`; made if it is not there.
        private: whether a new repository is private; one that is there must be as said. `None`: its owner's default.
        branch: pushed to instead of main; made from main if it is not there.
        create_pr: open a pull request instead; its URL is returned.
        tag: a name for this version, new in the repository.
        dry_run: an absent or empty folder: write there what would be pushed, push nothing and return the folder.
        allow: texts that the search finds and that may be seen by everyone.
        resume_command: the command that goes on after a failure, for its message; `None`: this call.
        token: a token with the right to write; `None`: the one of this machine.
        endpoint: URL of the Hub; `None`: the one of `HF_ENDPOINT`.

    Raises:
        ValueError: something private in the folder; a folder with other files, without card or data, or with too many
            files for one commit; a repository that holds something else.
        PublishError: the push did not arrive whole; the message names what goes on with it.

    Example:

    ```python
    publish_dataset("outputs/contexts", "user/contexts", dry_run="look")
    publish_dataset("outputs/contexts", "user/contexts", private=True, tag="v1")
    ```
    """
    folder = Path(folder)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    _check(folder, files)
    to = Destination(repo_id, "dataset", private, branch, create_pr, tag, token, endpoint)
    check_private(files, Machine.here(repo_id, token=token), allow)
    if dry_run is not None:
        return write_dry_run(files, to, dry_run)
    return push(files, to, owned=lambda name: _SHARD.fullmatch(name) is not None, resume_command=resume_command)


def _check(folder: Path, files: Collection[str]) -> None:
    if CARD not in files or not any(name.endswith(".parquet") for name in files):
        raise ValueError(f"`folder` must hold README.md and Parquet files, got {folder}. Write it with the synthesis.")
    other = sorted(name for name in files if not _PUBLISHED.fullmatch(name))
    if other:
        raise ValueError(
            f"`folder` must hold README.md, Parquet files and assets/*.png alone, got {other[0]}. Move it elsewhere."
        )
    if len(files) > MAX_FILES:
        raise ValueError(
            f"`folder` must hold at most {MAX_FILES} files to be pushed as one commit, got {len(files)}. "
            "Write fewer shards, each up to 5 GB."
        )
