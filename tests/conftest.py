"""Small real bundles that every room's tests may serve, and a browser."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

TINY_LENGTH = 288


@pytest.fixture(scope="session")
def tiny_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the bundles tiny-fp32/1 and tiny-int8/1: one random decoder, exported as any other is."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from export.bundle import Target, export_bundle
    from export.text import QUALITY
    from models.checkpoint import TokenizerInfo, TrainedModel
    from models.decoder import Decoder, DecoderConfig

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(QUALITY)], trainer)
    torch.manual_seed(0)
    decoder = Decoder(
        DecoderConfig(
            vocab_size=tokenizer.get_vocab_size(),
            d_model=48,
            num_layers=3,
            num_heads=6,
            num_kv_heads=2,
            head_dim=16,
            d_ff=96,
            max_model_len=TINY_LENGTH,
            positions="rotary",
            norm="rms",
            norm_eps=1e-5,
            activation="swiglu",
            bias="none",
            tie_embeddings=False,
        )
    )
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    model = TrainedModel(
        module=decoder.eval(),
        tokenizer=TokenizerInfo(
            json=tokenizer.to_str(),
            bos_token_id=0,
            eos_token_ids=(2,),
            pad_token_id=2,
            add_bos=False,
            chat_template=template,
        ),
        source="random weights",
        licence="Apache-2.0",
    )
    repository = tmp_path_factory.mktemp("bundles")
    for precision in ("fp32", "int8"):
        target = Target(repository=repository, name=f"tiny-{precision}", version=1)
        export_bundle(model, target, precision=precision, report=lambda line: None)
    return repository


SAMPLED_VOCABULARY = 5003  # a prime: no block is full at its end; and more than four times what is ranked


@pytest.fixture(scope="session")
def sampler_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the graphs that choose among `SAMPLED_VOCABULARY` tokens on a device."""
    from export.sampler import write_sampler

    directory = tmp_path_factory.mktemp("sampler")
    write_sampler(directory, SAMPLED_VOCABULARY)
    return directory


@pytest.fixture(scope="session")
def tiny_encoder():
    """One random encoder of the BERT family, with a WordPiece tokenizer, as a `TrainedModel`."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    from export.text import QUALITY
    from models.checkpoint import EmbeddingInfo, TokenizerInfo, TrainedModel
    from models.encoder import Encoder, EncoderConfig, StackConfig

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train(
        [str(QUALITY)], trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    torch.manual_seed(1)
    stack = StackConfig(
        d_model=48, num_layers=2, num_heads=3, d_ff=96, norm_eps=1e-12, norm_first=False, activation="gelu"
    )
    encoder = Encoder(
        EncoderConfig(
            vocab_size=tokenizer.get_vocab_size(),
            max_source_len=TINY_LENGTH,
            positions="learned",
            num_segments=2,
            embedding_norm=True,
            stack=stack,
        )
    ).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return TrainedModel(
        module=encoder,
        tokenizer=TokenizerInfo(
            json=tokenizer.to_str(),
            bos_token_id=None,
            eos_token_ids=(),
            pad_token_id=0,
            add_bos=False,
            chat_template=None,
        ),
        embedding=EmbeddingInfo(pooling="mean", normalize=True),
        source="random weights",
        licence="Apache-2.0",
    )


@pytest.fixture(scope="session")
def encoder_repository(tiny_encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the bundles encoder-fp32/1 and encoder-int8/1."""
    from export.bundle import Target, export_bundle

    repository = tmp_path_factory.mktemp("encoders")
    for precision in ("fp32", "int8"):
        target = Target(repository=repository, name=f"encoder-{precision}", version=1)
        export_bundle(tiny_encoder, target, precision=precision, report=lambda line: None)
    return repository


