"""What a user does, in a process of its own: load rows in every way, and ask each data set where it is from."""

import json
import os
import sys
from pathlib import Path

from loopback_hub import Hub


def main(folder):
    from datasets import Dataset, concatenate_datasets, load_dataset
    from huggingface_hub import HfApi

    from hf_longalign.run_record import data_source

    def source(dataset):
        found = data_source(dataset)
        return found if found is None else found.to_json()

    memory = Dataset.from_dict({"text": [str(number) for number in range(30)]})
    memory.push_to_hub("user/MyRows", "chat", split="train")
    memory.push_to_hub("user/other", split="train")
    memory.to_json(folder / "rows.jsonl")
    loaded = load_dataset("user/MyRows", "chat", split="train")
    streamed = load_dataset("user/MyRows", "chat", split="train", streaming=True)
    other = load_dataset("user/other", split="train")
    found = {
        "commit": HfApi().repo_info("user/MyRows", repo_type="dataset").sha,
        "loaded": source(loaded),
        "mapped": source(loaded.map(lambda row: {"n": 1}).filter(lambda row: True).shuffle(seed=0)),
        "split": source(loaded.train_test_split(0.1, seed=0)["train"]),
        "streamed": source(streamed),
        "streamed and mapped": source(streamed.map(lambda row: {"n": 1}).filter(lambda row: True)),
        "joined": source(concatenate_datasets([loaded, other])),
        "joined with memory": source(concatenate_datasets([loaded, memory])),
        "memory": source(memory),
        "file": source(load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")),
    }
    # Equal in all that their metadata tell, but for where they come from.
    memory.map(lambda row: {"text": row["text"][::-1]}).push_to_hub("user/MyRows", "chat", split="train")
    newer = load_dataset("user/MyRows", "chat", split="train")
    newer.info.update(loaded.info)
    found["joined versions"] = source(concatenate_datasets([loaded, newer]))
    (folder / "home" / "hub").rename(folder / "gone")
    return {**found, "no cache": source(loaded)}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    with Hub() as hub:
        # Read when the libraries are imported.
        os.environ.update(hub.environment(place / "home"))
        json.dump(main(place), sys.stdout)
