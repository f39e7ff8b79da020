"""What must not be published is found wherever it is, and what only looks like it is not."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from hf_longalign.hub.scan import SECRETS, Machine, check_private, find_in_text, find_private, scan


HUB_TOKEN = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeFgH"
API_KEY = "sk-proj-" + "a1B2c3D4e5F6g7H8i9J0"
MACHINE = Machine(secrets=("tr0ub4dor&3",), folders=("/home/jo", "/fsx/jo/runs"), names=("node-17",), hosts=("tower",))
# Text, and the kind that is found in it.
SECRET_TEXTS = {
    HUB_TOKEN: "a Hub token",
    f"key={API_KEY}, thanks": "an API key",
    "ghp_" + "a1" * 18: "a GitHub token",
    "AKIA" + "A1B2C3D4E5F6G7H8": "an AWS key",
    "AIza" + "a1B2C3D4E5" * 3 + "abcde": "a Google key",
    "xoxb-1234567890-abcdefghij": "a Slack token",
    "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.SflKxwRJSMeKKF2Q": "a web token",
    "Authorization: Bearer a1B2c3D4e5F6g7H8i9J0": "a bearer token",
    "-----BEGIN OPENSSH PRIVATE KEY-----": "a private key",
    "at https://jo:tr0ub4@10.0.0.7:8000/v1": "a URL with a password",
    "https://api.org/v1?api_key=a1b2c3d4e5f6g7h8i9j0": "a URL with a key",
    "it was tr0ub4dor&3 then": "a secret of this machine",
    "cd /home/jo/code": "a folder of this machine",
    "(/fsx/jo/runs)": "a folder of this machine",
    "trained on node-17.": "a name of this machine",
    "http://tower:8000/v1": "this host",
}
# Only in texts about the run: rows may tell of any computer.
RUN_TEXTS = {
    "saved to /mnt/disks/out/model": "an absolute path",
    '"/data/llama"': "an absolute path",
    "file:///home/ada/x": "an absolute path",
    r"C:\Users\ada\model": "a Windows path",
    "password = hunter2hunter2": "a password",
    "in ~/secret/x": "a path in a home folder",
    "('~ada/run')": "a path in a home folder",
    "from 10.1.2.3:8000": "a private address",
    "http://192.168.0.7/v1": "a private address",
    "172.31.4.5 answered": "a private address",
    "at fd12:3456::7": "a private address",
    "ask ada.lovell@lab.university.edu": "an e-mail address",
}
HARMLESS = (
    "The hf_longalign package, hf_hub_download(repo_id), HF_TOKEN and hf_transfer_enabled_or_not",
    "sk-learn-contrib-packages-for-everyone, risk-adjusted-returns, task-2",
    "http://user:password@host/, postgres://me:pw@db and https://x.org/a:b@c",
    "a bearer token, Bearer of bad news and of long sentences",
    "see a/b, and/or, /v1/chat/completions, https://huggingface.co/data/sets, </think> and #!/usr/bin/env python",
    "root and user and data; /path/to/model; ~/.cache/huggingface; the tower of node-170",
    "Q:\nA:\n",
    "git@github.com:org/repo, me@example.org, 127.0.0.1:8000, 172.32.1.1, 8.8.8.8, version 10.2.1, a @ b.T and x~/y",
    "token: <s>, max_tokens=1000, password: ...",
)


@pytest.mark.parametrize(("text", "kind"), [*SECRET_TEXTS.items(), *RUN_TEXTS.items()])
def test_is_found(text, kind):
    assert [find.kind for find in find_in_text(text, MACHINE)] == [kind]
    (find,) = find_in_text(text, MACHINE)
    assert find.text in text
    assert list(find_in_text(text, MACHINE, allow=[find.text])) == []


@pytest.mark.parametrize("text", HARMLESS)
def test_is_harmless(text):
    assert list(find_in_text(text, MACHINE)) == []


@pytest.mark.parametrize("allow", ["/home/jo/code/a.py", "/home/jo/code", "/home/jo/", "/home"])
def test_a_folder_that_is_allowed_allows_what_lies_in_it(allow):
    assert list(find_in_text("cd /home/jo/code/a.py", MACHINE, allow=[allow])) == []
    assert list(find_in_text(f"key {HUB_TOKEN}", MACHINE, allow=[HUB_TOKEN[:5]]))


@pytest.mark.parametrize("allow", ["/home/jo/code/a", "/home/j", "", "/"])
def test_what_only_begins_like_it_is_not_allowed(allow):
    assert list(find_in_text("cd /home/jo/code/a.py", MACHINE, allow=[allow]))


def test_re2_misses_nothing_that_re_finds():
    patterns = {**SECRETS, **MACHINE.patterns()}
    for text in (*SECRET_TEXTS, *RUN_TEXTS, *HARMLESS):
        for pattern in patterns.values():
            found = pc.match_substring_regex(pa.array([f"before {text} after"]), pattern)[0].as_py()
            assert found == bool(re.search(pattern, f"before {text} after", re.ASCII)), (pattern, text)


def places(files, machine=MACHINE):
    return [(file, where, find.kind) for file, where, find in scan(files, machine)]


def test_every_kind_of_file_names_the_place(tmp_path):
    save_file({"w": np.zeros(2)}, tmp_path / "model.safetensors", metadata={"from": "/home/jo/run"})
    files = {
        "README.md": f"# Card\n\n{HUB_TOKEN}\n".encode(),
        "config.json": json.dumps({"a": [{"path": "C:\\Users\\ada\\m"}], "t": "Q:\nA:\n"}).encode(),
        "broken.json": b"{/home/jo/x",
        "chat_template.jinja": b"{{ '/mnt/a/b' }}",
        "plot.png": b"\x89PNG\xff/home/jo/plot",
        "tokenizer.json": json.dumps({"vocab": {"/var/www/x": 1, "/home/jo/x": 2}}).encode(),
        "node-17.txt": b"",
        "model.safetensors": tmp_path / "model.safetensors",
    }
    assert places(files) == [
        ("README.md", "line 3", "a Hub token"),
        ("broken.json", "line 1", "a folder of this machine"),
        ("chat_template.jinja", "line 1", "an absolute path"),
        ("config.json", "key a.path", "a Windows path"),
        ("model.safetensors", "key __metadata__.from", "a folder of this machine"),
        ("node-17.txt", "its name", "a name of this machine"),
        ("plot.png", "its bytes", "a folder of this machine"),
        ("tokenizer.json", "its vocabulary", "a folder of this machine"),
    ]


@pytest.mark.parametrize("nested", [str, lambda text: [text], lambda text: [{"role": "user", "content": text}]])
@pytest.mark.parametrize("dictionary", [False, True])
def test_rows_are_found_by_number(tmp_path, nested, dictionary):
    values = pa.array([nested(f"row {row}") for row in range(700)] + [nested(f"see {API_KEY}"), nested("/mnt/a/b")])
    table = pa.table({"n": range(702), "text": values})
    if dictionary and pa.types.is_string(values.type):
        table = table.set_column(1, "text", values.dictionary_encode())
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=300)
    assert places({"chat/rows.parquet": tmp_path / "rows.parquet"}) == [
        ("chat/rows.parquet", "column text, row 700", "an API key")
    ]


def test_a_parquet_footer_is_read(tmp_path):
    table = pa.table({"a": [1]}).replace_schema_metadata({"made": "on node-17"})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert places({"r.parquet": tmp_path / "rows.parquet"}) == [("r.parquet", "footer made", "a name of this machine")]


def test_a_secret_is_masked_in_the_message_and_the_first_five_are_named():
    with pytest.raises(ValueError) as error:
        check_private({"README.md": "\n".join([HUB_TOKEN, *["/mnt/a/b"] * 9]).encode()}, MACHINE)
    assert "a Hub token in README.md, line 1: hf_a***" in str(error.value) and HUB_TOKEN not in str(error.value)
    assert str(error.value).count("/mnt/a/b") == 4 and "; and more. Take it out" in str(error.value)


def test_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "a1b2c3d4e5")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-but-long1")
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    monkeypatch.setenv("HOME", "/home/jo")
    monkeypatch.setattr("socket.gethostname", lambda: "gpu-07.cluster")
    monkeypatch.setattr("getpass.getuser", lambda: "jo_doe")
    monkeypatch.chdir(tmp_path)
    machine = Machine.here("org/rows", token=HUB_TOKEN)
    assert machine.secrets == ("a1b2c3d4e5", HUB_TOKEN)
    assert machine.folders == tuple(sorted(["/home/jo", str(tmp_path)]))
    assert machine.names == ("gpu-07", "gpu-07.cluster", "jo_doe")
    assert Machine.here("jo_doe/rows").names == ("gpu-07", "gpu-07.cluster")
    kinds = [find.kind for find in find_in_text(f"in {tmp_path.parent}/other", machine)]
    assert kinds in (["a path of this machine"], ["an absolute path"])


@pytest.mark.parametrize("name", ["root", "data", "user", "ubuntu", "anna", "mark"])
def test_a_name_that_is_a_word_blocks_nothing(monkeypatch, name):
    monkeypatch.setattr("socket.gethostname", lambda: name)
    monkeypatch.setattr("getpass.getuser", lambda: name)
    monkeypatch.setenv("HOME", f"/{name}")
    text = f"The {name} of {name}/rows at https://huggingface.co/{name}/rows, mail {name}@x.org."
    assert list(find_private(text, Machine.here("a/b").patterns())) == []


def test_a_push_stops_at_a_find_before_anything_is_sent(hub, publish, write):
    folder = write("a", [f"key {API_KEY}"])
    with pytest.raises(
        ValueError, match=r"an API key in chat/train-00000-of-00001.parquet, column value, row 0: sk-p"
    ):
        publish(folder)
    assert hub.seen == []
    publish(folder, allow=[API_KEY])
    assert hub.files("user/rows")


def test_the_token_of_the_push_is_found(publish, write, tmp_path):
    with pytest.raises(ValueError, match=r"a secret of this machine in README.md, line 9: hf_l\*\*\*"):
        publish(
            write("a", [1], card=f"---\n{'license: mit'}\n---\n\n\n\n\n\nhf_loopback\n"), dry_run=tmp_path / "look"
        )