@pytest.fixture(scope="session")
def byte_decoders():
    """Random decoders over bytes, as `TrainedModel`s, by the rule of what they remember; each takes 8,192 tokens."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers

    from models.checkpoint import TokenizerInfo, TrainedModel
    from models.decoder import Decoder, DecoderConfig

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    info = TokenizerInfo(
        json=tokenizer.to_str(),
        bos_token_id=None,
        eos_token_ids=(0,),
        pad_token_id=None,
        add_bos=False,
        chat_template=None,
    )
    sizes = {"vocab_size": 256, "d_model": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    rest = {"d_ff": 64, "max_model_len": 8192, "positions": "rotary", "norm": "rms", "activation": "swiglu"}
    choices = {
        "append": {"qk_norm": True},  # which the fused kernel does not know
        "window": {"window": 24},
        "ring": {"window": 24, "window_state": "ring", "softcap": 20.0},
        "replace": {"attention": "favor", "num_features": 24},
    }
    decoders = {}
    for rule, choice in choices.items():
        torch.manual_seed(3)
        config = DecoderConfig(**sizes, **rest, **choice, norm_eps=1e-5, bias="none", tie_embeddings=True)
        decoder = Decoder(config).eval()
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        decoders[rule] = TrainedModel(module=decoder, tokenizer=info, source="random weights", licence="Apache-2.0")
    return decoders


@pytest.fixture(scope="session")
def byte_repository(byte_decoders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a bundle of each of `byte_decoders`, named after its rule."""
    from export.bundle import Target, export_bundle

    repository = tmp_path_factory.mktemp("bytes")
    for rule, model in byte_decoders.items():
        target = Target(repository=repository, name=rule, version=1)
        export_bundle(model, target, precision="fp32", report=lambda line: None)
    return repository


@pytest.fixture(scope="session")
def smollm2_repository() -> Path:
    """The repository that `make bundles` writes."""
    repository = Path(__file__).parents[1] / "build" / "bundles"
    if not (repository / "smollm2-135m" / "1" / "manifest.json").is_file():
        pytest.fail("the SmolLM2 bundles are missing: run `make bundles`, as `make test` does")
    return repository


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Visit(NamedTuple):
    """What came of loading a page: standard output, the URLs that the page itself asked for, the console's messages."""

    output: bytes
    requests: list[str]
    console: list[str]


