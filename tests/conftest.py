import os

import pytest
import torch
from util import repository, script

from config import UserError
from data.tokenizer import load

if not torch.cuda.is_available():
    # before any test imports triton: without a GPU its kernels run in the interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A prepared folder of byte tokens: people counting to 96, the same on every machine and easy to learn."""
    folder = tmp_path_factory.mktemp("corpus")
    for document in range(40):
        numbers = (str((document + i) % 97) for i in range(400))
        (folder / f"{document:02}.txt").write_text(" ".join(numbers))
    script("-m", "data.prepare", "files", f"--input={folder}", "--tokenizer=byte", f"--out_dir={folder / 'tokens'}")
    return folder / "tokens"


@pytest.fixture
def r50k(monkeypatch):
    """GPT-2's tokenizer, where its tables are on this machine or can be fetched."""
    cache = repository.parent / "shared" / "tiktoken_cache"
    if "TIKTOKEN_CACHE_DIR" not in os.environ and cache.is_dir():
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    try:
        return load("r50k_base")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def poisoned_memory():
    """Uninitialised memory holds NaN, so that an element that no program writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
