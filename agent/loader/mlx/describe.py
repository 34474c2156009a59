"""How a model folder's chat template is spoken to, printed as one line of JSON by a short-lived process that does not
read the weights."""

import json
from pathlib import Path
from typing import Any

from mlx_lm import tokenizer_utils

from agent.files.model_folder import ModelFolder
from agent.loader.chat.probe import Conversation, probed
from agent.loader.chat.summary import summary
from agent.loader.cpu_limit import PROBE_S, cpu_limit
from agent.loader.mlx.encoder import is_encoder
from agent.loader.mlx.model import tokenizer_settings
from agent.loader.mlx.template import ChatTemplate
from shared.errors import Refused


def main(folder: str) -> int:
    """Prints the summary, or {"template": why not}."""
    try:
        print(json.dumps(_summary(Path(folder))))
    except Refused as error:
        print(json.dumps({"template": error.message}))
    except Exception as error:  # noqa: BLE001  # a damaged tokenizer may raise anything
        print(json.dumps({"template": f"the tokenizer cannot be loaded ({type(error).__name__})"}))
    return 0


def _summary(folder: Path) -> dict[str, str]:
    ModelFolder(folder, f"model folder {folder}").check()
    if is_encoder(str(folder)):
        return {"serves": "embeddings"}
    told: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    ends = told.get("eos_token_id")
    tokenizer: Any = tokenizer_utils.load(folder, tokenizer_settings(folder), eos_token_ids=ends)
    with cpu_limit(PROBE_S, "its chat template does not end"):
        template = ChatTemplate(tokenizer)
        talk = probed(template.render, template.traits(sorted(tokenizer.eos_token_ids))) if template.exists else None
    return summary(talk or Conversation(), template=template.exists)
