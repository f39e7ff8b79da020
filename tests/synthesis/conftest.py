import pytest
from tiny_chat import make_tiny_chat


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The path of a random two-layer Llama with a byte-level tokenizer and a chat template."""
    return str(make_tiny_chat(tmp_path_factory.mktemp("tiny") / "tiny", positions=8192))


@pytest.fixture(scope="session")
def tokenizer(tiny_model):
    """Its tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def path(tmp_path):
    """Where a journal goes."""
    return tmp_path / "deep" / "journal.sqlite"
