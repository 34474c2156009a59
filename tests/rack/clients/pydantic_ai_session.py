"""pydantic-ai: ``python -m tests.rack.clients.pydantic_ai_session BASE``."""

import json
import sys
from typing import Any

from pydantic_ai import Agent, Embedder, NativeOutput, Tool
from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.rack.clients.shapes import CAPITAL, SENTENCES, City


def main(base: str) -> dict[str, Any]:
    """Chat, stream, tools, schema, embeddings."""
    provider = OpenAIProvider(base_url=base, api_key="none")
    model = OpenAIChatModel("m", provider=provider)
    settings: Any = {"temperature": 0, "max_tokens": 100}
    plain = Agent(model, model_settings=settings)
    described = Agent(model, output_type=City, model_settings=settings)
    natively = Agent(model, output_type=NativeOutput(City), model_settings=settings)

    def weather(town: str) -> str:
        """The weather in a town."""
        return f"rain in {town}"

    helped = Agent(model, tools=[Tool(weather)], model_settings=settings)
    streamed = plain.run_stream_sync(CAPITAL)
    vectors = Embedder(OpenAIEmbeddingModel("e", provider=provider)).embed_documents_sync(SENTENCES)
    return {
        "whole": plain.run_sync(CAPITAL).output,
        "streamed": streamed.get_output(),
        "with_tools": helped.run_sync(CAPITAL).output,
        "schemas": [isinstance(one.run_sync("Describe Rome.").output, City) for one in (described, natively)],
        "vectors": [len(vector) for vector in vectors.embeddings],
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