@pytest.fixture(scope="session")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Visit]:
    """Load a URL in a headless browser with the given arguments."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed (Debian: apt-get install chromium)")

    def visit(url: str, *arguments: str) -> Visit:
        directory = tmp_path_factory.mktemp("browser")
        command = [
            browser,
            "--headless",
            "--no-sandbox",  # which needs more than a container has; the page is our own
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--hide-scrollbars",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            "--enable-logging=stderr",
            # A test uses no network, whatever a page or the browser asks for.
            "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
            f"--user-data-dir={directory / 'profile'}",
            f"--log-net-log={directory / 'net.json'}",
            "--window-size=1200,900",
            *arguments,
            url,
        ]
        done = subprocess.run(command, capture_output=True, check=True, timeout=120)
        log = json.loads((directory / "net.json").read_text())
        start = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
        started = [one["params"] for one in log["events"] if one["type"] == start and "url" in one.get("params", {})]
        # The requests of the browser's own have no origin.
        asked = [one["url"] for one in started if one["initiator"] != "not an origin"]
        return Visit(done.stdout, asked, [line for line in done.stderr.decode().splitlines() if "CONSOLE" in line])

    return visit


class WeakBundles:
    """The bundles weak/1 and weak-encoder/1, which fail in ONNX Runtime itself.

    A token goes through a table before it is embedded. It sends `raising_token` out of bounds, so that the graph
    raises; `nan_token` has an embedding that is not a number. The tables are mapped into memory from the bundles'
    files, so whoever writes into a file breaks what is being served, and mends it again.
    """

    raising_token = 7
    nan_token = 9

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self._tables: dict[str, tuple[Path, int, bytes]] = {}

    def add(self, original: Path, name: str) -> None:
        """Make a weak bundle of a sound one."""
        import json
        import shutil

        import numpy as np
        import onnx
        from onnx import helper, numpy_helper

        directory = self.repository / name / "1"
        shutil.copytree(original, directory)
        path = next(directory.glob("*.onnx"))
        model = onnx.load(path)
        graph = model.graph
        for node in graph.node:
            node.input[:] = ["known_ids" if taken == "token_ids" else taken for taken in node.input]
        embedding = next(tensor for tensor in graph.initializer if tensor.name == "token_embedding.table")
        rows = numpy_helper.to_array(embedding).copy()
        rows[self.nan_token] = np.nan
        embedding.CopyFrom(numpy_helper.from_array(rows, embedding.name))
        table = np.arange(len(rows), dtype=np.int64)
        table[self.raising_token] = 10**6
        graph.initializer.append(numpy_helper.from_array(table, "table"))
        graph.node.insert(0, helper.make_node("Gather", ["table", "token_ids"], ["known_ids"], name="known_ids"))
        data = path.with_suffix(".onnx.data")
        data.unlink()
        onnx.save_model(model, path, save_as_external_data=True, location=data.name)
        self._tables[name] = (data, data.read_bytes().index(table.tobytes()), table.tobytes())
        manifest = json.loads((directory / "manifest.json").read_text())
        manifest["name"] = name
        (directory / "manifest.json").write_text(json.dumps(manifest))
        rehash(directory)

    def add_swayed(self, original: Path, rows: int) -> None:
        """Make the bundle swayed/1, whose logits are others in steps of exactly so many rows, which no check tries."""
        import json
        import shutil

        import numpy as np
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        directory = self.repository / "swayed" / "1"
        shutil.copytree(original, directory)
        path = directory / "step.onnx"
        model = onnx.load(path)
        graph = model.graph
        last = next(node for node in graph.node if "logits" in node.output)
        last.output[:] = ["sound_logits" if made == "logits" else made for made in last.output]
        sway = np.random.default_rng(0).normal(size=320).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(sway, "sway"))
        graph.initializer.append(numpy_helper.from_array(np.array([rows]), "swaying_rows"))
        graph.node.extend(
            [
                helper.make_node("Shape", ["lengths"], ["rows_now"]),
                helper.make_node("Equal", ["rows_now", "swaying_rows"], ["sways"]),
                helper.make_node("Cast", ["sways"], ["share"], to=TensorProto.FLOAT),
                helper.make_node("Mul", ["sway", "share"], ["swayed"]),
                helper.make_node("Add", ["sound_logits", "swayed"], ["logits"]),
            ]
        )
        data = path.with_suffix(".onnx.data")
        data.unlink()
        onnx.save_model(model, path, save_as_external_data=True, location=data.name)
        manifest = json.loads((directory / "manifest.json").read_text())
        manifest["name"] = "swayed"
        (directory / "manifest.json").write_text(json.dumps(manifest))
        rehash(directory)

    def spoil(self, name: str) -> None:
        """Send every token out of bounds, in the file and so in the memory of who serves it."""
        import numpy as np

        path, offset, table = self._tables[name]
        _overwrite(path, offset, np.full(len(table) // 8, 10**6, np.int64).tobytes())

    def mend(self, name: str) -> None:
        """Undo `spoil`."""
        _overwrite(*self._tables[name])


def _overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def rehash(directory: Path) -> None:
    """Make a manifest's sizes and hashes true again, as somebody who means to edit a bundle would."""
    import hashlib
    import json

    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    for file in manifest["files"]:
        content = (directory / file["name"]).read_bytes()
        file["bytes"], file["sha256"] = len(content), hashlib.sha256(content).hexdigest()
    path.write_text(json.dumps(manifest))


@pytest.fixture
def weak_bundles(tiny_repository: Path, encoder_repository: Path, tmp_path: Path) -> WeakBundles:
    """Bundles that fail, sound to begin with, beside sound ones that nothing happens to."""
    weak = WeakBundles(tmp_path / "weak")
    weak.add(tiny_repository / "tiny-fp32" / "1", "weak")
    weak.add(encoder_repository / "encoder-fp32" / "1", "weak-encoder")
    weak.add_swayed(tiny_repository / "tiny-fp32" / "1", rows=3)
    for sound in (tiny_repository / "tiny-int8", encoder_repository / "encoder-int8"):
        (weak.repository / sound.name).symlink_to(sound)
    return weak
