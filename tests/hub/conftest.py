"""A loopback Hub for pushes in this process, and folders to push."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loopback_hub import TOKEN, in_this_process

from hf_longalign.hub import publish_dataset


CARD = """---
configs:
- config_name: chat
  data_files:
  - split: train
    path: chat/train-*.parquet
---
# Rows of hf_longalign
"""


@pytest.fixture
def hub(monkeypatch):
    with in_this_process(monkeypatch) as hub:
        yield hub


@pytest.fixture
def publish(hub):
    """`publish_dataset` to that Hub."""

    def publish(folder, repo_id="user/rows", token=TOKEN, **options):
        return publish_dataset(folder, repo_id, token=token, endpoint=hub.url, **options)

    return publish


@pytest.fixture
def write(tmp_path):
    """Write a folder of rows and a card."""

    def write(name, values, shards=1, card=CARD):
        folder = tmp_path / name
        (folder / "chat").mkdir(parents=True)
        for index in range(shards):
            path = folder / "chat" / f"train-{index:05d}-of-{shards:05d}.parquet"
            pq.write_table(pa.table({"value": values[index::shards]}), path)
        (folder / "README.md").write_text(card)
        return folder

    return write


def held(folder):
    """The files of a folder, as the Hub holds them."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
